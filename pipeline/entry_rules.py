"""The entries of a position by the rule of its kind: selected on the device, which nothing waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.errors import KdcacheError
from cache_schema.format.records import TopK
from cache_schema.format.spec import KINDS, EntryRule, Kind, TargetSpec


def most_selected(spec: TargetSpec, columns: int) -> int:
    """The entries that are looked for at every position, of a head of `columns` tokens. KdcacheError where a
    fixed number exceeds these."""
    rules = [spec.rule(kind) for kind in KINDS if kind in spec.targets] or [spec.rule("response")]
    for rule in rules:
        if rule.least_p is None and rule.most > columns:
            raise KdcacheError(f"top_k {rule.most} exceeds the teacher's {columns} tokens")
    return min(max(rule.most for rule in rules), columns)


def limits_of(kinds: Sequence[Kind], lengths: Sequence[int], spec: TargetSpec) -> NDArray[np.float32] | None:
    """(N, 2) for consecutive positions, `lengths` of each of `kinds`: the most entries, and the least
    log-probability of any but the first. None where one number holds for all kinds."""
    if len({spec.rule(kind) for kind in KINDS if kind in spec.targets}) < 2 and not spec.entries:
        return None
    rules = [spec.rule(kind) for kind in kinds]
    most = [rule.most for rule in rules]
    least = [-np.inf if rule.least_p is None else np.log(rule.least_p) for rule in rules]
    return np.repeat(np.array([most, least], dtype=np.float32).T.reshape(-1, 2), lengths, axis=0)


def kept(logprobs: Tensor, limits: Tensor) -> Tensor:
    """(n, K): which entries of logprobs (n, K), most likely first, stay within `limits` (n, 2)."""
    number = torch.arange(logprobs.shape[1], device=logprobs.device)
    return (number < limits[:, :1]) & ((logprobs >= limits[:, 1:]) | (number == 0))


def narrow(fields: Mapping[str, Tensor], inside: Tensor, temperatures: Sequence[float]) -> dict[str, Tensor]:
    """The fields of records with only the entries `inside` (n, K), the mass of the others in the tails.

    `counts` (n,) is added. The mass of an entry at a temperature other than 1 is known from that of all
    entries, 1 minus the tail.
    """
    logprobs = fields["logprobs"]
    tails = []
    for temperature, tail in zip(temperatures, fields["tail_logprob"].unbind(dim=1), strict=True):
        weights = logprobs / temperature
        dropped = weights.masked_fill(inside, -torch.inf).logsumexp(dim=1)
        if temperature != 1.0:
            dropped = dropped - weights.logsumexp(dim=1) + torch.log(-torch.expm1(tail))
        tails.append(torch.logaddexp(tail, dropped))
    return dict(fields) | {
        "token_ids": fields["token_ids"].masked_fill(~inside, 0),
        "logprobs": logprobs.masked_fill(~inside, -torch.inf),
        "tail_logprob": torch.stack(tails, dim=1),
        "counts": inside.sum(dim=1, dtype=torch.int32),
    }


def fitted(record: TopK, rule: EntryRule) -> TopK:
    """The record of positions of one kind, selected by its rule, as wide as it must be."""
    if record.counts is None:
        return record
    width = rule.most if rule.least_p is None else max(int(record.counts.max(initial=0)), 1)
    return replace(
        record,
        token_ids=record.token_ids[:, :width],
        logprobs=record.logprobs[:, :width],
        counts=None if rule.least_p is None else record.counts,
    )


def cut(record: TopK, rule: EntryRule) -> TopK:
    """The record of the same positions by a rule that keeps at most its K entries; the mass of the others is
    added to every tail.

    Equal to a capture by that rule up to rounding. Without tail draws, which belong to one selection alone.
    """
    logits = record.logprobs.astype(np.float64)  # up to a constant a position, which cancels below
    inside = np.arange(logits.shape[1]) < rule.most
    if rule.least_p is not None:
        inside = inside & (logits >= np.float32(np.log(rule.least_p)))
        inside[:, 0] = True
    counts = np.broadcast_to(inside, logits.shape).sum(axis=1)
    width = max(int(counts.max(initial=0)), 1) if rule.least_p is not None else rule.most
    tails = []
    with np.errstate(divide="ignore"):
        for index, temperature in enumerate(record.temperatures.astype(np.float64)):
            tail = record.tail_logprob[:, index].astype(np.float64)
            weights = logits / temperature
            total = np.logaddexp.reduce(weights, axis=1) - np.log(-np.expm1(tail))
            dropped = np.logaddexp.reduce(np.where(inside, -np.inf, weights), axis=1, initial=-np.inf)
            tails.append(np.logaddexp(tail, dropped - total))
    ids, logprobs = record.token_ids[:, :width], record.logprobs[:, :width]
    if rule.least_p is not None:
        ids, logprobs = np.where(inside[:, :width], ids, 0), np.where(inside[:, :width], logprobs, -np.inf)
    return replace(
        record,
        token_ids=np.ascontiguousarray(ids),
        logprobs=np.ascontiguousarray(logprobs),
        tail_logprob=np.stack(tails, axis=1).astype(np.float32),
        sampled_ids=None,
        sampled_counts=None,
        counts=None if rule.least_p is None else counts.astype(np.int32),
    )
