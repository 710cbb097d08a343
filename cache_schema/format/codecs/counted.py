"""Records with a number of entries of their own at each position, as flat arrays beside `counts`.

The arrays of `codecs.topk` without their padding: `ids`, `token_ids` and `logprobs` row after row, `steps`
rank after rank. With few entries the other fields weigh, so in precision compact they are stored about as
precisely as the entries: log-sum-exp, entropy and tail with fewer digits, the label's log-probability as
the rank of the entry that has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.errors import CacheDamaged
from cache_schema.format.codecs.ids import decode_ids, encode_ids
from cache_schema.format.codecs.logprobs import (
    LARGEST,
    encode_logprobs,
    encode_tail,
    rounded,
)
from cache_schema.format.codecs.ragged import Rows, by_rank
from cache_schema.format.records import TopK
from cache_schema.format.spec import Precision

Arrays = dict[str, NDArray[Any]]
Places = slice | NDArray[np.int64]

# Chosen by bytes against the gradient's angle: benchmarks/codecs.py.
LOGSUMEXP_STEP = 2.0**-10
ENTROPY_STEP = 2.0**-7
TAIL_BITS = 8
LEVELS = np.float32(127)
DROP_BITS = 6

_SAME = 1e-5
"""Nats within which a label's log-probability is that of an entry: rounding of float32 logits."""

_BY_ENTRY = ("token_ids", "logprobs")
_BY_TEMPERATURE = ("tail_logprob",)


def encode_counted(records: Sequence[TopK], precision: Precision) -> Arrays:
    """The arrays of the positions of all records, in order."""
    return _packed([_parts(record, precision) for record in records])


