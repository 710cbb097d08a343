"""Sample-wise fusion ratios of cross entropy and distillation (TGeo-KD, arXiv 2312.15112; our reading)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from cache_schema.errors import WrongUsage
from student.collate import Batch
from student.heldout import HeldOut
from student.loss_weights import TERMS, LossWeights
from student.losses import Denominators, DistillationLoss
from student.model import DistilledStudent
from student.ranks import AddUp

_SIGNALS, _WIDTH = 4, 8
_PARTS = (_WIDTH * _SIGNALS, _WIDTH, _WIDTH, 1)
_RATE, _BETAS, _SMALL = 1e-2, (0.9, 0.999), 1e-8
_STEP = 1e-2
"""Length of the step in the trained weights over which a slope is taken."""

_HELD_OUT = 8  # samples of an update

_NOTHING = torch.zeros(0, dtype=torch.float64)
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

    def gradient(self, signals: Tensor, slopes: Tensor) -> Tensor:
        """That of the held-out loss in the values, of signals (B, 4) and its slopes (B,) in the ratios."""
        values = torch.tensor(self.values, dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad((_ratios(values, signals) * slopes).sum(), values)
        return found

    def move(self, gradient: Tensor) -> None:
        """One step of Adam (rate 0.01) down the gradient."""
        self.updates += 1
        first, second = (torch.tensor(each, dtype=torch.float64) for each in (self.first, self.second))
        first = _BETAS[0] * first + (1 - _BETAS[0]) * gradient
        second = _BETAS[1] * second + (1 - _BETAS[1]) * gradient**2
        mean = first / (1 - _BETAS[0] ** self.updates)
        size = (second / (1 - _BETAS[1] ** self.updates)).sqrt()
        self.values = (
            torch.tensor(self.values, dtype=torch.float64) - _RATE * mean / (size + _SMALL)
        ).tolist()
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
    from its mean over the global batch, the relation between samples. Equal ratios of 1/2 are the plain loss.

    Every `every` steps the network learns in a bilevel step on 8 samples of the held-out cache, one after the
    other: with v the gradient of their cross entropy in the trained weights and r the learning rate, a plain
    gradient step of the global batch would change it by -r <v, dL/da_i> for a change of a_i, to first order.
    The product is a difference of the sample's terms at weights moved by v, forth and back, of length 0.01.

    A step makes the samples' terms once, of the hidden states of its own forward pass; an update adds one
    gradient of the held-out samples, on every process, and two forward passes without gradient over the
    global batch. Every process must take part; their slopes are added up, so all have the same network. Not
    promised: that AdamW's steps follow these slopes.
    """

    def __init__(
        self,
        student: DistilledStudent,
        held_out: HeldOut,
        weights: LossWeights,
        network: RatioNetwork,
        *,
        add_up: AddUp = lambda values: values,
    ) -> None:
        self.network = network
        self._student, self._held_out, self._weights = student, held_out, weights
        self._add_up = add_up
        self._loss = DistillationLoss(_LABELS_ALONE)
        self._due = False
        self._seen: list[tuple[Batch, Tensor]] = []  # what an update reads: micro-batches and their signals
        self._samples = self._usual = self._sum = 0.0

    @property
    def mean(self) -> float:
        """The mean ratio of the global batch's samples. Every process must ask."""
        return self._add_up(torch.tensor([self._sum], dtype=torch.float64)).item() / max(self._samples, 1.0)

    def begin(self, micro_batches: Sequence[Batch], step: int) -> None:
        """Before the micro-batches of a step, on every process."""
        teacher = torch.cat([_teacher_of(batch) for batch in micro_batches])
        total = torch.stack([teacher.sum(), torch.tensor(float(len(teacher)), dtype=torch.float64)])
        mean, self._samples = self._add_up(total).tolist()
        self._usual, self._sum = mean / max(self._samples, 1.0), 0.0
        self._due, self._seen = step % self._weights.fusion_every == 0, []

    def weigh(self, batch: Batch) -> None:
        """Before the loss of a micro-batch, which is on the student's device: it weighs each sample."""
        loss = self._student.loss
        assert isinstance(loss, DistillationLoss)
        loss.weigh = partial(self._scales, batch) if batch.rows else None

    def _scales(self, batch: Batch, terms: Tensor) -> Tensor:
        """(2, B) factors of cross entropy and other terms, of the terms (B, TERMS) of a batch's samples."""
        signals = self._signals(terms, batch)
        if self._due:
            self._seen.append((batch, signals))
        ratios = self.network.ratios(signals)
        self._sum += float(ratios.sum())
        return torch.stack([2 * (1 - ratios), 2 * ratios])

    def _signals(self, terms: Tensor, batch: Batch) -> Tensor:
        """(B, 4) float64 on the CPU."""
        teacher, terms = _teacher_of(batch), terms.cpu().double()
        ours, distance = (
            terms[:, TERMS.index(name)].clamp(min=0.0).log1p() for name in ("ce", "response_kl")
        )
        return torch.stack([ours, teacher, distance, teacher - self._usual], dim=1)

    def learn(self, step: int, rate: float, device: torch.device) -> None:
        """One update of the network where it is due, after the gradients of a step and before its optimizer
        moves the weights."""
        if self._due and (found := self.slopes(step, rate, device)) is not None:
            self.network.move(self._add_up(self.network.gradient(*found)))
        self._seen = []

    def slopes(self, step: int, rate: float, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """The signals (B, 4) of this process's samples, and the slope (B,) of the held-out loss after a plain
        gradient step in each ratio; None where that loss is flat. Weights are left bit by bit."""
        trained = [one for one in self._student.model.parameters() if one.requires_grad]
        toward = self._held_out_gradient(trained, step, device)
        norm = float(torch.sqrt(sum(((one.double() ** 2).sum() for one in toward), start=torch.zeros(()))))
        if norm == 0.0:
            return None
        kept = [one.detach().clone() for one in trained]
        found = []
        try:
            for length in (_STEP / norm, -_STEP / norm):
                _set(trained, [before + length * along for before, along in zip(kept, toward, strict=True)])
                gaps = [self._gap(self._terms(batch)) for batch, _ in self._seen]
                found.append(torch.cat([_NOTHING, *gaps]))
        finally:
            _set(trained, kept)
        signals = torch.cat([_NOTHING.new_zeros(0, _SIGNALS), *(each for _, each in self._seen)])
        return signals, -rate * norm / (_STEP * self._samples) * (found[0] - found[1])

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
        with self._student.autocast():
            hidden = self._student.hidden_states(batch.inputs)
        return loss.by_sample(hidden, batch.labels, batch.targets, self._student.head).cpu().double()

    def _held_out_gradient(self, trained: Sequence[Tensor], step: int, device: torch.device) -> list[Tensor]:
        """Of the mean cross entropy of the next held-out samples, in the trained weights."""
        first, cache = _HELD_OUT * (step // self._weights.fusion_every), self._held_out.cache
        samples = [cache[(first + more) % len(cache)] for more in range(min(_HELD_OUT, len(cache)))]
        batch = self._held_out.collator(samples).to(device)
        with torch.enable_grad():
            with self._student.autocast():
                hidden = self._student.hidden_states(batch.inputs)
            counts = Denominators(samples=float(len(samples)))
            parts = self._loss(hidden, batch.labels, None, self._student.head, counts)
            found = torch.autograd.grad(parts.total, list(trained), allow_unused=True)
        return [
            torch.zeros_like(one) if grad is None else grad for one, grad in zip(trained, found, strict=True)
        ]


def _teacher_of(batch: Batch) -> Tensor:
    """(B,) float64: log(1 + the teacher's cross entropy) of a batch's samples."""
    return torch.tensor(batch.teacher_ce or (), dtype=torch.float64).log1p()


@torch.no_grad()
def _set(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for one, value in zip(weights, values, strict=True):
        one.copy_(value)


def fusion_of(
    student: DistilledStudent,
    held_out: HeldOut | None,
    weights: LossWeights,
    network: RatioNetwork | None,
    accelerator: Accelerator,
    *,
    seed: int,
    add_up: AddUp,
) -> Fusion | None:
    """None: the stage has no fusion ratios. WrongUsage where they cannot be learnt."""
    if not weights.fusion_every:
        return None
    if held_out is None:
        raise WrongUsage("fusion_every learns ratios on held-out samples: give --eval-cache")
    if not isinstance(student.loss, DistillationLoss):
        raise WrongUsage("fusion_every does not go with preference distillation")
    if accelerator.distributed_type == DistributedType.FSDP:
        raise WrongUsage("fusion_every does not go with FSDP: each process needs all of the trained weights")
    return Fusion(student, held_out, weights, network or RatioNetwork.begun(seed), add_up=add_up)
