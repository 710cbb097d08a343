"""What a run knows at a step beside weights and optimizer: typed, and stored as JSON in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from student.interpolation import Interpolation


@dataclass(slots=True, kw_only=True)
class RunState:
    """Grows with the run.

    step: optimizer steps done, which is the position in the stream too. samples: trained on, over all ranks.
    seconds: by lap of the stopwatch. scaler: state of the gradient scaler of fp16, else None. evaluated: the
    step of the newest evaluation, which gave `evaluation`; best_evaluation: the one with the least loss, at
    best_step; waited: evaluations since then. held_out: the identity of the cache that they measured.
    interpolation: that of a run with TAID. teacher_temperature: at which FIRST found its teacher calibrated.
    mixture: the shares of a mixture whose rule is ddk, as `Reweighing.state`. fusion: the network of fusion
    ratios, as `RatioNetwork.to_json`.
    """

    step: int = 0
    samples: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    scaler: dict[str, Any] | None = None
    evaluated: int | None = None
    evaluation: dict[str, float] | None = None
    best_step: int | None = None
    best_evaluation: dict[str, float] | None = None
    waited: int = 0
    held_out: str | None = None
    interpolation: Interpolation | None = None
    mixture: dict[str, Any] | None = None
    teacher_temperature: float | None = None
    fusion: dict[str, Any] | None = None

    @classmethod
    def from_json(cls, step: int, document: Mapping[str, Any]) -> RunState:
        """The state of a checkpoint of `step`. KeyError when an entry is missing that every version wrote."""
        values = {name: document[name] for name in ("samples", "seconds", "evaluation", "best_step")}
        known = {each.name for each in fields(cls)}
        values |= {name: value for name, value in document.items() if name in known}
        if values.get("interpolation") is not None:
            values["interpolation"] = Interpolation(**values["interpolation"])
        # Before version 0.2 a step was evaluated before it was saved.
        return cls(**{"evaluated": step, **values, "step": step, "seconds": dict(values["seconds"])})

    def to_json(self) -> dict[str, Any]:
        """All but the step, as JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "step"}

    def measure_against(self, held_out: str | None) -> None:
        """Forgets the evaluations of another held-out cache: they cannot be compared."""
        if held_out != self.held_out and self.held_out is not None:
            self.evaluated = self.evaluation = self.best_step = self.best_evaluation = None
            self.waited = 0
        self.held_out = held_out

    def take(self, measured: dict[str, float], watch: str = "loss") -> None:
        """Takes in the evaluation of this step; its value named `watch` decides whether it is the best."""
        self.evaluated, self.evaluation = self.step, measured
        if self.best_evaluation is None or measured[watch] < self.best_evaluation[watch]:
            self.best_step, self.best_evaluation, self.waited = self.step, measured, 0
        else:
            self.waited += 1
