"""What is shown of a sample is what the cache holds of it, position by position."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tokenizers import Tokenizer

from cache_schema import Cache, KdcacheError, TargetSpec
from cache_schema.errors import printable
from cache_schema.format.records import Relation
from tests.fake_caches import make_cache, tokenizer
from views.blocks import fitted, half_blocks, heat
from views.relation_picture import pooled, principal_factor, similarity
from views.sample_document import recorded_images, roles_of, sample_document
from views.sample_page import print_sample
from views.token_text import TokenText, visible


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sample")


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    return make_cache(
        folder / "a",
        folder / "images",
        rows=10,
        patches=(9, 6),
        bad={5: "broken_image"},
        ids={3: "8", 4: "<b>\x1b[31m"},
    )


def printed(
    cache: Cache, row: int | str, root: Path | None, *, colour: bool = False, width: int = 100
) -> str:
    system = "truecolor" if colour else None
    console = Console(
        file=io.StringIO(), width=width, highlight=False, color_system=system, force_terminal=colour
    )
    print_sample(cache, row, root, console)
    return console.file.getvalue()


def test_the_document_is_the_sample(cache: Cache) -> None:
    document = json.loads(json.dumps(sample_document(cache, 0), allow_nan=False))
    sample = cache[cache.find(0)[0]]
    made = tokenizer()
    words = {token["position"]: token for token in document["tokens"]}
    assert [(t["position"], t["count"]) for t in document["tokens"] if t["role"] == "visual"] == [
        (0, 9),
        (9, 6),
    ]
    for position, role in enumerate(roles_of(sample)):
        if role != "visual":
            assert words[position]["id"] == sample.input_ids[position]
            assert words[position]["role"] == ("response" if sample.labels[position] >= 0 else "prompt")
    text = "".join(token["text"] for token in document["tokens"] if token["role"] != "visual")
    assert text == made.decode(sample.input_ids[15:].tolist(), skip_special_tokens=False)
    for n, entry in enumerate(document["response"]):
        assert entry["position"] == sample.response_positions[n]
        assert entry["label_id"] == sample.input_ids[entry["position"] + 1]
        assert entry["agrees"] == (sample.response.token_ids[n, 0] == entry["label_id"])
        assert [e["id"] for e in entry["top"]] == sample.response.token_ids[n, :5].tolist()
        total = np.exp(sample.response.logprobs[n, :5]).sum()
        assert sum(e["probability"] for e in entry["top"]) == pytest.approx(total, abs=1e-4)
    second = document["images"][1]
    assert second["visual"][2]["top"][0]["id"] == sample.visual.token_ids[9 + 2, 0]
    assert second["visual"][2]["position"] == sample.visual_positions[9 + 2]
    assert second["relation"]["residual"] == sample.relations[1].residual


def test_rows_come_before_ids(cache: Cache) -> None:
    assert sample_document(cache, "8")["row"] == 8
    assert sample_document(cache, "id-2")["row"] == 2
    assert sample_document(cache, "id-2")["rows_with_this_id"] == [9]


def test_a_row_in_quarantine_says_why(cache: Cache) -> None:
    with pytest.raises(KdcacheError, match=r"row 5 is in quarantine \(broken_image\): row 5 is bad"):
        sample_document(cache, 5)
    with pytest.raises(KdcacheError, match="no sample with row number or id 'x9'"):
        sample_document(cache, "x9")


def test_the_page_shows_every_part(cache: Cache, folder: Path) -> None:
    page = printed(cache, 0, folder / "images")
    for told in (
        "row 0",
        "pictures/0.png",
        "48 x 40",
        "9 visual tokens",
        "[image 0: 9 tokens]",
        "a red circle",
        "response positions",
        "patch of image 1",
        "rank",
        "p(label)",
    ):
        assert told in page, told
    assert "\x1b" not in page
    assert "\x1b[" in printed(cache, 0, folder / "images", colour=True)


def test_a_missing_or_changed_picture_is_said(cache: Cache, tmp_path: Path, folder: Path) -> None:
    assert "no picture" in printed(cache, 0, tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "0.png")
    assert "its digest differs" in printed(cache, 0, tmp_path)
    assert "its digest differs" not in printed(cache, 0, folder / "images")


def test_images_are_looked_for_where_the_build_had_them(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "a", tmp_path / "images", rows=3)
    assert recorded_images(cache) == tmp_path / "images"
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert recorded_images(cache) is None


def test_disagreements_are_marked_without_colour_too(cache: Cache) -> None:
    """In the table, and in the conversation by colour where there is one."""
    document = sample_document(cache, 0)
    wrong = [entry for entry in document["response"] if not entry["agrees"]]
    assert wrong
    assert printed(cache, 0, None).count("✗") == len(wrong)
    assert "the teacher disagrees" in printed(cache, 0, None)
    lines = [line for line in printed(cache, 0, None, width=80).splitlines() if "✗" in line]
    for entry, line in zip(wrong, lines, strict=True):
        assert f"{entry['label_probability']:.4f}" in line
        assert f"{entry['top'][0]['probability']:.3f}" in line


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_figure_of_a_sample_is_cut(cache: Cache, folder: Path, width: int) -> None:
    page = printed(cache, 0, folder / "images", width=width)
    assert all(len(line) <= width for line in page.splitlines())
    figures = [f"{entry['label_probability']:.4f}" for entry in sample_document(cache, 0)["response"]]
    assert all(figure in page for figure in figures)


def test_a_terminal_of_no_width_to_speak_of_gets_a_page(cache: Cache, folder: Path) -> None:
    assert "themostconfidentof" in "".join(printed(cache, 0, folder / "images", width=4).split())


def test_text_of_the_dataset_cannot_steer_the_terminal(cache: Cache) -> None:
    page = printed(cache, 4, None)
    assert "\x1b" not in page
    assert "<b>\\x1b[31m" in page


def test_caches_with_fewer_targets_have_a_page(tmp_path: Path) -> None:
    for targets in (("response",), ("visual",), ("relation",)):
        cache = make_cache(
            tmp_path / targets[0], tmp_path / "images", rows=3, spec=TargetSpec(targets=targets, top_k=2)
        )
        page = printed(cache, 0, None, width=60)
        assert ("response positions" in page) == (targets == ("response",))
        assert ("patch of image" in page) == (targets == ("visual",))
        json.dumps(sample_document(cache, 2), allow_nan=False)


def test_a_tokenizer_with_split_characters_reads_whole() -> None:
    made = tokenizer()
    text = TokenText(made)
    ids = made.encode("海 naïve €").ids
    assert "".join(text.flow(ids)) == "海 naïve €"
    assert "\N{REPLACEMENT CHARACTER}" in "".join(text.flow(made.encode("€").ids[:1]))
    assert text.piece(made.encode(" circle").ids[0]).startswith(" ")
    assert text.piece(0) == "<|end|>"
    assert TokenText(None).flow([4, 5]) == ["#4", "#5"]


def test_sentencepiece_style_blanks_are_kept() -> None:
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {"<unk>": 0, "a": 1, "▁red": 2, "▁a": 3, "▁": 4}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    text = TokenText(made)
    assert text.piece(2) == " red"
    assert "".join(text.flow([1, 2, 3])) == "a red a"


def test_signs_for_what_cannot_be_seen() -> None:
    assert visible(" a\n\t\x1b\x7f") == "␣a⏎⇥\\x1b\\x7f"
    assert printable("a\nb\x07") == "a\nb\\x07"


def test_relation_pictures() -> None:
    rng = np.random.default_rng(0)
    factor = (rng.normal(size=(40, 6)) * [5, 4, 3, 2, 1, 0.5] @ rng.normal(size=(6, 6))).astype(np.float32)
    gram = (factor.astype(np.float64) @ factor.T).astype(np.float32)
    for record in (Relation(residual=0, norm=1, factor=factor), Relation(residual=0, norm=1, gram=gram)):
        whole, best = principal_factor(record, 6), principal_factor(record, 2)
        np.testing.assert_allclose(whole @ whole.T, gram, atol=1e-3 * np.abs(gram).max())
        values, vectors = np.linalg.eigh(gram.astype(np.float64))
        nearest = (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T
        np.testing.assert_allclose(best @ best.T, nearest, atol=1e-3 * np.abs(gram).max())
    cosines = similarity(factor.astype(np.float64))
    centred = factor - factor.mean(axis=0)
    expected = centred[3] @ centred[7] / np.linalg.norm(centred[3]) / np.linalg.norm(centred[7])
    assert cosines[3, 7] == pytest.approx(expected, rel=1e-4)
    assert pooled(cosines, 10, 10).shape == (10, 10)
    assert pooled(cosines, 10, 10)[0, 0] == pytest.approx(cosines[:4, :4].mean())


def test_blocks() -> None:
    pixels = heat(np.array([[0.0, 1.0], [0.5, 0.5]]))
    assert pixels[0, 0].tolist() == [68, 1, 84]
    assert pixels[0, 1].tolist() == [253, 231, 37]
    assert heat(np.zeros((2, 2))).shape == (2, 2, 3)
    text = half_blocks(pixels, colour=True)
    assert text.plain == "▀▀"
    assert half_blocks(np.full((4, 3, 3), 255, np.uint8), colour=False).plain == "@@@\n@@@"
    shrunk = fitted(Image.new("RGB", (400, 100)), 40, 20)
    assert shrunk.shape == (10, 40, 3)
