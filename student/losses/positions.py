"""Cross entropy and sparse KL in one pass over the positions: every position's logits are made once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from student.divergences import Divergence
from student.losses.batches import Batches
from student.losses.logit_rows import LogitRows, row_losses
from student.losses.plan import Layout
from student.losses.products import Gradients, HeadProducts
from student.losses.records import Entries
from student.losses.selection import row_entropy


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PositionWork:
    """The requests at the m rows of logits of `layout`, each at a position of hidden (N, D); labels are in
    the first `layout.positions` rows only. With batches the rows have no labels and stand at distinct
    positions."""

    layout: Layout
    rows: LogitRows
    temperature: float
    inside_only: bool
    divergences: tuple[Divergence, ...]

    @classmethod
    def compared(
        cls,
        positions: Tensor,
        entries: Entries,
        weights: Tensor,
        batches: Batches,
        divergence: Divergence,
        temperature: float,
    ) -> PositionWork:
        """Of `sinkhorn`: entries (M, K) at distinct positions (M,), which weigh weights (M,), in batches."""
        kept = replace(
            entries, **{name: getattr(entries, name).to(weights.dtype) for name in ("logprobs", "log_tail")}
        )
        return cls(
            layout=Layout(
                sources=positions,
                base=positions[:0],
                kl_rows=torch.arange(len(positions), device=positions.device),
                ce_rows=positions[:0],
            ),
            rows=LogitRows.of_entries(kept, weights, batches),
            temperature=temperature,
            inside_only=False,
            divergences=(divergence,),
        )

    def __len__(self) -> int:
        """m."""
        return len(self.rows.weights)

    def chunks(self, count: int, further: int, row_bytes: int, memory_budget: int) -> list[slice]:
        """`count` rows in even parts that fit the budget, `further` rows with any of them; of whole batches
        where there are some."""
        batches = self.rows.batches
        if batches is None:
            size = _chunk_rows(count, further, row_bytes, memory_budget)
            return [slice(start, min(start + size, count)) for start in range(0, count, size)]
        row_bytes += 4 * batches.row_elements * self.rows.weights.itemsize
        return list(batches.chunks(max(1, memory_budget // row_bytes)))


def run_positions(
    hidden: Tensor,
    work: PositionWork,
    products: HeadProducts,
    gradients: Gradients,
    memory_budget: int,
    kl: Tensor,
    ce: Tensor,
) -> None:
    """Puts KL and cross entropy of the rows of `work` in kl (m,) and ce (m,), which hold zeros; adds to
    `gradients`.

    memory_budget: bytes of logits and of what is made from them at a time; at least one position's, and with
    a selection one sample's; the selected ones come on top of it. Where rows are selected, their KL counts as
    often as their weights do in the total, and that of the others is 0.
    """
    kernel = kernel_for(hidden.device, products.dtype)
    if kernel is not None:
        _run_kernel(kernel, hidden, work, products, gradients, memory_budget, kl, ce)
        return
    layout, columns, dtype = work.layout, len(products.weight), products.dtype
    count = layout.positions
    stride = -(-(columns + 1) // 16) * 16  # rows begin on a cache line
    apart = work.temperature != 1.0 and len(layout.ce_rows) > 0
    buffers = 1 + apart + (products.softcap is not None) + 0.5 * products.narrow
    chunks = work.chunks(count, len(layout.base), int(stride * dtype.itemsize * buffers), memory_budget)
    borders = torch.tensor([*(rows.start for rows in chunks), count], device=hidden.device)
    rest = (torch.searchsorted(layout.base, borders) + count).tolist()  # the rows above n of each chunk
    capped = products.softcap is not None  # a row then holds its slopes behind its logits

    def make(rows: slice, table: Tensor) -> None:
        states = hidden.index_select(0, layout.sources[rows]).to(dtype)  # (n, D)
        for block, matrix in products.blocks(columns):
            slope = products.logits(states, block, matrix, table[:, block])
            if slope is not None:
                table[:, stride + block.start : stride + block.stop] = slope
        table[:, columns] = -math.inf

    def entropy_of(table: Tensor) -> Tensor:
        return row_entropy(table[:, :columns])

    for number, part in enumerate(_parts(work, chunks, stride * (1 + capped), make, entropy_of)):
        table, logits = part.table, part.table[:, : columns + 1]
        index = layout.sources[part.rows]
        if isinstance(part.rows, slice):
            copies = slice(rest[number], rest[number + 1])
            further_work = work.rows.pick(copies)
            which = layout.base[copies.start - count : copies.stop - count] - part.rows.start
            losses = _losses(logits, work, part.asked, further_work, which, products.columns, apart)
            kl[part.rows], kl[copies], ce[part.rows] = losses
        else:
            nothing = part.asked.pick(slice(0, 0))
            losses = _losses(logits, work, part.asked, nothing, index[:0], products.columns, apart)
            part.put(losses[0], losses[2], kl, ce)
        if gradients.wanted:
            slope = table[:, stride : stride + columns] if capped else None
            grad = products.unscale(logits[:, :columns], slope)
            gradients.add(products, grad, index, hidden.index_select(0, index).to(dtype))


def kernel_for(device: torch.device, dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`kernels.row_kernel` where Triton drives the device, for sums in float32."""
    return _row_kernel() if device.type == "cuda" and dtype == torch.float32 else None


