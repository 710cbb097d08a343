"""The divergence from a teacher's whole distribution, chunk by chunk: of its hidden states and head, or of
entries with the tail's mass spread evenly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.head import Head
from student.divergences import BATCH, OF_LOGITS, Divergence
from student.losses.batches import Batches
from student.losses.divergences import IN_ORDER, NOTHING
from student.losses.logit_rows import LogitRows, row_losses
from student.losses.products import Gradients, HeadProducts
from student.losses.records import Entries
from student.losses.targets import TeacherStates

_TABLES = 6
"""Arrays (n, V) in memory at a time, about."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseWork:
    """The divergence at M positions of hidden (N, D): positions (M,) int64, the teacher there, and what each
    counts, weights (M,).

    teacher: exactly one of states, with its head, and entries at `temperature`. share: what its logits count
    in the target of `taid`, softmax((1 - share) student + share teacher), whose own the rest is, a constant
    of the gradient. batches: of `sinkhorn`, whose positions of one batch weigh the same.
    """

    positions: Tensor
    weights: Tensor
    temperature: float
    divergence: Divergence
    states: TeacherStates | None = None
    teacher: Head | None = None
    entries: Entries | None = None
    share: float = 1.0
    batches: Batches | None = None

    def __len__(self) -> int:
        """M."""
        return len(self.weights)


def run_dense(
    hidden: Tensor,
    work: DenseWork,
    products: HeadProducts,
    gradients: Gradients,
    memory_budget: int,
    compute: torch.dtype | None,
) -> Tensor:
    """The divergence (M,) times T^2; adds to `gradients`. ValueError when teacher and student have different
    numbers of tokens.

    memory_budget: bytes of logits of both and of what is made from them at a time; at least one position's,
    and those of a whole batch of `sinkhorn`.
    """
    columns, tokens, dtype = len(products.weight), products.columns, products.dtype
    theirs = None
    if work.teacher is not None:
        if work.teacher.columns != tokens:
            raise ValueError(
                f"dense loss: the teacher has {work.teacher.columns} tokens, the student {tokens}"
            )
        theirs = HeadProducts(work.teacher, dtype, compute)
    tables = _TABLES if work.batches is None else _TABLES + BATCH
    size = max(1, memory_budget // (tables * (columns + 1) * dtype.itemsize))
    values = torch.zeros(len(work.positions), dtype=dtype, device=hidden.device)
    name = work.divergence.name
    starts = range(0, len(values), size)
    parts = [slice(start, min(start + size, len(values))) for start in starts]
    for chunk in parts if work.batches is None else work.batches.chunks(size):
        index, weights = work.positions[chunk], work.weights[chunk]
        entries = None if work.entries is None else work.entries.pick(chunk)
        if theirs is not None and work.states is not None:
            log_p, _ = _logits(theirs, work.states.at(chunk).to(dtype), tokens)
            log_p.div_(work.temperature)
            log_p = log_p if name in OF_LOGITS else torch.log_softmax(log_p, dim=1)
        elif entries is not None:
            log_p = spread_evenly(entries, tokens, dtype)
        states = hidden.index_select(0, index).to(dtype)  # (n, D)
        logits, slope = _logits(products, states, columns, blank=True)
        logits.div_(work.temperature)
        if name in ("forward_kl", "taid"):
            values[chunk] = _forward_kl(logits, log_p, weights, tokens, work)
        elif name in OF_LOGITS:
            values[chunk] = _binary_kl(logits, log_p, weights, work.temperature)
        else:
            batches = None if work.batches is None else work.batches.cut(chunk)
            events = _every_token(log_p, name in IN_ORDER)
            values[chunk], _ = row_losses(
                logits,
                LogitRows.of_entries(events, weights, batches),
                tokens=tokens,
                temperature=work.temperature,
                inside_only=False,
                divergences=(work.divergence,),
            )
        gradients.add(products, products.unscale(logits[:, :columns], slope), index, states)
    return values


def _logits(
    products: HeadProducts, states: Tensor, columns: int, *, blank: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(n, columns) logits, and their slopes where the head is not linear. blank: one more column of -inf."""
    made = states.new_empty(len(states), columns + blank)
    slopes = None if products.softcap is None else torch.empty_like(made[:, :columns])
    for block, matrix in products.blocks(columns):
        slope = products.logits(states, block, matrix, made[:, block])
        if slopes is not None and slope is not None:
            slopes[:, block] = slope
    if blank:
        made[:, columns] = -math.inf
    return made, slopes


def spread_evenly(entries: Entries, tokens: int, dtype: torch.dtype) -> Tensor:
    """(n, tokens) log-probabilities of entries, the mass outside of them divided evenly among all other
    tokens."""
    there = entries.ids >= 0
    others = (tokens - there.sum(dim=1)).clamp(min=1).to(dtype)
    even = (entries.log_tail.to(dtype) - others.log()).clamp(min=NOTHING)
    table = even[:, None].repeat(1, tokens + 1)  # the last column takes the blanks
    ids = torch.where(there, entries.ids, tokens).long()
    return table.scatter_(1, ids, entries.logprobs.to(dtype).clamp(min=NOTHING))[:, :tokens]


def _every_token(log_p: Tensor, in_order: bool) -> Entries:
    """log_p (n, tokens) as entries, the most likely first where that matters."""
    if in_order:
        log_p, ids = log_p.sort(dim=1, descending=True)
    else:
        ids = torch.arange(log_p.shape[1], device=log_p.device).expand(log_p.shape)
    return Entries(ids=ids, logprobs=log_p, log_tail=log_p.new_full((len(log_p),), -math.inf))


def _forward_kl(logits: Tensor, log_p: Tensor, weights: Tensor, tokens: int, work: DenseWork) -> Tensor:
    """(n,) T^2 KL, to the target of `taid` where that is asked for, of logits (n, V + 1) divided by T, which
    become the gradient of its weighted sum in the logits before that division: T (q - p)."""
    if work.divergence.name == "taid":
        own = logits[:, :tokens].mul(1.0 - work.share)
        log_p = torch.log_softmax(own.add_(log_p, alpha=work.share), dim=1)
    logits -= torch.logsumexp(logits, dim=1, keepdim=True)
    p = log_p.exp()
    kl: Tensor = torch.linalg.vecdot(p, log_p.sub_(logits[:, :tokens]))
    logits.exp_()[:, :tokens].sub_(p)
    logits *= (weights * work.temperature)[:, None]
    return kl * work.temperature**2


def _binary_kl(logits: Tensor, theirs: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """(n,) T^2 times the mean over the V tokens of KL(1/2 || sigmoid(x)), x the difference of the logits of
    student (n, V + ...) and teacher (n, V), both divided by T (DHKD's BinaryKL-Norm, arXiv 2411.08937, whose
    sum over classes is a mean here). That is log cosh(x / 2). logits become the gradient of its weighted sum
    before the division: T / 2V tanh(x / 2), and 0 in the padding."""
    tokens = theirs.shape[1]
    half = logits[:, :tokens].sub_(theirs).mul_(0.5)
    size = half.abs()
    value = (size + torch.log1p(torch.exp(-2.0 * size)) - math.log(2.0)).mean(dim=1)
    half.tanh_().mul_((weights * (temperature / (2 * tokens)))[:, None])
    logits[:, tokens:] = 0.0
    return value * temperature**2
