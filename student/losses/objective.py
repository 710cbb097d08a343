"""The objective of a training step: LLaVA-KD eq. 6, 7 from sparse targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cache_schema.format.spec import KINDS, Kind
from models.head import Head
from student.divergences import FORWARD
from student.loss_weights import TERMS, LossWeights
from student.losses.dense import DenseWork
from student.losses.fused import fused_losses
from student.losses.plan import Plan, groups_of, plan_of
from student.losses.positions import position_work
from student.losses.products import KeptMatrix, wide_dtype
from student.losses.records import Entries, entries_of, join, no_entries
from student.losses.relation import RelationWork
from student.losses.targets import Denominators, DistillationTargets, PositionTargets


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossParts:
    """The loss of one micro-batch.

    total: what to call backward on; times world_size, because DDP takes the mean of the ranks' gradients. Its
    sum over micro-batches, averaged over ranks, is the loss of the global batch. The terms are detached,
    without their weights and world_size: sums over micro-batches and ranks give the terms of the global
    batch. A term of weight 0 is not computed; its value is 0. unsupervised: samples with no supervised token.
    """

    total: Tensor
    ce: Tensor
    kl: Mapping[Kind, Tensor]
    relation: Tensor
    unsupervised: int

    @property
    def by_term(self) -> dict[str, Tensor]:
        """The value of each of TERMS."""
        return dict(zip(TERMS, (self.ce, *self.kl.values(), self.relation), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Term:
    """A kind of KL term: its distributions, and the share (N,) of each in its mean."""

    kind: Kind
    entries: Entries
    shares: Tensor


class DistillationLoss:
    """L = ce L_CE + response L_res + visual L_vis + relation L_rel + prompt L_prompt.

    L_CE: -log q of the next token at every position whose next label is supervised. L_res, L_vis, L_prompt:
    `sparse_kl` at the response, visual and prompt positions, or the divergence of `LossWeights.divergence`.
    L_rel: `relation_loss` of every image. Means as `LossWeights.reduction` says. All terms share one pass: a
    position's logits are made once. With a `kl_share` below 1 the KL terms count the selected positions
    alone, each of them for as many as were asked for each selected one. With tail `dense` they compare with
    the whole distribution that `teacher`, its head, makes of its hidden states; their logits are made apart.
    """

    def __init__(
        self, weights: LossWeights, *, teacher: Head | None = None, memory_budget: int | None = None
    ) -> None:
        self.weights = weights
        self.teacher = teacher
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
        targets are `PlannedTargets` of all kinds that have weight, and their labels too.
        """
        if hidden.dim() != 3 or labels.shape != hidden.shape[:2]:
            shapes = f"{tuple(hidden.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"hidden must be (B, T, D) and labels (B, T), not {shapes}")
        weights, dtype = self.weights, wide_dtype(hidden.dtype, head.weight.dtype)
        targets = DistillationTargets() if targets is None else targets
        batch, length, width = hidden.shape

        asked = tuple(
            kind for kind, target in targets.positions.items() if len(target) and weights.by_target[kind]
        )
        kinds, whole = ((), asked) if weights.tail == "dense" else (asked, ())
        plan = plan_of(labels, targets, kinds, supervised=weights.ce != 0, kl_share=weights.kl_share)
        if plan.label_range is not None:
            head.check_label_range(*plan.label_range)
        ce_shares = self._shares(plan.label_siblings, denominators.samples, denominators.ce_tokens, dtype)
        terms = [self._term(kind, targets.positions[kind], plan, head, denominators, dtype) for kind in kinds]
        factors = [weights.by_target[term.kind] * world_size * term.shares for term in terms]
        divergences = tuple(dict.fromkeys(weights.divergences[kind] for kind in kinds)) or (FORWARD,)
        which = [
            torch.full_like(term.shares, divergences.index(weights.divergences[term.kind]), dtype=torch.long)
            for term in terms
        ]
        work = position_work(
            layout=plan.layout,
            entries=join([no_entries(hidden.device, dtype), *(term.entries for term in terms)], head.rows),
            weights=torch.cat([ce_shares[:0], *factors]),
            labels=plan.labels,
            label_weights=ce_shares * (weights.ce * world_size),
            columns=head.rows,
            temperature=weights.temperature,
            inside_only=weights.tail == "renormalize",
            which=torch.cat([plan.labels[:0], *which]),
            divergences=divergences,
        )
        dense = [
            self._dense(kind, targets.positions[kind], plan, denominators, world_size, dtype)
            for kind in whole
        ]
        groups = groups_of(targets) if weights.relation != 0 else ()
        siblings = torch.cat([ce_shares[:0], *(group.siblings.to(dtype) for group in groups)])
        image_shares = self._shares(siblings, denominators.samples, denominators.images, dtype)
        values = fused_losses(
            hidden.reshape(batch * length, width),
            head,
            positions=work,
            relations=RelationWork(groups=groups, weights=image_shares * (weights.relation * world_size)),
            dense=[work for work, _ in dense],
            memory_budget=self.memory_budget,
            compute=compute,
            matrix=self.matrix,
        )

        kl = dict.fromkeys(KINDS, values.total.new_zeros(()))
        at = 0
        for term in terms:
            rows = plan.layout.kl_rows[at : at + len(term.shares)]
            kl[term.kind] = (term.shares * values.kl[rows]).sum()
            at += len(rows)
        parts = values.dense.split([len(shares) for _, shares in dense])
        for kind, (_, shares), part in zip(whole, dense, parts, strict=True):
            kl[kind] = (shares * part).sum()
        return LossParts(
            total=values.total,
            ce=(ce_shares * values.ce[plan.layout.ce_rows]).sum(),
            kl=kl,
            relation=(image_shares * values.relation).sum(),
            unsupervised=plan.unsupervised,
        )

    def _term(
        self,
        kind: Kind,
        target: PositionTargets,
        plan: Plan,
        head: Head,
        denominators: Denominators,
        dtype: torch.dtype,
    ) -> _Term:
        """The KL term of a kind that has a weight and targets."""
        weights = self.weights
        entries = entries_of(
            target, tail=weights.tail, temperature=weights.temperature, head=head, dtype=dtype
        )
        shares = self._shares(plan.siblings[kind], denominators.samples, denominators.tokens[kind], dtype)
        return _Term(kind=kind, entries=entries, shares=shares)

    def _dense(
        self,
        kind: Kind,
        target: PositionTargets,
        plan: Plan,
        denominators: Denominators,
        world_size: int,
        dtype: torch.dtype,
    ) -> tuple[DenseWork, Tensor]:
        """The term of a kind against the teacher's whole distribution, and each position's share (N,)."""
        weights = self.weights
        if target.states is None or self.teacher is None:
            raise ValueError("tail `dense` needs the teacher's hidden states and its head")
        shares = self._shares(plan.siblings[kind], denominators.samples, denominators.tokens[kind], dtype)
        return DenseWork(
            positions=target.positions,
            states=target.states,
            teacher=self.teacher,
            weights=shares * (weights.by_target[kind] * world_size),
            temperature=weights.temperature,
            divergence=weights.divergences[kind],
        ), shares

    def _shares(self, siblings: Tensor, all_samples: float, all_items: float, dtype: torch.dtype) -> Tensor:
        """(N,) the share of each of a term's N tokens (images), of whose sample there are `siblings` (N,)."""
        if self.weights.reduction == "token_mean":
            return torch.full_like(siblings, 1.0 / max(all_items, 1.0), dtype=dtype)
        return 1.0 / (siblings.to(dtype) * max(all_samples, 1.0))
