"""The losses as functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from student.losses.fused import MEMORY_BUDGET, Work, run
from student.losses.head import Head
from student.losses.positions import plan
from student.losses.records import Entries, entries_of
from student.losses.targets import IGNORE_INDEX, RelationTargets, Tail


def _acc_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def sparse_kl(
    hidden: Tensor,
    lm_head_weight: Tensor,
    target: Any,
    *,
    tail: Tail = "bucket",
    temperature: float = 1.0,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    """sum_n w_n T^2 KL(p_n || q_n), p the teacher's sparse record and q = softmax(logits / T)."""
    head = Head(weight=lm_head_weight, bias=bias, softcap=softcap, vocab_size=vocab_size)
    count, device, dtype = hidden.shape[0], hidden.device, _acc_dtype(hidden, lm_head_weight)
    if len(target.token_ids) != count:
        raise ValueError(f"sparse_kl: hidden has {count} positions, the target {len(target.token_ids)}")
    entries = entries_of(target, tail=tail, temperature=temperature, columns=head.columns, dtype=dtype)
    if weights is None:
        weights = torch.full((count,), 1.0 / max(count, 1), dtype=dtype, device=device)
    elif weights.shape != (count,):
        raise ValueError(f"sparse_kl: weights must be ({count},), not {tuple(weights.shape)}")
    weights = weights.detach().to(dtype)
    rows = weights.nonzero()[:, 0]
    picked = Entries(ids=entries.ids[rows], logprobs=entries.logprobs[rows], log_tail=entries.log_tail[rows])
    none = rows[:0]
    positions = plan(
        positions=rows,
        entries=picked,
        weights=weights[rows],
        label_positions=none,
        labels=none,
        label_weights=weights[none],
        columns=head.columns,
        temperature=temperature,
        inside_only=tail == "renormalize",
    )
    return run(hidden, head, Work(positions=positions, memory_budget=memory_budget)).total


def cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    """-sum_n w_n log softmax(logits_n)[labels_n] over the positions whose label is not -100."""
    head = Head(weight=lm_head_weight, bias=bias, softcap=softcap, vocab_size=vocab_size)
    dtype = _acc_dtype(hidden, lm_head_weight)
    if labels.shape != (hidden.shape[0],):
        raise ValueError(f"cross_entropy: labels must be ({hidden.shape[0]},), not {tuple(labels.shape)}")
    rows = (labels != IGNORE_INDEX).nonzero()[:, 0]
    if weights is None:
        weights = torch.full((len(labels),), 1.0 / max(len(rows), 1), dtype=dtype, device=hidden.device)
    elif weights.shape != labels.shape:
        raise ValueError(f"cross_entropy: weights must be {tuple(labels.shape)}, not {tuple(weights.shape)}")
    weights = weights.detach().to(dtype)
    rows = rows[weights[rows] != 0]
    picked = labels[rows]
    if bool(((picked < 0) | (picked >= head.columns)).any()):
        raise ValueError(f"cross_entropy: a label lies outside 0..{head.columns - 1}")
    positions = plan(
        positions=rows[:0],
        entries=no_entries(hidden.device, dtype),
        weights=weights[:0],
        label_positions=rows,
        labels=picked,
        label_weights=weights[rows],
        columns=head.columns,
        temperature=1.0,
        inside_only=False,
    )
    return run(hidden, head, Work(positions=positions, memory_budget=memory_budget)).total


def no_entries(device: torch.device, dtype: torch.dtype) -> Entries:
    """Entries of no position."""
    return Entries(
        ids=torch.zeros((0, 1), dtype=torch.int64, device=device),
        logprobs=torch.zeros((0, 1), dtype=dtype, device=device),
        log_tail=torch.zeros((0,), dtype=dtype, device=device),
    )


def relation_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    factor: Tensor | None = None,
    *,
    gram: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    """1 - cos(R_s, R_t), R_s = Z Z^T of the student's logits Z (P, V), R_t = factor factor^T or gram."""
    head = Head(weight=lm_head_weight, bias=bias, softcap=softcap, vocab_size=vocab_size)
    count = hidden.shape[0]
    for name, value in (("factor", factor), ("gram", gram)):
        if value is not None and (value.dim() != 2 or value.shape[0] != count):
            raise ValueError(f"relation_loss: {name} must have {count} rows, not {tuple(value.shape)}")
    image = RelationTargets(
        positions=torch.arange(count, device=hidden.device), sample=0, factor=factor, gram=gram
    )
    work = Work(positions=None, images=(image,), image_weights=(1.0,), memory_budget=memory_budget)
    return run(hidden, head, work).total
