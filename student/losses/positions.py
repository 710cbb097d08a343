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
from student.losses.products import Gradients, HeadProducts
from student.losses.records import Entries


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PositionWork:
    """The requests at n distinct positions.

    positions (n,) int64 into hidden (N, D), ascending. layers: the requests there; a position with several
    distributions has one in each of the first layers, labels are in the first only. layer_of, row_of (M,):
    where the M given distributions went; label_row (C,): where the labels went.
    """

    positions: Tensor
    layers: tuple[LogitRows, ...]
    layer_of: Tensor
    row_of: Tensor
    label_row: Tensor
    temperature: float
    inside_only: bool

    def stacked(self) -> tuple[LogitRows, Tensor]:
        """The layers as rows (m,) one after the other, those above the first only where they ask something,
        and the position (m,) of each."""
        if len(self.layers) == 1:
            return self.layers[0], self.positions
        which = [(layer.weights != 0).nonzero()[:, 0] for layer in self.layers[1:]]
        parts = [
            self.layers[0],
            *(layer.pick(index) for layer, index in zip(self.layers[1:], which, strict=True)),
        ]
        sources = [self.positions, *(self.positions[index] for index in which)]
        return LogitRows.cat(parts), torch.cat(sources)

    def unstacked(self, values: Tensor) -> Tensor:
        """(layers, n) of values (m,) of `stacked`, 0 where nothing is asked."""
        if len(self.layers) == 1:
            return values[None]
        count = len(self.positions)
        table = values.new_zeros(len(self.layers), count)
        table[0] = values[:count]
        for layer, rows in enumerate(self.layers[1:], start=1):
            index = (rows.weights != 0).nonzero()[:, 0]
            table[layer, index] = values[count : count + len(index)]
            count += len(index)
        return table


def position_work(
    *,
    positions: Tensor,
    entries: Entries,
    weights: Tensor,
    label_positions: Tensor,
    labels: Tensor,
    label_weights: Tensor,
    columns: int,
    temperature: float,
    inside_only: bool,
) -> PositionWork:
    """Bring M distributions at `positions` (M,) and C labels at `label_positions` (C,) together by position.

    A position may carry several distributions, but one label. columns: the number of logits, with padding.
    """
    distinct, inverse = torch.unique(torch.cat([positions, label_positions]), return_inverse=True)
    rows, label_rows = inverse[: len(positions)], inverse[len(positions) :]
    order = torch.argsort(rows, stable=True)
    ranked = rows[order]
    layer_of = torch.empty_like(rows)
    layer_of[order] = torch.arange(len(rows), device=rows.device) - torch.searchsorted(ranked, ranked)
    depth = 1 + (int(layer_of.max()) if len(rows) else 0)

    def spread(values: Tensor, layer: Tensor | int, row: Tensor, fill: float) -> Tensor:
        table = values.new_full((depth, len(distinct), *values.shape[1:]), fill)
        table[layer, row] = values
        return table

    tables = (
        spread(entries.ids, layer_of, rows, columns),
        spread(entries.logprobs, layer_of, rows, -math.inf),
        spread(entries.log_tail, layer_of, rows, -math.inf),
        spread(weights, layer_of, rows, 0.0),
        spread(labels, 0, label_rows, columns),
        spread(label_weights, 0, label_rows, 0.0),
    )
    layers = tuple(
        LogitRows(
            entries=Entries(ids=ids, logprobs=logprobs, log_tail=log_tail),
            weights=kl_weights,
            labels=next_tokens,
            label_weights=ce_weights,
        )
        for ids, logprobs, log_tail, kl_weights, next_tokens, ce_weights in zip(*tables, strict=True)
    )
    return PositionWork(
        positions=distinct,
        layers=layers,
        layer_of=layer_of,
        row_of=rows,
        label_row=label_rows,
        temperature=temperature,
        inside_only=inside_only,
    )


