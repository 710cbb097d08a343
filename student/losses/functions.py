"""The losses as functions of hidden states and head: the logits of all positions are never held.

Shared by all: hidden (N, D) and lm_head_weight (V, D) of any floating dtype, logits = hidden weight^T + bias
(V,), then softcap * tanh(logits / softcap) where given. Columns at or above vocab_size are padding: they
count in the student's softmax, where their mass is its error, but no target, label or Gram matrix contains
them. Sums are formed in float32 (float64 where an argument is), whatever the dtype. Differentiable once, in
hidden, weight and bias; a frozen head costs no gradient memory. memory_budget: bytes of logits at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cache_schema.errors import WrongUsage
from cache_schema.format.records import IGNORE_INDEX
from models.head import Head
from student.divergences import APART, BATCH, FORWARD, OF_LOGITS, Divergence
from student.loss_weights import Tail
from student.losses.batches import Batches
from student.losses.dense import DenseWork
from student.losses.fused import fused_losses
from student.losses.logit_rows import LogitRows
from student.losses.plan import Layout, group_images
from student.losses.positions import PositionWork
from student.losses.products import wide_dtype
from student.losses.records import entries_of
from student.losses.relation import RelationWork
from student.losses.targets import RelationTargets


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
    memory_budget: int | None = None,
    divergence: str = "forward_kl",
) -> Tensor:
    """sum_n w_n T^2 KL(p_n || q_n), p the teacher at N positions as a sparse record, q the student.

    target: any object with the fields of TopK as tensors: token_ids (N, K), logprobs (N, K),
    tail_logprob (N, n_T), temperatures (n_T,); for `sampled` also sampled_ids, sampled_counts (N, M) and, if
    not 1, sample_temperature. weights (N,), constants, 1/N when None; positions of weight 0 are skipped.
    Returns a float32 (float64) scalar. With q = softmax(logits / T), p the teacher's softmax at T, S the K
    ids and a subscript "tail" for the sum outside them:

    - `bucket`: KL = sum_S p (log p - log q) + p_tail (log p_tail - log q_tail). At K = V the dense KL.
    - `renormalize`: KL = sum_S p' (log p' - log q'), p' = p / sum_S p, q' = q / sum_S q. Blind to the tail.
    - `drop`: KL = sum_S p (log p - log q). Not a divergence: it can be negative; its minimum is elsewhere.
    - `sampled`: KL(p^ || q) with p^ = p in S and p_tail count_j / M at each of the M draws j. Over fresh
      draws the mean of its gradient is that of the dense KL. Over one draw kept for many epochs it is not,
      and the value is that to p^, which is above the dense one.

    divergence: another one in place of the KL, as `jsd:0.5`, over the events of `bucket` and the student's
    padding (`student.losses.divergences`). `taid:0.4`: TAID at t = 0.4, the tail's mass spread evenly.
    `sinkhorn`: its batches are 16 positions each, in order; their weights must be equal.

    Gradients are those of this value, the factor T^2 included. ValueError: shapes that do not fit, a T whose
    tail mass (whose draws) the target does not hold, an id with mass that is not a token of the head, a
    divergence that is not known or with another tail.
    """
    head = Head(weight=lm_head_weight, bias=bias, softcap=softcap, vocab_size=vocab_size)
    count, dtype = len(hidden), wide_dtype(hidden.dtype, lm_head_weight.dtype)
    if len(target.token_ids) != count:
        raise ValueError(f"sparse_kl: hidden has {count} positions, the target {len(target.token_ids)}")
    if not temperature > 0:
        raise ValueError(f"sparse_kl: temperature must be positive, not {temperature}")
    weights = _weights(weights, count, 1.0 / max(count, 1), hidden.device, dtype)
    form = Divergence.parse(divergence)
    if form != FORWARD and tail != "bucket":
        raise WrongUsage(f"divergence {form.name} is defined with tail `bucket`, not `{tail}`")
    if form.name in OF_LOGITS:
        raise WrongUsage(f"divergence {form.name} needs the teacher's logits: take a stage with tail `dense`")
    entries = entries_of(target, tail=tail, temperature=temperature, dtype=dtype).of(head)
    rows = weights.nonzero()[:, 0]
    weights = weights[rows]
    if form.name in APART:
        kept = entries.pick(rows)
        apart: DenseWork | PositionWork
        if form.name == "sinkhorn":
            ends = (*range(BATCH, len(rows), BATCH), len(rows)) if len(rows) else ()
            batches = Batches.of(ends, kept, rows.device)
            apart = PositionWork.compared(rows, kept, weights, batches, form, temperature)
        else:
            apart = DenseWork(
                positions=rows,
                weights=weights,
                temperature=temperature,
                divergence=form,
                entries=kept,
                share=form.value,
            )
        return fused_losses(hidden, head, shares=weights[None], apart=[apart], memory_budget=memory_budget)[0]
    work = PositionWork(
        layout=Layout.of(rows, rows[:0]),
        rows=LogitRows.of_entries(entries.pick(rows), weights),
        temperature=temperature,
        inside_only=tail == "renormalize",
        divergences=(form,),
    )
    shares = torch.cat([weights, torch.zeros_like(weights)])[None]
    return fused_losses(hidden, head, shares=shares, positions=work, memory_budget=memory_budget)[0]


def cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """-sum_n w_n log softmax(logits_n)[labels_n] over the N positions whose label is not -100.

    labels (N,) int64, already shifted: the token to be predicted at each position. weights (N,), constants;
    when None, 1 over the number of supervised positions. Returns a float32 (float64) scalar, 0 when none is
    supervised. ValueError: shapes that do not fit, a label that is not a token of the head.
    """
    head = Head(weight=lm_head_weight, bias=bias, softcap=softcap, vocab_size=vocab_size)
    count, dtype = len(hidden), wide_dtype(hidden.dtype, lm_head_weight.dtype)
    if labels.shape != (count,):
        raise ValueError(f"cross_entropy: labels must be ({count},), not {tuple(labels.shape)}")
    supervised = labels != IGNORE_INDEX
    weights = _weights(weights, count, 1.0 / max(int(supervised.sum()), 1), hidden.device, dtype)
    rows = (supervised & (weights != 0)).nonzero()[:, 0]
    labels, weights = labels[rows], weights[rows]
    head.check_labels(labels)
    work = PositionWork(
        layout=Layout.of(rows[:0], rows),
        rows=LogitRows.of_labels(labels, weights),
        temperature=1.0,
        inside_only=False,
        divergences=(FORWARD,),
    )
    shares = torch.cat([torch.zeros_like(weights), weights])[None]
    return fused_losses(hidden, head, shares=shares, positions=work, memory_budget=memory_budget)[0]


def relation_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    factor: Tensor | None = None,
    *,
    gram: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    neighbours: int = 0,
) -> Tensor:
    """1 - cos(R_s, R_t) = 1 - <R_s, R_t> / (|R_s| |R_t|), R_s = Z Z^T, Z (N, V) the raw logits of an image,
    without padding.

    R_t (N, N) is `gram`, or factor factor^T of factor (N, r): exactly one of them. Frobenius product and
    norms. A linear head takes R_s = H (W^T W) H^T, with W^T W cached as long as a frozen weight tensor is
    unchanged; soft-capping, and a trained head where it is cheaper, takes the logits in blocks: the values
    agree. neighbours: of each token in the token relationship graph, `student.losses.graph`, which then takes
    the place of the cosine. Returns a float32 (float64) scalar. ValueError: shapes that do not fit.
    """
    head = Head(weight=lm_head_weight, bias=bias, softcap=softcap, vocab_size=vocab_size)
    count = len(hidden)
    if factor is not None and (factor.dim() != 2 or len(factor) != count):
        raise ValueError(f"relation_loss: factor must be ({count}, r), not {tuple(factor.shape)}")
    if gram is not None and gram.shape != (count, count):
        raise ValueError(f"relation_loss: gram must be ({count}, {count}), not {tuple(gram.shape)}")
    everything = torch.arange(count, device=hidden.device)
    image = RelationTargets(positions=everything, sample=0, factor=factor, gram=gram)
    weights = torch.ones(1, dtype=wide_dtype(hidden.dtype, lm_head_weight.dtype), device=hidden.device)
    work = RelationWork(groups=group_images((image,)), weights=weights, neighbours=neighbours)
    return fused_losses(hidden, head, shares=weights[None], relations=work, memory_budget=memory_budget)[0]


def _weights(
    weights: Tensor | None, count: int, default: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    if weights is None:
        return torch.full((count,), default, dtype=dtype, device=device)
    if weights.shape != (count,):
        raise ValueError(f"weights must be ({count},), not {tuple(weights.shape)}")
    return weights.detach().to(dtype)
