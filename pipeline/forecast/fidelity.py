"""The error of a stored record, relative to the exact target and to the full distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.format.codecs.topk import decode_topk, encode_topk, topk_at
from cache_schema.format.records import Relation, TopK
from cache_schema.format.spec import EntryRule, Precision
from cache_schema.operations.divergence import relation_cosine
from pipeline.entry_rules import cut

Float64 = NDArray[np.float64]

_ROWS = 32768  # positions worked on at a time
_NOTHING = 1e-300  # keeps the log of a mass that a float cannot hold finite


def covered(record: TopK, rule: EntryRule) -> tuple[float, float]:
    """The mean mass within the entries that a rule keeps, at temperature 1, and their mean number."""
    total = entries = 0.0
    for start in range(0, len(record), _ROWS):
        part = cut(topk_at(record, slice(start, start + _ROWS)), rule)
        total += float(-np.expm1(_tail(part)).sum())
        entries += float(part.there.sum())
    return total / max(len(record), 1), entries / max(len(record), 1)


def as_stored(record: TopK, precision: Precision) -> TopK:
    """The record as read from a cache."""
    return decode_topk(encode_topk(record, precision), slice(None), record.temperatures)


@dataclass(slots=True)
class Agreement:
    """Sums over positions that compare a record's gradient with that of the full distribution.

    g = q - p is the gradient in the logits (V,) of KL(teacher || student), s that of the record's KL with
    one event for all that lies outside its entries. dot: <g, s>; dense: |g|^2; sparse: |s|^2. dense_kl:
    KL(teacher || student) over V; record_kl: as the record has it.
    """

    positions: int = 0
    dot: float = 0.0
    dense: float = 0.0
    sparse: float = 0.0
    dense_kl: float = 0.0
    record_kl: float = 0.0

    def add(self, other: Agreement) -> None:
        """Counts the other's positions too."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def angle(self) -> float:
        """Degrees between g and s over all positions together; 0 where both are zero."""
        size = (self.dense * self.sparse) ** 0.5
        return float(np.degrees(np.arccos(min(1.0, self.dot / size)))) if size else 0.0

    @property
    def mean_kl(self) -> float:
        """Mean KL(teacher || student) in nats."""
        return self.dense_kl / max(self.positions, 1)

    @property
    def unseen_kl(self) -> float:
        """Mean nats of KL(teacher || student) that the record cannot see."""
        return (self.dense_kl - self.record_kl) / max(self.positions, 1)


def compare(teacher: Tensor, student: Tensor, records: Mapping[Any, TopK]) -> dict[Any, Agreement]:
    """The agreement of every record with the logits it was made of, for a student.

    teacher, student (n, V) float32 logits of the same n positions; both are overwritten. records: of these
    positions; the ids of each must be the first of those of the widest.
    """
    widest = max(records.values(), key=lambda record: record.token_ids.shape[1])
    ids = torch.from_numpy(widest.token_ids.astype(np.int64)).to(teacher.device)
    log_p = teacher.sub_(teacher.logsumexp(dim=1, keepdim=True))
    log_q = student.sub_(student.logsumexp(dim=1, keepdim=True))
    log_q_in = _numpy(log_q.gather(1, ids))
    p, gap = log_p.exp(), log_p.sub_(log_q)
    dense_kl = float(_numpy(torch.linalg.vecdot(p, gap)).sum())
    q = log_q.exp_()
    p_in, q_in = _numpy(p.gather(1, ids)), _numpy(q.gather(1, ids))
    p.scatter_(1, ids, 0.0)  # from here on both are restricted to the tail of the widest record
    q.scatter_(1, ids, 0.0)
    mass, squares, product = (_numpy(x) for x in (q.sum(1), _dot(q, q), _dot(p, q)))
    gradient = q.sub_(p)
    dense = float(np.square(q_in - p_in).sum() + _numpy(_dot(gradient, gradient)).sum())
    found = {}
    for key, record in records.items():
        there = np.zeros(q_in.shape, np.bool_)
        there[:, : record.token_ids.shape[1]] = record.there
        beyond = np.where(there, 0.0, q_in)
        q_tail = np.maximum(mass + beyond.sum(axis=1), _NOTHING)
        squares_out = squares + np.square(beyond).sum(axis=1)
        product_out = product + (beyond * p_in).sum(axis=1)
        log_p_tail = _tail(record)
        p_tail = np.exp(log_p_tail)
        shrink = 1.0 - p_tail / q_tail  # s = shrink * q outside the entries
        log_stored = np.zeros(q_in.shape)
        log_stored[there] = record.logprobs[record.there]
        stored = np.where(there, np.exp(log_stored), 0.0)
        inside = np.where(there, q_in - stored, 0.0)
        seen = (stored * (log_stored - log_q_in)).sum()
        seen += (p_tail * (np.maximum(log_p_tail, np.log(_NOTHING)) - np.log(q_tail))).sum()
        found[key] = Agreement(
            positions=len(record),
            dot=float((inside * (q_in - p_in)).sum() + (shrink * (squares_out - product_out)).sum()),
            dense=dense,
            sparse=float(np.square(inside).sum() + (np.square(shrink) * squares_out).sum()),
            dense_kl=dense_kl,
            record_kl=float(seen),
        )
    return found


def noise_of_kl(kl_at: Callable[[float], float], wanted: float, start: float, rounds: int) -> float:
    """The noise scale at which kl_at(scale) is within 1% of `wanted` nats, from an initial guess above 0; the
    nearest one after `rounds` tries. 0.0 where noise does not change the distribution.

    A KL grows with the noise, about with its square while it is small; the size is found between the
    nearest on either side.
    """
    size, goal = start, np.log(wanted)
    below = above = None  # (log size, log KL) of the nearest on either side
    best = (np.inf, 0.0)
    for _ in range(rounds):
        reached = kl_at(size)
        if not np.isfinite(reached) or reached <= 0.0:
            break
        point = (np.log(size), np.log(reached))
        best = min(best, (abs(point[1] - goal), size))
        if best[0] <= 0.01:
            break
        below, above = (point, above) if point[1] < goal else (below, point)
        if below is None or above is None:
            size *= float(np.clip(np.sqrt(wanted / reached), 0.1, 10.0))
        else:
            share = np.clip((goal - below[1]) / max(above[1] - below[1], 1e-9), 0.1, 0.9)
            size = float(np.exp(below[0] + share * (above[0] - below[0])))
    return float(best[1])


def relation_angle(exact: Relation, stored: Relation, student: Relation) -> float:
    """Degrees between the gradients of 1 - cos(R_s, R) in R_s for R the exact and the stored relation.

    The gradient points along the part of R that is orthogonal to R_s. 0 where they are equal.
    """
    near, told = relation_cosine(student, exact), relation_cosine(student, stored)
    size = ((1.0 - near * near) * (1.0 - told * told)) ** 0.5
    if size <= 0.0:
        return 0.0
    cosine = (relation_cosine(exact, stored) - near * told) / size
    return float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))))


def _tail(record: TopK) -> Float64:
    """(N,) log of the mass outside the entries at temperature 1."""
    at_one = int(np.flatnonzero(record.temperatures == 1.0)[0])
    return np.asarray(record.tail_logprob[:, at_one], dtype=np.float64)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(a, b)
    return product


def _numpy(values: Tensor) -> Float64:
    """On the host and in float64, which not every device has."""
    return np.asarray(values.cpu().numpy(), dtype=np.float64)
