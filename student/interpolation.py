"""TAID's schedule: how much of the teacher is in the target that the student learns from, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from student.loss_weights import LossWeights

_RATE, _KEEP, _END = 5e-4, 0.99, 1.0
"""TAID's alpha, beta and t_end, as in its authors' code."""


@dataclass(slots=True, kw_only=True)
class Interpolation:
    """The state of the schedule of TAID (arXiv 2501.16937): part of every checkpoint.

    share: t, what the teacher's logits count in the target softmax((1 - t) z_student + t z_teacher); it
    begins at `start` and never falls. momentum: of the loss's relative change; last: the loss of the step
    before, None before the first.
    """

    start: float
    share: float
    momentum: float = 0.0
    last: float | None = None

    @classmethod
    def of(cls, weights: LossWeights) -> Interpolation | None:
        """That of a run that begins; None where no divergence is `taid`."""
        start = weights.interpolates_from
        return None if start is None else cls(start=start, share=start)

    def advance(self, weights: LossWeights, terms: Mapping[str, float], step: int, total: int) -> None:
        """After the step `step` of 0..total-1 with these terms of its global batch:
        m = 0.99 m + 0.01 (last - loss) / last, and
        t = min(1, max(start + (1 - start) step / total, t + 5e-4 sigmoid(m) (1 - t)))."""
        loss = sum(weights.by_target[kind] * terms[f"{kind}_kl"] for kind in weights.interpolated)
        if self.last is not None:
            change = (self.last - loss) / (self.last + 1e-15)
            self.momentum = _KEEP * self.momentum + (1.0 - _KEEP) * change
            gate = 0.5 * (1.0 + math.tanh(0.5 * self.momentum))
            line = self.start + (_END - self.start) * step / total
            self.share = min(_END, max(line, self.share + _RATE * gate * (1.0 - self.share)))
        self.last = loss
