"""From a sparse target to the distribution that the student is compared with: entries and a tail event."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.head import Head
from student.loss_weights import Tail
from student.losses.targets import range_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entries:
    """N distributions, each as E entries and one event for everything else.

    ids (N, E) int64; an id equal to the number of logits is a blank: no entry. logprobs (N, E) and
    log_tail (N,): natural logs, -inf where there is no mass. They need not add up to 1.
    """

    ids: Tensor
    logprobs: Tensor
    log_tail: Tensor

    def pick(self, index: Tensor | slice) -> Entries:
        """Those of some of the N."""
        return Entries(ids=self.ids[index], logprobs=self.logprobs[index], log_tail=self.log_tail[index])


def no_entries(device: torch.device, dtype: torch.dtype) -> Entries:
    """Entries of zero positions."""
    logprobs = torch.zeros((0, 1), dtype=dtype, device=device)
    return Entries(ids=logprobs.long(), logprobs=logprobs, log_tail=logprobs[:, 0])


def join(entries: list[Entries], columns: int) -> Entries:
    """Entries one after the other, the narrower ones filled up with blanks."""
    width = max(each.ids.shape[1] for each in entries)

    def widened(values: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)

    return Entries(
        ids=torch.cat([widened(each.ids, columns) for each in entries]),
        logprobs=torch.cat([widened(each.logprobs, -math.inf) for each in entries]),
        log_tail=torch.cat([each.log_tail for each in entries]),
    )


def log_complement(log_mass: Tensor) -> Tensor:
    """log(1 - exp(log_mass)) for log_mass <= 0, to rounding at both ends."""
    log_mass = log_mass.clamp(max=0.0)
    near_one = torch.log(-torch.expm1(log_mass))
    return torch.where(log_mass > -math.log(2.0), near_one, torch.log1p(-torch.exp(log_mass)))


def entries_of(target: Any, *, tail: Tail, temperature: float, head: Head, dtype: torch.dtype) -> Entries:
    """The entries of `target` (any object with the fields of TopK as tensors) at `temperature`.

    With p the teacher's softmax at that temperature: `bucket` keeps p of the K entries and the mass
    outside them as one event; `drop` ignores that mass; `renormalize` divides p by its sum over the K
    entries; `sampled` gives each drawn id j the mass p_tail * count_j / M. head: the student's.
    ValueError when the tail mass of that temperature was not captured, when draws are asked for that were
    not captured or were captured at another temperature, and when an id with mass is not a token of the head.
    """
    ids, logprobs = target.token_ids.long(), target.logprobs.to(dtype)
    if ids.dim() != 2 or ids.shape != logprobs.shape:
        shapes = f"{tuple(ids.shape)} and {tuple(logprobs.shape)}"
        raise ValueError(f"sparse target: token_ids and logprobs must both be (N, K), not {shapes}")
    if (counts := getattr(target, "counts", None)) is not None:
        beyond = torch.arange(ids.shape[1], device=ids.device) >= counts[:, None]
        ids, logprobs = ids.masked_fill(beyond, -1), logprobs.masked_fill(beyond, -math.inf)
    known = getattr(target, "id_range", None)
    ids = _tokens(ids, known or range_of(ids, logprobs > -math.inf), head)
    nothing = logprobs.new_full((len(logprobs),), -math.inf)
    # At T != 1 the entries are known up to a factor, which their common mass fixes.
    tempered = torch.log_softmax(logprobs / temperature, dim=1).nan_to_num(nan=-math.inf)
    if tail == "renormalize":
        return Entries(ids=ids, logprobs=tempered, log_tail=nothing)
    if temperature == 1.0 and tail == "drop":
        return Entries(ids=ids, logprobs=logprobs, log_tail=nothing)
    log_tail = _tail_at(target, temperature).to(dtype)
    if temperature != 1.0:
        logprobs = tempered + log_complement(log_tail)[:, None]
    if tail == "bucket":
        return Entries(ids=ids, logprobs=logprobs, log_tail=log_tail)
    if tail == "drop":
        return Entries(ids=ids, logprobs=logprobs, log_tail=nothing)
    if tail == "sampled":
        drawn, drawn_logprobs = _draws(target, temperature, log_tail, head)
        return Entries(
            ids=torch.cat([ids, drawn], dim=1),
            logprobs=torch.cat([logprobs, drawn_logprobs], dim=1),
            log_tail=nothing,
        )
    raise ValueError(f"sparse target: tail must be bucket, renormalize, drop or sampled, not {tail}")


def _tokens(ids: Tensor, used: tuple[int, int], head: Head) -> Tensor:
    """ids, blank where they are not tokens. used: the least and the greatest with mass. ValueError when one
    of these is not a token."""
    strange = (ids < 0) | (ids >= head.columns)
    if used[0] < 0 or used[1] >= head.columns:
        worst = used[0] if used[0] < 0 else used[1]
        raise ValueError(
            f"sparse target: token id {worst} has mass, but the student has {head.columns} tokens"
        )
    return ids.masked_fill(strange, head.rows)


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


def _draws(target: Any, temperature: float, log_tail: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """ids (N, M) and log-masses (N, M) of the draws from the tail."""
    if target.sampled_ids is None or target.sampled_counts is None:
        raise ValueError("sparse target: tail 'sampled' needs draws from the tail, and none were captured")
    captured = getattr(target, "sample_temperature", 1.0)
    if not math.isclose(captured, temperature, rel_tol=1e-6):
        raise ValueError(
            f"sparse target: the tail was drawn at temperature {captured}; at {temperature} the draws are"
            " biased; use that temperature or another tail"
        )
    counts = target.sampled_counts.to(log_tail.dtype)
    ids = target.sampled_ids.long()
    used = getattr(target, "drawn_range", None) or range_of(ids, counts > 0)
    ids = _tokens(ids, used, head).masked_fill(counts == 0, head.rows)
    ids, counts = _merged(ids, counts, head.rows)
    share = counts / counts.sum(dim=1, keepdim=True).clamp(min=1.0)
    return ids, log_tail[:, None] + share.log()


def _merged(ids: Tensor, counts: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The same draws with every id once per row, its counts summed; rows are padded with blanks."""
    ids, order = ids.sort(dim=1)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = begins.cumsum(dim=1) - 1
    merged = torch.full_like(ids, columns).scatter_(1, place, ids)
    return merged, torch.zeros_like(counts).scatter_add_(1, place, counts.gather(1, order))
