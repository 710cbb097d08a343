"""KL and cross entropy at rows of logits, whose place their gradient takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from student.divergences import FORWARD, Divergence
from student.losses.batches import Batches
from student.losses.divergences import value_and_slopes
from student.losses.records import Entries, no_entries


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogitRows:
    """What is asked of the student at n rows of logits (n, V + 1): tokens, padding, and last the blank.

    entries: the distributions to compare with, all blank where there is none; weights (n,) of their KL, which
    is the divergence at place `which` (n,) int64 of those in use; labels (n,) int64, -1 or V where there is
    none, and label_weights (n,) of their cross entropy. batches: of `sinkhorn`, whose rows of one batch weigh
    the same; a part of such rows has its entries over the tokens of each one's batch.
    """

    entries: Entries
    weights: Tensor
    which: Tensor
    labels: Tensor
    label_weights: Tensor
    batches: Batches | None = None

    def pick(self, index: Tensor | slice) -> LogitRows:
        """Some of the rows; with batches a range of whole ones."""
        entries, batches = self.entries.pick(index), self.batches
        if batches is not None:
            assert isinstance(index, slice)
            batches = batches.cut(index)
            entries = batches.in_common(entries)
        return LogitRows(
            entries=entries,
            batches=batches,
            weights=self.weights[index],
            which=self.which[index],
            labels=self.labels[index],
            label_weights=self.label_weights[index],
        )

    @classmethod
    def of_labels(cls, labels: Tensor, weights: Tensor) -> LogitRows:
        """The cross entropy alone."""
        return cls(
            entries=no_entries(len(labels), weights.dtype, weights.device),
            weights=torch.zeros_like(weights),
            which=torch.zeros_like(labels),
            labels=labels,
            label_weights=weights,
        )

    @classmethod
    def of_entries(cls, entries: Entries, weights: Tensor, batches: Batches | None = None) -> LogitRows:
        """The KL alone, of the first divergence in use."""
        which = torch.zeros(len(weights), dtype=torch.long, device=weights.device)
        return cls(
            entries=entries,
            weights=weights,
            which=which,
            labels=torch.full_like(which, -1),
            label_weights=torch.zeros_like(weights),
            batches=batches,
        )

    def split(self) -> tuple[LogitRows, LogitRows]:
        """The KL alone, and the cross entropy alone."""
        divergence = replace(self.of_entries(self.entries, self.weights), which=self.which)
        return divergence, self.of_labels(self.labels, self.label_weights)


def row_losses(
    logits: Tensor,
    rows: LogitRows,
    *,
    tokens: int,
    temperature: float,
    inside_only: bool,
    divergences: Sequence[Divergence] = (FORWARD,),
) -> tuple[Tensor, Tensor]:
    """KL (n,) times T^2 and cross entropy (n,) of each row, from logits (n, V + 1) divided by T.

    `logits` become the gradient of sum_n weights_n T^2 KL_n + label_weights_n CE_n in the logits before their
    division by T. Their last column must hold -inf; columns from `tokens` on are padding. With q =
    softmax(logits), S the entries' ids, q_tail the sum of q over the tokens outside S, p and p_tail the
    teacher's, which has nothing at padding, and s = sum_S p + p_tail:

        KL = sum_S p (log p - log q) + p_tail (log p_tail - log q_tail)
        dKL / dlogit_j = s q_j - p_j in S,  q_j (s - p_tail / q_tail) outside S,  s q_j at padding
        CE = -log q_label

    For another divergence D over the same events, p, p_tail and the padding's 0 in the gradient give way to
    -dD / dlog q, s to their sum. inside_only: the KL takes q over S alone, as if there were nothing outside.
    Where T != 1 rows must not carry both terms: CE is that of these logits.
    """
    blank = logits.shape[1] - 1
    ids, labels = (each.long() for each in (rows.entries.ids, rows.labels))
    ids, labels = ids.masked_fill(ids < 0, blank), labels.masked_fill(labels < 0, blank)
    log_p, log_tail = rows.entries.logprobs, rows.entries.log_tail
    inside = logits.gather(1, ids)  # (n, E)
    label = logits.gather(1, labels[:, None])[:, 0]
    logits.scatter_(1, ids, -math.inf)
    outside, padding = logits[:, :tokens], logits[:, tokens:]
    # Each has its own maximum and its own sum, so that a tail of any smallness keeps its digits.
    top_outside, sum_outside = _exponentiate(outside)
    top_padding, sum_padding = _exponentiate(padding)
    top = torch.maximum(torch.maximum(top_outside, top_padding), inside.amax(dim=1))
    # From here on relative to the row's largest logit, whose size would cost digits.
    inside = inside - top[:, None]
    log_outside = (top_outside - top) + sum_outside.log()
    log_padding = (top_padding - top) + sum_padding.log()
    log_inside = torch.logsumexp(inside, dim=1)
    log_all = torch.logaddexp(torch.logaddexp(log_inside, log_outside), log_padding)

    log_norm = log_inside.nan_to_num(neginf=0.0) if inside_only else log_all
    log_q, log_q_tail = inside - log_norm[:, None], log_outside - log_all
    log_q_padding = log_padding - log_all
    p, p_tail, p_padding = log_p.exp(), log_tail.exp(), torch.zeros_like(log_tail)
    if tuple(divergences) == (FORWARD,):
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=1)
        kl = kl + torch.where(p_tail > 0, p_tail * (log_tail - log_q_tail), 0.0)
    else:
        teacher = torch.cat([log_p, log_tail[:, None], p_padding[:, None].log()], dim=1)
        student = torch.cat([log_q, log_q_tail[:, None], log_q_padding[:, None]], dim=1)
        kl, slopes = value_and_slopes(divergences, rows.which, teacher, student, rows.batches)
        p, p_tail, p_padding = -slopes[:, :-2], -slopes[:, -2], -slopes[:, -1]
    kl = torch.where(rows.weights != 0, kl * temperature**2, 0.0)
    ce = torch.where(rows.label_weights != 0, log_all - (label - top), 0.0)

    mass, q_tail = p.sum(dim=1) + p_tail + p_padding, log_q_tail.exp()
    kl_weights, ce_weights = rows.weights * temperature, rows.label_weights
    push = ce_weights if inside_only else ce_weights + kl_weights * mass
    pull = torch.zeros_like(p_tail) if inside_only else kl_weights * p_tail
    outside.mul_(torch.where(sum_outside > 0, (push * q_tail - pull) / sum_outside, 0.0)[:, None])
    pulled = push * log_q_padding.exp() - kl_weights * p_padding
    padding.mul_(torch.where(sum_padding > 0, pulled / sum_padding, 0.0)[:, None])
    slope = kl_weights[:, None] * (mass[:, None] * log_q.exp() - p)
    logits.scatter_(1, ids, slope + ce_weights[:, None] * (inside - log_all[:, None]).exp())
    logits.scatter_add_(1, labels[:, None], -ce_weights[:, None])
    return kl, ce


def _exponentiate(part: Tensor) -> tuple[Tensor, Tensor]:
    """`part` (n, v) in place to exp(part - top): top (n,), its maximum, and the sum (n,)."""
    top = part.amax(dim=1)
    part.sub_(top.nan_to_num(neginf=0.0)[:, None]).exp_()
    return top, part.sum(dim=1)
