"""All that the losses read of a batch, made on the host: nothing then waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cache_schema.format.records import IGNORE_INDEX
from cache_schema.format.spec import Kind
from student.divergences import BATCH, FORWARD, Divergence
from student.loss_weights import TERMS, LossWeights
from student.losses.batches import Batches
from student.losses.records import Entries, entries_of, no_entries, placed, spread
from student.losses.selection import Selection, rows_by_sample
from student.losses.targets import (
    ON_THE_HOST,
    DistillationTargets,
    FactorSteps,
    PositionTargets,
    RelationTargets,
)

_GROUP_ELEMENTS = 2**24
"""Elements of the Gram matrices (I, P, P) of a group that is made before the device is known."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """Which row of logits each request takes: M distributions and C labels at n distinct positions.

    sources (m,): the position of each row, m >= n: one row for each of the n positions, ascending, and one
    for each further distribution at a position that has several; base (m - n,), ascending, is the row of
    that position. kl_rows (M,), distinct, and ce_rows (C,), below n: the rows of distributions and labels.
    selection: where only some rows get a gradient; rows then stand in its order, and none in `base`.
    """

    sources: Tensor
    base: Tensor
    kl_rows: Tensor
    ce_rows: Tensor
    selection: Selection | None = None

    @property
    def positions(self) -> int:
        """n."""
        return len(self.sources) - len(self.base)

    @classmethod
    def of(cls, positions: Tensor, label_positions: Tensor) -> Layout:
        """That of distributions at `positions` (M,) and labels at `label_positions` (C,), distinct."""
        distinct, inverse = torch.unique(torch.cat([positions, label_positions]), return_inverse=True)
        rows = inverse[: len(positions)]
        order = torch.argsort(rows, stable=True)
        ranked = rows[order]
        further = ranked == torch.cat([ranked.new_full((1,), -1), ranked])[:-1]
        base = ranked[further]
        kl_rows = rows.clone()
        kl_rows[order[further]] = len(distinct) + torch.arange(len(base), device=rows.device)
        return cls(
            sources=torch.cat([distinct, distinct[base]]),
            base=base,
            kl_rows=kl_rows,
            ce_rows=inverse[len(positions) :],
        )

    def to(self, device: torch.device | str) -> Layout:
        """The same on `device`."""
        names = ("sources", "base", "kl_rows", "ce_rows")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return Layout(**moved, selection=None if self.selection is None else self.selection.to(device))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RelationGroup:
    """I images of about as many tokens, filled up to P, the most of them.

    lengths (I,): tokens of each. places (I, P) int64 into hidden.reshape(B * T, D), 0 where filled up; real
    (I, P) float32: 1 at tokens, 0 where filled up; None: nothing is. Exactly one of factor (I, P, r), gram
    (I, P, P) and steps, 0 where filled up. samples: whose image each is.
    """

    lengths: tuple[int, ...]
    samples: tuple[int, ...]
    places: Tensor
    real: Tensor | None
    factor: Tensor | None
    gram: Tensor | None
    steps: FactorSteps | None

    @classmethod
    def of(cls, images: list[RelationTargets]) -> RelationGroup:
        """One of images of the same form."""
        lengths = tuple(len(image.positions) for image in images)
        length, device = max(lengths), images[0].positions.device
        real = None
        if min(lengths) < length:
            real = _padded([torch.ones(size, device=device) for size in lengths], length)
        factors = [image.factor for image in images if image.factor is not None]
        grams = [image.gram for image in images if image.gram is not None]
        stored = [image.stored for image in images if image.stored is not None]
        rank = max((each.shape[1] for each in factors), default=0)
        return cls(
            lengths=lengths,
            samples=tuple(image.sample for image in images),
            places=_padded([image.positions for image in images], length),
            real=real,
            factor=_padded(factors, length, rank) if factors else None,
            gram=_padded(grams, length, length) if grams else None,
            steps=FactorSteps.of(stored).to(device) if stored else None,
        )

    def decoded(self) -> RelationGroup:
        """The same with factors in place of steps."""
        return self if self.steps is None else replace(self, factor=self.steps.factor(), steps=None)

    def cut(self, part: slice) -> RelationGroup:
        """Some of the images."""
        whole = self._each(lambda tensor: tensor[part])
        return replace(whole, lengths=self.lengths[part], samples=self.samples[part])

    def to(self, device: torch.device | str) -> RelationGroup:
        """The same on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> RelationGroup:
        return replace(
            self,
            places=change(self.places),
            real=None if self.real is None else change(self.real),
            factor=None if self.factor is None else change(self.factor),
            gram=None if self.gram is None else change(self.gram),
            steps=None
            if self.steps is None
            else FactorSteps(columns=change(self.steps.columns), scales=change(self.steps.scales)),
        )


