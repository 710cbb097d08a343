"""What each objective costs beside the forward KL, in one table: python -m benchmarks.objectives

    CPU       KL and cross entropy of 352 positions in two samples, V = 151,936, float32, a trained head, one
              thread; CPU time. A step of what an objective is compared with stands before and after each of
              its own; the ratio is that to their mean, so that other work on the machine counts for both.
    foretold  16 samples at LLaVA-KD's shapes, bfloat16 products, by the cost model: milliseconds, ratio,
              launches, waits for the device, and the most memory beside weights, inputs and gradients.

Compared with the forward KL of the same positions: `relation graph` with the relation loss, `preference` with
the response positions alone, all others without the relation loss, which is the same for them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks._loss_batch import Sizes, asked_of
from benchmarks._recorder import as_on_cuda, imagined
from benchmarks.roofline import DEVICES, SAMPLES, Forecast, Recorded, foretell
from student.divergences import OF_LOGITS, PARAMETERS
from student.losses import (
    Denominators,
    DistillationLoss,
    DistillationTargets,
    Head,
    LossWeights,
    PlannedTargets,
    PreferenceLoss,
    PreferenceTargets,
)

EXCEPTED = frozenset({"taid", "sinkhorn", "dual head"})
"""Those that may cost more than 1.3 times the forward KL."""

_BETA = 0.1


@dataclass(frozen=True, slots=True)
class Objective:
    """weights: of the objective. pairs: preference distillation takes their place."""

    weights: LossWeights
    pairs: bool = False


_ALONE = LossWeights(relation=0.0)
BASES = {
    "forward_kl": Objective(_ALONE),
    "forward_kl, relation": Objective(LossWeights()),
    "forward_kl, responses": Objective(LossWeights(relation=0.0, visual=0.0)),
}
"""The forward KL, as what others are compared with."""

# A temperature, so that `first` needs no held-out labels.
OBJECTIVES: dict[str, tuple[str, Objective]] = {
    **{
        name: ("forward_kl", Objective(replace(_ALONE, divergence="first:1" if name == "first" else name)))
        for name in PARAMETERS
        if name not in {"forward_kl", *OF_LOGITS}  # those read no entries
    },
    "relation graph": ("forward_kl, relation", Objective(LossWeights(relation_neighbours=16))),
    "preference": ("forward_kl, responses", Objective(LossWeights(), pairs=True)),
    "dual head": ("forward_kl", Objective(replace(_ALONE, dual_head=True))),
}
"""By name, one of BASES and what is compared with it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """What a step reads beside states and heads: labels (B, T) and targets, on the host."""

    sizes: Sizes
    labels: Tensor
    targets: DistillationTargets
    counts: Denominators

    @classmethod
    def of(cls, sizes: Sizes, samples: int) -> Asked:
        labels, targets = asked_of(sizes, samples)
        return cls(sizes=sizes, labels=labels, targets=targets, counts=Denominators.of(labels, targets))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of hidden states and two heads."""
        head = self.sizes.v, self.sizes.d
        return (*self.labels.shape, self.sizes.d), head, head

    def planned(self, objective: Objective) -> Any:
        """The targets as a loader makes them."""
        if objective.pairs:
            reference = torch.full((len(self.labels),), -100.0, dtype=torch.float64)
            return PreferenceTargets.of(self.labels, reference)
        return PlannedTargets.of(self.labels, self.targets, objective.weights)

    def step(
        self, objective: Objective, planned: Any, leaves: tuple[Tensor, ...], compute: torch.dtype | None
    ) -> None:
        """Forward and backward of the loss at leaves: hidden (B, T, D), and the heads' matrices (V, D)."""
        hidden, *matrices = leaves
        first, second = (Head(weight=each, vocab_size=self.sizes.tokens) for each in matrices)
        losses: list[tuple[DistillationLoss | PreferenceLoss, Head]]
        if objective.pairs:
            losses = [(PreferenceLoss(_BETA), first)]
        elif objective.weights.dual_head:
            distilled, labelled = (DistillationLoss(each) for each in objective.weights.by_head)
            losses = [(distilled, second), (labelled, first)]
        else:
            losses = [(DistillationLoss(objective.weights), first)]
        given = self.labels, planned
        totals = [loss(hidden, *given, head, self.counts, compute=compute).total for loss, head in losses]
        sum(totals[1:], totals[0]).backward()


