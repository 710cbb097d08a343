"""The HTML page: self-contained, escaped, true to the cache, and alive in a real browser."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema import Cache, KdcacheError, TargetSpec
from cache_schema.operations.scores import scores_of
from tests.browser import Browser
from tests.fake_caches import make_cache
from views.html_page import write_html
from views.relation_picture import principal_factor
from views.settings import PageConfig

EVIL = "</script><img src=x onerror=document.title='hit'>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    """Row 2 of the fake answers holds a <script> element; rows 3 * n + 2 have no image."""
    return make_cache(
        folder / "a",
        folder / "images",
        rows=12,
        patches=(36, 12),
        bad={5: "broken_image"},
        ids={3: EVIL},
        identity={"dtype": "<b>float32</b>"},
    )


@pytest.fixture(scope="module")
def page(cache: Cache, folder: Path) -> Path:
    return write_html(cache, folder / "page.html", PageConfig(samples=8), image_root=folder / "images")


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    assert "<" not in found[1], "nothing in the data can end its element"
    document = json.loads(found[1])
    assert isinstance(document, dict)
    return document


class Elements(HTMLParser):
    """Start tags with their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    elements = Elements(text).found
    assert not [a for tag, a in elements if tag in ("link", "iframe", "object", "base") or "src" in a]
    assert [a for tag, a in elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "http://" not in text
    assert "https://" not in text
    assert "{{" not in text


def test_text_of_the_data_set_stays_text(cache: Cache, tmp_path: Path) -> None:
    page = write_html(cache, tmp_path / "page.html", only=[3])
    text = page.read_text(encoding="utf-8")
    assert EVIL not in text
    assert "<b>float32" not in text
    assert "&lt;b&gt;float32" in text
    assert text.count("<script") == 2, "the data and the page's own script"
    assert data_of(page)["samples"][0]["id"] == EVIL


def test_the_worst_come_first(page: Path, cache: Cache) -> None:
    shown = [s["row"] for s in data_of(page)["samples"]]
    scores = {s.row: scores_of(s) for s in (cache[i] for i in range(len(cache)))}
    worst = sorted(scores, key=lambda row: (-scores[row].disagreement, -scores[row].perplexity))
    assert shown == worst[:8]


def test_other_orders(cache: Cache, tmp_path: Path) -> None:
    asked = write_html(cache, tmp_path / "ids.html", PageConfig(samples=1), only=[7, "id-4", "0"])
    assert [s["row"] for s in data_of(asked)["samples"]] == [7, 4, 0]
    drawn = [
        [
            s["row"]
            for s in data_of(
                write_html(cache, tmp_path / f"{n}.html", PageConfig(samples=4, order="random", seed=seed))
            )["samples"]
        ]
        for n, seed in enumerate((1, 1, 2))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(KdcacheError, match="no sample"):
        write_html(cache, tmp_path / "x.html", PageConfig(order="nothing"))


def test_the_numbers_are_those_of_the_cache(page: Path, cache: Cache) -> None:
    data = data_of(page)
    document = next(s for s in data["samples"] if s["images"])
    sample = cache[cache.find(document["row"])[0]]
    entry = document["response"][1]
    assert [i for i, _ in entry["top"]] == sample.response.token_ids[1, :8].tolist()
    assert entry["label_id"] == sample.input_ids[sample.response_positions[1] + 1]
    assert all(str(i) in data["words"] for i, _ in entry["top"])
    first, second = document["images"]
    assert (first["tokens"], first["layout"]["note"]) == (36, None)
    assert [layer["box"] for layer in first["layout"]["layers"]] == [[0, 0, 1, 1]]
    assert (
        "SiglipImageProcessor with the settings in the cache does not make 12 tokens"
        in second["layout"]["note"]
    )
    assert [layer["box"] for layer in second["layout"]["layers"]] == [None]
    assert [i for i, _ in second["visual"]["top"][3]] == sample.visual.token_ids[36 + 3, :5].tolist()
    levels = np.frombuffer(base64.b64decode(first["relation"]["columns"]), np.int8).reshape(-1, 36)
    drawn = levels.T * np.array(first["relation"]["scales"])
    whole = principal_factor(sample.relations[0], 99)
    r, s = drawn @ drawn.T, whole @ whole.T
    assert (r * s).sum() / np.linalg.norm(r) / np.linalg.norm(s) > 1 - 1e-4
    assert first["picture"].startswith("data:image/png;base64,")


def test_without_pictures_or_targets(cache: Cache, tmp_path: Path) -> None:
    bare = data_of(write_html(cache, tmp_path / "bare.html", PageConfig(samples=3)))
    assert {image["picture"] for s in bare["samples"] for image in s["images"]} <= {None}
    lost = data_of(write_html(cache, tmp_path / "lost.html", PageConfig(samples=3), image_root=tmp_path))
    notes = [image["note"] for s in lost["samples"] for image in s["images"]]
    assert notes
    assert all(note.startswith("No picture") for note in notes)
    for targets in (("response",), ("visual",), ("relation",)):
        other = make_cache(
            tmp_path / targets[0], tmp_path / "i", rows=4, spec=TargetSpec(targets=targets, top_k=3)
        )
        assert len(data_of(write_html(other, tmp_path / "other.html"))["samples"]) == 4


def test_a_page_that_cannot_be_written(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(KdcacheError, match="give a file that can be written"):
        write_html(cache, tmp_path, PageConfig(samples=1))


# In Chromium


@pytest.fixture
def browser(tmp_path: Path, page: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as opened:
        opened.open(page.as_uri())
        yield opened


def open_row(browser: Browser, page: Path, *, images: bool) -> dict[str, Any]:
    """Shows the first sample of the page that has images, or has none; its data."""
    samples = data_of(page)["samples"]
    number = next(n for n, s in enumerate(samples) if bool(s["images"]) == images)
    browser.click(f"#list li:nth-child({number + 1}) button")
    return samples[number]


@pytest.mark.slow
def test_a_patch_shows_its_tokens_and_its_relation(browser: Browser, page: Path) -> None:
    document = open_row(browser, page, images=True)
    words, image = data_of(page)["words"], document["images"][0]
    pixels = (
        "const c = document.querySelector('canvas').getContext('2d');"
        "return Array.from(c.getImageData(0, 0, 6, 6).data)"
    )
    browser.click(".grid button:nth-child(3)")
    if not browser.run("return document.querySelector('.tools input').checked"):
        browser.click(".tools input")
    first = browser.run(pixels)
    told = browser.text(".patch-detail")
    assert "patch at row 0, column 2" in told
    assert words[str(image["visual"]["top"][2][0][0])].strip() in told
    assert f"rank {image['relation']['rank']}" in told
    heats = np.array(first).reshape(36, 4)[:, :3]
    assert heats[2] == pytest.approx([253, 231, 37], abs=2), (
        "a patch is most like itself: the brightest colour"
    )
    browser.click(".grid button:nth-child(30)")
    assert browser.run(pixels) != first
    assert "patch at row 4, column 5" in browser.text(".patch-detail")
    browser.click(".tools input")
    levels = np.frombuffer(base64.b64decode(image["relation"]["columns"]), np.int8).reshape(-1, 36)
    row = (levels.T * np.array(image["relation"]["scales"])) @ (levels[:, 29] * image["relation"]["scales"])
    low, high = (float(browser.text(f".legend span:nth-of-type({n})")) for n in (1, 2))
    assert (low, high) == pytest.approx((row.min(), row.max()), rel=0.06), "the row of R as stored"
    browser.hover(".grid button:nth-child(3)")
    assert "patch at row 0, column 2" in browser.text(".patch-detail"), "hovering looks, without choosing"
    chosen = browser.run(
        "return ['[aria-selected=true]', '[tabindex=\"0\"]'].map(which =>"
        "[...document.querySelector('.grid').children].findIndex(patch => patch.matches(which)))"
    )
    assert chosen == [29, 29]
    assert "null" not in browser.text("#sample")


@pytest.mark.slow
def test_two_grids_of_one_picture_and_their_row_ends(tmp_path: Path) -> None:
    """LLaVA-NeXT: 48 x 40 pixels as 4 x 4 patches, then as 8 x 8 less a row of padding above and below."""
    pixels = {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": 28},
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
    }
    processor = {
        "processor_config.json": json.dumps({"patch_size": 7, "image_processor": pixels}).encode(),
        "config.json": b'{"model_type": "llava_next"}',
    }
    count = 16 + 6 * 8 + 6
    cache = make_cache(tmp_path / "a", tmp_path / "images", rows=1, patches=(count,), processor=processor)
    page = write_html(cache, tmp_path / "page.html", image_root=tmp_path / "images")
    (image,) = data_of(page)["samples"][0]["images"]
    layers = image["layout"]["layers"]
    sizes = [(layer["rows"], layer["columns"], len(layer["row_ends"])) for layer in layers]
    assert sizes == [(4, 4, 0), (6, 8, 6)]
    with Browser(tmp_path / "profile") as browser:
        browser.open(page.as_uri())
        assert browser.run("return document.querySelectorAll('.stage img').length") == 2
        pixels_of = (
            "return [...document.querySelectorAll('.stage canvas')].map(c => "
            "Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data))"
        )
        browser.click(".grid[aria-label*='in detail'] button:nth-child(11)")
        assert "in detail, patch at row 1, column 2" in browser.text(".patch-detail")
        before = browser.run(pixels_of)
        assert [len(part) for part in before] == [4 * 16, 4 * 48]
        browser.click(".grid[aria-label*='the whole picture'] button:nth-child(6)")
        assert "the whole picture, patch at row 1, column 1" in browser.text(".patch-detail")
        after = browser.run(pixels_of)
        assert all(x != y for x, y in zip(before, after, strict=True)), "one relation over both grids"
        token = layers[1]["row_ends"][3]
        browser.click(".ends button:nth-child(4)")
        assert "in detail, end of row 3" in browser.text(".patch-detail")
        assert f"position {image['visual']['positions'][token]}," in browser.text(".patch-detail")
        chosen = browser.run("return document.querySelectorAll('.look.two [aria-selected=true]').length")
        assert chosen == 1
        assert [line for line in browser.log() if "getImageData" not in line] == []


@pytest.mark.slow
def test_a_token_shows_its_bars(browser: Browser, page: Path) -> None:
    document = open_row(browser, page, images=False)
    words = data_of(page)["words"]
    for n in (0, 2):
        browser.run("document.querySelectorAll('.flow [role=option]')[arguments[0]].click()", n)
        entry = document["response"][n]
        told = browser.text("#token-detail")
        assert told.startswith("label")
        assert words[str(entry["label_id"])].strip() in told
        assert f"position {entry['position']}" in told
        bars = "[...document.querySelectorAll('#token-detail .track i')]"
        widths = browser.run(f"return {bars}.map(bar => parseFloat(bar.style.width))")
        assert widths == pytest.approx(
            [*(100 * p for _, p in entry["top"]), 100 * entry["outside"]], abs=0.01
        )
    wrong = browser.run("return document.querySelectorAll('.flow [role=option].wrong').length")
    assert wrong == sum(not entry["agrees"] for entry in document["response"])


@pytest.mark.slow
def test_the_keyboard_reaches_everything(browser: Browser, page: Path) -> None:
    open_row(browser, page, images=True)
    active = "return document.activeElement.textContent"
    browser.run("document.querySelector('#list button').focus()")
    before = browser.run(active)
    browser.press("down")
    assert browser.run(active) != before
    assert browser.run("return document.activeElement.getAttribute('aria-current')") == "true"
    open_row(browser, page, images=True)
    browser.run("document.querySelector('.flow [role=option]').focus()")
    browser.press("right")
    assert browser.run(
        "return document.activeElement === document.querySelectorAll('.flow [role=option]')[1]"
    )
    position = browser.text("#token-detail")
    browser.press("right")
    assert browser.text("#token-detail") != position
    browser.run("document.querySelector('.grid button').focus()")
    browser.press("down")
    assert "patch at row 1, column 0" in browser.text(".patch-detail")
    browser.press("left")
    assert "patch at row 0, column 5" in browser.text(".patch-detail")
    browser.press("tab")
    assert browser.run("return document.activeElement.tagName") == "SELECT", "one stop for a whole grid"


@pytest.mark.slow
def test_evil_text_is_seen_and_not_run(browser: Browser, page: Path, cache: Cache) -> None:
    samples = data_of(page)["samples"]
    for number, sample in enumerate(samples):
        browser.click(f"#list li:nth-child({number + 1}) button")
        if "<script>alert(1)</script>" in "".join(token["text"] for token in sample["tokens"]):
            assert "<script>alert(1)</script>" in browser.text(".flow").replace("\n", "")
            break
    else:
        raise AssertionError("no sample with a script element is on the page")
    assert browser.run("return document.title") == "a - kdcache"
    assert browser.run("return document.querySelectorAll('script').length") == 2
    assert browser.log() == []


@pytest.mark.slow
def test_light_dark_and_small_screens(page: Path, tmp_path: Path) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    with Browser(tmp_path / "p", 500, 900) as small:
        small.open(page.as_uri())
        light = small.run(ground)
        small.click("#theme")
        dark = small.run(ground)
        assert light != dark
        assert small.run("return document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling"
        small.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000
