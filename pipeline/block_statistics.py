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


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """Of n rows and B blocks: peak (n, B), the largest entry m; mass (n_T, n, B), sum exp((z - m) / T);
    moment (n, B), sum exp(z - m) (z - m). All float32."""

    peak: Tensor
    mass: Tensor
    moment: Tensor


def block_statistics(
    logits: Tensor, temperatures: tuple[float, ...], scratch: tuple[Tensor, Tensor] | None = None
) -> BlockStatistics:
    """The statistics of logits (n, V) float32; the last block may be shorter. 1 is one of the temperatures.

    scratch: two buffers of the size of the logits for intermediate values, else fresh memory is taken.
    """
    if fused := kernels(logits.device):
        return BlockStatistics(*fused.fused_statistics(logits, temperatures, BLOCK))
    whole = logits.shape[1] // BLOCK * BLOCK
    parts = [
        _statistics(logits[:, columns].unflatten(1, (-1, size)), temperatures, room)
        for columns, size, room in (
            (slice(0, whole), BLOCK, scratch),
            (slice(whole, None), logits.shape[1] - whole, None),
        )
        if logits[:, columns].shape[1]
    ]
    return BlockStatistics(*(torch.cat(values, dim=-1) for values in zip(*parts, strict=True)))


def _statistics(
    blocks: Tensor, temperatures: tuple[float, ...], scratch: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """peak, mass and moment of blocks (n, B, size)."""
    rooms: list[Tensor | None] = [None, None]
    if scratch is not None:
        rooms = [room.flatten()[: blocks.numel()].view(blocks.shape) for room in scratch]
    peak = blocks.amax(dim=2)
    fall = torch.sub(blocks, peak[:, :, None], out=rooms[0])
    mass = []
    for temperature in temperatures:
        if temperature == 1.0:
            weights = torch.exp(fall, out=rooms[1])
            moment = torch.linalg.vecdot(weights, fall)
        else:
            weights = torch.div(fall, temperature, out=rooms[1]).exp_()
        mass.append(weights.sum(dim=2))
    return peak, torch.stack(mass), moment


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