def recorded(objective: Objective, sizes: Sizes | None = None) -> Recorded:
    """The loss of a micro-batch of 16 samples, at LLaVA-KD's shapes unless told otherwise."""
    asked = Asked.of(sizes or Sizes(device=torch.device("cpu")), SAMPLES)
    planned = asked.planned(objective)
    with imagined() as recorder, as_on_cuda():
        leaves = tuple(torch.empty(shape, requires_grad=True) for shape in asked.shapes)
        recorder.begin()
        asked.step(objective, planned, leaves, torch.bfloat16)
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        peak = recorder.peak - sum(each.numel() * each.element_size() for each in gradients)
        return Recorded(operations=recorder.operations, peak=peak)


@cache
def base_seconds(base: str, device: str) -> float:
    """Foretold, of one of BASES."""
    return foretell(recorded(BASES[base]).operations, DEVICES[device]).seconds


def foretold(name: str, device: str) -> tuple[Forecast, float, int]:
    """An objective's forecast, its ratio to what it is compared with, and its peak in bytes."""
    base, objective = OBJECTIVES[name]
    found = recorded(objective)
    forecast = foretell(found.operations, DEVICES[device])
    return forecast, forecast.seconds / base_seconds(base, device), found.peak


class Clock:
    """CPU seconds of steps at a fixed batch."""

    def __init__(self, sizes: Sizes, samples: int) -> None:
        torch.manual_seed(0)
        self._asked = Asked.of(sizes, samples)
        self._leaves = tuple(
            torch.empty(shape).normal_(std=deviation).requires_grad_()
            for shape, deviation in zip(self._asked.shapes, (1.0, 0.05, 0.05), strict=True)
        )

    def seconds(self, objective: Objective) -> float:
        """Of one step; what a loader does before it does not count."""
        planned = self._asked.planned(objective)
        for leaf in self._leaves:
            leaf.grad = None
        began = time.process_time()
        self._asked.step(objective, planned, self._leaves, None)
        return time.process_time() - began

    def ratio(self, name: str, rounds: int) -> tuple[float, float]:
        """Seconds of the last step, and the median ratio of the rounds."""
        base, objective = BASES[OBJECTIVES[name][0]], OBJECTIVES[name][1]
        ratios, before = [], self.seconds(base)
        for _ in range(rounds):
            taken, after = self.seconds(objective), self.seconds(base)
            ratios.append(2 * taken / (before + after))
            before = after
        return taken, statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES), metavar="NAME"
    )
    parser.add_argument(
        "--device", choices=[name for name, each in DEVICES.items() if not each.is_host], default="H100"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="timed steps of each, of which the median counts; 0: foretold alone",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock = None
    if arguments.rounds:
        clock = Clock(Sizes(device=torch.device("cpu"), length=200, visual=96, response=80), samples=2)
        clock.seconds(BASES["forward_kl"])  # the first step is slower
    print(
        f"{'objective':18} {'beside':22} {'CPU s':>6} {'ratio':>6} {arguments.device + ' ms':>8} "
        f"{'ratio':>6} {'launches':>9} {'waits':>6} {'peak MB':>8}"
    )
    for name in arguments.only:
        forecast, ratio, peak = foretold(name, arguments.device)
        measured = f"{'-':>6} {'-':>6}"
        if clock is not None:
            seconds, slower = clock.ratio(name, arguments.rounds)
            measured = f"{seconds:6.2f} {slower:6.2f}"
        print(
            f"{name:18} {OBJECTIVES[name][0]:22} {measured} {forecast.seconds * 1e3:8.1f} {ratio:6.2f} "
            f"{forecast.launches:9,} {forecast.waits:6,} {peak / 1e6:8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