def group_images(images: tuple[RelationTargets, ...]) -> tuple[RelationGroup, ...]:
    """All images, in groups of which the longest is at most a quarter longer than the shortest."""
    groups: list[list[int]] = []
    longest = 0
    by_length = sorted(range(len(images)), key=lambda each: (images[each].form, -len(images[each].positions)))
    for number in by_length:
        length = len(images[number].positions)
        if (
            not groups
            or len(groups[-1]) >= _GROUP_ELEMENTS // max(1, longest**2)
            or 4 * longest > 5 * length
            or images[groups[-1][0]].form != images[number].form
        ):
            groups.append([])
            longest = length
        groups[-1].append(number)
    return tuple(RelationGroup.of([images[each] for each in group]) for group in groups)


def _padded(tensors: list[Tensor], *shape: int) -> Tensor:
    """(I, *shape) of I tensors at most as large: zeros follow. One that needs nothing is not copied."""
    if all(tensor.shape == shape for tensor in tensors):
        return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
    table = tensors[0].new_zeros(len(tensors), *shape)
    for row, tensor in zip(table, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """All that the losses read of a batch's labels and targets.

    weights: of the objective it is made for. layout: of m rows of logits. entries, which (m,) int64 and
    labels (m,) int64: what is asked at each, -1 and blanks where nothing is; the place of each one's
    divergence in `divergences`. label_range: the least and the greatest label, None: there is none. groups:
    the images. whole: the targets of kinds that are learnt from the teacher's whole distribution; spread:
    their entries, where it is made of these; batches: of kinds with `sinkhorn`. terms:
    whose losses are asked for, by their places in TERMS, with shares (T, N) float64: what each of N values
    counts in the sum of each term, 0 where nothing; 1 over the number of its sample where samples have means
    of their own, else 1. The values: KL and cross entropy of the m rows, the images of all groups, the
    positions of `whole`. unsupervised: samples with no supervised token.
    """

    weights: LossWeights
    layout: Layout
    entries: Entries
    which: Tensor
    divergences: tuple[Divergence, ...]
    labels: Tensor
    label_range: tuple[int, int] | None
    groups: tuple[RelationGroup, ...]
    whole: Mapping[Kind, PositionTargets]
    spread: Mapping[Kind, Entries]
    batches: Mapping[Kind, Batches]
    terms: tuple[int, ...]
    shares: Tensor
    unsupervised: int

    @classmethod
    def of(cls, labels: Tensor, targets: DistillationTargets, weights: LossWeights) -> Plan:
        """That of labels (B, T), unshifted, on their device, which is waited for. ValueError: see
        `entries_of`."""
        batch, length = labels.shape
        marked = labels[:, 1:] != IGNORE_INDEX  # (B, T - 1)
        samples, offsets = marked.nonzero(as_tuple=True)
        if not weights.ce:
            samples, offsets = samples[:0], offsets[:0]
        label_positions = samples * length + offsets
        next_tokens = labels.flatten().index_select(0, label_positions + 1)
        asked = {kind: one for kind, one in targets.positions.items() if len(one) and weights.by_target[kind]}
        whole = {kind: target for kind, target in asked.items() if kind in weights.apart}
        sparse = {kind: target for kind, target in asked.items() if kind not in whole}
        layout = _layout(sparse, label_positions, samples, batch, weights.kl_share)
        count = len(layout.sources)
        groups = group_images(targets.relations) if weights.relation else ()

        # The sample of every value that counts, and its place among all: see `shares`.
        counted = {"ce": (samples, count + layout.ce_rows)}
        rows = layout.kl_rows.split([len(target) for target in sparse.values()])
        for (kind, target), places in zip(sparse.items(), rows, strict=True):
            counted[f"{kind}_kl"] = target.samples, places
        end = 2 * count
        images = torch.tensor([sample for group in groups for sample in group.samples], dtype=torch.long)
        more = {"relation": images.to(labels.device)}
        for name, of in {**more, **{f"{kind}_kl": target.samples for kind, target in whole.items()}}.items():
            counted[name] = of, torch.arange(end, end + len(of), device=of.device)
            end += len(of)
        counted = {name: counted[name] for name in TERMS if name in counted and len(counted[name][0])}
        shares = torch.zeros(len(counted), end, dtype=torch.float64, device=labels.device)
        for share, (of, places) in zip(shares, counted.values(), strict=True):
            siblings = torch.bincount(of, minlength=batch).double()
            each = siblings.reciprocal_() if weights.reduction == "sample_mean" else torch.ones_like(siblings)
            share.index_copy_(0, places, each.index_select(0, of))

        divergences = tuple(dict.fromkeys(weights.divergences[kind] for kind in sparse)) or (FORWARD,)
        entries, which = _requests(sparse, weights, divergences, layout)
        spread_out = (
            {} if weights.tail == "dense" else {kind: _entries(whole[kind], weights) for kind in whole}
        )
        return cls(
            weights=weights,
            layout=layout,
            entries=entries,
            which=which,
            divergences=divergences,
            labels=spread(next_tokens, layout.ce_rows, count, -1),
            label_range=(int(next_tokens.min()), int(next_tokens.max())) if len(next_tokens) else None,
            groups=groups,
            whole=whole,
            spread=spread_out,
            batches={
                kind: Batches.of(_ends(target.samples), spread_out.get(kind), labels.device)
                for kind, target in whole.items()
                if weights.divergences[kind].name == "sinkhorn"
            },
            terms=tuple(TERMS.index(name) for name in counted),
            shares=shares,
            unsupervised=int((~marked.any(dim=1)).sum()),
        )

    def to(self, device: torch.device | str) -> Plan:
        """The same with its tensors on `device`."""
        return replace(
            self,
            layout=self.layout.to(device),
            entries=self.entries.to(device),
            which=self.which.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            groups=tuple(group.to(device) for group in self.groups),
            whole={kind: target.to(device) for kind, target in self.whole.items()},
            spread={kind: entries.to(device) for kind, entries in self.spread.items()},
            batches={kind: batches.to(device) for kind, batches in self.batches.items()},
            shares=self.shares.to(device, non_blocking=True),
        )


def _layout(
    sparse: Mapping[Kind, PositionTargets], label_positions: Tensor, samples: Tensor, batch: int, share: float
) -> Layout:
    """That of distributions by kind and of labels (C,) of the given samples (C,). share: `kl_share`."""
    positions = [target.positions for target in sparse.values()]
    if share == 1.0:
        return Layout.of(torch.cat([samples[:0], *positions]), label_positions)
    owners = [target.samples for target in sparse.values()]
    sources, kl_rows, ce_rows, selection = rows_by_sample(
        positions, owners, label_positions, samples, batch, share
    )
    return Layout(sources=sources, base=sources[:0], kl_rows=kl_rows, ce_rows=ce_rows, selection=selection)


def _requests(
    sparse: Mapping[Kind, PositionTargets],
    weights: LossWeights,
    divergences: tuple[Divergence, ...],
    layout: Layout,
) -> tuple[Entries, Tensor]:
    """The entries of all kinds at the rows of the layout, and which (m,) divergence each one has."""
    rows, count = layout.kl_rows, len(layout.sources)
    which = torch.zeros(count, dtype=torch.long, device=rows.device)
    if not sparse:
        return no_entries(count, torch.float32, rows.device), which
    made = [_entries(target, weights) for target in sparse.values()]
    if len(divergences) > 1:
        places = [divergences.index(weights.divergences[kind]) for kind in sparse]
        lengths = torch.tensor([len(target) for target in sparse.values()])
        which[rows] = torch.tensor(places).repeat_interleave(lengths).to(rows.device)
    return placed(made, rows.split([len(target) for target in sparse.values()]), count), which


def _ends(samples: Tensor) -> tuple[int, ...]:
    """The ends of batches of at most BATCH positions whose samples (M,) are the same, consecutive ones."""
    ends, end = [], 0
    for count in torch.unique_consecutive(samples, return_counts=True)[1].tolist():
        ends += [*range(end + BATCH, end + count, BATCH), end + count]
        end += count
    return tuple(ends)


def _entries(target: PositionTargets, weights: LossWeights) -> Entries:
    return entries_of(target, tail=weights.tail, temperature=weights.temperature, dtype=target.logprobs.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedTargets(DistillationTargets):
    """Targets of a batch with the plan of its losses, so that nothing waits for the device.

    `positions` and `relations` stay on the host: the losses read the plan alone, and label_plan for the
    model's own head where the objective has two.
    """

    positions: Mapping[Kind, PositionTargets] = field(default_factory=dict, metadata=ON_THE_HOST)
    relations: tuple[RelationTargets, ...] = field(default=(), metadata=ON_THE_HOST)
    plan: Plan
    label_plan: Plan | None = None

    @classmethod
    def of(
        cls, labels: Tensor, targets: DistillationTargets | None, weights: LossWeights | None = None
    ) -> PlannedTargets:
        """targets of a batch with labels (B, T), unshifted, all on the host, for the objective of
        `weights`."""
        targets = DistillationTargets() if targets is None else targets
        weights = weights or LossWeights()
        first, *own = weights.by_head if weights.dual_head else (weights,)
        return cls(
            positions=targets.positions,
            relations=targets.relations,
            plan=Plan.of(labels, targets, first),
            label_plan=Plan.of(labels, targets, own[0]) if own else None,
        )

    def to(self, device: torch.device | str) -> PlannedTargets:
        """The same with its plan on `device`."""
        own = self.label_plan
        return replace(self, plan=self.plan.to(device), label_plan=None if own is None else own.to(device))


def plan_of(labels: Tensor, targets: DistillationTargets, weights: LossWeights) -> Plan:
    """The plan that the targets bring, or a new one where that is for another objective."""
    if isinstance(targets, PlannedTargets):
        for plan in (targets.plan, targets.label_plan):
            if plan is not None and plan.weights == weights:
                return plan
        targets = DistillationTargets(positions=targets.positions, relations=targets.relations)
    return Plan.of(labels, targets.to(labels.device), weights)
