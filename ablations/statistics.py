"""Means, their intervals, and the paired t-test of two arms on the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """A difference of two arms over n seeds, in their unit, and its two-sided p; nan for less than two."""

    difference: float
    p: float
    n: int


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def half_interval(values: Sequence[float]) -> float:
    """Half the 95% confidence interval of the mean, by Student's t; nan for less than two values."""
    if len(values) < 2:
        return math.nan
    low, high = 0.0, 1e4
    for _ in range(80):  # bisection
        middle = (low + high) / 2
        low, high = (middle, high) if _two_sided(middle, len(values) - 1) > 0.05 else (low, middle)
    return high * statistics.stdev(values) / math.sqrt(len(values))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """The paired t-test of ours against theirs, seed by seed in the same order."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, deviation = spread(gaps)
    if len(gaps) < 2:
        return Paired(difference=mean, p=math.nan, n=len(gaps))
    if deviation == 0.0:
        return Paired(difference=mean, p=0.0 if mean else 1.0, n=len(gaps))
    t = mean / (deviation / math.sqrt(len(gaps)))
    return Paired(difference=mean, p=_two_sided(abs(t), len(gaps) - 1), n=len(gaps))


def _two_sided(t: float, freedom: int) -> float:
    """P(|T| > t) of Student's distribution: with x = sqrt(freedom) tan(angle), its density is a power of the
    cosine."""
    edge = math.atan(t / math.sqrt(freedom))
    angles = np.linspace(edge, math.pi / 2, 4001)
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(math.pi) * math.gamma(freedom / 2))
    return float(2 * scale * np.trapezoid(np.cos(angles) ** (freedom - 1), angles))
