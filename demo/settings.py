"""What a user decides about the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cache_schema.settings import Help, at_least, check


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """A seed decides new weights, the text-only pre-training and the order of the samples of two students."""

    out: Annotated[Path, Help("Folder of the run; finished steps in it are not repeated.")] = Path("demo-run")
    seed: Annotated[int, at_least(0), Help("Seed of the first students.")] = 0
    seeds: Annotated[
        int, at_least(1), Help("Number of seeds, each with a distilled and a plain student.")
    ] = 1

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsConfig:
    """Rounds of on-policy distillation, as a file describes them."""

    recipe: Annotated[
        Path,
        Help("YAML file: rounds, student, teacher, data, image_root; more in docs/training.md."),
    ]
    out: Annotated[Path, Help("Folder of the rounds; finished steps in it are not repeated.")]

    def __post_init__(self) -> None:
        check(self)
