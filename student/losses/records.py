"""From a sparse target to the distribution that the student is compared with: entries and a tail event."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from models.head import Head
from student.loss_weights import Tail
from student.losses.targets import range_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entries:
    """N distributions, each as E entries and one event for everything else.

    ids (N, E) int32 or int64; an id that is not one of the V logits' columns is a blank: no entry; -1 where
    it is made here. logprobs (N, E) and log_tail (N,): natural logs, -inf where there is no mass. They need
    not add up to 1. used: the least and the greatest id with mass; most: the greatest id of all.
    """

    ids: Tensor
    logprobs: Tensor
    log_tail: Tensor
    used: tuple[int, int] = (0, 0)
    most: int = -1

    def pick(self, index: Tensor | slice) -> Entries:
        """Those of some of the N."""
        return replace(
            self, ids=self.ids[index], logprobs=self.logprobs[index], log_tail=self.log_tail[index]
        )

    def to(self, device: torch.device | str) -> Entries:
        """The same on `device`."""
        names = ("ids", "logprobs", "log_tail")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})

    def of(self, head: Head) -> Entries:
        """The same, blank where ids are not tokens of the head, the student's. ValueError when such an id has
        mass."""
        least, greatest = self.used
        if least < 0 or greatest >= head.columns:
            raise ValueError(
                f"sparse target: token id {least if least < 0 else greatest} has mass, but the student has"
                f" {head.columns} tokens"
            )
        if self.most < head.columns:
            return self
        return replace(self, ids=self.ids.masked_fill(self.ids >= head.columns, -1))


def spread(values: Tensor, rows: Tensor, count: int, fill: float) -> Tensor:
    """(count, ...) with values (N, ...) at distinct rows (N,), `fill` elsewhere."""
    return values.new_full((count, *values.shape[1:]), fill).index_copy_(0, rows, values)


def no_entries(count: int, dtype: torch.dtype, device: torch.device) -> Entries:
    """Entries of `count` positions, all blank."""
    nothing = torch.full((count, 1), -math.inf, dtype=dtype, device=device)
    ids = torch.full((count, 1), -1, dtype=torch.int32, device=device)
    return Entries(ids=ids, logprobs=nothing, log_tail=nothing[:, 0].contiguous())


def placed(entries: Sequence[Entries], rows: Sequence[Tensor], count: int) -> Entries:
    """Entries of `count` rows: each of `entries`, at least one, at its distinct rows (N,); what is narrower
    than the widest is filled up with blanks, as the other rows are."""
    first, width = entries[0], max(each.ids.shape[1] for each in entries)
    ids = first.ids.new_full((count, width), -1)
    logprobs = first.logprobs.new_full((count, width), -math.inf)
    log_tail = first.logprobs.new_full((count,), -math.inf)
    for each, places in zip(entries, rows, strict=True):
        kept = each.ids.shape[1]
        ids[:, :kept].index_copy_(0, places, each.ids.to(ids.dtype))
        logprobs[:, :kept].index_copy_(0, places, each.logprobs.to(logprobs.dtype))
        log_tail.index_copy_(0, places, each.log_tail.to(logprobs.dtype))
    used = [each.used for each in entries]
    return Entries(
        ids=ids,
        logprobs=logprobs,
        log_tail=log_tail,
        used=(min(least for least, _ in used), max(greatest for _, greatest in used)),
        most=max(each.most for each in entries),
    )


def log_complement(log_mass: Tensor) -> Tensor:
    """log(1 - exp(log_mass)) for log_mass <= 0, to rounding at both ends."""
    log_mass = log_mass.clamp(max=0.0)
    near_one = torch.log(-torch.expm1(log_mass))
    return torch.where(log_mass > -math.log(2.0), near_one, torch.log1p(-torch.exp(log_mass)))


def entries_of(target: Any, *, tail: Tail, temperature: float, dtype: torch.dtype) -> Entries:
    """The entries of `target` (any object with the fields of TopK as tensors) at `temperature`.

    With p the teacher's softmax at that temperature: `bucket` keeps p of the K entries and the mass
    outside them as one event; `drop` ignores that mass; `renormalize` divides p by its sum over the K
    entries; `sampled` gives each drawn id j the mass p_tail * count_j / M.
    ValueError when the tail mass of that temperature was not captured, and when draws are asked for that were
    not captured or were captured at another temperature.
    """
    ids, logprobs = target.token_ids, target.logprobs.to(dtype)
    if ids.dim() != 2 or ids.shape != logprobs.shape:
        shapes = f"{tuple(ids.shape)} and {tuple(logprobs.shape)}"
        raise ValueError(f"sparse target: token_ids and logprobs must both be (N, K), not {shapes}")
    if (counts := getattr(target, "counts", None)) is not None:
        beyond = torch.arange(ids.shape[1], device=ids.device) >= counts[:, None]
        ids, logprobs = ids.masked_fill(beyond, -1), logprobs.masked_fill(beyond, -math.inf)
    entries = Entries(
        ids=ids,
        logprobs=logprobs,
        log_tail=logprobs.new_full((len(logprobs),), -math.inf),
        used=range_of(ids, logprobs > -math.inf),
        most=int(ids.max()) if ids.numel() else -1,
    )
    if tail == "renormalize":
        return replace(entries, logprobs=_tempered(logprobs, temperature))
    if temperature == 1.0 and tail == "drop":
        return entries
    log_tail = _tail_at(target, temperature).to(dtype)
    if temperature != 1.0:
        # The entries are known up to a factor, which their common mass fixes.
        logprobs = _tempered(logprobs, temperature) + log_complement(log_tail)[:, None]
        entries = replace(entries, logprobs=logprobs)
    if tail == "bucket":
        return replace(entries, log_tail=log_tail)
    if tail == "drop":
        return entries
    if tail == "sampled":
        return _with_draws(entries, target, temperature, log_tail)
    raise ValueError(f"sparse target: tail must be bucket, renormalize, drop or sampled, not {tail}")


def _tempered(logprobs: Tensor, temperature: float) -> Tensor:
    """Log-probabilities at `temperature`, as if there were nothing outside the entries."""
    return torch.log_softmax(logprobs / temperature, dim=1).nan_to_num(nan=-math.inf)


def _tail_at(target: Any, temperature: float) -> Tensor:
    """tail_logprob (N,) at `temperature`."""
    captured = target.temperatures.tolist()
    for column, value in enumerate(captured):
        if math.isclose(value, temperature, rel_tol=1e-6):
            tail: Tensor = target.tail_logprob[:, column]
            return tail
    raise ValueError(
        f"sparse target: the tail mass at temperature {temperature} was not captured, only at"
        f" {[round(value, 6) for value in captured]}; use one of these, or capture again with it"
    )


def _with_draws(entries: Entries, target: Any, temperature: float, log_tail: Tensor) -> Entries:
    """The same with the draws from the tail, which share its mass."""
    if target.sampled_ids is None or target.sampled_counts is None:
        raise ValueError("sparse target: tail 'sampled' needs draws from the tail, and none were captured")
    captured = getattr(target, "sample_temperature", 1.0)
    if not math.isclose(captured, temperature, rel_tol=1e-6):
        raise ValueError(
            f"sparse target: the tail was drawn at temperature {captured}; at {temperature} the draws are"
            " biased; use that temperature or another tail"
        )
    counts = target.sampled_counts.to(log_tail.dtype)
    ids = target.sampled_ids.to(entries.ids.dtype)
    used = range_of(ids, counts > 0)
    ids, counts = _merged(ids.masked_fill(counts == 0, torch.iinfo(ids.dtype).max), counts)
    share = counts / counts.sum(dim=1, keepdim=True).clamp(min=1.0)
    drawn = log_tail[:, None] + share.log()
    nothing = torch.full_like(log_tail, -math.inf)
    return replace(
        entries,
        ids=torch.cat([entries.ids, ids], dim=1),
        logprobs=torch.cat([entries.logprobs, drawn], dim=1),
        log_tail=nothing,
        used=(min(entries.used[0], used[0]), max(entries.used[1], used[1])),
        most=max(entries.most, used[1]),
    )


def _merged(ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The same draws with every id once per row, its counts summed; rows are padded with blanks, as which the
    greatest number counts."""
    ids, order = ids.sort(dim=1)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = begins.cumsum(dim=1) - 1
    merged = torch.full_like(ids, -1).scatter_(1, place, ids)
    merged = merged.masked_fill(merged == torch.iinfo(ids.dtype).max, -1)
    return merged, torch.zeros_like(counts).scatter_add_(1, place, counts.gather(1, order))
