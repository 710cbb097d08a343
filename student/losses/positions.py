"""Cross entropy and sparse KL in one pass over the positions: every position's logits are made once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from student.losses.logit_rows import LogitRows, row_losses
from student.losses.plan import Layout
from student.losses.products import Gradients, HeadProducts
from student.losses.records import Entries


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PositionWork:
    """The requests at rows of logits, each at a position of hidden (N, D), as `layout` lays them out; labels
    are in the first `layout.positions` rows only."""

    layout: Layout
    rows: LogitRows
    temperature: float
    inside_only: bool


def position_work(
    *,
    layout: Layout,
    entries: Entries,
    weights: Tensor,
    labels: Tensor,
    label_weights: Tensor,
    columns: int,
    temperature: float,
    inside_only: bool,
) -> PositionWork:
    """Bring M distributions, their weights (M,), C labels and theirs (C,) to the rows of their layout.

    columns: the number of logits, with padding.
    """

    def spread(values: Tensor, rows: Tensor, fill: float) -> Tensor:
        table = values.new_full((len(layout.sources), *values.shape[1:]), fill)
        return table.index_copy_(0, rows, values)

    return PositionWork(
        layout=layout,
        rows=LogitRows(
            entries=Entries(
                ids=spread(entries.ids, layout.kl_rows, columns),
                logprobs=spread(entries.logprobs, layout.kl_rows, -math.inf),
                log_tail=spread(entries.log_tail, layout.kl_rows, -math.inf),
            ),
            weights=spread(weights, layout.kl_rows, 0.0),
            labels=spread(labels, layout.ce_rows, columns),
            label_weights=spread(label_weights, layout.ce_rows, 0.0),
        ),
        temperature=temperature,
        inside_only=inside_only,
    )


def run_positions(
    hidden: Tensor, work: PositionWork, products: HeadProducts, gradients: Gradients, memory_budget: int
) -> tuple[Tensor, Tensor]:
    """KL (m,) of the rows of `work` and cross entropy (n,) at its n positions; adds to `gradients`.

    memory_budget: bytes of logits and of what is made from them at a time; at least one position's.
    """
    kernel = kernel_for(hidden.device, products.dtype)
    if kernel is not None:
        return _run_kernel(kernel, hidden, work, products, gradients, memory_budget)
    layout, columns, dtype = work.layout, len(products.weight), products.dtype
    count, further = layout.positions, len(layout.base)
    kl = torch.zeros((count + further,), dtype=dtype, device=hidden.device)
    ce = torch.zeros((count,), dtype=dtype, device=hidden.device)
    stride = -(-(columns + 1) // 16) * 16  # rows begin on a cache line
    apart = work.temperature != 1.0 and len(layout.ce_rows) > 0
    buffers = 1 + apart + (products.softcap is not None) + 0.5 * products.narrow
    size = _chunk_rows(count, further, int(stride * dtype.itemsize * buffers), memory_budget)
    buffer = torch.empty((min(size, count), stride), dtype=dtype, device=hidden.device)
    slopes = None if products.softcap is None else torch.empty_like(buffer)

    ends = torch.searchsorted(layout.base, torch.arange(0, count + size, size, device=hidden.device))
    rest = (ends + count).tolist()  # the rows above n of each chunk
    for start in range(0, count, size):
        chunk = slice(start, min(start + size, count))
        copies = slice(rest[start // size], rest[start // size + 1])
        index = layout.sources[chunk]
        states = hidden.index_select(0, index).to(dtype)  # (n, D)
        logits = buffer[: len(index), : columns + 1]
        slope = None if slopes is None else slopes[: len(index), :columns]
        for block, matrix in products.blocks(columns):
            curve = products.logits(states, block, matrix, logits[:, block])
            if slope is not None and curve is not None:
                slope[:, block] = curve
        logits[:, columns] = -math.inf
        kl[chunk], kl[copies], ce[chunk] = _losses(logits, work, chunk, copies, products.columns, apart)
        if gradients.wanted:
            grad = products.unscale(logits[:, :columns], slope)
            if gradients.hidden is not None:
                gradients.hidden.index_add_(0, index, products.hidden_gradient(grad))
            if gradients.weight is not None:
                gradients.weight.add(slice(0, columns), grad.t(), states)
            if gradients.bias is not None:
                gradients.bias[:columns] += grad.sum(dim=0)
    return kl, ce


def kernel_for(device: torch.device, dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`kernels.row_kernel` where Triton drives the device, for sums in float32."""
    return _row_kernel() if device.type == "cuda" and dtype == torch.float32 else None