@cache
def _row_kernel() -> Callable[..., tuple[Tensor, Tensor]] | None:
    if find_spec("triton") is None:
        return None
    from student.losses.kernels import row_kernel

    return row_kernel


def _entropy_kernel() -> Callable[..., Tensor]:
    from student.losses.entropy_kernel import kernel_entropy

    return kernel_entropy


def _run_kernel(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    hidden: Tensor,
    work: PositionWork,
    products: HeadProducts,
    gradients: Gradients,
    memory_budget: int,
    kl: Tensor,
    ce: Tensor,
) -> None:
    """`run_positions` through a kernel. Of a selection the entropies are found first, from logits that are as
    wide as the factors of products; those of the selected rows are made again, in full chunks: as many rows
    of logits as a sample has do not fit beside their gradients."""
    sources, rows, selection = work.layout.sources, work.rows, work.layout.selection
    if selection is None:
        _rows_by_kernel(kernel, hidden, sources, rows, work, products, gradients, memory_budget, kl, ce)
        return
    chosen = selection.pick(_entropies(hidden, sources, products, memory_budget))
    scale = selection.scale.to(kl.dtype)
    rows = rows.pick(chosen)
    rows = replace(rows, weights=rows.weights * scale)
    found = kl.new_zeros(2, len(chosen))
    sources = sources.index_select(0, chosen)
    _rows_by_kernel(kernel, hidden, sources, rows, work, products, gradients, memory_budget, *found)
    kl.index_copy_(0, chosen, found[0] * scale)
    ce.index_copy_(0, chosen, found[1])


