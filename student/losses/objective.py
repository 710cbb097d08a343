"""The objective of a training step: LLaVA-KD eq. 6, 7 from sparse targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cache_schema.format.spec import KINDS, Kind
from models.head import Head
from student.loss_weights import TERMS, LossWeights
from student.losses.dense import DenseWork
from student.losses.fused import fused_losses
from student.losses.logit_rows import LogitRows
from student.losses.plan import Plan, plan_of
from student.losses.positions import PositionWork
from student.losses.products import KeptMatrix, wide_dtype
from student.losses.relation import RelationWork
from student.losses.targets import Denominators, DistillationTargets, PositionTargets


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossParts:
    """The loss of one micro-batch.

    total: what to call backward on; times world_size, because DDP takes the mean of the ranks' gradients. Its
    sum over micro-batches, averaged over ranks, is the loss of the global batch. The terms are detached,
    without their weights and world_size: sums over micro-batches and ranks give the terms of the global
    batch. A term of weight 0 is not computed; its value is 0. unsupervised: samples with no supervised token.
    measures: what else an objective tells of a step (its `measures`), summed like the terms.
    """

    total: Tensor
    ce: Tensor
    kl: Mapping[Kind, Tensor]
    relation: Tensor
    unsupervised: int
    measures: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def by_term(self) -> dict[str, Tensor]:
        """The value of each of TERMS."""
        return dict(zip(TERMS, (self.ce, *self.kl.values(), self.relation), strict=True))


class DistillationLoss:
    """L = ce L_CE + response L_res + visual L_vis + relation L_rel + prompt L_prompt.

    L_CE: -log q of the next token at every position whose next label is supervised. L_res, L_vis, L_prompt:
    `sparse_kl` at the response, visual and prompt positions, or the divergence of `LossWeights.divergence`.
    L_rel: `relation_loss` of every image, or its graph. Means as `LossWeights.reduction` says. All terms
    share one pass: a position's logits are made once. With a `kl_share` below 1 the KL terms count the
    selected positions alone, each of them for as many as were asked for each selected one. With tail
    `dense` they compare with the whole distribution that `teacher`, its head, makes of its hidden states;
    their logits are made apart, as are those of TAID, whose t is `teacher_share` (None: where it begins).
    `weigh`, where set, makes of `by_sample` the factors (2, B) of each sample's cross entropy and other
    terms.
    """

    measures: tuple[str, ...] = ()

    def __init__(
        self, weights: LossWeights, *, teacher: Head | None = None, memory_budget: int | None = None
    ) -> None:
        self.weights = weights
        self.teacher = teacher
        self.teacher_share: float | None = None
        self.weigh: Callable[[Tensor], Tensor] | None = None
        self.memory_budget = memory_budget
        self.matrix = KeptMatrix()

    def __call__(
        self,
        hidden: Tensor,
        labels: Tensor,
        targets: DistillationTargets | None,
        head: Head,
        denominators: Denominators,
        world_size: int = 1,
        compute: torch.dtype | None = None,
    ) -> LossParts:
        """The loss of hidden (B, T, D), labels (B, T), unshifted, of the batch that `denominators` counts.

        targets: of the B samples, on the device of hidden; None: there are none. A kind with weight that the
        targets lack contributes 0, as in a batch of text-only rows. The head must be used inside the forward
        of the module that DDP or FSDP wraps. ValueError: shapes that do not fit, a label that is not a token,
        whatever `sparse_kl` refuses. compute: the dtype of the products' factors in a mixed-precision step,
        whatever dtype hidden and head have; that of hidden when None. Nothing waits for the device when the
        targets are `PlannedTargets` for the same weights.
        """
        dtype, batch = wide_dtype(hidden.dtype, head.weight.dtype), DistillationTargets()
        plan = plan_of(labels, batch if targets is None else targets, self.weights)
        check_batch(hidden, labels, plan.label_range, head)
        counts = self._counts(plan, denominators)
        shares = plan.shares.to(dtype)  # (T, N)
        weights = shares.new_zeros(shares.shape[1])  # (N,)
        scales = None
        if self.weigh is not None:
            by_sample = self.weigh(self.by_sample(hidden.detach(), labels, targets, head, compute))
            scales = by_sample.to(weights)[:, _samples_of(plan, hidden.shape[1])]  # (2, N)
        for share, term, count in zip(shares, plan.terms, counts, strict=True):
            own = share if scales is None else share * scales[int(TERMS[term] != "ce")]
            weights.add_(own, alpha=self.weights.by_term[TERMS[term]] * world_size / count)
        total, sums = self._fused(hidden, head, plan, weights, shares, compute)
        same = len(set(counts)) == 1
        means = (
            sums[1:] / counts[0]
            if same
            else [one / count for one, count in zip(sums[1:], counts, strict=True)]
        )
        terms = [sums.new_zeros(())] * len(TERMS)
        for term, mean in zip(plan.terms, means, strict=True):
            terms[term] = mean
        ce, *kl, relation = terms
        return LossParts(
            total=total,
            ce=ce,
            kl=dict(zip(KINDS, kl, strict=True)),
            relation=relation,
            unsupervised=plan.unsupervised,
        )

    @torch.no_grad()
    def by_sample(
        self,
        hidden: Tensor,
        labels: Tensor,
        targets: DistillationTargets | None,
        head: Head,
        compute: torch.dtype | None = None,
    ) -> Tensor:
        """(B, TERMS): the terms of each sample, means of its own tokens and images as in `sample_mean`."""
        dtype = wide_dtype(hidden.dtype, head.weight.dtype)
        plan = plan_of(labels, DistillationTargets() if targets is None else targets, self.weights)
        shares = plan.shares.to(dtype)
        own = _samples_of(plan, hidden.shape[1]) == torch.arange(len(labels), device=hidden.device)[:, None]
        rows = (shares[:, None] * own).flatten(0, 1)  # (T B, N)
        _, sums = self._fused(hidden, head, plan, shares.sum(dim=0), rows, compute)
        found = sums.new_zeros(len(labels), len(TERMS))
        found[:, list(plan.terms)] = sums[1:].view(len(plan.terms), len(labels)).T
        return found

    def _fused(
        self,
        hidden: Tensor,
        head: Head,
        plan: Plan,
        weights: Tensor,
        shares: Tensor,
        compute: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        """The sum with weights (N,), and the sums with weights and each row of shares (R, N)."""
        dtype, entries = weights.dtype, plan.entries.of(head)
        rows, images = len(plan.layout.sources), sum(len(group.lengths) for group in plan.groups)
        kl, ce, relation, *whole = weights.split(
            [rows, rows, images, *(len(target) for target in plan.whole.values())]
        )
        work = PositionWork(
            layout=plan.layout,
            rows=LogitRows(
                entries=replace(
                    entries, logprobs=entries.logprobs.to(dtype), log_tail=entries.log_tail.to(dtype)
                ),
                weights=kl,
                which=plan.which,
                labels=plan.labels,
                label_weights=ce,
            ),
            temperature=self.weights.temperature,
            inside_only=self.weights.tail == "renormalize",
            divergences=plan.divergences,
        )
        return fused_losses(
            hidden.reshape(-1, hidden.shape[2]),
            head,
            shares=torch.cat([weights[None], shares]),
            positions=work,
            relations=RelationWork(
                groups=plan.groups, weights=relation, neighbours=self.weights.relation_neighbours
            ),
            apart=[
                self._apart(kind, target, part, plan, head)
                for (kind, target), part in zip(plan.whole.items(), whole, strict=True)
            ],
            memory_budget=self.memory_budget,
            compute=compute,
            matrix=self.matrix,
        )

    def _counts(self, plan: Plan, denominators: Denominators) -> list[float]:
        """What each term of the plan is divided by."""
        if self.weights.reduction == "sample_mean":
            return [max(denominators.samples, 1.0)] * len(plan.terms)
        return [max(denominators.by_term[TERMS[term]], 1.0) for term in plan.terms]

    def _apart(
        self, kind: Kind, target: PositionTargets, weights: Tensor, plan: Plan, head: Head
    ) -> DenseWork | PositionWork:
        """The term of a kind whose logits are made apart."""
        entries, batches = plan.spread.get(kind), plan.batches.get(kind)
        if entries is None and (target.states is None or self.teacher is None):
            raise ValueError("tail `dense` needs the teacher's hidden states and its head")
        divergence = self.weights.divergences[kind]
        if entries is not None and batches is not None:
            return PositionWork.compared(
                target.positions, entries.of(head), weights, batches, divergence, self.weights.temperature
            )
        return DenseWork(
            positions=target.positions,
            weights=weights,
            temperature=self.weights.temperature,
            divergence=divergence,
            states=target.states if entries is None else None,
            teacher=self.teacher if entries is None else None,
            entries=None if entries is None else entries.of(head),
            batches=batches,
            share=divergence.value if self.teacher_share is None else self.teacher_share,
        )


def check_batch(hidden: Tensor, labels: Tensor, label_range: tuple[int, int] | None, head: Head) -> None:
    """ValueError where a batch is not hidden (B, T, D) and labels (B, T), or a label is not a token.
    label_range: the least and the greatest label, None: there is none."""
    if hidden.dim() != 3 or labels.shape != hidden.shape[:2]:
        shapes = f"{tuple(hidden.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"hidden must be (B, T, D) and labels (B, T), not {shapes}")
    if label_range is not None:
        head.check_label_range(*label_range)


def _samples_of(plan: Plan, length: int) -> Tensor:
    """Which sample of (B, T) each of the plan's N values is of; length: T."""
    rows = plan.layout.sources // length
    images = [sample for group in plan.groups for sample in group.samples]
    whole = [target.positions // length for target in plan.whole.values()]
    return torch.cat([rows, rows, torch.tensor(images, dtype=rows.dtype, device=rows.device), *whole])
