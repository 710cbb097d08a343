"""Divergences between teacher and student over the same events, value and slopes.

The events of a position are the teacher's kept entries, one event for all other tokens (the tail), and one
for the student's padding columns, which the teacher gives no mass. A formula takes log p and log q (n, m) of
the m events, the tail last but one and the padding last, and returns (n,) in nats. So it is exact for what
the cache stores; joining tokens in one event bounds the dense divergence from below where that is an
f-divergence. Where a formula takes log p of an event of the student's, p counts as at least exp(LEAST).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cache_schema.errors import WrongUsage
from student.divergences import CONCENTRATED, Divergence
from student.losses.batches import Batches

LEAST = -30.0
"""Least log p that a reverse divergence sees: a teacher's mass of 0 would make it infinite."""

_JUST_OVER = 1.0 + 1e-6
"""So that a mass of exactly mu, up to rounding, still counts to the head."""

NOTHING = -1e30
"""Stands for the log of 0: finite, so that 0 times it is 0."""

_PAIRED = 64
"""Most likely entries whose logit differences `dbild` takes at most."""

_ROUNDS = 20

IN_ORDER = frozenset({"adaptive_kl", "dac_kl", "dbild", "first"})
"""The divergences that need the most likely entry first."""


def forward_kl(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    """sum p (log p - log q)."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def reverse_kl(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    """sum q (log q - log p) (MiniLLM, arXiv 2306.08543, exact in place of sampled). The padding counts to the
    tail, since the teacher has no mass there."""
    outside = torch.logaddexp(log_q[:, -2], log_q[:, -1])
    log_q = torch.cat([log_q[:, :-2], outside[:, None]], dim=1)
    return (log_q.exp() * (log_q - log_p[:, :-1].clamp(min=LEAST))).sum(dim=1)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, with the
    convention of TRL); at beta = 0 and 1 the forward and the reverse KL, as there."""
    if beta in (0.0, 1.0):
        return (reverse_kl if beta else forward_kl)(log_p, log_q, 0.0)
    mixed = _mixed(log_p, log_q, beta)
    to_teacher = (log_p.exp() * (log_p - mixed)).sum(dim=1)
    return beta * to_teacher + (1.0 - beta) * (log_q.exp() * (log_q - mixed)).sum(dim=1)


def total_variation(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    """sum |p - q| / 2 (f-Distill, arXiv 2307.15190)."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=1)


def skew_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898, eq. 3)."""
    return (log_p.exp() * (log_p - _mixed(log_p, log_q, alpha))).sum(dim=1)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q) (DistiLLM, arXiv 2402.03898)."""
    return (log_q.exp() * (log_q - _mixed(log_p, log_q, 1.0 - alpha))).sum(dim=1)


def adaptive_kl(log_p: Tensor, log_q: Tensor, mu: float) -> Tensor:
    """(h KL(p || q) + t KL(q || p)) / (h + t), h and t the sums of |p - q| over head and rest (AKL, arXiv
    2404.02657).

    The head is the most likely entry and all further ones up to a mass of mu. As in the authors' code h and t
    are constants of the gradient. The gap of the tail event bounds that of its tokens from below.
    """
    p, q = log_p.exp(), log_q.detach().exp()
    head = p.cumsum(dim=1) <= mu * _JUST_OVER
    head[:, 0], head[:, -2:] = True, False
    gap = (p - q).abs()
    share = _share((gap * head).sum(dim=1), (gap * ~head).sum(dim=1))
    return share * forward_kl(log_p, log_q, 0.0) + (1.0 - share) * reverse_kl(log_p, log_q, 0.0)


def balanced_kl(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    """(H_p KL(p || q) + H_q KL(q || p)) / (H_p + H_q), H the entropies over the events, constants of the
    gradient.

    Our reading of BD-KD (arXiv 2212.12965), which weights both by comparing the entropies: a student less
    sure than its teacher learns more from the reverse KL, one too sure more from the forward KL.
    """
    entropies = [-(log.exp() * log).sum(dim=1) for log in (log_p, log_q.detach())]
    share = _share(*entropies)
    return share * forward_kl(log_p, log_q, 0.0) + (1.0 - share) * reverse_kl(log_p, log_q, 0.0)


def dac_kl(log_p: Tensor, log_q: Tensor, mu: float) -> Tensor:
    """sum_C p' (log p' - log q), p' = p / sum_C p, C the fewest most likely entries of a mass of at least mu,
    else all of them.

    Our reading of DAC-KL (arXiv 2407.10068), which clips the teacher to its high-density classes. There a
    network, learnt with the student, sets the limits and the label is always a class; here the mass does.
    """
    log_p, log_q = log_p[:, :-2], log_q[:, :-2]
    p = log_p.exp()
    before = p.cumsum(dim=1) - p
    clipped = log_p.masked_fill(before * _JUST_OVER >= mu, NOTHING).log_softmax(dim=1)
    return (clipped.exp() * (clipped - log_q)).sum(dim=1)


def dbild(log_p: Tensor, log_q: Tensor, k: float) -> Tensor:
    """KL(softmax(d_p) || softmax(d_q)), d the differences of the logits of all pairs i < j among the k most
    likely entries, without a k of those up to the knee of the teacher's log-probabilities.

    The teacher-led half of DBiLD (Switch-KD, arXiv 2604.14629) in the form of BiLD (arXiv 2406.13555); a
    cache does not have the teacher's logits at the student's own most likely tokens, which the other half
    needs. Knee: the rank furthest below the straight line from the first to the last log-probability, as
    Kneedle has it. 0 where fewer than two entries are kept.
    """
    width = min(log_p.shape[1] - 2, _PAIRED)
    log_p, log_q = log_p[:, :width], log_q[:, :width]
    rank = torch.arange(width, device=log_p.device)
    there = log_p > NOTHING
    kept = there & (rank < (k or _up_to_knee(log_p, there)))
    one, other = torch.triu_indices(width, width, 1, device=log_p.device)
    pairs = kept[:, other]
    pairs_p, pairs_q = (
        torch.where(pairs, log[:, one] - log[:, other], NOTHING).log_softmax(dim=1) for log in (log_p, log_q)
    )
    return torch.where(pairs, pairs_p.exp() * (pairs_p - pairs_q), 0.0).sum(dim=1)


def first(log_p: Tensor, log_q: Tensor, temperature: float) -> Tensor:
    """KL(p' || q') over the five most likely entries, p' = p^(1/temperature) and q' = q, both normalised over
    them (FIRST, arXiv 2408.12168).

    Our reading of its trustworthy maximisation: the temperature calibrates the teacher's log-probabilities.
    Its authors' code takes the softmax of probabilities, which cannot be sure.
    """
    if not temperature:
        raise WrongUsage("divergence first needs its temperature here, as in first:1.5")
    width = min(CONCENTRATED, log_p.shape[1] - 2)
    calibrated = (log_p[:, :width] / temperature).log_softmax(dim=1)
    own = log_q[:, :width].masked_fill(log_p[:, :width] <= NOTHING, NOTHING).log_softmax(dim=1)
    return (calibrated.exp() * (calibrated - own)).sum(dim=1)


def sinkhorn(log_p: Tensor, log_q: Tensor, epsilon: float) -> Tensor:
    """sum_j P_ij W_ij (G, B) of each row i of batches (G, B, m): W_ij = |q_i - p_j|_1 over the events of row
    j, P = exp(-W / epsilon) with rows and columns normalised in turn, 20 times, columns last (SinKD, arXiv
    2402.17110).

    The columns of entries of a batch are the same tokens; NOTHING where a row does not keep one, whose mass
    is then in its tail, and everywhere in a row that is none. The gradient flows through P, as in the
    authors' code. Of one row P is 1; of more there is no closed form.
    """
    entries, q = log_p[..., :-2], log_q[..., :-2].exp()
    tail, padding = log_q[..., -2, None].exp(), log_q[..., -1, None].exp()
    rest = torch.bmm(q, (entries <= NOTHING).to(q.dtype).transpose(1, 2))  # what is in row j's tail
    inside = torch.cdist(q, entries.exp(), p=1.0) - rest
    cost = inside + (rest + tail - log_p[..., None, :, -2].exp()).abs() + padding
    there = (log_p > NOTHING).any(dim=2)
    # Rows that are none are normalised among themselves.
    alone = torch.where(there[:, :, None] == there[:, None], 0.0, NOTHING).to(cost.dtype)
    log_plan = torch.where(there[:, :, None] & there[:, None], -cost / epsilon, alone)
    for _ in range(_ROUNDS):
        log_plan = log_plan.log_softmax(dim=2).log_softmax(dim=1)
    return (log_plan.exp() * cost).sum(dim=2)


FORMULAS: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    formula.__name__: formula
    for formula in (
        forward_kl,
        reverse_kl,
        jsd,
        total_variation,
        skew_kl,
        skew_reverse_kl,
        adaptive_kl,
        balanced_kl,
        dac_kl,
        dbild,
        first,
        sinkhorn,
    )
}


def value_and_slopes(
    divergences: Sequence[Divergence],
    which: Tensor,
    log_p: Tensor,
    log_q: Tensor,
    batches: Batches | None = None,
) -> tuple[Tensor, Tensor]:
    """The divergence (n,) of each row and its derivatives (n, m) in log q, every event by itself.

    log_p, log_q (n, m): logs of the masses of the events, -inf where there is none, of the same dtype. which
    (n,): the place in `divergences` of each row's own. batches: the rows' own, for `sinkhorn`.
    """
    log_p = log_p.detach().clamp(min=NOTHING)
    value, slopes = torch.zeros_like(log_p[:, 0]), torch.zeros_like(log_p)
    for place, divergence in enumerate(divergences):
        with torch.enable_grad():
            leaf = log_q.detach().clamp(min=NOTHING).requires_grad_()
            formula = FORMULAS[divergence.name]
            if batches is None:
                found = formula(log_p, leaf, divergence.value)
            else:
                stacks = [batches.stacked(each, NOTHING) for each in (log_p, leaf)]
                found = formula(stacks[0], stacks[1], divergence.value).flatten()
                found = found.index_select(0, batches.slots)
            (slope,) = torch.autograd.grad(found.sum(), leaf)
        mine = which == place
        value = torch.where(mine, found.detach(), value)
        slopes = torch.where(mine[:, None], slope, slopes)
    return value, slopes


def _mixed(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _share(mine: Tensor, other: Tensor) -> Tensor:
    """mine / (mine + other), 1/2 where both are 0."""
    both = mine + other
    return torch.where(both > 0, mine / torch.where(both > 0, both, 1.0), 0.5)


def _up_to_knee(log_p: Tensor, there: Tensor) -> Tensor:
    """(n, 1) how many of log_p (n, m), falling, lie up to its knee, at least 2. there (n, m): which exist."""
    last = there.sum(dim=1, keepdim=True).clamp(min=2) - 1
    rank = torch.arange(log_p.shape[1], device=log_p.device)
    lowest = log_p.gather(1, last.clamp(max=log_p.shape[1] - 1))
    height = (log_p - lowest) / (log_p[:, :1] - lowest).clamp(min=torch.finfo(log_p.dtype).tiny)
    below = (1.0 - rank / last - height).masked_fill(~there, -1.0)
    # The first of those that are equal up to rounding.
    knee = (below >= below.amax(dim=1, keepdim=True) - 1e-6).to(torch.uint8).argmax(dim=1, keepdim=True)
    return (knee + 1).clamp(min=2)
