"""The distance between two records of the same positions, or of the same image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache_schema.format.records import HiddenStates, Int32, Relation, TopK

Float64 = NDArray[np.float64]

LOG_NOTHING = -100.0
"""Log-probability of an event to which one side gives no mass; it keeps the KL finite."""


def kl(a: TopK, b: TopK) -> Float64:
    """KL(a || b) in nats at each of N positions, (N,) float64, temperature 1.

    The events are the ids that both keep, and one more for everything else: a lower bound of the KL
    between the full distributions. Numbers of entries may differ. ValueError when N differs.
    """
    if len(a) != len(b):
        raise ValueError(f"KL of {len(a)} positions against {len(b)}")
    log_p, log_q = a.logprobs.astype(np.float64), b.logprobs.astype(np.float64)
    ids_a, ids_b = _distinct(a, -1), _distinct(b, -2)
    in_b = _places(ids_a, ids_b)  # (N, K_a)
    in_a = _places(ids_b, ids_a)  # (N, K_b)
    same = np.take_along_axis(log_q, np.maximum(in_b, 0), axis=1)
    terms = (np.exp(log_p) * np.subtract(log_p, same, out=np.zeros_like(log_p), where=in_b >= 0)).sum(axis=1)
    rest_p = _rest(a, log_p, in_b < 0)
    rest_q = np.maximum(_rest(b, log_q, in_a < 0), LOG_NOTHING)
    rest = np.exp(rest_p) * (np.maximum(rest_p, LOG_NOTHING) - rest_q)
    return np.asarray(terms + rest, dtype=np.float64)


def hidden_distance(a: HiddenStates, b: HiddenStates) -> Float64:
    """|a - b| / |a| of the hidden states at each of N positions, (N,) float64; where a is zero, 0 if b is,
    else 1. ValueError when the shapes differ."""
    left, right = a.decode().astype(np.float64), b.decode().astype(np.float64)
    if left.shape != right.shape:
        raise ValueError(f"hidden states of shape {list(left.shape)} against {list(right.shape)}")
    apart, size = (np.linalg.norm(values, axis=1) for values in (left - right, left))
    return np.asarray(np.where(size > 0, apart / np.where(size > 0, size, 1.0), apart > 0), np.float64)


def relation_cosine(a: Relation, b: Relation) -> float:
    """cos(R_a, R_b) of two relation records of the same image, in [-1, 1]; factors are not multiplied out."""
    size_a, size_b = len(_matrix(a)), len(_matrix(b))
    if size_a != size_b:
        raise ValueError(f"relation of {size_a} tokens against {size_b}")
    norms = np.sqrt(_inner(a, a) * _inner(b, b))
    return float(np.clip(_inner(a, b) / norms, -1.0, 1.0)) if norms > 0 else 1.0


def _distinct(record: TopK, filling: int) -> Int32:
    """token_ids with `filling`, which must be below 0, where there is no entry."""
    return np.where(record.there, record.token_ids, np.int32(filling)).astype(np.int32)


def _places(ids: Int32, among: Int32) -> NDArray[np.int64]:
    """For each entry of ids (N, K): its place in the same row of among (N, M), or -1."""
    count, width = among.shape
    stride = int(max(ids.max(initial=0), among.max(initial=0))) + 3  # rows stay apart, ids below 0 included
    offset = np.arange(count, dtype=np.int64)[:, None] * stride
    keys = (among + offset).ravel()
    order = np.argsort(keys, kind="stable")
    wanted = (ids + offset).ravel()
    found = np.minimum(np.searchsorted(keys, wanted, sorter=order), max(len(keys) - 1, 0))
    if not len(keys):
        return np.full(ids.shape, -1, dtype=np.int64)
    place = np.where(keys[order[found]] == wanted, order[found] % width, -1)
    return np.asarray(place.reshape(ids.shape), dtype=np.int64)


def _rest(record: TopK, logprobs: Float64, outside: NDArray[np.bool_]) -> Float64:
    """(N,) log of the mass in the tail and in the entries marked `outside`."""
    tail = record.tail_logprob[:, int(np.flatnonzero(record.temperatures == 1.0)[0])].astype(np.float64)
    entries = np.where(outside, logprobs, -np.inf)
    return np.asarray(np.logaddexp(np.logaddexp.reduce(entries, axis=1), tail), dtype=np.float64)


def _matrix(relation: Relation) -> NDArray[np.float32]:
    matrix = relation.gram if relation.factor is None else relation.factor
    assert matrix is not None
    return matrix


def _inner(a: Relation, b: Relation) -> float:
    """<R_a, R_b>, without a (P, P) matrix where both are factors."""
    left, right = _matrix(a).astype(np.float64), _matrix(b).astype(np.float64)
    if a.factor is not None and b.factor is not None:
        return float(np.square(left.T @ right).sum())
    if a.factor is not None:
        return float(((right @ left) * left).sum())
    if b.factor is not None:
        return float(((left @ right) * right).sum())
    return float((left * right).sum())