@cache
def _row_kernel() -> Callable[..., tuple[Tensor, Tensor]] | None:
    if find_spec("triton") is None:
        return None
    from student.losses.kernels import row_kernel

    return row_kernel


def _run_kernel(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    hidden: Tensor,
    work: PositionWork,
    products: HeadProducts,
    gradients: Gradients,
    memory_budget: int,
) -> tuple[Tensor, Tensor]:
    """`run_positions` in six launches a chunk: products, one pass over the logits, and what gathers."""
    (columns, width), dtype = products.weight.shape, products.dtype
    rows, sources = work.rows, work.layout.sources
    kl = torch.empty(len(sources), dtype=dtype, device=hidden.device)
    ce = torch.empty_like(kl)
    apart = work.temperature != 1.0
    stride = -(-columns // 16) * 16
    size = _chunk_rows(len(sources), 0, stride * dtype.itemsize, memory_budget)
    buffer = torch.empty((min(size, len(sources)), stride), dtype=dtype, device=hidden.device)
    # A row's gradient lies in the row's own memory, half as wide where the factors of products are.
    slots = buffer.view(products.operand)
    states = hidden.index_select(0, sources).to(products.operand)  # (n, D)
    pulled = None if gradients.hidden is None else kl.new_empty(len(buffer), width)
    matrix = products.operand_matrix()
    for start in range(0, len(sources), size):
        chunk = slice(start, min(start + size, len(sources)))
        logits = products.product(states[chunk], matrix.t(), buffer[: chunk.stop - start, :columns])
        grads = slots[: chunk.stop - start, :columns] if gradients.wanted else None
        kl[chunk], ce[chunk] = kernel(
            logits,
            rows.pick(chunk),
            grads=grads,
            tokens=products.columns,
            temperature=work.temperature,
            inside_only=work.inside_only,
            apart=apart,
            bias=products.bias,
            scale=products.logit_scale,
            softcap=products.softcap,
        )
        if grads is None:
            continue
        if gradients.hidden is not None and pulled is not None:
            part = products.product(grads, matrix, pulled[: len(grads)])
            gradients.hidden.index_add_(0, sources[chunk], part)
        if gradients.weight is not None:
            gradients.weight.add(slice(0, columns), grads.t(), states[chunk])
        if gradients.bias is not None:
            gradients.bias += grads.sum(dim=0, dtype=dtype)
    return kl, ce[: work.layout.positions]


def _chunk_rows(count: int, copies: int, row_bytes: int, memory_budget: int) -> int:
    """Positions per chunk, at least 1: even chunks that fit the budget, all `copies` of rows in one of
    them."""
    most = max(1, memory_budget // row_bytes)
    most -= min(copies, most // 2)
    return max(1, math.ceil(count / max(1, math.ceil(count / most))))


def _losses(
    logits: Tensor, work: PositionWork, chunk: slice, copies: slice, tokens: int, apart: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """KL (n,) and (c,), CE (n,) of a chunk of n positions, whose logits (n, V + 1) become the gradient of all
    its terms.

    copies: the rows of further distributions at these positions. tokens: how many of the V columns are not
    padding. apart: whether KL and CE need softmaxes of their own, for a temperature other than 1.
    """
    temperature = work.temperature
    losses_of = partial(row_losses, tokens=tokens, inside_only=work.inside_only)
    first, further = work.rows.pick(chunk), work.rows.pick(copies)
    which = work.layout.base[copies.start - work.layout.positions : copies.stop - work.layout.positions]
    which = which - chunk.start
    others = logits[which].div_(temperature)
    further_kl, _ = losses_of(others, further, temperature=temperature)
    if apart:
        at_1 = logits.clone()
        first, labelled = first.split(logits.shape[1] - 1)
        _, ce = losses_of(at_1, labelled, temperature=1.0)
    if temperature != 1.0:
        logits.div_(temperature)
    kl, fused_ce = losses_of(logits, first, temperature=temperature)
    if apart:
        logits += at_1
    logits.index_add_(0, which, others)
    return kl, further_kl, ce if apart else fused_ce
