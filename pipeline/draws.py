"""Draws from the tail of a distribution, decided by (seed, row, position) alone."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_U64 = np.uint64


def uniforms(
    draws: int, *, seed: int, rows: NDArray[np.integer], positions: NDArray[np.integer]
) -> NDArray[np.float64]:
    """(N, draws) numbers in [0, 1), a function of (seed, row, position, draw) by splitmix64 mixing.

    Not for cryptography, and not one stream: every number is hashed on its own.
    """
    state = _mix(np.full(len(rows), seed & 0xFFFFFFFFFFFFFFFF, dtype=_U64))
    state = _mix(state ^ np.asarray(rows).astype(np.int64).astype(_U64))
    state = _mix(state ^ np.asarray(positions).astype(np.int64).astype(_U64))
    mixed = _mix(state[:, None] ^ np.arange(draws, dtype=_U64))
    return (mixed >> _U64(11)).astype(np.float64) * 2.0**-53


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of splitmix64 (Steele, Lea and Flood, 2014): increment, then its finaliser."""
    with np.errstate(over="ignore"):
        z = state + _U64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> _U64(27))) * _U64(0x94D049BB133111EB)
        return z ^ (z >> _U64(31))


def tail_places(logits: Tensor, numbers: Tensor) -> Tensor:
    """Independent draws (n, draws) int32 of softmax(logits) (n, V), ascending, one for each of `numbers`
    (n, draws) in [0, 1); entries of -inf are excluded. -1 in a row without any other."""
    cumulative = torch.nan_to_num((logits - logits.amax(dim=1, keepdim=True)).exp_()).double().cumsum(dim=1)
    total = cumulative[:, -1:]
    # right=True: never an entry of zero weight, whose cumulative sum equals its predecessor's
    places = torch.searchsorted(cumulative, numbers * total, right=True).clamp_(max=logits.shape[1] - 1)
    return places.sort(dim=1).values.masked_fill(total == 0.0, -1).int()


def counted(places: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Draws (n, draws), ascending, as distinct ids (n, draws), ascending, and their counts; unused places,
    and those of draws of -1, hold id 0, count 0."""
    fresh = np.ones(places.shape, dtype=bool)
    fresh[:, 1:] = places[:, 1:] != places[:, :-1]
    slots = np.cumsum(fresh, axis=1) - 1
    rows = np.broadcast_to(np.arange(len(places))[:, None], places.shape)
    drawn = places >= 0
    ids, counts = np.zeros_like(places), np.zeros_like(places)
    ids[rows[drawn], slots[drawn]] = places[drawn]
    np.add.at(counts, (rows[drawn], slots[drawn]), 1)
    return ids, counts
