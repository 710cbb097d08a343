"""Inputs of the losses: targets of a batch, denominators of the global batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_schema.format.records import IGNORE_INDEX, Relation, StoredRelation
from cache_schema.format.spec import KINDS, Kind
from models.stored_head import decoded_states
from student.loss_weights import TERMS

ON_THE_HOST: Mapping[str, bool] = {"on_the_host": True}
"""Metadata of a field whose tensors no device reads."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherStates:
    """The teacher's hidden states at N positions as a cache stores them: values (N, D) int8, scales (N,),
    channels (C, 2, D) float32, channel_of (N,) int64."""

    values: Tensor
    scales: Tensor
    channels: Tensor
    channel_of: Tensor

    def at(self, rows: slice) -> Tensor:
        """(n, D) float32 of some of them."""
        return decoded_states(self.values[rows], self.scales[rows], self.channels, self.channel_of[rows])

    def to(self, device: torch.device | str) -> TeacherStates:
        """The same on `device`."""
        names = ("values", "scales", "channels", "channel_of")
        return TeacherStates(**{name: getattr(self, name).to(device, non_blocking=True) for name in names})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PositionTargets:
    """The teacher's distribution at N positions of a batch, flattened over its samples.

    positions (N,) int64 into hidden.reshape(B * T, D); samples (N,) int64 in 0..B-1:
    whose position it is. token_ids (N, K) int32 or int64, distinct along K, -1 where a position has fewer
    than K entries; logprobs (N, K) float32, natural log of the full softmax at temperature 1, -inf there;
    tail_logprob (N, n_T) float32: log of the mass outside the entries at each of `temperatures` (n_T,)
    float32. sampled_ids (N, M), none of them among token_ids, with sampled_counts (N, M): draws from the
    tail at `sample_temperature`; places with count 0 are unused.
    states: where the teacher's whole distribution is to be learnt from; the entries then count nothing.
    `temperatures` stays on the CPU.
    """

    positions: Tensor
    samples: Tensor
    token_ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor
    temperatures: Tensor
    sampled_ids: Tensor | None = None
    sampled_counts: Tensor | None = None
    sample_temperature: float = 1.0
    states: TeacherStates | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str) -> PositionTargets:
        """The same targets with their tensors on `device`."""
        names = ("positions", "samples", "token_ids", "logprobs", "tail_logprob")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        for name in ("sampled_ids", "sampled_counts"):
            value = getattr(self, name)
            moved[name] = None if value is None else value.to(device, non_blocking=True)
        moved["states"] = None if self.states is None else self.states.to(device)
        return replace(self, **moved)


