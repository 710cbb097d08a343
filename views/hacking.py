"""Teacher hacking: where the distance to the teacher keeps falling while that to the labels rises again.

After "On Teacher Hacking in Language Model Distillation" (arXiv 2502.02671), whose sign of it is that a run
leaves the polynomial law of its early convergence. The oracle of the paper is not there outside of its
experiments: the golden curve is the cross entropy on held-out labels, the proxy the KL in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EARLY = 0.5
"""The share of the measurements that the laws are fitted to, at least LEAST of them."""

LEAST = 3
TOLERANCE = 0.01
"""A golden value counts as risen when it is above the least one by more than this share of it."""

Curve = Sequence[tuple[float, float]]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """value = scale * step^-exponent, fitted to the logarithms of the steps up to `until`."""

    scale: float
    exponent: float
    until: float

    def at(self, step: float) -> float:
        """Its value at a step."""
        return float(self.scale * step**-self.exponent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """proxy, golden: the early laws of both. above: the last golden value over its law, less 1. parted: the
    step of the least golden value where the last one is risen from it while the proxy fell; None where they
    go together."""

    proxy: Law
    golden: Law
    above: float
    parted: float | None


def watch(proxy: Curve, golden: Curve) -> Watch | None:
    """The watch over two curves of (step, value), at the steps of the golden one; None with too few."""
    found = [(step, value) for step, value in golden if step > 0 and value > 0]
    falling = [(step, value) for step, value in proxy if value > 0]
    if len(found) <= LEAST or not falling:
        return None
    steps, labels = (np.array(column, dtype=np.float64) for column in zip(*found, strict=True))
    at, values = (np.array(column, dtype=np.float64) for column in zip(*falling, strict=True))
    ours = np.interp(steps, at, values)
    early = max(LEAST, int(len(steps) * EARLY))
    proxy_law, golden_law = (_law(steps[:early], curve[:early]) for curve in (ours, labels))
    least = int(labels.argmin())
    risen = labels[-1] > labels[least] * (1 + TOLERANCE) and ours[-1] < ours[least]
    return Watch(
        proxy=proxy_law,
        golden=golden_law,
        above=float(labels[-1] / golden_law.at(steps[-1]) - 1),
        parted=float(steps[least]) if risen else None,
    )


def _law(steps: Float64, values: Float64) -> Law:
    slope, intercept = np.polyfit(np.log(steps), np.log(values), 1)
    return Law(scale=float(np.exp(intercept)), exponent=-float(slope), until=float(steps[-1]))
