"""One sample of a cache as a document: every token, and the teacher's distribution there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.errors import KdcacheError
from cache_schema.format.cache import Cache
from cache_schema.format.records import IGNORE_INDEX, ImageRecord, Relation, Sample, TopK
from cache_schema.operations.scores import scores_of
from views.grid import ImageSettings, Layout, Shape, layout_of
from views.token_text import TokenText

TOP = 5
"""Entries of a distribution that a document shows."""

BEFORE = 24
"""Tokens before an image's token that may name the tile it opens."""


def find_sample(cache: Cache, row_or_id: int | str) -> Sample:
    """The sample of this row number, or else the first with this id; "12" may be either. KdcacheError when
    there is none; it mentions quarantine."""
    found = cache.find(int(row_or_id)) if str(row_or_id).isdecimal() else []
    found = found or cache.find(str(row_or_id))
    if found:
        return cache[found[0]]
    for row in cache.quarantined():
        if str(row_or_id) in (str(row.row), row.sample_id):
            raise KdcacheError(
                f"{cache.url}: row {row.row} is in quarantine ({row.reason}): {row.detail}; "
                "build --retry-quarantine tries it again"
            )
    raise KdcacheError(
        f"{cache.url}: no sample with row number or id {str(row_or_id)!r}; the plan holds "
        f"{cache.plan.rows:,} rows, {len(cache):,} are captured"
    )


def recorded_images(cache: Cache) -> Path | None:
    """The folder from which the build read its images, if it exists on this machine."""
    folder = cache.manifest.dataset.get("image_root")
    return Path(folder) if isinstance(folder, str) and Path(folder).is_dir() else None


def sample_document(cache: Cache, row_or_id: int | str, *, top: int = TOP) -> dict[str, Any]:
    """What `inspect --sample` shows, as JSON values; `top` entries of each distribution.

    tokens: position, id, text, role (prompt, visual, response) of each, runs of visual tokens as one entry
    with `count`. response: a list over response positions; images: a list with `visual` over their tokens
    and `layout`, their places on the image (`views.grid`).
    rows_with_this_id: other rows with the same label.
    """
    sample = find_sample(cache, row_or_id)
    document = describe(cache, sample, TokenText.of_assets(cache.assets), top=top)
    rows = cache.rows_labelled(sample.sample_id)
    return document | {"rows_with_this_id": sorted(set(rows) - {sample.row})}


def describe(cache: Cache, sample: Sample, text: TokenText, *, top: int = TOP) -> dict[str, Any]:
    """`sample_document` of a sample already read, without the other rows of its id."""
    settings = ImageSettings(cache.assets)
    scores = None
    if sample.response is not None and len(sample.response):
        found = scores_of(sample)
        scores = {
            "confidence": found.confidence,
            "disagreement": found.disagreement,
            "perplexity": found.perplexity if np.isfinite(found.perplexity) else None,
        }
    return {
        "row": int(sample.row),
        "id": sample.sample_id,
        "length": len(sample.input_ids),
        "scores": scores,
        "tokens": _tokens(sample, text),
        "response": _response(sample, text, top),
        "images": [
            _image(sample, number, image, settings, text, top) for number, image in enumerate(sample.images)
        ],
    }


def roles_of(sample: Sample) -> NDArray[np.str_]:
    """(T,) prompt, visual or response: response where the token itself is supervised."""
    roles = np.full(len(sample.input_ids), "prompt", dtype="<U8")
    roles[sample.labels != IGNORE_INDEX] = "response"
    roles[sample.visual_positions] = "visual"
    return roles


def _tokens(sample: Sample, text: TokenText) -> list[dict[str, Any]]:
    roles = roles_of(sample)
    owner = np.full(len(roles), -1, dtype=np.int64)
    for number, image in enumerate(sample.images):
        owner[image.positions] = number
    entries: list[dict[str, Any]] = []
    for position, piece in enumerate(text.flow([int(i) for i in sample.input_ids])):
        role, image_number = str(roles[position]), int(owner[position])
        last = entries[-1] if entries else None
        if role == "visual" and last and last["role"] == "visual" and last["image"] == image_number:
            last["count"] += 1
            continue
        entry = {"position": position, "id": int(sample.input_ids[position]), "text": piece, "role": role}
        entries.append(entry | ({"image": image_number, "count": 1} if role == "visual" else {}))
    return entries


