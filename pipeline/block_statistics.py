"""Statistics of blocks of logits in one pass, from which top-k, log-sum-exp, entropy and tails follow.

Of every block of 64 entries its largest, and relative to it the sum of exp(z / T) for each temperature T and
that of exp(z) z. On CUDA and ROCm one kernel of pipeline.block_kernel; torch elsewhere.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

BLOCK = 64
"""Entries of a block."""

_CACHE_BYTES = 1 << 20  # logits worked on at a time, so that passes over them stay in a CPU's cache


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """Of n rows and B blocks: peak (n, B), the largest entry m; mass (n_T, n, B), sum exp((z - m) / T);
    moment (n, B), sum exp(z - m) (z - m). All float32."""

    peak: Tensor
    mass: Tensor
    moment: Tensor


def block_statistics(logits: Tensor, temperatures: tuple[float, ...]) -> BlockStatistics:
    """The statistics of logits (n, V) float32; the last block may be shorter. temperatures contain 1."""
    if fused := kernels(logits.device):
        return BlockStatistics(*fused.fused_statistics(logits, temperatures, BLOCK))
    vocab = logits.shape[1]
    whole = vocab // BLOCK * BLOCK
    rows = len(logits) if logits.device.type != "cpu" else _CACHE_BYTES // (4 * vocab)
    parts = [
        _statistics(logits[:, columns].unflatten(1, (-1, size)), temperatures, max(1, rows))
        for columns, size in ((slice(0, whole), BLOCK), (slice(whole, None), vocab - whole))
        if logits[:, columns].shape[1]
    ]
    return BlockStatistics(*(torch.cat(values, dim=-1) for values in zip(*parts, strict=True)))


def _statistics(blocks: Tensor, temperatures: tuple[float, ...], rows: int) -> list[Tensor]:
    """peak, mass and moment of blocks (n, B, size), `rows` of the n at a time."""
    falls, others = torch.empty(2, min(rows, len(blocks)), *blocks.shape[1:], device=blocks.device)
    found = []
    for piece in blocks.split(rows):
        peak = piece.amax(dim=2)
        fall = torch.sub(piece, peak[:, :, None], out=falls[: len(piece)])
        mass = []
        for temperature in temperatures:
            if temperature == 1.0:
                weights = torch.exp(fall, out=others[: len(piece)])
                mass.append(weights.sum(dim=2))
                moment = weights.mul_(fall).sum(dim=2)
            else:
                mass.append(torch.div(fall, temperature, out=others[: len(piece)]).exp_().sum(dim=2))
        found.append((peak, torch.stack(mass), moment))
    return [torch.cat(values, dim=-2) for values in zip(*found, strict=True)]


def kernels(device: torch.device) -> ModuleType | None:
    """pipeline.block_kernel where tensors on this device can go through it."""
    return _kernels() if device.type == "cuda" else None


@functools.cache
def _kernels() -> ModuleType | None:
    """The kernels, where triton is installed."""
    try:
        from pipeline import block_kernel
    except ImportError:
        return None
    return block_kernel
