"""Cross entropy and sparse KL in one pass over the positions: every position's logits are made once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from student.losses.products import HeadProducts, WeightGradient
from student.losses.records import Entries


@dataclass(slots=True, kw_only=True, eq=False)
class Gradients:
    """Where the gradients of a step are summed; None: not wanted. hidden (N, D), weight (V, D), bias (V,)."""

    hidden: Tensor | None
    weight: WeightGradient | None
    bias: Tensor | None

    @property
    def wanted(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """What is asked of the student at n rows of logits.

    entries: the distributions to compare with, all blank where there is none; weights (n,) of their KL;
    labels (n,) int64, blank where there is none, and label_weights (n,) of their cross entropy.
    """

    entries: Entries
    weights: Tensor
    labels: Tensor
    label_weights: Tensor

    def pick(self, index: Tensor | slice) -> Rows:
        """Some of the rows."""
        entries = self.entries
        picked = Entries(
            ids=entries.ids[index], logprobs=entries.logprobs[index], log_tail=entries.log_tail[index]
        )
        return Rows(
            entries=picked,
            weights=self.weights[index],
            labels=self.labels[index],
            label_weights=self.label_weights[index],
        )

    def without_labels(self, columns: int) -> Rows:
        """The same with no cross entropy."""
        return Rows(
            entries=self.entries,
            weights=self.weights,
            labels=torch.full_like(self.labels, columns),
            label_weights=torch.zeros_like(self.label_weights),
        )

    def without_entries(self, columns: int) -> Rows:
        """The same with no KL."""
        count = self.labels.shape[0]
        blank = Entries(
            ids=self.labels.new_full((count, 1), columns),
            logprobs=self.weights.new_full((count, 1), -math.inf),
            log_tail=self.weights.new_full((count,), -math.inf),
        )
        return Rows(
            entries=blank,
            weights=torch.zeros_like(self.weights),
            labels=self.labels,
            label_weights=self.label_weights,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PositionWork:
    """All that is asked at n distinct positions.

    positions (n,) int64 into hidden (N, D), ascending. layers: a position that carries several
    distributions has one in each of the first layers; labels only in the first. layer_of, row_of (M,):
    where the M distributions handed to `plan` went; label_row (C,): where the labels went.
    """

    positions: Tensor
    layers: tuple[Rows, ...]
    layer_of: Tensor
    row_of: Tensor
    label_row: Tensor
    temperature: float
    inside_only: bool


def plan(
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
    """Gather M distributions at `positions` (M,) and C labels at `label_positions` (C,) by position."""
    distinct, inverse = torch.unique(torch.cat([positions, label_positions]), return_inverse=True)
    count = distinct.shape[0]
    rows, label_rows = inverse[: positions.shape[0]], inverse[positions.shape[0] :]
    order = torch.argsort(rows, stable=True)
    ranked = rows[order]
    layer_of = torch.empty_like(rows)
    layer_of[order] = torch.arange(len(rows), device=rows.device) - torch.searchsorted(ranked, ranked)
    depth = 1 + (int(layer_of.max()) if len(rows) else 0)
    width = max(1, entries.ids.shape[1])

    ids = entries.ids.new_full((depth, count, width), columns)
    logprobs = entries.logprobs.new_full((depth, count, width), -math.inf)
    log_tail = entries.log_tail.new_full((depth, count), -math.inf)
    kl_weights = weights.new_zeros((depth, count))
    if len(rows):
        ids[layer_of, rows] = entries.ids
        logprobs[layer_of, rows] = entries.logprobs
        log_tail[layer_of, rows] = entries.log_tail
        kl_weights[layer_of, rows] = weights
    all_labels = labels.new_full((depth, count), columns)
    all_labels[0, label_rows] = labels
    all_label_weights = label_weights.new_zeros((depth, count))
    all_label_weights[0, label_rows] = label_weights
    layers = tuple(
        Rows(
            entries=Entries(ids=ids[layer], logprobs=logprobs[layer], log_tail=log_tail[layer]),
            weights=kl_weights[layer],
            labels=all_labels[layer],
            label_weights=all_label_weights[layer],
        )
        for layer in range(depth)
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


def form(logits: Tensor, rows: Rows, *, temperature: float, inside_only: bool) -> tuple[Tensor, Tensor]:
    """KL (n,) and cross entropy (n,) of each row; `logits` (n, V + 1) become their weighted gradient.

    The last column of `logits` is the blank and holds -inf. With q = softmax(logits), S the entries' ids,
    q_tail = sum of q outside S, p and p_tail the teacher's and s = sum_S p + p_tail:
        KL = sum_S p (log p - log q) + p_tail (log p_tail - log q_tail)
        dKL / dlogit_i = s q_i - p_i in S, and q_j (s - p_tail / q_tail) outside.
    inside_only: q is the softmax over S alone, nothing outside. The weights of the KL count at
    temperature^2 in the value's sense and at temperature in the gradient's, logits being already divided
    by the temperature. Cross entropy is that of q at these logits.
    """
    ids, log_p, log_tail = rows.entries.ids, rows.entries.logprobs, rows.entries.log_tail
    inside = logits.gather(1, ids)  # (n, E)
    label = logits.gather(1, rows.labels[:, None])[:, 0]
    logits.scatter_(1, ids, -math.inf)
    # The complement has its own maximum, so that a tail of any smallness keeps its digits.
    top_outside = logits.amax(dim=1)
    top = torch.maximum(top_outside, inside.amax(dim=1))
    logits.sub_(top_outside.nan_to_num(neginf=0.0)[:, None]).exp_()
    sum_outside = logits.sum(dim=1)
    inside = inside - top[:, None]
    log_outside = (top_outside - top) + sum_outside.log()
    log_inside = torch.logsumexp(inside, dim=1)
    log_all = torch.logaddexp(log_inside, log_outside)

    log_norm = log_inside.nan_to_num(neginf=0.0) if inside_only else log_all
    log_q = inside - log_norm[:, None]
    p, p_tail = log_p.exp(), log_tail.exp()
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=1)
    if not inside_only:
        kl = kl + torch.where(p_tail > 0, p_tail * (log_tail - (log_outside - log_all)), 0.0)
    ce = torch.where(rows.label_weights != 0, log_all - (label - top), 0.0)

    mass = p.sum(dim=1) + p_tail
    q_tail = (log_outside - log_all).exp()
    kl_weights = rows.weights * temperature
    outside = rows.label_weights * q_tail
    if not inside_only:
        outside = outside + kl_weights * (mass * q_tail - p_tail)
    logits.mul_(torch.where(sum_outside > 0, outside / sum_outside, 0.0)[:, None])
    grad_inside = kl_weights[:, None] * (mass[:, None] * log_q.exp() - p)
    grad_inside = grad_inside + rows.label_weights[:, None] * (inside - log_all[:, None]).exp()
    logits.scatter_(1, ids, grad_inside)
    logits.scatter_add_(1, rows.labels[:, None], -rows.label_weights[:, None])
    return torch.where(rows.weights != 0, kl * temperature**2, 0.0), ce


def chunk_rows(count: int, columns: int, *, itemsize: int, buffers: int, memory_budget: int) -> int:
    """Positions a chunk: even chunks such that `buffers` arrays (rows, columns) fit the budget, at least 1."""
    most = max(1, memory_budget // (columns * itemsize * buffers))
    chunks = max(1, math.ceil(count / most))
    return max(1, math.ceil(count / chunks))


def run_positions(
    hidden: Tensor,
    work: PositionWork,
    products: HeadProducts,
    gradients: Gradients,
    *,
    softcap: float | None,
    logit_scale: float,
    memory_budget: int,
) -> tuple[Tensor, Tensor]:
    """KL (layers, n) and cross entropy (n,) at the n positions of `work`; adds to `gradients`."""
    count, columns, dtype = len(work.positions), products.columns, products.dtype
    first = work.layers[0]
    kl = torch.zeros((len(work.layers), count), dtype=dtype, device=hidden.device)
    ce = torch.zeros((count,), dtype=dtype, device=hidden.device)
    apart = work.temperature != 1.0 and bool((first.label_weights != 0).any())
    buffers = 1 + apart + (len(work.layers) > 1) + (softcap is not None)
    stride = -(-(columns + 1) // 16) * 16  # rows start on a cache line
    size = chunk_rows(count, stride, itemsize=dtype.itemsize, buffers=buffers, memory_budget=memory_budget)
    buffer = torch.empty((min(size, count), stride), dtype=dtype, device=hidden.device)

    for start in range(0, count, size):
        chunk = slice(start, min(start + size, count))
        index = work.positions[chunk]
        states = hidden.index_select(0, index).to(dtype)  # (n, D)
        logits = buffer[: len(index), : columns + 1]
        products.logits(states, out=logits[:, :columns])
        if logit_scale != 1.0:
            logits.mul_(logit_scale)
        slope = None
        if softcap is not None:
            logits.div_(softcap).tanh_()
            slope = 1.0 - logits.square()
            logits.mul_(softcap)
        logits[:, columns] = -math.inf

        also: list[tuple[Tensor | slice, Tensor]] = []
        if apart:
            extra = logits.clone()
            rows = first.pick(chunk).without_entries(columns)
            ce[chunk] = form(extra, rows, temperature=1.0, inside_only=False)[1]
            also.append((slice(None), extra))
        for depth, layer in enumerate(work.layers[1:], start=1):
            which = layer.weights[chunk].nonzero()[:, 0]
            if len(which):
                extra = logits[which].div_(work.temperature)
                rows = layer.pick(chunk).pick(which)
                kl[depth, start + which] = form(
                    extra, rows, temperature=work.temperature, inside_only=work.inside_only
                )[0]
                also.append((which, extra))
        if work.temperature != 1.0:
            logits.div_(work.temperature)
        rows = first.pick(chunk)
        rows = rows.without_labels(columns) if apart else rows
        kl[0, chunk], first_ce = form(
            logits, rows, temperature=work.temperature, inside_only=work.inside_only
        )
        if not apart:
            ce[chunk] = first_ce
        if not gradients.wanted:
            continue
        for which, extra in also:
            logits[which] += extra
        grad = logits[:, :columns]
        if slope is not None:
            grad.mul_(slope[:, :columns])
        if logit_scale != 1.0:
            grad.mul_(logit_scale)
        if gradients.hidden is not None:
            gradients.hidden.index_add_(0, index, products.hidden_gradient(grad))
        if gradients.weight is not None:
            gradients.weight.add(slice(0, columns), grad.t(), states)
        if gradients.bias is not None:
            gradients.bias[:columns] += grad.sum(dim=0)
    return kl, ce