def run_positions(
    hidden: Tensor, work: PositionWork, products: HeadProducts, gradients: Gradients, memory_budget: int
) -> tuple[Tensor, Tensor]:
    """KL (layers, n) and cross entropy (n,) at the n positions of `work`; adds to `gradients`.

    memory_budget: bytes of logits and of what is made from them at a time; at least one position's.
    """
    kernel = kernel_for(hidden.device, products.dtype)
    if kernel is not None:
        return _run_kernel(kernel, hidden, work, products, gradients, memory_budget)
    count, columns, dtype = len(work.positions), len(products.weight), products.dtype
    kl = torch.zeros((len(work.layers), count), dtype=dtype, device=hidden.device)
    ce = torch.zeros((count,), dtype=dtype, device=hidden.device)
    stride = -(-(columns + 1) // 16) * 16  # rows begin on a cache line
    apart = work.temperature != 1.0 and bool((work.layers[0].label_weights != 0).any())
    buffers = 1 + apart + (products.softcap is not None) + 0.5 * products.narrow
    copies = sum(int((layer.weights != 0).sum()) for layer in work.layers[1:])
    size = _chunk_rows(count, copies, int(stride * dtype.itemsize * buffers), memory_budget)
    buffer = torch.empty((min(size, count), stride), dtype=dtype, device=hidden.device)
    slopes = None if products.softcap is None else torch.empty_like(buffer)

    for start in range(0, count, size):
        chunk = slice(start, min(start + size, count))
        index = work.positions[chunk]
        states = hidden.index_select(0, index).to(dtype)  # (n, D)
        logits = buffer[: len(index), : columns + 1]
        slope = None if slopes is None else slopes[: len(index), :columns]
        for block, matrix in products.blocks(columns):
            curve = products.logits(states, block, matrix, logits[:, block])
            if slope is not None and curve is not None:
                slope[:, block] = curve
        logits[:, columns] = -math.inf
        kl[:, chunk], ce[chunk] = _losses(logits, work, chunk, products.columns, apart)
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
    count, (columns, width), dtype = len(work.positions), products.weight.shape, products.dtype
    rows, sources = work.stacked()
    kl = torch.zeros((len(work.layers), count), dtype=dtype, device=hidden.device)
    values, ce = kl.new_zeros(len(sources)), kl.new_zeros(len(sources))
    apart = work.temperature != 1.0
    stride = -(-columns // 16) * 16
    size = _chunk_rows(len(sources), 0, stride * dtype.itemsize, memory_budget)
    buffer = torch.empty((min(size, len(sources)), stride), dtype=dtype, device=hidden.device)
    # A row's gradient lies in the row's own memory, half as wide where the factors of products are.
    slots = buffer.view(products.operand)
    states = hidden.index_select(0, sources).to(products.operand)  # (n, D)
    pulled = None if gradients.hidden is None else kl.new_empty(len(sources), width)
    matrix = products.operand_matrix()
    for start in range(0, len(sources), size):
        chunk = slice(start, min(start + size, len(sources)))
        logits = products.product(states[chunk], matrix.t(), buffer[: chunk.stop - start, :columns])
        grads = slots[: chunk.stop - start, :columns] if gradients.wanted else None
        values[chunk], ce[chunk] = kernel(
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
        if pulled is not None:
            products.product(grads, matrix, pulled[chunk])
        if gradients.weight is not None:
            gradients.weight.add(slice(0, columns), grads.t(), states[chunk])
        if gradients.bias is not None:
            gradients.bias += grads.sum(dim=0, dtype=dtype)
    if gradients.hidden is not None and pulled is not None:
        gradients.hidden.index_add_(0, sources, pulled)
    return work.unstacked(values), ce[:count]


def _chunk_rows(count: int, copies: int, row_bytes: int, memory_budget: int) -> int:
    """Positions per chunk, at least 1: even chunks that fit the budget, all `copies` of rows in one of
    them."""
    most = max(1, memory_budget // row_bytes)
    most -= min(copies, most // 2)
    return max(1, math.ceil(count / max(1, math.ceil(count / most))))


def _losses(
    logits: Tensor, work: PositionWork, chunk: slice, tokens: int, apart: bool
) -> tuple[Tensor, Tensor]:
    """KL (layers, n) and CE (n,) of a chunk, whose logits (n, V + 1) become the gradient of all its terms.

    tokens: how many of the V columns are not padding. apart: whether KL and CE need softmaxes of their own,
    for a temperature other than 1.
    """
    temperature = work.temperature
    losses_of = partial(row_losses, tokens=tokens, inside_only=work.inside_only)
    first = work.layers[0].pick(chunk)
    kl = first.weights.new_zeros(len(work.layers), len(logits))
    more: list[tuple[Tensor | slice, Tensor]] = []  # rows, and the gradient of their other terms
    for layer, rows in enumerate(work.layers[1:], start=1):
        which = rows.weights[chunk].nonzero()[:, 0]
        if len(which):
            copy = logits[which].div_(temperature)
            rows = rows.pick(chunk).pick(which)
            kl[layer, which] = losses_of(copy, rows, temperature=temperature)[0]
            more.append((which, copy))
    if apart:
        copy = logits.clone()
        first, labelled = first.split(logits.shape[1] - 1)
        _, ce = losses_of(copy, labelled, temperature=1.0)
        more.append((slice(None), copy))
    if temperature != 1.0:
        logits.div_(temperature)
    kl[0], fused_ce = losses_of(logits, first, temperature=temperature)
    for place, copy in more:
        logits[place] += copy
    return kl, ce if apart else fused_ce