def prepare_counted(arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    """A block as `decode_counted` takes it: `levels` (E,) of the entries instead of `steps`, and where the
    entries and what else is not one per position begin."""
    prepared = dict(arrays)
    rows = Rows.of(arrays["counts"])
    entries = len(arrays["ids"] if "ids" in arrays else arrays["token_ids"])
    if rows.counts.min(initial=1) < 1 or int(rows.counts.sum()) != entries:
        raise CacheDamaged(f"counts of {rows.counts.sum()} entries, {entries} are there")
    prepared |= {"starts": rows.starts, "counts": rows.counts}
    if "steps" in prepared:
        prepared["levels"] = _levels(prepared.pop("steps"), rows)
    if "label_rank" in prepared:
        prepared["rest_starts"] = Rows.of(arrays["label_rank"] == 0).starts
    return prepared


def decode_counted(prepared: Arrays, places: Places, temperatures: NDArray[np.float32]) -> TopK:
    """The record at some positions of a prepared block, padded to the largest count among them."""
    rows = Rows(prepared["starts"], prepared["counts"]).at(places)
    counts, entries = rows.counts.astype(np.int32), _run(rows, places)
    there = np.arange(max(int(counts.max(initial=0)), 1)) < counts[:, None]

    def spread(values: NDArray[Any], fill: float) -> NDArray[Any]:
        table = np.full(there.shape, fill, values.dtype)
        table[there] = values
        return table

    def floats(name: str) -> NDArray[np.float32] | None:
        return prepared[name][places].astype(np.float32) if name in prepared else None

    tail = prepared["tail_logprob"][:, places]
    label, sampled = floats("label_logprob"), prepared.get("sampled_ids")
    if sampled is not None:
        sampled = sampled[places]
    if "vocabulary" in prepared:
        vocabulary = prepared["vocabulary"]
        token_ids = decode_ids(vocabulary, prepared["ids"][entries])
        at_one = int(np.flatnonzero(temperatures == 1.0)[0])
        logprobs = _logprobs(prepared["levels"][entries], prepared["drop"][places], tail[at_one], rows.counts)
        if sampled is not None:
            sampled = decode_ids(vocabulary, sampled)
        if "label_rank" in prepared:
            label = _labels(prepared, places, logprobs, rows.counts)
    else:
        token_ids, logprobs = prepared["token_ids"][entries], prepared["logprobs"][entries]
    drawn = prepared["sampled_counts"][places].astype(np.int32) if sampled is not None else None
    return TopK(
        token_ids=spread(token_ids, 0),
        logprobs=spread(logprobs, -np.inf),
        tail_logprob=np.ascontiguousarray(tail.T, dtype=np.float32),
        temperatures=temperatures,
        logsumexp=floats("logsumexp"),
        entropy=floats("entropy"),
        label_logprob=label,
        sampled_ids=sampled,
        sampled_counts=drawn,
        counts=counts,
    )


def join_counted(pieces: Sequence[tuple[Mapping[str, NDArray[Any]], Places]]) -> Arrays:
    """The block of some positions of several blocks, as stored: see `codecs.topk.join_stored`."""
    return _packed([_stored_parts(arrays, places) for arrays, places in pieces])


def _parts(record: TopK, precision: Precision) -> Arrays:
    """The arrays of a record, all in the order of its positions, ids not coded yet."""
    assert record.counts is not None
    there, counts = record.there, record.counts
    arrays: Arrays = {"counts": counts, "token_ids": record.token_ids[there]}
    if record.sampled_ids is not None and record.sampled_counts is not None:
        arrays |= {"sampled_ids": record.sampled_ids, "sampled_counts": record.sampled_counts}
    if precision == "full":
        arrays |= {"logprobs": record.logprobs[there], "tail_logprob": record.tail_logprob.T}
        for name in ("logsumexp", "entropy", "label_logprob"):
            if (values := getattr(record, name)) is not None:
                arrays[name] = values
        return arrays
    last = np.take_along_axis(record.logprobs, counts[:, None].astype(np.int64) - 1, 1)
    steps, arrays["drop"] = encode_logprobs(np.where(there, record.logprobs, last), LEVELS, DROP_BITS)
    arrays["steps"] = steps.T[there[:, 1:]]
    arrays["tail_logprob"] = encode_tail(rounded(record.tail_logprob, TAIL_BITS)).T
    if record.logsumexp is not None:
        arrays["logsumexp"] = _stepped(record.logsumexp, LOGSUMEXP_STEP)
    if record.entropy is not None:
        arrays["entropy"] = _stepped(record.entropy, ENTROPY_STEP).astype(np.float16)
    if record.label_logprob is not None:
        same = np.abs(record.logprobs - record.label_logprob[:, None]) <= _SAME
        arrays["label_rank"] = np.where(same.any(axis=1), same.argmax(axis=1) + 1, 0)
        rest = record.label_logprob[arrays["label_rank"] == 0]
        arrays["label_rest"] = np.maximum(rest, -LARGEST).astype(np.float16)
    return arrays


def _stored_parts(stored: Mapping[str, NDArray[Any]], places: Places) -> Arrays:
    """Some positions of stored arrays, as `_parts` gives them."""
    rows = Rows.of(stored["counts"])
    entries = rows.at(places).entries
    arrays: Arrays = {}
    for name, values in stored.items():
        if name == "ids":
            arrays["token_ids"] = decode_ids(stored["vocabulary"], values[entries])
        elif name in _BY_ENTRY:
            arrays[name] = values[entries]
        elif name == "steps":
            further = Rows.of(rows.counts - 1).at(places).entries
            arrays[name] = _by_position(values, stored["counts"])[further]
        elif name == "label_rest":
            arrays[name] = values[Rows.of(stored["label_rank"] == 0).at(places).entries]
        elif name == "sampled_ids" and "vocabulary" in stored:
            arrays[name] = decode_ids(stored["vocabulary"], values[places])
        elif name != "vocabulary":
            arrays[name] = values[:, places] if name in _BY_TEMPERATURE else values[places]
    return arrays


def _packed(parts: Sequence[Arrays]) -> Arrays:
    """The stored arrays of positions whose arrays come in parts."""
    arrays: Arrays = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        arrays[name] = np.concatenate(values, axis=1 if name in _BY_TEMPERATURE else 0)
    if "steps" in arrays:
        arrays["steps"] = arrays["steps"][by_rank(arrays["counts"] - 1)]
        ids, sampled = arrays.pop("token_ids"), arrays.get("sampled_ids")
        both = ids if sampled is None else np.concatenate([ids, sampled.ravel()])
        arrays["vocabulary"], index = encode_ids(both)
        arrays["ids"] = index[: len(ids)]
        if sampled is not None:
            arrays["sampled_ids"] = index[len(ids) :].reshape(sampled.shape)
    for name in ("counts", "label_rank", "sampled_counts"):
        if name in arrays:
            arrays[name] = arrays[name].astype(np.min_scalar_type(int(arrays[name].max(initial=0))))
    return arrays


def _by_position(steps: NDArray[np.uint8], counts: NDArray[Any]) -> NDArray[np.uint8]:
    """steps, which stand rank after rank, position after position."""
    found = np.empty_like(steps)
    found[by_rank(counts.astype(np.int64) - 1)] = steps
    return found


def _run(rows: Rows, places: Places) -> slice | NDArray[np.int64]:
    """The entries of the rows: those of neighbours stand in one run."""
    neighbours = isinstance(places, slice) and places.step in (None, 1)
    if not neighbours or not len(rows.counts):
        return rows.entries
    return slice(int(rows.starts[0]), int(rows.starts[-1] + rows.counts[-1]))


def _levels(steps: NDArray[np.uint8], rows: Rows) -> NDArray[np.uint8]:
    """`level` (E,), row after row, from steps, which stand rank after rank."""
    levels = np.zeros(int(rows.counts.sum()), np.uint8)
    alive = np.arange(len(rows.counts))
    level, begin, rank = np.zeros(len(alive), np.uint8), 0, 1
    while True:  # twice the speed of sorting the steps by row
        longer = rows.counts[alive] > rank
        alive, level = alive[longer], level[longer]
        if not len(alive):
            return levels
        level += steps[begin : begin + len(alive)]
        levels[rows.starts[alive] + rank] = level
        begin, rank = begin + len(alive), rank + 1


def _logprobs(
    levels: NDArray[np.uint8],
    drop: NDArray[np.float16],
    tail: NDArray[np.float16],
    counts: NDArray[np.int64],
) -> NDArray[np.float32]:
    """The log-probabilities (E,) of rows of `counts` (N,) entries: see `codecs.logprobs`."""
    if not len(counts):
        return np.zeros(0, np.float32)
    logprobs = levels.astype(np.float32)
    logprobs *= logprobs
    logprobs *= np.repeat(drop.astype(np.float32) / -(LEVELS * LEVELS), counts)
    mass = np.add.reduceat(np.exp(logprobs), np.cumsum(counts) - counts)
    inside = np.log(-np.expm1(tail.astype(np.float32)))
    logprobs += np.repeat(inside - np.log(mass), counts)
    return logprobs


def _labels(
    prepared: Arrays, places: Places, logprobs: NDArray[np.float32], counts: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The labels' log-probabilities (N,): of the entry that has it, or stored apart. logprobs (E,)."""
    rank = prepared["label_rank"][places].astype(np.int64)
    rest = rank == 0
    found: NDArray[np.float32] = logprobs[np.cumsum(counts) - counts + np.maximum(rank - 1, 0)]
    found[rest] = prepared["label_rest"][prepared["rest_starts"][places][rest]]
    return found


def _stepped(values: NDArray[np.float32], step: float) -> NDArray[np.float32]:
    """`values` in whole steps."""
    stepped: NDArray[np.float32] = np.rint(values / np.float32(step)) * np.float32(step)
    return stepped
