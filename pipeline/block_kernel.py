"""The kernels of top-k targets, for CUDA and ROCm: block statistics, and the fields of a record from them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 32  # blocks a program


_MOST_ENTRIES = 8192  # of what a program of the selection holds: block peaks, and entries of k blocks
_MOST_LIMITED = 16384  # of the same with limits: what falls below them is not looked for, one by one
_SLACK = 1e-4  # nats below a limit down to which entries are looked for; rounding is far below


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


@triton.jit  # type: ignore[untyped-decorator]
def _fields_kernel(  # type: ignore[no-untyped-def]
    logits,
    inverse_temperatures,
    limits,
    peaks,
    masses,
    moments,
    token_ids,
    logprobs,
    logsumexps,
    entropies,
    tails,
    vocab,
    readable,
    blocks,
    row_stride,
    plane,
    TEMPERATURES: tl.constexpr,
    AT_ONE: tl.constexpr,
    K: tl.constexpr,
    PICKS: tl.constexpr,
    SLOTS: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMITED: tl.constexpr,
    SLACK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, PLACES)
    there = block < blocks
    peak = tl.load(peaks + row * blocks + block, mask=there, other=float("-inf"))
    slot = tl.arange(0, SLOTS)
    far = peak
    picks = PICKS
    entries = K
    floor = float("-inf")
    if LIMITED:  # no more than the most, and none below the least but the first
        most = tl.load(limits + 2 * row).to(tl.int32)
        least = tl.load(limits + 2 * row + 1)
        summit = tl.max(peak, axis=0)
        weight = tl.load(masses + AT_ONE * plane + row * blocks + block, mask=there, other=0.0)
        weight = tl.sum(tl.exp(tl.maximum(peak - summit, -1e30)) * weight, axis=0)
        floor = summit + tl.log(weight) + least - SLACK
        entries = tl.minimum(K, most)
        picks = tl.minimum(PICKS, entries)
        picks = tl.maximum(tl.minimum(picks, tl.sum((peak >= floor).to(tl.int32), axis=0)), 1)
    chosen = tl.zeros([SLOTS], tl.int32)
    for pick in range(picks):
        _, place = tl.max(far, axis=0, return_indices=True)
        chosen = tl.where(slot == pick, place, chosen)
        far = tl.where(block == place, float("-inf"), far)
    column = chosen[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    picked = (slot < picks)[:, None]
    entry = tl.load(
        logits + row * row_stride + column, mask=picked & (column < readable), other=float("-inf")
    )
    near = tl.reshape(tl.where(picked & (column < vocab), entry, float("-inf")), [SLOTS * BLOCK])
    index = tl.arange(0, SLOTS * BLOCK)
    value = tl.full([SLOTS], float("-inf"), tl.float32)
    places = tl.zeros([SLOTS], tl.int32)
    if LIMITED:
        entries = tl.maximum(tl.minimum(entries, tl.sum((near >= floor).to(tl.int32), axis=0)), 1)
    for pick in range(entries):
        best, place = tl.max(near, axis=0, return_indices=True)
        value = tl.where(slot == pick, best, value)
        places = tl.where(slot == pick, place, places)
        near = tl.where(index == place, float("-inf"), near)
    of_place = (places // BLOCK)[:, None] == slot[None, :]
    ids = tl.sum(tl.where(of_place, chosen[None, :], 0), axis=1) * BLOCK + places % BLOCK
    highest = tl.maximum(tl.max(near, axis=0), tl.max(far, axis=0))  # outside the k; -inf where nothing is
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    top = tl.max(value, axis=0)
    for t in tl.static_range(TEMPERATURES):
        inverse = tl.load(inverse_temperatures + t)
        mass = tl.load(masses + t * plane + row * blocks + block, mask=there, other=0.0)
        outside = tl.sum(tl.exp((near - anchor) * inverse), axis=0)
        outside += tl.sum(tl.exp((far - anchor) * inverse) * mass, axis=0)
        lift = (highest - top) * inverse
        total = tl.sum(tl.exp((value - top) * inverse), axis=0) + outside * tl.exp(lift)
        outside = tl.where(outside > 0.0, outside, 1.0)  # 0 where nothing is outside, and lift -inf
        tl.store(tails + row * TEMPERATURES + t, tl.log(outside) + lift - tl.log(total))
        if t == AT_ONE:
            low = tl.maximum(peak - top, -1e30)  # finite where there is no block
            moment = tl.load(moments + row * blocks + block, mask=there, other=0.0)
            moment = tl.sum(tl.exp(low) * (moment + mass * low), axis=0)
            entropy = tl.log(total) - moment / total
            tl.store(entropies + row, tl.where(entropy < 0.0, 0.0, entropy))
            tl.store(logsumexps + row, top + tl.log(total))
            tl.store(logprobs + row * K + slot, value - top - tl.log(total), mask=slot < K)
    tl.store(token_ids + row * K + slot, tl.minimum(ids, vocab - 1), mask=slot < K)


def selects(vocab: int, k: int, size: int, *, limited: bool) -> bool:
    """Whether `fused_fields` takes a vocabulary of this size and this k, with limits or without."""
    return _held(vocab, k, size) <= (_MOST_LIMITED if limited else _MOST_ENTRIES)


def _held(vocab: int, k: int, size: int) -> int:
    most: int = max(triton.cdiv(vocab, size), triton.next_power_of_2(k) * size)
    return most


def fused_fields(
    logits: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    temperatures: tuple[float, ...],
    k: int,
    size: int,
    limits: Tensor | None = None,
) -> dict[str, Tensor]:
    """The label-free fields of logits (n, V) from the `fused_statistics` of their blocks, row by row.

    Takes the largest block or entry k times over from a program's registers. Ties: the lower id first.
    limits (n, 2) float32: see pipeline.entry_rules; what lies 1e-4 nats below them is not looked for: it is
    counted to the tails, and its places have log-probability -inf and any id.
    """
    rows, vocab = logits.shape
    peak, mass, moment = statistics
    blocks = peak.shape[1]
    fields = {
        "token_ids": torch.empty(rows, k, dtype=torch.int32, device=logits.device),
        "logprobs": logits.new_empty(rows, k),
        "logsumexp": logits.new_empty(rows),
        "entropy": logits.new_empty(rows),
        "tail_logprob": logits.new_empty(rows, len(temperatures)),
    }
    grid: Any = (rows,)
    _fields_kernel[grid](
        logits,
        _inverses(temperatures, logits.device),
        peak if limits is None else limits.contiguous(),
        peak,
        mass,
        moment,
        *fields.values(),
        vocab,
        blocks * size if _has_whole_blocks(logits, blocks * size) else vocab,
        blocks,
        logits.stride(0),
        rows * blocks,
        TEMPERATURES=len(temperatures),
        AT_ONE=temperatures.index(1.0),
        K=k,
        PICKS=min(k, blocks),
        SLOTS=triton.next_power_of_2(k),
        PLACES=triton.next_power_of_2(blocks),
        BLOCK=size,
        LIMITED=limits is not None,
        SLACK=_SLACK,
        num_warps=8 if _held(vocab, k, size) <= _MOST_ENTRIES else 16,
    )
    return fields


_known: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def _inverses(temperatures: tuple[float, ...], device: torch.device) -> Tensor:
    """1 / T of each, kept on the device."""
    key = (temperatures, device)
    if key not in _known:
        _known[key] = torch.tensor([1.0 / t for t in temperatures], dtype=torch.float32, device=device)
    return _known[key]
