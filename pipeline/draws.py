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


def tail_draws(
    logits: Tensor, draws: int, *, seed: int, rows: NDArray[np.integer], positions: NDArray[np.integer]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """`draws` independent draws a row of softmax(logits) (n, V), entries of -inf excluded.

    Returns (n, draws) ids, ascending and distinct, and their counts; unused places hold id 0, count 0.
    A row without any finite entry has only unused places.
    """
    with torch.inference_mode():
        cumulative = (
            torch.nan_to_num((logits - logits.amax(dim=1, keepdim=True)).exp()).double().cumsum(dim=1)
        )
        total = cumulative[:, -1:]
        targets = torch.from_numpy(uniforms(draws, seed=seed, rows=rows, positions=positions))
        # right=True: never an entry of zero weight, whose cumulative sum equals its predecessor's
        places = torch.searchsorted(cumulative, targets.to(total.device) * total, right=True)
        found = places.clamp(max=logits.shape[1] - 1).sort(dim=1).values.cpu().numpy()
        empty = (total[:, 0] == 0.0).cpu().numpy()
    ids = np.zeros((len(found), draws), dtype=np.int32)
    counts = np.zeros_like(ids)
    for index, row in enumerate(found):
        if not empty[index]:
            distinct, repeated = np.unique(row, return_counts=True)
            ids[index, : len(distinct)] = distinct
            counts[index, : len(distinct)] = repeated
    return ids, counts