def _response(sample: Sample, text: TokenText, top: int) -> list[dict[str, Any]]:
    record = sample.response
    if record is None:
        return []
    tops = top_entries(record, text, top)
    labels = sample.labels[sample.response_positions + 1]
    text.learn(labels)
    entries = []
    for n, (position, label) in enumerate(zip(sample.response_positions, labels, strict=True)):
        place = np.flatnonzero((record.token_ids[n] == label) & record.there[n])
        entries.append(
            {
                "position": int(position),
                "label_id": int(label),
                "label": text.piece(int(label)),
                "label_probability": _probability(record.label_logprob, n),
                "label_rank": int(place[0]) if len(place) else None,
                "agrees": bool(len(place) and place[0] == 0),
                "entropy": _entropy(record, n),
                "outside": tail_probability(record, n),
                "top": tops[n],
            }
        )
    return entries


def _image(
    sample: Sample, number: int, image: ImageRecord, settings: ImageSettings, text: TokenText, top: int
) -> dict[str, Any]:
    document: dict[str, Any] = {
        "path": image.path,
        "sha256": image.sha256,
        "width": image.width,
        "height": image.height,
        "tokens": len(image.positions),
        "layout": _layout(layout_of(_shape(sample, image, text), settings)),
        "visual": [],
        "relation": None,
    }
    if sample.visual is not None:
        start = sum(len(before.positions) for before in sample.images[:number])
        tops = top_entries(sample.visual, text, top, slice(start, start + len(image.positions)))
        document["visual"] = [
            {
                "position": int(position),
                "entropy": _entropy(sample.visual, start + n),
                "outside": tail_probability(sample.visual, start + n),
                "top": tops[n],
            }
            for n, position in enumerate(image.positions)
        ]
    if sample.relations:
        document["relation"] = _relation(sample.relations[number])
    return document


def _shape(sample: Sample, image: ImageRecord, text: TokenText) -> Shape:
    """The input of an image's layout."""
    cuts = np.flatnonzero(np.diff(image.positions) > 1) + 1
    runs = []
    for run in np.split(image.positions, cuts):
        earlier = sample.visual_positions[sample.visual_positions < run[0]]  # of this image or another
        start = max(int(earlier[-1]) + 1 if len(earlier) else 0, int(run[0]) - BEFORE)
        runs.append((len(run), "".join(text.flow(sample.input_ids[start : int(run[0])].tolist()))))
    return Shape(
        width=image.width,
        height=image.height,
        count=len(image.positions),
        images=len(sample.images),
        runs=runs,
    )


def _layout(layout: Layout) -> dict[str, Any]:
    layers = [
        {
            "name": layer.name,
            "rows": layer.tokens.shape[0],
            "columns": layer.tokens.shape[1],
            "tokens": layer.tokens.tolist(),
            "box": None if layer.box is None else list(layer.box),
            "row_ends": layer.row_ends.tolist(),
        }
        for layer in layout.layers
    ]
    return {
        "layers": layers,
        "frame": list(layout.frame),
        "apart": list(layout.apart),
        "note": layout.note,
    }


def _relation(relation: Relation) -> dict[str, Any]:
    rank = None if relation.factor is None else relation.factor.shape[1]
    form = "exact" if relation.factor is None else "factor"
    return {"form": form, "rank": rank, "residual": float(relation.residual), "norm": float(relation.norm)}


def top_entries(
    record: TopK, text: TokenText, top: int, rows: slice = slice(None)
) -> list[list[dict[str, Any]]]:
    """The `top` most likely tokens at the positions `rows` of the record: id, text, probability."""
    ids, there = record.token_ids[rows, :top], record.there[rows, :top]
    probabilities = np.exp(record.logprobs[rows, :top].astype(np.float64))
    text.learn(ids.ravel())
    return [
        [
            {"id": int(i), "text": text.piece(int(i)), "probability": round(float(p), 6)}
            for i, p in zip(row_ids[row_there], row_probabilities[row_there], strict=True)
        ]
        for row_ids, row_probabilities, row_there in zip(ids, probabilities, there, strict=True)
    ]


def tail_probability(record: TopK, n: int) -> float:
    """The mass outside the kept entries at position n, temperature 1."""
    column = [float(t) for t in record.temperatures].index(1.0)
    return round(float(np.exp(np.float64(record.tail_logprob[n, column]))), 6)


def _entropy(record: TopK, n: int) -> float | None:
    return None if record.entropy is None else round(float(record.entropy[n]), 4)


def _probability(logprobs: Sequence[float] | NDArray[np.float32] | None, n: int) -> float | None:
    return None if logprobs is None else round(float(np.exp(np.float64(logprobs[n]))), 6)
