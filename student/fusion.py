"""Sample-wise fusion ratios of cross entropy and distillation (TGeo-KD, arXiv 2312.15112; our reading)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from cache_schema.errors import WrongUsage
from student.collate import Batch
from student.heldout import HeldOut
from student.loss_weights import TERMS, LossWeights
from student.losses import Denominators, DistillationLoss
from student.model import DistilledStudent

_SIGNALS, _WIDTH = 4, 8
_PARTS = (_WIDTH * _SIGNALS, _WIDTH, _WIDTH, 1)
_RATE, _BETAS, _SMALL = 1e-2, (0.9, 0.999), 1e-8
_STEP = 1e-2
"""Length of the step in the trained weights over which a slope is taken."""

_HELD_OUT = 8  # samples of an update

_LABELS_ALONE = LossWeights(response=0.0, visual=0.0, relation=0.0)


@dataclass(slots=True, kw_only=True)
class RatioNetwork:
    """Two layers, 4 signals to 8 tanh to a sigmoid, and its Adam: part of every checkpoint, as lists of
    float64. It begins with ratios of 1/2."""

    values: list[float]
    first: list[float] = field(default_factory=lambda: [0.0] * sum(_PARTS))
    second: list[float] = field(default_factory=lambda: [0.0] * sum(_PARTS))
    updates: int = 0

    @classmethod
    def begun(cls, seed: int) -> RatioNetwork:
        """One of new weights: small in the first layer, zeros after it."""
        random = torch.Generator().manual_seed(seed)
        inner = torch.randn(_PARTS[0], generator=random, dtype=torch.float64) * _SIGNALS**-0.5
        return cls(values=[*inner.tolist(), *[0.0] * sum(_PARTS[1:])])

    def ratios(self, signals: Tensor) -> Tensor:
        """(B,) float64 of signals (B, 4) float64."""
        return _ratios(torch.tensor(self.values, dtype=torch.float64), signals)

    def learn(self, signals: Tensor, slopes: Tensor) -> None:
        """One step of Adam (rate 0.01) down the slopes (B,) of the held-out loss in the ratios."""
        values = torch.tensor(self.values, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad((_ratios(values, signals) * slopes).sum(), values)
        self.updates += 1
        first, second = (torch.tensor(each, dtype=torch.float64) for each in (self.first, self.second))
        first = _BETAS[0] * first + (1 - _BETAS[0]) * gradient
        second = _BETAS[1] * second + (1 - _BETAS[1]) * gradient**2
        mean = first / (1 - _BETAS[0] ** self.updates)
        size = (second / (1 - _BETAS[1] ** self.updates)).sqrt()
        self.values = (values.detach() - _RATE * mean / (size + _SMALL)).tolist()
        self.first, self.second = first.tolist(), second.tolist()

    def to_json(self) -> dict[str, object]:
        """All of it, as JSON values."""
        return asdict(self)


def _ratios(values: Tensor, signals: Tensor) -> Tensor:
    inner, bias, outer, shift = values.split(_PARTS)
    hidden = torch.tanh(signals @ inner.view(_WIDTH, _SIGNALS).T + bias)
    return torch.sigmoid(hidden @ outer + shift)


class Fusion:
    """L_i = 2 (1 - a_i) ce L_CE,i + 2 a_i (the other terms of sample i, with their weights).

    a_i is what a network makes of four signals of a sample, in log(1 + nats per token): the sides of the
    triangle of student, teacher and label (student to label: its cross entropy; teacher to label: the
    teacher's; student to teacher: the KL at response positions), and how far the teacher's cross entropy lies
    from its mean over the micro-batch, the relation between samples. Equal ratios of 1/2 are the plain loss.

    Every `every` steps the network learns in a bilevel step on 8 samples of the held-out cache, one after the
    other: with v the gradient of their cross entropy in the trained weights and r the learning rate, a plain
    gradient step of the global batch would change it by -r <v, dL/da_i> for a change of a_i, to first order.
    The product is a difference of the sample's terms at weights moved by v, forth and back, of length 0.01.

    Costs a forward pass without gradient more per step, and of an update one gradient of the held-out samples
    and two more such passes. Not promised: that AdamW's steps follow these slopes.
    """

    def __init__(
        self, student: DistilledStudent, held_out: HeldOut, weights: LossWeights, network: RatioNetwork
    ) -> None:
        self.network = network
        self.mean = 0.5  # of the ratios of the newest micro-batch
        self._student, self._held_out, self._weights = student, held_out, weights
        self._loss = DistillationLoss(_LABELS_ALONE)

    def due(self, step: int) -> bool:
        return step % self._weights.fusion_every == 0

    def weigh(self, batch: Batch) -> None:
        """Sets the ratios of the samples of a micro-batch on the student's device, for its loss."""
        loss = self._student.loss
        assert isinstance(loss, DistillationLoss)
        loss.scales = None
        if not batch.rows:
            return
        ratios = self.network.ratios(signals_of(self._terms(batch), batch))
        self.mean = float(ratios.mean())
        loss.scales = torch.stack([2 * (1 - ratios), 2 * ratios]).to(batch.labels.device)

    def learn(self, micro_batches: Sequence[Batch], step: int, rate: float, device: torch.device) -> None:
        """One update of the network from the samples of a global batch."""
        found = self.slopes(micro_batches, step, rate, device)
        if found is not None:
            self.network.learn(*found)

    def slopes(
        self, micro_batches: Sequence[Batch], step: int, rate: float, device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """The signals (B, 4) of a global batch's samples, and the slope (B,) of the held-out loss after a
        plain gradient step in each ratio; None where that loss is flat. Weights are left bit by bit."""
        trained = [one for one in self._student.model.parameters() if one.requires_grad]
        toward = self._held_out_gradient(trained, step, device)
        norm = float(torch.sqrt(sum(((one.double() ** 2).sum() for one in toward), start=torch.zeros(()))))
        if norm == 0.0:
            return None
        moved = [batch.to(device) for batch in micro_batches if batch.rows]
        signals = torch.cat([signals_of(self._terms(batch), batch) for batch in moved])
        kept = [one.detach().clone() for one in trained]
        found = []
        for length in (_STEP / norm, -_STEP / norm):
            with torch.no_grad():
                for one, before, along in zip(trained, kept, toward, strict=True):
                    one.copy_(before + length * along)
            found.append(torch.cat([self._gap(self._terms(batch)) for batch in moved]))
        with torch.no_grad():
            for one, before in zip(trained, kept, strict=True):
                one.copy_(before)
        products = (found[0] - found[1]) * norm / (2 * _STEP)
        return signals, -2.0 * rate * products / len(products)

    def _gap(self, terms: Tensor) -> Tensor:
        """The weighted terms of distillation less the weighted cross entropy, (B,), of terms (B, TERMS)."""
        signs = [-1.0 if name == "ce" else 1.0 for name in TERMS]
        weights = [sign * self._weights.by_term[name] for sign, name in zip(signs, TERMS, strict=True)]
        return terms @ torch.tensor(weights, dtype=terms.dtype)

    @torch.no_grad()
    def _terms(self, batch: Batch) -> Tensor:
        """(B, TERMS) float64: the terms of each sample."""
        loss = self._student.loss
        assert isinstance(loss, DistillationLoss)
        hidden = self._student.hidden_states(batch.inputs)
        return loss.by_sample(hidden, batch.labels, batch.targets, self._student.head).cpu().double()

    def _held_out_gradient(self, trained: Sequence[Tensor], step: int, device: torch.device) -> list[Tensor]:
        """Of the mean cross entropy of the next held-out samples, in the trained weights."""
        first, cache = _HELD_OUT * (step // self._weights.fusion_every), self._held_out.cache
        samples = [cache[(first + more) % len(cache)] for more in range(min(_HELD_OUT, len(cache)))]
        batch = self._held_out.collator(samples).to(device)
        with torch.enable_grad():
            hidden = self._student.hidden_states(batch.inputs)
            counts = Denominators(samples=float(len(samples)))
            parts = self._loss(hidden, batch.labels, None, self._student.head, counts)
            found = torch.autograd.grad(parts.total, list(trained), allow_unused=True)
        return [
            torch.zeros_like(one) if grad is None else grad for one, grad in zip(trained, found, strict=True)
        ]


def signals_of(terms: Tensor, batch: Batch) -> Tensor:
    """(B, 4) float64 of the terms (B, TERMS) of a batch's samples."""
    assert batch.teacher_ce is not None
    teacher = torch.log1p(torch.tensor(batch.teacher_ce, dtype=torch.float64))
    ours, distance = (terms[:, TERMS.index(name)].clamp(min=0.0).log1p() for name in ("ce", "response_kl"))
    return torch.stack([ours, teacher, distance, teacher - teacher.mean()], dim=1)


def fusion_of(
    student: DistilledStudent,
    held_out: HeldOut | None,
    weights: LossWeights,
    network: RatioNetwork | None,
    *,
    seed: int,
    processes: int,
) -> Fusion | None:
    """None: the stage has no fusion ratios. WrongUsage where they cannot be learnt."""
    if not weights.fusion_every:
        return None
    if held_out is None:
        raise WrongUsage("fusion_every learns ratios on held-out samples: give --eval-cache")
    if not isinstance(student.loss, DistillationLoss):
        raise WrongUsage("fusion_every does not go with preference distillation")
    if processes > 1:
        raise WrongUsage("fusion_every is for one process")
    return Fusion(student, held_out, weights, network or RatioNetwork.begun(seed))
