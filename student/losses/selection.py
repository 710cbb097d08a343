"""Selection of positions: the divergence is trained only where the student's entropy is highest.

As arXiv 2602.01395 selects, by sample; here by kind of position too. A row that is not selected costs its
logits, and no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_APART = 1e4
"""More than any entropy of logits: log V is at most."""
_CLASSES = 8
_CLASS_LABEL, _CLASS_BOTH, _CLASS_ALONE = 0, 1, 2
"""Of a row: a label, a label and a distribution, a distribution alone (from here on one for each kind)."""
_BLOCK_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """What is kept of m rows of logits that stand sample by sample and, within one, group by group.

    group (m,) int64, ascending: the rows of a sample without a distribution; those with one and a label,
    which have their gradient in any case; and those with a distribution alone, by kind. In its group, ordered
    by falling entropy, the first ceil(share * size) rows are selected.
    take (k,) int64 into that order: the rows whose gradient is made; scale (k,) float64: what the weight of
    each one's distribution is multiplied by: size / selected, so that those selected stand for their group; 0
    for rows with a label that are not. row_ends, take_ends: where each sample ends in the rows, and in
    `take`.
    """

    share: float
    group: Tensor
    take: Tensor
    scale: Tensor
    row_ends: tuple[int, ...]
    take_ends: tuple[int, ...]

    @classmethod
    def of(cls, keys: Tensor, samples: int, share: float) -> Selection:
        """That of rows whose ascending keys (m,) are their sample times 8 plus the class."""
        found, sizes = torch.unique_consecutive(keys, return_counts=True)
        group = torch.repeat_interleave(torch.arange(len(found), device=keys.device), sizes)
        starts = sizes.cumsum(0) - sizes
        rank = torch.arange(len(keys), device=keys.device) - starts[group]
        selected = torch.ceil(share * sizes.double() - 1e-9).long()
        labelled = found % _CLASSES < _CLASS_ALONE
        kept = torch.where(labelled, sizes, selected)
        scale = torch.where(rank < selected[group], (sizes.double() / selected)[group], 0.0)
        take = (rank < kept[group]).nonzero()[:, 0]

        def ends(of: Tensor) -> tuple[int, ...]:
            return tuple(torch.bincount(keys[of] // _CLASSES, minlength=samples).cumsum(0).tolist())

        return cls(
            share=share,
            group=group,
            take=take,
            scale=scale[take],
            row_ends=ends(torch.arange(len(keys), device=keys.device)),
            take_ends=ends(take),
        )

    def to(self, device: torch.device | str) -> Selection:
        """The same on `device`."""
        names = ("group", "take", "scale")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})

    def parts(self, size: int) -> Iterator[tuple[slice, slice]]:
        """(rows, places in `take`) of as many whole samples as have `size` rows together, at least one."""
        row = took = 0
        last = len(self.row_ends) - 1
        for sample, end in enumerate(self.row_ends):
            if end > row and (sample == last or self.row_ends[sample + 1] - row > size):
                yield slice(row, end), slice(took, self.take_ends[sample])
                row, took = end, self.take_ends[sample]

    def pick(self, entropy: Tensor, rows: slice | None = None, takes: slice | None = None) -> Tensor:
        """Of one of `parts`, or of all rows, which have these entropies (n,): the rows kept (k,), counted
        from its first. A row of no number is kept, so that the loss shows it."""
        rows, takes = rows or slice(0, len(self.group)), takes or slice(0, len(self.take))
        entropy = entropy.double().nan_to_num(nan=_APART / 2)
        order = torch.argsort(_APART * self.group[rows] - entropy, stable=True)
        return order[self.take[takes] - rows.start]


def rows_by_sample(
    positions: Sequence[Tensor],
    samples: Sequence[Tensor],
    label_positions: Tensor,
    label_samples: Tensor,
    count: int,
    share: float,
) -> tuple[Tensor, Tensor, Tensor, Selection]:
    """(sources, kl_rows, ce_rows) of a layout, and what of it is selected.

    positions, samples: of the distributions of each kind; those of labels (C,), positions ascending. The
    first kind that stands at labels alone shares their rows, all other distributions get rows of their own.
    count: samples of the batch.
    """
    label_class = torch.full_like(label_positions, _CLASS_LABEL)
    shared: tuple[int, Tensor] | None = None
    for kind, places in enumerate(positions):
        at = torch.searchsorted(label_positions, places).clamp(max=max(0, len(label_positions) - 1))
        distinct = len(label_positions) > 0 and len(places.unique()) == len(places)
        if distinct and bool((label_positions[at] == places).all()):
            shared = kind, at
            label_class[at] = _CLASS_BOTH
            break
    keys, sources = [label_samples * _CLASSES + label_class], [label_positions]
    for kind, (places, owners) in enumerate(zip(positions, samples, strict=True)):
        if shared is None or kind != shared[0]:
            keys.append(owners * _CLASSES + _CLASS_ALONE + kind)
            sources.append(places)
    key, order = torch.cat(keys).sort(stable=True)
    row_of = torch.empty_like(order)
    row_of[order] = torch.arange(len(order), device=order.device)
    ce_rows, *alone = row_of.split([len(each) for each in keys])
    if shared is not None:
        alone.insert(shared[0], ce_rows[shared[1]])
    kl_rows = torch.cat([ce_rows[:0], *alone])
    return torch.cat(sources)[order], kl_rows, ce_rows, Selection.of(key, count, share)


def row_entropy(logits: Tensor) -> Tensor:
    """(n,) the entropy, in nats, of the softmax of each row of logits (n, V), in little memory."""
    rows = max(1, _BLOCK_BYTES // (logits.shape[1] * logits.itemsize))
    return torch.cat([logits.new_zeros(0), *(_entropy(block) for block in logits.split(rows))])


def _entropy(logits: Tensor) -> Tensor:
    shifted = logits - logits.amax(dim=1, keepdim=True)
    masses = shifted.exp()
    total = masses.sum(dim=1)
    return total.log() - masses.mul_(shifted).sum(dim=1) / total
