"""The objective of a training step: LLaVA-KD eq. 6, 7 from sparse targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student.losses.functions import no_entries
from student.losses.fused import MEMORY_BUDGET, Work, run
from student.losses.head import Head
from student.losses.positions import plan
from student.losses.records import Entries, entries_of
from student.losses.targets import (
    IGNORE_INDEX,
    Denominators,
    DistillationTargets,
    LossWeights,
    PositionTargets,
)

KINDS = ("response", "visual", "prompt")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossParts:
    """total: what to call backward on. The terms are detached, unweighted, over the global denominators:
    their sums over micro-batches and ranks are the terms of the global batch; a term of weight 0 is 0.
    unsupervised: samples of this micro-batch with no supervised token."""

    total: Tensor
    ce: Tensor
    response: Tensor
    visual: Tensor
    prompt: Tensor
    relation: Tensor
    unsupervised: int


class DistillationLoss:
    """ce * L_CE + response * L_res + visual * L_vis + relation * L_rel + prompt * L_prompt."""

    def __init__(self, weights: LossWeights, *, memory_budget: int = MEMORY_BUDGET) -> None:
        self.weights = weights
        self.memory_budget = memory_budget

    def __call__(
        self,
        hidden: Tensor,
        labels: Tensor,
        targets: DistillationTargets | None,
        head: Head,
        denominators: Denominators,
        world_size: int = 1,
    ) -> LossParts:
        """The loss of one micro-batch of the global batch that `denominators` counts."""
        batch, length, width = hidden.shape
        if labels.shape != (batch, length):
            raise ValueError(f"labels must be ({batch}, {length}) like hidden, not {tuple(labels.shape)}")
        weights, device = self.weights, hidden.device
        double = torch.float64 in (hidden.dtype, head.weight.dtype)
        dtype = torch.float64 if double else torch.float32
        targets = DistillationTargets() if targets is None else targets

        supervised = labels[:, 1:] != IGNORE_INDEX
        sample, offset = supervised.nonzero(as_tuple=True)
        ce_weights = self._shares(sample, batch, denominators.samples, denominators.ce_tokens, dtype)
        label_positions = sample * length + offset
        next_labels = labels[:, 1:][supervised]

        kinds, entries, kl_positions, shares = [], [], [], []
        factors = []
        for kind in KINDS:
            target: PositionTargets | None = getattr(targets, kind)
            factor = getattr(weights, kind)
            if target is None or len(target) == 0 or factor == 0:
                continue
            count = getattr(denominators, f"{kind}_tokens")
            kinds.append(kind)
            factors.append(factor)
            kl_positions.append(target.positions)
            shares.append(self._shares(target.samples, batch, denominators.samples, count, dtype))
            entries.append(
                entries_of(
                    target,
                    tail=weights.tail,
                    temperature=weights.temperature,
                    columns=head.columns,
                    dtype=dtype,
                )
            )
        scale = float(world_size)
        none = label_positions[:0]
        with_ce = weights.ce != 0
        work = plan(
            positions=torch.cat(kl_positions) if kinds else none,
            entries=_join(entries, head.columns) if kinds else no_entries(device, dtype),
            weights=torch.cat(
                [share * (factor * scale) for share, factor in zip(shares, factors, strict=True)]
            )
            if kinds
            else ce_weights[:0],
            label_positions=label_positions if with_ce else none,
            labels=next_labels if with_ce else none,
            label_weights=ce_weights * (weights.ce * scale) if with_ce else ce_weights[:0],
            columns=head.columns,
            temperature=weights.temperature,
            inside_only=weights.tail == "renormalize",
        )
        images = targets.relations if weights.relation != 0 else ()
        image_shares = self._image_shares([image.sample for image in images], denominators)
        values = run(
            hidden.reshape(batch * length, width),
            head,
            Work(
                positions=work,
                images=images,
                image_weights=tuple(share * weights.relation * scale for share in image_shares),
                memory_budget=self.memory_budget,
            ),
        )
        zero = values.total.detach().new_zeros(())
        parts = dict.fromkeys(KINDS, zero)
        per_record = values.kl[work.layer_of, work.row_of]
        start = 0
        for kind, share in zip(kinds, shares, strict=True):
            parts[kind] = (share * per_record[start : start + len(share)]).sum()
            start += len(share)
        relation = (values.relation * values.relation.new_tensor(image_shares)).sum()
        return LossParts(
            total=values.total,
            ce=(ce_weights * values.ce[work.label_row]).sum() if with_ce else zero,
            relation=relation,
            unsupervised=int((~supervised.any(dim=1)).sum()),
            **parts,
        )

    def _shares(
        self, samples: Tensor, batch: int, all_samples: float, all_tokens: float, dtype: torch.dtype
    ) -> Tensor:
        """(N,) the share of each token of a term in its mean."""
        if self.weights.reduction == "token_mean":
            return torch.full((len(samples),), 1.0 / max(all_tokens, 1.0), dtype=dtype, device=samples.device)
        counts = torch.bincount(samples, minlength=batch)
        return 1.0 / (counts[samples].to(dtype) * max(all_samples, 1.0))

    def _image_shares(self, samples: list[int], denominators: Denominators) -> list[float]:
        """The share of each image in the relation loss."""
        if self.weights.reduction == "token_mean":
            return [1.0 / max(denominators.images, 1.0) for _ in samples]
        return [1.0 / (samples.count(sample) * max(denominators.samples, 1.0)) for sample in samples]


def _join(entries: list[Entries], columns: int) -> Entries:
    """Entries of several kinds one after the other, the narrower filled up with blanks."""
    width = max(each.ids.shape[1] for each in entries)

    def widen(values: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)

    return Entries(
        ids=torch.cat([widen(each.ids, columns) for each in entries]),
        logprobs=torch.cat([widen(each.logprobs, float("-inf")) for each in entries]),
        log_tail=torch.cat([each.log_tail for each in entries]),
    )
