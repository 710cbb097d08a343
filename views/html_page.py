"""A cache as one self-contained page: no network, no other file."""

from __future__ import annotations

import base64
import heapq
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cache_schema.datasets.image_roots import ImageRoot, open_root
from cache_schema.datasets.images import open_image
from cache_schema.errors import KdcacheError, RowRejected
from cache_schema.format.cache import Cache
from cache_schema.format.records import Relation, Sample
from cache_schema.operations.scores import scores_of
from cache_schema.operations.summary import summarise
from cache_schema.output import require_file, write_text
from cache_schema.progress import Progress, Silent, task
from views.grid import framed
from views.html_summary import summary_html
from views.relation_picture import principal_factor
from views.sample_document import describe, find_sample
from views.settings import PageConfig
from views.token_text import TokenText

TOP = 8
PATCH_TOP = 5
PICTURE_SIDE = 448
RELATION_RANK = 48
PAGE = Path(__file__).parent / "page"


def write_html(
    cache: Cache,
    out: Path,
    config: PageConfig | None = None,
    *,
    only: Sequence[str | int] = (),
    image_root: Path | str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the page to the file `out` and returns it.

    The order `worst` is by the share of response positions where the label is not the teacher's most likely
    token, then by perplexity. only: rows and ids, instead of the choice of `config`. Without `image_root`
    only the patches are shown. The relation of a patch is drawn from the strongest 48 columns of the factor,
    in 8 bits: for display only.
    """
    require_file(out)
    progress = progress or Silent()
    text = TokenText.of_assets(cache.assets)
    root = None if image_root is None else open_root(image_root, patience=0.0)
    words: dict[str, str] = {}
    documents = []
    chosen, told = _choose(cache, config or PageConfig(), only, progress)
    with task(progress, "samples", len(chosen)):
        for number, sample in enumerate(chosen):
            documents.append(_sample(cache, sample, text, root, words))
            progress.update(number + 1)
    title = cache.url.rstrip("/").rsplit("/", 1)[-1]
    parts = {
        "title": _escaped(title),
        "css": (PAGE / "page.css").read_text(encoding="utf-8"),
        "js": (PAGE / "page.js").read_text(encoding="utf-8"),
        "summary": summary_html(summarise(cache)),
        "order": _escaped(told),
        "data": _json({"words": words, "samples": documents}),
    }
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    pieces = page.split("{{")
    filled = pieces[0] + "".join(
        parts[piece.partition("}}")[0]] + piece.partition("}}")[2] for piece in pieces[1:]
    )
    write_text(out, filled)
    return out


def _choose(
    cache: Cache, config: PageConfig, only: Sequence[str | int], progress: Progress
) -> tuple[list[Sample], str]:
    """The samples to show and a sentence on how they were chosen."""
    samples, seed = config.samples, config.seed
    if only or config.order not in ("worst", "random"):
        named = only or [name.strip() for name in config.order.split(",")]
        return [find_sample(cache, name) for name in named], "As requested."
    total = len(cache)
    if config.order == "random" or "response" not in cache.spec.targets:
        drawn = np.random.default_rng(seed).permutation(total)[:samples]
        return [cache[int(i)] for i in sorted(drawn)], f"{len(drawn)} of {total:,} at random (seed {seed})."
    with task(progress, "disagreement", len(cache.shards)):
        worst = heapq.nlargest(samples, _ranked(cache, progress))
    places = [-place for _, _, place in worst]
    found = {place: cache[place] for place in sorted(places)}  # in this order each shard is read once
    told = f"The {len(worst)} of {total:,} where the teacher disagrees most with the labels, worst first."
    return [found[place] for place in places], told


def _ranked(cache: Cache, progress: Progress) -> Iterator[tuple[float, float, int]]:
    """(disagreement, perplexity, -index in the cache) of every sample that has response positions."""
    place = 0
    for number, shard in enumerate(cache.shards):
        block = cache.read_shard(shard, parts={"response"})
        for j in range(len(block)):
            sample = block.sample(j)
            if sample.response is not None and len(sample.response):
                scores = scores_of(sample)
                yield scores.disagreement, scores.perplexity, -(place + j)
        place += len(block)
        progress.update(number + 1)


def _sample(
    cache: Cache,
    sample: Sample,
    text: TokenText,
    image_root: ImageRoot | None,
    words: dict[str, str],
) -> dict[str, Any]:
    """The sample's document in the short form that the page's script reads; fills `words`."""
    document = describe(cache, sample, text, top=TOP)
    for entry in document["response"]:
        words[str(entry["label_id"])] = entry.pop("label")
        entry["top"] = _pairs(entry["top"], words)
    for number, image in enumerate(document["images"]):
        visual = image["visual"]
        image["visual"] = None
        if visual:
            image["visual"] = {
                "positions": [entry["position"] for entry in visual],
                "entropy": [round(entry["entropy"], 3) for entry in visual],
                "outside": [entry["outside"] for entry in visual],
                "top": [_pairs(entry["top"][:PATCH_TOP], words) for entry in visual],
            }
        if image["relation"]:
            image["relation"] |= _columns(sample.relations[number])
        image["picture"], image["note"] = _picture(image, image_root, sample.images[number].content)
        _onto_the_shown_part(image)
    return document


def _onto_the_shown_part(image: dict[str, Any]) -> None:
    """Boxes in fractions of the part of the image that is shown, and that part's aspect ratio."""
    left, top, right, bottom = image["layout"].pop("frame")
    across, down = right - left, bottom - top
    image["aspect"] = image["width"] * across / (image["height"] * down)
    for layer in image["layout"]["layers"]:
        if layer["box"]:
            x, y, x_end, y_end = layer["box"]
            edges = ((x - left) / across, (y - top) / down, (x_end - left) / across, (y_end - top) / down)
            layer["box"] = [round(edge, 5) for edge in edges]


def _pairs(entries: list[dict[str, Any]], words: dict[str, str]) -> list[list[float]]:
    words.update((str(entry["id"]), entry["text"]) for entry in entries)
    return [[entry["id"], round(entry["probability"], 5)] for entry in entries]


def _columns(relation: Relation) -> dict[str, Any]:
    """The strongest columns of the factor in 8 bits, column after column, and the scale of each."""
    factor = principal_factor(relation, RELATION_RANK)
    scales = np.maximum(np.abs(factor).max(axis=0, initial=0.0) / 127, np.finfo(np.float32).tiny)
    levels = np.rint(factor / scales).astype(np.int8)
    columns = base64.b64encode(np.ascontiguousarray(levels.T).tobytes()).decode()
    return {"columns": columns, "scales": [float(f"{scale:.5g}") for scale in scales]}


def _picture(
    image: dict[str, Any], root: ImageRoot | None, content: bytes | None
) -> tuple[str | None, str | None]:
    """The image as a data URI, and a note on it."""
    if root is None and content is None:
        return None, "Give --image-root to see the image."
    try:
        opened = open_image(root, image["path"], image["sha256"], content)
    except KdcacheError as error:
        return None, f"No picture: {error.detail if isinstance(error, RowRejected) else error}."
    seen = framed(opened.image, image["layout"]["frame"])
    small = max(seen.size) <= PICTURE_SIDE
    if not small:
        seen.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    stream = io.BytesIO()
    kind = "png" if small else "jpeg"
    seen.save(stream, kind, **({} if small else {"quality": 82}))
    changed = opened.sha256 != image["sha256"]
    note = "This is not the captured file: its digest differs." if changed else None
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}", note


def _json(document: Any) -> str:
    """JSON that cannot close the element that contains it, nor open a comment in it."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
