"""A block of `TopK` records as arrays, compact or full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.format.codecs.counted import (
    Arrays as Arrays,
)
from cache_schema.format.codecs.counted import (
    Places as Places,
)
from cache_schema.format.codecs.counted import (
    decode_counted,
    encode_counted,
    join_counted,
    prepare_counted,
)
from cache_schema.format.codecs.ids import decode_ids, encode_ids
from cache_schema.format.codecs.logprobs import (
    LARGEST,
    decode_levels,
    encode_logprobs,
    encode_tail,
    levels_of,
)
from cache_schema.format.records import TopK
from cache_schema.format.spec import Precision

_POSITIONS_LAST = ("steps", "tail_logprob")
"""Arrays whose last axis, not the first, is over positions."""


_DECODED = 8192
"""Positions that `decode_whole` decodes at a time: with counts their records are as wide as the widest."""


def join_topk(records: Sequence[TopK]) -> TopK:
    """One record of all positions, in order. Optional fields must be set in all records or in none. Records
    with counts are filled up to the widest."""
    if len(records) == 1:
        return records[0]
    if records[0].counts is not None:
        width = max(record.token_ids.shape[1] for record in records)
        records = [_widened(record, width) for record in records]
    fields: dict[str, Any] = {"temperatures": records[0].temperatures}
    for name in TopK.__dataclass_fields__:
        if name != "temperatures":
            parts = [getattr(record, name) for record in records]
            assert all((part is None) == (parts[0] is None) for part in parts), name
            fields[name] = None if parts[0] is None else np.concatenate(parts)
    return TopK(**fields)


def _widened(record: TopK, width: int) -> TopK:
    """The record with `width` places for entries."""
    more = ((0, 0), (0, width - record.token_ids.shape[1]))
    return replace(
        record,
        token_ids=np.pad(record.token_ids, more),
        logprobs=np.pad(record.logprobs, more, constant_values=-np.inf),
    )


def topk_at(record: TopK, places: Places | NDArray[np.integer[Any]]) -> TopK:
    """The record of some positions."""
    fields: dict[str, Any] = {"temperatures": record.temperatures}
    for name in TopK.__dataclass_fields__:
        if name != "temperatures":
            values = getattr(record, name)
            fields[name] = None if values is None else values[places]
    return TopK(**fields)


def encode_records(records: Sequence[TopK], precision: Precision) -> Arrays:
    """The arrays of a block of the positions of all records, in order; see docs/cache-format.md for each.

    full: ids int32 and all else float32, exact. compact: ids through a dictionary, log-probabilities in 8
    bits, tail, entropy and label in float16; logsumexp stays exact. Records with counts: see codecs.counted.
    """
    if records[0].counts is not None:
        return encode_counted(records, precision)
    return _encode_fixed(join_topk(records), precision)


def encode_topk(record: TopK, precision: Precision) -> Arrays:
    """The arrays of a block of N positions: see `encode_records`."""
    return encode_records([record], precision)


def _encode_fixed(record: TopK, precision: Precision) -> Arrays:
    arrays: Arrays = {} if record.logsumexp is None else {"logsumexp": record.logsumexp}
    if precision == "full":
        arrays |= {
            "token_ids": record.token_ids,
            "logprobs": record.logprobs,
            "tail_logprob": record.tail_logprob.T,
        }
        if record.entropy is not None:
            arrays["entropy"] = record.entropy
        if record.label_logprob is not None:
            arrays["label_logprob"] = record.label_logprob
        if record.sampled_ids is not None:
            arrays["sampled_ids"] = record.sampled_ids
    else:
        sampled = record.sampled_ids
        both = record.token_ids if sampled is None else np.concatenate([record.token_ids, sampled], axis=1)
        arrays["vocabulary"], index = encode_ids(both)
        arrays["ids"] = index[:, : record.token_ids.shape[1]]
        arrays["steps"], arrays["drop"] = encode_logprobs(record.logprobs)
        arrays["tail_logprob"] = encode_tail(record.tail_logprob).T
        if record.entropy is not None:
            arrays["entropy"] = record.entropy.astype(np.float16)
        if record.label_logprob is not None:
            arrays["label_logprob"] = np.maximum(record.label_logprob, -LARGEST).astype(np.float16)
        if sampled is not None:
            arrays["sampled_ids"] = index[:, record.token_ids.shape[1] :]
    if record.sampled_counts is not None:
        counts = record.sampled_counts
        arrays["sampled_counts"] = counts.astype(np.min_scalar_type(int(counts.max(initial=0))))
    return arrays


def prepare_topk(arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    """A block with `levels` (K, N) uint8 instead of `steps`: the part of `decode_topk` that is common to all
    positions, done once."""
    if "counts" in arrays:
        return prepare_counted(arrays)
    prepared = dict(arrays)
    if "steps" in prepared:
        prepared["levels"] = levels_of(prepared.pop("steps"))
    return prepared


def decode_topk(
    arrays: Mapping[str, NDArray[Any]], places: Places, temperatures: NDArray[np.float32]
) -> TopK:
    """The record at some positions of a block, as stored or prepared."""
    if "counts" in arrays:
        prepared = dict(arrays) if "starts" in arrays else prepare_counted(arrays)
        return decode_counted(prepared, places, temperatures)

    def floats(name: str) -> NDArray[np.float32] | None:
        return arrays[name][places].astype(np.float32) if name in arrays else None

    tail = arrays["tail_logprob"][:, places]
    if "vocabulary" in arrays:
        vocabulary = arrays["vocabulary"]
        token_ids = decode_ids(vocabulary, arrays["ids"][places])
        at_one = int(np.flatnonzero(temperatures == 1.0)[0])
        levels = arrays["levels"][:, places] if "levels" in arrays else levels_of(arrays["steps"][:, places])
        logprobs = decode_levels(levels.T, arrays["drop"][places], tail[at_one])
        sampled = decode_ids(vocabulary, arrays["sampled_ids"][places]) if "sampled_ids" in arrays else None
    else:
        token_ids, logprobs = arrays["token_ids"][places], arrays["logprobs"][places]
        sampled = arrays["sampled_ids"][places] if "sampled_ids" in arrays else None
    counts = arrays["sampled_counts"][places].astype(np.int32) if "sampled_counts" in arrays else None
    return TopK(
        token_ids=token_ids,
        logprobs=logprobs,
        tail_logprob=np.ascontiguousarray(tail.T, dtype=np.float32),
        temperatures=temperatures,
        logsumexp=floats("logsumexp"),
        entropy=floats("entropy"),
        label_logprob=floats("label_logprob"),
        sampled_ids=sampled,
        sampled_counts=counts,
    )


def decode_whole(arrays: Mapping[str, NDArray[Any]], temperatures: NDArray[np.float32]) -> list[TopK]:
    """The records of all positions of a block, some thousand positions each; none where there is none."""
    prepared = prepare_topk(arrays)
    count = arrays["tail_logprob"].shape[1]
    return [
        decode_topk(prepared, slice(start, start + _DECODED), temperatures)
        for start in range(0, count, _DECODED)
    ]


def join_stored(pieces: Sequence[tuple[Mapping[str, NDArray[Any]], Places]]) -> Arrays:
    """The block of some positions of several blocks, as stored: only the ids get a new dictionary, so the new
    block decodes to the same values bit by bit."""
    if "counts" in pieces[0][0]:
        return join_counted(pieces)
    parts: dict[str, list[NDArray[Any]]] = {}
    for arrays, places in pieces:
        for name, values in arrays.items():
            if name == "vocabulary":
                continue
            cut = values[:, places] if name in _POSITIONS_LAST else values[places]
            coded = "vocabulary" in arrays and name in ("ids", "sampled_ids")
            parts.setdefault(name, []).append(decode_ids(arrays["vocabulary"], cut) if coded else cut)
    joined = {
        name: np.concatenate(cuts, axis=1 if name in _POSITIONS_LAST else 0) for name, cuts in parts.items()
    }
    if "ids" in joined:
        kept = joined["ids"].shape[1]
        both = np.concatenate([joined[name] for name in ("ids", "sampled_ids") if name in joined], axis=1)
        joined["vocabulary"], index = encode_ids(both)
        joined["ids"] = index[:, :kept]
        if "sampled_ids" in joined:
            joined["sampled_ids"] = index[:, kept:]
    return joined
