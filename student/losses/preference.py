"""Preference distillation: chosen and rejected answers, with the teacher as the reference of DPO."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cache_schema.format.records import IGNORE_INDEX
from cache_schema.format.spec import KINDS
from models.head import Head
from student.divergences import FORWARD
from student.losses.fused import fused_losses
from student.losses.logit_rows import LogitRows
from student.losses.objective import LossParts, check_batch
from student.losses.plan import Layout
from student.losses.positions import PositionWork
from student.losses.products import KeptMatrix, wide_dtype
from student.losses.targets import Denominators, DistillationTargets


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreferenceTargets(DistillationTargets):
    """Pairs of a batch: samples 0, 2, 4, ... are chosen, each followed by its rejected one.

    rows (C,) int64, ascending, into hidden.reshape(B * T, D): where the next label is supervised; labels,
    samples (C,) int64: that label, and whose it is. reference (B,) float64: the teacher's log-likelihood of
    each sample's supervised labels, nats. label_range: the least and the greatest label, None: there is none.
    """

    rows: Tensor
    labels: Tensor
    samples: Tensor
    reference: Tensor
    label_range: tuple[int, int] | None

    @classmethod
    def of(cls, labels: Tensor, reference: Tensor) -> PreferenceTargets:
        """labels (B, T), unshifted; reference (B,). ValueError for an odd B."""
        if len(labels) % 2 or reference.shape != (len(labels),):
            raise ValueError(f"pairs need an even B and (B,) references, not {tuple(labels.shape)}")
        samples, places = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        supervised = labels[samples, places + 1]
        return cls(
            rows=samples * labels.shape[1] + places,
            labels=supervised,
            samples=samples,
            reference=reference,
            label_range=(int(supervised.min()), int(supervised.max())) if len(supervised) else None,
        )

    def to(self, device: torch.device | str) -> PreferenceTargets:
        """The same on `device`."""
        names = ("rows", "labels", "samples", "reference")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


class PreferenceLoss:
    """LLaVA-MoD's preference distillation (arXiv 2408.15881): the mean over the pairs of a global batch of

        -log sigmoid(beta (log q(y+|x) - log p(y+|x)) - beta (log q(y-|x) - log p(y-|x))),

    q the student, p the teacher, y+ the chosen and y- the rejected answer; log-likelihoods are sums over
    the supervised labels. Those of the teacher are the sums of the cache's `label_logprob`: exact but for
    how that is stored. An answer without a supervised label has log-likelihood 0.

    Two passes over the supervised positions, both in chunks of logits: the first without gradients for the
    likelihoods, on which the weights of the second depend. Differentiable once, in hidden states and head.
    Both samples of a pair stand in one micro-batch. Nothing waits for the device.
    """

    measures = ("reward_accuracy", "reward_margin")
    """Means over pairs, beside the loss: how often the chosen answer's reward beta (log q - log p) is the
    larger one, and by how much it is larger."""

    def __init__(self, beta: float, *, memory_budget: int | None = None) -> None:
        self.beta = beta
        self.teacher: Head | None = None
        self.teacher_share: float | None = None
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
        """As `DistillationLoss`, of targets that are PreferenceTargets; None: an idle batch, whose loss is 0.
        `denominators` counts samples, two a pair. ValueError: shapes that do not fit, a label that is not a
        token."""
        dtype = wide_dtype(hidden.dtype, head.weight.dtype)
        nothing = torch.zeros((), dtype=dtype, device=hidden.device)
        loss, accuracy, margin = nothing + 0.0 * hidden.sum().to(dtype), nothing, nothing
        if targets is not None:
            assert isinstance(targets, PreferenceTargets), type(targets).__name__
            check_batch(hidden, labels, targets.label_range, head)
            pairs = max(denominators.samples / 2.0, 1.0)
            loss, accuracy, margin = self._pairs(
                hidden.reshape(-1, hidden.shape[-1]), targets, head, world_size / pairs, compute
            )
            accuracy, margin = accuracy / pairs, margin / pairs
        return LossParts(
            total=loss,
            ce=nothing,
            kl=dict.fromkeys(KINDS, nothing),
            relation=nothing,
            unsupervised=0,
            measures={"reward_accuracy": accuracy, "reward_margin": margin},
        )

    def _pairs(
        self,
        hidden: Tensor,
        targets: PreferenceTargets,
        head: Head,
        scale: float,
        compute: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The scaled sum over pairs of the loss, and the sums of measures."""
        dtype = wide_dtype(hidden.dtype, head.weight.dtype)
        samples = len(targets.reference)
        nothing, numbers = targets.rows[:0], torch.arange(len(targets.rows), device=hidden.device)
        layout = Layout(sources=targets.rows, base=nothing, kl_rows=nothing, ce_rows=numbers)
        owners = torch.arange(samples, device=hidden.device)[:, None] == targets.samples  # (B, C)

        def passed(weights: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
            work = PositionWork(
                layout=layout,
                rows=LogitRows.of_labels(targets.labels, weights),
                temperature=1.0,
                inside_only=False,
                divergences=(FORWARD,),
            )
            shares = torch.cat([weights[None], sums])
            return fused_losses(
                hidden,
                head,
                shares=torch.cat([torch.zeros_like(shares), shares], dim=1),
                positions=work,
                memory_budget=self.memory_budget,
                compute=compute,
                matrix=self.matrix,
            )

        with torch.no_grad():
            once = torch.ones(len(targets.rows), dtype=dtype, device=hidden.device)
            likelihood = -passed(once, owners.to(dtype))[1][1:]  # (B,)
            rewards = self.beta * (likelihood.double() - targets.reference)
            margins = rewards[::2] - rewards[1::2]  # (B / 2,)
            loss = -scale * logsigmoid(margins).sum().to(dtype)
            slopes = (scale * self.beta * torch.sigmoid(-margins)).to(dtype)  # of the cross entropies
            weights = torch.stack([slopes, -slopes], dim=1).reshape(-1)[targets.samples]
            right = (margins > 0).sum().to(dtype)
        if not torch.is_grad_enabled():
            return loss, right, margins.sum().to(dtype)
        surrogate = passed(weights, weights[None])[0]
        return surrogate + (loss - surrogate.detach()), right, margins.sum().to(dtype)
