"""The arms of the ablations as data: which stages, which losses, how large a student, how many images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from student.loss_weights import LossWeights
from student.stages import CE_ONLY, DPT, SFT, Stage

Source = Literal["compact", "full", "threshold", "live"]
Size = Literal["small", "medium", "large"]

SIZES: dict[Size, tuple[int, int, int]] = {"small": (32, 2, 2), "medium": (48, 2, 4), "large": (96, 3, 4)}
"""Hidden size, layers and heads of a student's language model."""

ALL = LossWeights()
LOGITS = LossWeights(relation=0.0)
RELATION = LossWeights(response=0.0, visual=0.0)
RESPONSE = LossWeights(visual=0.0, relation=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What every arm on a set is given: images, epochs, batch, and the same search of learning rates, whose
    `factors` multiply both of them."""

    images: int
    fewer: tuple[int, ...]
    alignment_epochs: float = 2
    tuning_epochs: float = 6
    batch: int = 8
    alignment_rate: float = 3e-3
    tuning_rate: float = 2e-3
    factors: tuple[float, ...] = (1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to train a student.

    alignment: the losses of the first stage, on captions, projector alone. tuning: those of the stages on
    conversations, which share the epochs equally. images: None for all of the set.
    """

    name: str
    alignment: LossWeights = ALL
    tuning: tuple[LossWeights, ...] = (CE_ONLY, ALL)
    source: Source = "compact"
    size: Size = "medium"
    images: int | None = None

    def stages(self, budget: Budget, factor: float) -> list[tuple[str, Stage]]:
        """Its stages, each with the name of its data; `factor` multiplies every learning rate."""
        first = replace(
            DPT,
            name="alignment",
            losses=self.alignment,
            learning_rate=budget.alignment_rate * factor,
            global_batch=budget.batch,
            epochs=budget.alignment_epochs,
        )
        made = [("captions", first)]
        for number, losses in enumerate(self.tuning, start=1):
            stage = replace(
                SFT,
                name=f"tuning-{number}",
                losses=losses,
                learning_rate=budget.tuning_rate * factor,
                global_batch=budget.batch,
                epochs=budget.tuning_epochs / len(self.tuning),
                group_by_modality=False,
            )
            made.append(("conversations", stage))
        return made


PLAIN = Arm(name="PT + SFT", alignment=CE_ONLY, tuning=(CE_ONLY,))
DISTILLED = Arm(name="DPT + DFT", tuning=(ALL,))
THREE_STAGES = Arm(name="DPT + SFT + DFT")

STAGES = (
    PLAIN,
    Arm(name="PT + DFT", alignment=CE_ONLY, tuning=(ALL,)),
    Arm(name="DPT + SFT", tuning=(CE_ONLY,)),
    DISTILLED,
    THREE_STAGES,
)
"""The paper's Table 2. The tuning stages of every arm have as many steps together. The tables after it start
from DISTILLED, which is better than three stages at equal steps."""


def _with(name: str, losses: LossWeights) -> Arm:
    return Arm(name=name, alignment=losses, tuning=(losses,))


STRATEGIES = (PLAIN, _with("MDist", LOGITS), _with("RDist", RELATION), DISTILLED)
"""The paper's Table 3: logits (response and visual), relation, or both."""

TARGETS = (
    PLAIN,
    _with("response", RESPONSE),
    _with("response + prompt", replace(RESPONSE, prompt=1.0)),
    STRATEGIES[1],
    _with("response + prompt + visual", replace(LOGITS, prompt=1.0)),
    STRATEGIES[2],
    DISTILLED,
)
"""The paper's Table 4. MDist is response + visual."""


def _sources(arm: Arm) -> tuple[Arm, ...]:
    sources: tuple[Source, ...] = ("live", "full", "threshold")
    return tuple(replace(arm, name=f"{arm.name}, {source}", source=source) for source in sources)


SOURCES = {arm: _sources(arm) for arm in (DISTILLED, THREE_STAGES)}
"""Cached or live. The compact cache, k = 32, is that of the arm itself."""

SEARCHED_AS = {other: arm for arm, others in SOURCES.items() for other in others}
"""Whose learning rate an arm takes that has no search of its own."""


def sized(size: Size) -> tuple[Arm, Arm]:
    """Plain and distilled students of another size."""
    return tuple(replace(arm, name=f"{arm.name}, {size}", size=size) for arm in (PLAIN, DISTILLED))


def with_images(images: int) -> tuple[Arm, Arm]:
    """Plain and distilled students that see fewer images. Epochs, not steps, stay."""
    return tuple(
        replace(arm, name=f"{arm.name}, {images} images", images=images) for arm in (PLAIN, DISTILLED)
    )
