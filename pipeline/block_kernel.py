"""The kernel of pipeline.block_statistics, for CUDA and ROCm: every logit is read once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 32  # blocks a program


@triton.jit  # type: ignore[untyped-decorator]
def _statistics_kernel(  # type: ignore[no-untyped-def]
    logits,
    inverse_temperatures,
    peaks,
    masses,
    moments,
    vocab,
    readable,
    blocks,
    row_stride,
    plane,
    TEMPERATURES: tl.constexpr,
    AT_ONE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    entry = tl.load(logits + row * row_stride + column, mask=column < readable, other=float("-inf"))
    entry = tl.where(column < vocab, entry, float("-inf"))
    peak = tl.max(entry, axis=1)
    fall = entry - tl.where(peak == float("-inf"), 0.0, peak)[:, None]
    place = row * blocks + block
    there = block < blocks
    tl.store(peaks + place, peak, mask=there)
    for t in tl.static_range(TEMPERATURES):
        weight = tl.exp(fall * tl.load(inverse_temperatures + t))
        tl.store(masses + t * plane + place, tl.sum(weight, axis=1), mask=there)
        if t == AT_ONE:
            product = weight * tl.maximum(fall, -1e30)  # 0 beyond the vocabulary
            tl.store(moments + place, tl.sum(product, axis=1), mask=there)


def fused_statistics(
    logits: Tensor, temperatures: tuple[float, ...], size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """peak, mass and moment of blocks of `size` entries: see `pipeline.block_statistics.BlockStatistics`.

    Where whole blocks can be read, padding included, and rows begin at a multiple of 16 entries, entries are
    read in fours.
    """
    rows, vocab = logits.shape
    blocks = triton.cdiv(vocab, size)
    peak = logits.new_empty(rows, blocks)
    moment = logits.new_empty(rows, blocks)
    mass = logits.new_empty(len(temperatures), rows, blocks)
    grid: Any = (rows, triton.cdiv(blocks, _TILE))
    _statistics_kernel[grid](
        logits,
        _inverses(temperatures, logits.device),
        peak,
        mass,
        moment,
        vocab,
        blocks * size if _has_whole_blocks(logits, blocks * size) else vocab,
        blocks,
        logits.stride(0),
        rows * blocks,
        TEMPERATURES=len(temperatures),
        AT_ONE=temperatures.index(1.0),
        TILE=_TILE,
        BLOCK=size,
    )
    return peak, mass, moment


def _has_whole_blocks(logits: Tensor, width: int) -> bool:
    """Whether memory of `logits` goes on to `width` entries in every row."""
    last = logits.storage_offset() + (len(logits) - 1) * logits.stride(0) + width
    return last * logits.element_size() <= logits.untyped_storage().nbytes()


_known: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def _inverses(temperatures: tuple[float, ...], device: torch.device) -> Tensor:
    """1 / T of each, kept on the device."""
    key = (temperatures, device)
    if key not in _known:
        _known[key] = torch.tensor([1.0 / t for t in temperatures], dtype=torch.float32, device=device)
    return _known[key]
