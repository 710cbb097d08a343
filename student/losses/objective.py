"""The objective of a training step: LLaVA-KD eq. 6, 7 from sparse targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cache_schema.format.records import IGNORE_INDEX
from cache_schema.format.spec import KINDS, Kind
from models.head import Head
from student.loss_weights import TERMS, LossWeights
from student.losses.fused import fused_losses
from student.losses.positions import position_work
from student.losses.products import wide_dtype
from student.losses.records import Entries, entries_of, join, no_entries
from student.losses.relation import RelationWork
from student.losses.targets import Denominators, DistillationTargets, RelationTargets


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
    """A kind of KL term: its distributions at `positions` (N,), and the share (N,) of each in its mean."""

    kind: Kind
    positions: Tensor
    entries: Entries
    shares: Tensor


class DistillationLoss:
    """L = ce L_CE + response L_res + visual L_vis + relation L_rel + prompt L_prompt.

    L_CE: -log q of the next token at every position whose next label is supervised. L_res, L_vis, L_prompt:
    `sparse_kl` at the response, visual and prompt positions. L_rel: `relation_loss` of every image. Means as
    `LossWeights.reduction` says. All terms share one pass: a position's logits are made once.
    """

    def __init__(self, weights: LossWeights, *, memory_budget: int | None = None) -> None:
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
        compute: torch.dtype | None = None,
    ) -> LossParts:
        """The loss of hidden (B, T, D), labels (B, T), unshifted, of the batch that `denominators` counts.

        targets: of the B samples, on the device of hidden; None: there are none. A kind with weight that the
        targets lack contributes 0, as in a batch of text-only rows. The head must be used inside the forward
        of the module that DDP or FSDP wraps. ValueError: shapes that do not fit, a label that is not a token,
        whatever `sparse_kl` refuses. compute: the dtype of the products' factors in a mixed-precision step,
        whatever dtype hidden and head have; that of hidden when None.
        """
        if hidden.dim() != 3 or labels.shape != hidden.shape[:2]:
            shapes = f"{tuple(hidden.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"hidden must be (B, T, D) and labels (B, T), not {shapes}")
        weights, dtype = self.weights, wide_dtype(hidden.dtype, head.weight.dtype)
        targets = DistillationTargets() if targets is None else targets
        batch, length, width = hidden.shape

        supervised = labels[:, 1:] != IGNORE_INDEX  # (B, T - 1)
        samples, offsets = supervised.nonzero(as_tuple=True)
        if weights.ce == 0:
            samples, offsets = samples[:0], offsets[:0]
        next_tokens = labels[samples, offsets + 1]
        head.check_labels(next_tokens)
        ce_shares = self._shares(samples, batch, denominators.samples, denominators.ce_tokens, dtype)
        terms = self._terms(targets, batch, head, denominators, dtype)
        factors = [weights.by_target[term.kind] * world_size * term.shares for term in terms]
        work = position_work(
            positions=torch.cat([samples[:0], *(term.positions for term in terms)]),
            entries=join([no_entries(hidden.device, dtype), *(term.entries for term in terms)], head.rows),
            weights=torch.cat([ce_shares[:0], *factors]),
            label_positions=samples * length + offsets,
            labels=next_tokens,
            label_weights=ce_shares * (weights.ce * world_size),
            columns=head.rows,
            temperature=weights.temperature,
            inside_only=weights.tail == "renormalize",
        )
        images = targets.relations if weights.relation != 0 else ()
        image_shares = self._image_shares(images, denominators)
        image_weights = tuple(share * weights.relation * world_size for share in image_shares)
        values = fused_losses(
            hidden.reshape(batch * length, width),
            head,
            positions=work,
            relations=RelationWork(images=images, weights=image_weights),
            memory_budget=self.memory_budget,
            compute=compute,
        )

        ce = (ce_shares * values.ce[work.label_row]).sum()
        kl = dict.fromkeys(KINDS, torch.zeros_like(ce))
        at = 0
        for term in terms:
            end = at + len(term.positions)
            kl[term.kind] = (term.shares * values.kl[work.layer_of[at:end], work.row_of[at:end]]).sum()
            at = end
        return LossParts(
            total=values.total,
            ce=ce,
            kl=kl,
            relation=(values.relation * values.relation.new_tensor(image_shares)).sum(),
            unsupervised=int((~supervised.any(dim=1)).sum()),
        )

    def _terms(
        self,
        targets: DistillationTargets,
        batch: int,
        head: Head,
        denominators: Denominators,
        dtype: torch.dtype,
    ) -> list[_Term]:
        """The KL terms that have a weight and targets."""
        terms = []
        for kind, target in targets.positions.items():
            if len(target) == 0 or self.weights.by_target[kind] == 0:
                continue
            entries = entries_of(
                target,
                tail=self.weights.tail,
                temperature=self.weights.temperature,
                head=head,
                dtype=dtype,
            )
            shares = self._shares(
                target.samples, batch, denominators.samples, denominators.tokens[kind], dtype
            )
            terms.append(_Term(kind=kind, positions=target.positions, entries=entries, shares=shares))
        return terms

    def _shares(
        self, samples: Tensor, batch: int, all_samples: float, all_tokens: float, dtype: torch.dtype
    ) -> Tensor:
        """(N,) the share of each of a term's N tokens, which belong to `samples` (N,), in its mean."""
        if self.weights.reduction == "token_mean":
            return torch.full((len(samples),), 1.0 / max(all_tokens, 1.0), dtype=dtype, device=samples.device)
        counts = torch.bincount(samples, minlength=batch).to(dtype)
        return 1.0 / (counts[samples] * max(all_samples, 1.0))

    def _image_shares(
        self, images: tuple[RelationTargets, ...], denominators: Denominators
    ) -> tuple[float, ...]:
        """The share of each image in the relation loss."""
        if self.weights.reduction == "token_mean":
            return (1.0 / max(denominators.images, 1.0),) * len(images)
        owners = [image.sample for image in images]
        return tuple(1.0 / (owners.count(owner) * max(denominators.samples, 1.0)) for owner in owners)