def _entropies(hidden: Tensor, sources: Tensor, products: HeadProducts, memory_budget: int) -> Tensor:
    """(n,) the entropies of the student at positions sources (n,)."""
    matrix = products.operand_matrix()
    columns, width = len(matrix), -(-len(matrix) // 16) * 16
    row_bytes = width * matrix.itemsize + hidden.shape[1] * (hidden.itemsize + matrix.itemsize)
    size = _chunk_rows(len(sources), 0, row_bytes, memory_budget)
    table = matrix.new_empty(min(size, len(sources)), width)
    found = matrix.new_empty(len(sources), dtype=products.dtype)
    kernel = _entropy_kernel()
    for part, entropy in zip(sources.split(size), found.split(size), strict=True):
        logits = table[: len(part), :columns]
        torch.mm(hidden.index_select(0, part).to(products.operand), matrix.t(), out=logits)
        kernel(logits, out=entropy, bias=products.bias, scale=products.logit_scale, softcap=products.softcap)
    return found


def _rows_by_kernel(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    hidden: Tensor,
    sources: Tensor,
    rows: LogitRows,
    work: PositionWork,
    products: HeadProducts,
    gradients: Gradients,
    memory_budget: int,
    kl: Tensor,
    ce: Tensor,
) -> None:
    """KL (n,) and cross entropy (n,) at rows of logits of positions sources (n,), in seven launches a
    chunk."""
    columns, dtype, matrix = len(products.weight), products.dtype, products.operand_matrix()
    stride = -(-columns // 16) * 16
    parts = work.chunks(len(sources), 0, stride * dtype.itemsize, memory_budget)
    table = kl.new_empty(max((part.stop - part.start for part in parts), default=0), stride)
    for part in parts:
        lines = table[: part.stop - part.start]
        states = hidden.index_select(0, sources[part]).to(products.operand)  # (n, D)
        products.product(states, matrix.t(), lines[:, :columns])
        # A row's gradient lies in the row's own memory, half as wide where the factors of products are.
        grads = lines.view(products.operand)[:, :columns] if gradients.wanted else None
        kernel(
            lines[:, :columns],
            rows.pick(part),
            out=(kl[part], ce[part]),
            grads=grads,
            tokens=products.columns,
            temperature=work.temperature,
            inside_only=work.inside_only,
            divergences=work.divergences,
            apart=work.temperature != 1.0,
            bias=products.bias,
            scale=products.logit_scale,
            softcap=products.softcap,
        )
        if grads is None:
            continue
        if gradients.hidden is not None:
            gradients.hidden.index_add_(0, sources[part], products.product(grads, matrix))
        if gradients.weight is not None:
            gradients.weight.add(slice(0, columns), grads.t(), states)
        if gradients.bias is not None:
            gradients.bias += grads.sum(dim=0, dtype=dtype)


def _chunk_rows(count: int, copies: int, row_bytes: int, memory_budget: int) -> int:
    """Positions per chunk, at least 1: even chunks that fit the budget, all `copies` of rows in one of
    them."""
    most = max(1, memory_budget // row_bytes)
    most -= min(copies, most // 2)
    return max(1, math.ceil(count / max(1, math.ceil(count / most))))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """Rows whose losses and gradients are made together: their memory (n, width), which begins with their
    logits, and their requests. rows: a range of all rows, or, where they are selected, the place (n,) of
    each; then scale (n,) is what the KL of each counts."""

    table: Tensor
    rows: slice | Tensor
    asked: LogitRows
    scale: Tensor | None = None

    def put(self, kl: Tensor, ce: Tensor, all_kl: Tensor, all_ce: Tensor) -> None:
        """KL (n,) and cross entropy (n,) of selected rows to their places."""
        assert isinstance(self.rows, Tensor)
        assert self.scale is not None
        all_kl.index_copy_(0, self.rows, kl * self.scale)
        all_ce.index_copy_(0, self.rows, ce)


def _parts(
    work: PositionWork,
    chunks: list[slice],
    width: int,
    make: Callable[[slice, Tensor], None],
    entropy_of: Callable[[Tensor], Tensor],
) -> Iterator[_Part]:
    """The rows in `chunks`, or the selected ones of whole samples in parts of such a size.

    make: writes the logits of rows into their memory (n, width); it lasts until the next part.
    """
    selection, weights = work.layout.selection, work.rows.weights
    size = max((rows.stop - rows.start for rows in chunks), default=0)
    if selection is None:
        table = weights.new_empty(size, width)
        for rows in chunks:
            part = table[: rows.stop - rows.start]
            make(rows, part)
            yield _Part(table=part, rows=rows, asked=work.rows.pick(rows))
        return
    samples = list(selection.parts(size))
    most = max((takes.stop - takes.start for _, takes in samples), default=0)
    table = weights.new_empty(max((rows.stop - rows.start for rows, _ in samples), default=0), width)
    kept = weights.new_empty(max(most, min(size, len(selection.take))), width)
    places, filled = torch.empty_like(selection.take), 0
    for number, (rows, takes) in enumerate(samples):
        part = table[: rows.stop - rows.start]
        make(rows, part)
        place = selection.pick(entropy_of(part), rows, takes)
        end = filled + len(place)
        torch.index_select(part, 0, place, out=kept[filled:end])
        torch.add(place, rows.start, out=places[takes])
        filled = end
        coming = samples[number + 1][1] if number + 1 < len(samples) else None
        if coming is None or filled + coming.stop - coming.start > len(kept):
            these = slice(takes.stop - filled, takes.stop)
            asked, scale = work.rows.pick(places[these]), selection.scale[these].to(weights.dtype)
            asked = replace(asked, weights=asked.weights * scale)
            yield _Part(table=kept[:filled], rows=places[these], asked=asked, scale=scale)
            filled = 0


def _losses(
    logits: Tensor,
    work: PositionWork,
    first: LogitRows,
    further: LogitRows,
    which: Tensor,
    tokens: int,
    apart: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL (n,) and (c,), CE (n,) of a chunk of n positions, whose logits (n, V + 1) become the gradient of all
    its terms.

    further: c more distributions, and which (c,) of the n positions they stand at. tokens: how many of the V
    columns are not padding. apart: whether KL and CE need softmaxes of their own, for a temperature other
    than 1.
    """
    temperature = work.temperature
    losses_of = partial(row_losses, tokens=tokens, inside_only=work.inside_only, divergences=work.divergences)
    others = logits[which].div_(temperature)
    further_kl, _ = losses_of(others, further, temperature=temperature)
    if apart:
        at_1 = logits.clone()
        first, labelled = first.split()
        _, ce = losses_of(at_1, labelled, temperature=1.0)
    if temperature != 1.0:
        logits.div_(temperature)
    kl, fused_ce = losses_of(logits, first, temperature=temperature)
    if apart:
        logits += at_1
    logits.index_add_(0, which, others)
    return kl, further_kl, ce if apart else fused_ce