def range_of(ids: Tensor, used: Tensor) -> tuple[int, int]:
    """The least and the greatest of `ids` where they are used; (0, 0) where none is."""
    if bool(used.all()) and len(used):
        least, greatest = ids.aminmax()
        return int(least), int(greatest)
    if not bool(used.any()):
        return 0, 0
    limits = torch.iinfo(ids.dtype)
    least, greatest = ids.masked_fill(~used, limits.max).min(), ids.masked_fill(~used, limits.min).max()
    return int(least), int(greatest)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FactorSteps:
    """Factors U (P, r) of I images in 16 bits, as a cache has them: columns (I, r, P) int16 and scales
    (I, r) float32, 0 where filled up. See `cache_schema.format.codecs.relation`."""

    columns: Tensor
    scales: Tensor

    @classmethod
    def of(cls, records: Sequence[StoredRelation]) -> FactorSteps:
        """Those of records in steps, on the host, in one piece of memory."""
        rank, tokens = max(each.rank for each in records), max(each.tokens for each in records)
        columns = np.empty((len(records), rank, tokens), np.int16)  # of numpy: it asks for large pages
        scales = np.zeros((len(records), rank), np.float32)
        for record, steps, scale in zip(records, columns, scales, strict=True):
            record.steps(into=steps[: record.rank, : record.tokens])
            steps[record.rank :] = 0
            steps[: record.rank, record.tokens :] = 0
            scale[: record.rank] = record.scales
        return cls(columns=torch.from_numpy(columns), scales=torch.from_numpy(scales))

    def factor(self) -> Tensor:
        """U (I, P, r) float32, bit by bit that of `StoredRelation.decode`, by one launch on a device."""
        return (self.columns * self.scales[..., None]).mT

    def to(self, device: torch.device | str) -> FactorSteps:
        """The same on `device`."""
        columns, scales = (each.to(device, non_blocking=True) for each in (self.columns, self.scales))
        return FactorSteps(columns=columns, scales=scales)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RelationTargets:
    """The teacher's Gram matrix R (P, P) of one image: exactly one of factor (P, r) float32, R ~= factor
    factor^T, gram (P, P) float32, and stored, a cache's record in steps of such a factor, on the host.

    positions (P,) int64 into hidden.reshape(B * T, D); sample: whose image it is; norm: the Frobenius norm
    of R, not used by the loss (the cosine takes the norm of what is given).
    """

    positions: Tensor
    sample: int
    factor: Tensor | None = None
    gram: Tensor | None = None
    stored: StoredRelation | None = None
    norm: float = math.nan

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.factor, self.gram, self.stored)) != 1:
            raise ValueError("a relation target needs exactly one of factor and gram, or a record in steps")

    @classmethod
    def of(cls, record: Relation | StoredRelation, positions: Tensor, sample: int) -> RelationTargets:
        """That of a cache's record of an image with positions (P,), decoded unless it is in steps."""
        found: dict[str, Any] = {"positions": positions, "sample": sample, "norm": float(record.norm)}
        if isinstance(record, StoredRelation):
            if record.in_steps:
                return cls(**found, stored=record)
            record = record.decode()
        for name in ("factor", "gram"):
            if (matrix := getattr(record, name)) is not None:
                found[name] = torch.from_numpy(matrix)
        return cls(**found)

    @property
    def form(self) -> str:
        """Which of `factor`, `gram` and `stored` it has."""
        return next(name for name in ("factor", "gram", "stored") if getattr(self, name) is not None)

    def to(self, device: torch.device | str) -> RelationTargets:
        """The same target with its tensors on `device`."""
        return replace(
            self,
            positions=self.positions.to(device, non_blocking=True),
            factor=None if self.factor is None else self.factor.to(device, non_blocking=True),
            gram=None if self.gram is None else self.gram.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DistillationTargets:
    """All targets of a batch, those of positions by kind. A kind that no sample has is absent or empty."""

    positions: Mapping[Kind, PositionTargets] = field(default_factory=dict)
    relations: tuple[RelationTargets, ...] = ()

    def to(self, device: torch.device | str) -> DistillationTargets:
        """The same targets with their tensors on `device`."""
        return DistillationTargets(
            positions={kind: target.to(device) for kind, target in self.positions.items()},
            relations=tuple(relation.to(device) for relation in self.relations),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """Counts over the global batch: all ranks, all accumulation steps. To be summed and all-reduced.

    tokens: the positions of each kind. `ce_tokens`: the supervised labels.
    """

    samples: float = 0.0
    ce_tokens: float = 0.0
    tokens: Mapping[Kind, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    images: float = 0.0

    @classmethod
    def of(cls, labels: Tensor, targets: DistillationTargets | None) -> Denominators:
        """Those of one micro-batch with labels (B, T), unshifted."""
        targets = targets or DistillationTargets()
        return cls(
            samples=float(labels.shape[0]),
            ce_tokens=float((labels[:, 1:] != IGNORE_INDEX).sum()),
            tokens={kind: float(len(targets.positions.get(kind, ()))) for kind in KINDS},
            images=float(len(targets.relations)),
        )

    @property
    def by_term(self) -> dict[str, float]:
        """What each of TERMS is divided by where it is a mean over all tokens (images)."""
        return dict(zip(TERMS, (self.ce_tokens, *self.tokens.values(), self.images), strict=True))

    @property
    def by_name(self) -> dict[str, float]:
        """Every count, to be summed over ranks."""
        tokens = {f"{kind}_tokens": count for kind, count in self.tokens.items()}
        return {"samples": self.samples, "ce_tokens": self.ce_tokens, **tokens, "images": self.images}

    @classmethod
    def from_names(cls, counts: Mapping[str, float]) -> Denominators:
        """The inverse of `by_name`; other names are passed over."""
        tokens = {kind: counts[f"{kind}_tokens"] for kind in KINDS}
        return cls(tokens=tokens, **{name: counts[name] for name in ("samples", "ce_tokens", "images")})

    def __add__(self, other: Denominators) -> Denominators:
        theirs = other.by_name
        return Denominators.from_names({name: count + theirs[name] for name, count in self.by_name.items()})
