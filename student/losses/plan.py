"""Where the requests of a batch go: index tables made on the host, so that no loss waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cache_schema.format.records import IGNORE_INDEX
from cache_schema.format.spec import Kind
from student.losses.selection import Selection, rows_by_sample
from student.losses.targets import DistillationTargets, RelationTargets

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
    (I, P) float32: 1 at tokens, 0 where filled up; None: nothing is. Exactly one of factor (I, P, r) and gram
    (I, P, P), 0 where filled up. siblings (I,) float32: the images of each one's sample.
    """

    lengths: tuple[int, ...]
    places: Tensor
    real: Tensor | None
    factor: Tensor | None
    gram: Tensor | None
    siblings: Tensor

    @classmethod
    def of(cls, images: list[RelationTargets], siblings: list[int]) -> RelationGroup:
        """One of images that have all a factor, or all a Gram matrix."""
        lengths = tuple(len(image.positions) for image in images)
        length, device = max(lengths), images[0].positions.device
        real = None
        if min(lengths) < length:
            real = _padded([torch.ones(size, device=device) for size in lengths], length)
        factors = [image.factor for image in images if image.factor is not None]
        grams = [image.gram for image in images if image.gram is not None]
        return cls(
            lengths=lengths,
            places=_padded([image.positions for image in images], length),
            real=real,
            factor=_padded(factors, length) if factors else None,
            gram=_padded(grams, length) if grams else None,
            siblings=torch.tensor(siblings, dtype=torch.float32).to(device),
        )

    def cut(self, part: slice) -> RelationGroup:
        """Some of the images."""
        return replace(self._each(lambda tensor: tensor[part]), lengths=self.lengths[part])

    def to(self, device: torch.device | str) -> RelationGroup:
        """The same on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> RelationGroup:
        return RelationGroup(
            lengths=self.lengths,
            places=change(self.places),
            real=None if self.real is None else change(self.real),
            factor=None if self.factor is None else change(self.factor),
            gram=None if self.gram is None else change(self.gram),
            siblings=change(self.siblings),
        )


def group_images(images: tuple[RelationTargets, ...]) -> tuple[RelationGroup, ...]:
    """All images, in groups of which the longest is at most a quarter longer than the shortest."""
    owners = [image.sample for image in images]
    groups: list[list[int]] = []
    longest = 0
    by_length = sorted(
        range(len(images)), key=lambda each: (images[each].factor is None, -len(images[each].positions))
    )
    for number in by_length:
        length = len(images[number].positions)
        if (
            not groups
            or len(groups[-1]) >= _GROUP_ELEMENTS // max(1, longest**2)
            or 4 * longest > 5 * length
            or (images[groups[-1][0]].factor is None) != (images[number].factor is None)
        ):
            groups.append([])
            longest = length
        groups[-1].append(number)
    return tuple(
        RelationGroup.of([images[each] for each in group], [owners.count(owners[each]) for each in group])
        for group in groups
    )


def _padded(tensors: list[Tensor], length: int) -> Tensor:
    """(I, length, ...) of tensors (P, ...): zeros follow; a second dimension is filled up to the widest, that
    of square ones to `length`."""
    if all(tensor.shape == tensors[0].shape and len(tensor) == length for tensor in tensors):
        return torch.stack(tensors)
    width = [max(tensor.shape[1] for tensor in tensors)] if tensors[0].dim() == 2 else []
    table = tensors[0].new_zeros(len(tensors), length, *width)
    for row, tensor in zip(table, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """The requests of a batch at positions.

    kinds: whose distributions have rows in `layout`, one kind after the other; labels (C,) int64: the next
    tokens, where they are supervised and asked for, label_range the least and the greatest of them (None:
    there is none). siblings: the supervised tokens (C,), and the positions (M_kind,) of each kind, of each
    one's sample, float32, also of other kinds. unsupervised: samples with no supervised token. kl_share: as
    in `LossWeights`.
    """

    kinds: tuple[Kind, ...]
    supervised: bool
    kl_share: float
    layout: Layout
    labels: Tensor
    label_range: tuple[int, int] | None
    label_siblings: Tensor
    siblings: Mapping[Kind, Tensor]
    unsupervised: int

    @classmethod
    def of(
        cls,
        labels: Tensor,
        targets: DistillationTargets,
        kinds: tuple[Kind, ...],
        supervised: bool,
        kl_share: float,
    ) -> Plan:
        """That of labels (B, T), unshifted. supervised: whether labels are asked for. On the device of the
        labels, which is waited for."""
        batch, length = labels.shape
        marked = labels[:, 1:] != IGNORE_INDEX  # (B, T - 1)
        samples, offsets = marked.nonzero(as_tuple=True)
        if not supervised:
            samples, offsets = samples[:0], offsets[:0]
        next_tokens = labels[samples, offsets + 1]
        positions = [targets.positions[kind].positions for kind in kinds]
        siblings = {kind: target.samples for kind, target in targets.positions.items()}

        label_positions = samples * length + offsets
        if kl_share < 1.0:
            owners = [siblings[kind] for kind in kinds]
            sources, kl_rows, ce_rows, selection = rows_by_sample(
                positions, owners, label_positions, samples, batch, kl_share
            )
            layout = Layout(
                sources=sources, base=sources[:0], kl_rows=kl_rows, ce_rows=ce_rows, selection=selection
            )
        else:
            layout = Layout.of(torch.cat([samples[:0], *positions]), label_positions)

        def counted(owners: Tensor) -> Tensor:
            return torch.bincount(owners, minlength=batch).float()[owners]

        return cls(
            kinds=kinds,
            supervised=supervised,
            kl_share=kl_share,
            layout=layout,
            labels=next_tokens,
            label_range=(int(next_tokens.min()), int(next_tokens.max())) if len(next_tokens) else None,
            label_siblings=counted(samples),
            siblings={kind: counted(owners) for kind, owners in siblings.items()},
            unsupervised=int((~marked.any(dim=1)).sum()),
        )

    def to(self, device: torch.device | str) -> Plan:
        """The same with its tensors on `device`."""
        return replace(
            self,
            layout=self.layout.to(device),
            labels=self.labels.to(device, non_blocking=True),
            label_siblings=self.label_siblings.to(device, non_blocking=True),
            siblings={kind: each.to(device, non_blocking=True) for kind, each in self.siblings.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedTargets(DistillationTargets):
    """Targets of a batch with what the losses need to know of them, so that nothing waits for the device.

    `relations` stay where they are; what the losses read is `groups`.
    """

    plan: Plan
    groups: tuple[RelationGroup, ...]

    @classmethod
    def of(cls, labels: Tensor, targets: DistillationTargets | None, kl_share: float = 1.0) -> PlannedTargets:
        """targets of a batch with labels (B, T), unshifted, all on the host. kl_share: of `LossWeights`."""
        targets = DistillationTargets() if targets is None else targets
        kinds = tuple(
            kind for kind, target in targets.positions.items() if len(target) and target.states is None
        )
        return cls(
            positions={kind: target.checked() for kind, target in targets.positions.items()},
            relations=targets.relations,
            plan=Plan.of(labels, targets, kinds, supervised=True, kl_share=kl_share),
            groups=group_images(targets.relations),
        )

    def to(self, device: torch.device | str) -> PlannedTargets:
        """The same with what the losses read on `device`."""
        return PlannedTargets(
            positions={kind: target.to(device) for kind, target in self.positions.items()},
            relations=self.relations,
            plan=self.plan.to(device),
            groups=tuple(group.to(device) for group in self.groups),
        )


def plan_of(
    labels: Tensor, targets: DistillationTargets, kinds: tuple[Kind, ...], supervised: bool, kl_share: float
) -> Plan:
    """The plan that the targets bring, or a new one where that is for other kinds or another share."""
    if isinstance(targets, PlannedTargets):
        plan = targets.plan
        if (plan.kinds, plan.supervised, plan.kl_share) == (kinds, supervised, kl_share):
            return plan
    return Plan.of(labels, targets, kinds, supervised, kl_share)


def groups_of(targets: DistillationTargets) -> tuple[RelationGroup, ...]:
    """The images of the targets in groups: those that they bring, or new ones."""
    return targets.groups if isinstance(targets, PlannedTargets) else group_images(targets.relations)
