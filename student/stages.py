"""Stages as data: what trains, which losses count, how fast. DPT, SFT, DFT and any other are values."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from cache_schema.errors import KdcacheError, WrongUsage
from cache_schema.format.spec import TARGETS
from models.parts import Part
from student.losses import LossWeights

Schedule = Literal["cosine", "linear", "constant"]

CE_ONLY = LossWeights(response=0.0, visual=0.0, relation=0.0)
"""Plain supervised training: no target is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One pass of training with fixed settings.

    trainable: the parts whose parameters move; all others are frozen. learning_rate: the peak, reached
    after warmup_ratio of the steps, then decayed to 0 by `schedule`. global_batch: samples a step over
    all ranks and accumulation steps. The stage ends after `epochs` passes or `max_steps` steps, whichever
    is asked last (max_steps wins). weight_decay, beta1, beta2, epsilon: of AdamW. max_grad_norm: the
    clipping bound of the global gradient norm, 0 for none. group_by_modality: batches are either all with
    or all without images, as in LLaVA's sampler. lora_rank: above 0 the language model trains through
    low-rank adapters alone, scaled by lora_alpha / lora_rank and merged into its weights at the end.
    """

    name: str
    trainable: tuple[Part, ...]
    losses: LossWeights
    learning_rate: float
    global_batch: int
    epochs: float = 1.0
    max_steps: int | None = None
    schedule: Schedule = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    group_by_modality: bool = False
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if not self.trainable or any(part not in get_args(Part) for part in self.trainable):
            problems.append(
                f"trainable must be some of {', '.join(get_args(Part))}, not {list(self.trainable)}"
            )
        if self.schedule not in get_args(Schedule):
            problems.append(f"schedule must be one of {', '.join(get_args(Schedule))}, not {self.schedule!r}")
        if not 0.0 < self.learning_rate < math.inf:
            problems.append(f"learning_rate must be positive, not {self.learning_rate}")
        if self.global_batch < 1:
            problems.append(f"global_batch must be at least 1, not {self.global_batch}")
        if self.max_steps is not None and self.max_steps < 1:
            problems.append(f"max_steps must be at least 1, not {self.max_steps}")
        if self.max_steps is None and not 0.0 < self.epochs < math.inf:
            problems.append(f"epochs must be positive, not {self.epochs}")
        if not 0.0 <= self.warmup_ratio < 1.0:
            problems.append(f"warmup_ratio must lie in [0, 1), not {self.warmup_ratio}")
        if self.lora_rank < 0 or not self.lora_alpha > 0.0 or not 0.0 <= self.lora_dropout < 1.0:
            lora = (self.lora_rank, self.lora_alpha, self.lora_dropout)
            problems.append(
                f"lora_rank, lora_alpha, lora_dropout must be >= 0, > 0 and in [0, 1), not {lora}"
            )
        if self.max_grad_norm < 0.0:
            problems.append(f"max_grad_norm must not be negative, not {self.max_grad_norm}")
        if problems:
            raise ValueError(f"stage {self.name}: " + "; ".join(problems))

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets that its losses read from the cache."""
        return tuple(name for name in TARGETS if getattr(self.losses, name) > 0.0)

    def only(self, targets: tuple[str, ...]) -> Stage:
        """The stage with the losses of all other targets switched off; CE stays."""
        unknown = [name for name in targets if name not in TARGETS]
        if unknown:
            raise WrongUsage(f"targets must be some of {', '.join(TARGETS)}, not {unknown}")
        off: dict[str, Any] = {name: 0.0 for name in TARGETS if name not in targets}
        return replace(self, losses=replace(self.losses, **off))

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole stage."""
        return self.max_steps or max(1, math.ceil(self.epochs * steps_per_epoch))

    def learning_rate_at(self, step: int, total: int) -> float:
        """The learning rate of step 0..total-1: a function of the step alone, so it has no state to save."""
        warmup = math.ceil(self.warmup_ratio * total)
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, total - warmup)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
        return self.learning_rate * (1.0 - done if self.schedule == "linear" else 1.0)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `stage_from` turns back into an equal stage."""
        return {**asdict(self), "trainable": list(self.trainable)}


# The paper's stages (section 3.3 and appendix; research of the authors' scripts): one epoch each.
DPT = Stage(
    name="dpt",
    trainable=("projector",),
    losses=LossWeights(),
    learning_rate=1e-3,
    global_batch=256,
)
SFT = Stage(
    name="sft",
    trainable=("projector", "language_model"),
    losses=CE_ONLY,
    learning_rate=2e-5,
    global_batch=128,
    group_by_modality=True,
)
DFT = replace(SFT, name="dft", losses=LossWeights())
PT = replace(DPT, name="pt", losses=CE_ONLY)

STAGES: Mapping[str, Stage] = {stage.name: stage for stage in (DPT, SFT, DFT, PT)}
RECIPES: Mapping[str, tuple[Stage, ...]] = {"llava-kd": (DPT, SFT, DFT), "llava": (PT, SFT)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeStage:
    """A stage in a recipe, with the data it learns from where the recipe says so."""

    stage: Stage
    cache: str | None = None
    image_root: str | None = None
    eval_cache: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Stages in a row: each begins with the model that the one before it left."""

    name: str
    stages: tuple[RecipeStage, ...]


def stage_from(document: Mapping[str, Any], where: str = "recipe") -> Stage:
    """The stage that `document` describes; `base` names a built-in stage whose settings it starts from.

    ValueError names every unknown key and every value out of range.
    """
    values = dict(document)
    base = values.pop("base", None)
    if base is not None and base not in STAGES:
        raise ValueError(f"{where}: base {base!r} is not one of {', '.join(STAGES)}")
    kinds = {field.name: str(field.type) for field in fields(Stage)}
    unknown = sorted(set(values) - set(kinds))
    if unknown:
        raise ValueError(f"{where}: unknown keys {unknown}; known are {', '.join(['base', *kinds])}")
    if "losses" in values:
        start = STAGES[base].losses if base else LossWeights()
        values["losses"] = _losses_from(start, values["losses"], where)
    if "trainable" in values:
        listed = values["trainable"]
        values["trainable"] = (listed,) if isinstance(listed, str) else tuple(listed)
    for name in values:
        if kinds[name] == "float":  # YAML reads 1e-3 as text
            values[name] = _number(values[name], f"{where}: {name}")
        elif kinds[name].startswith("int") and not isinstance(values[name], int | None):
            raise ValueError(f"{where}: {name} must be a whole number, not {values[name]!r}")
    if base is not None:
        return replace(STAGES[base], **values)
    missing = sorted({"name", "trainable", "learning_rate", "global_batch"} - set(values))
    if missing:
        raise ValueError(f"{where}: a stage without `base` needs {', '.join(missing)}")
    return Stage(**{"losses": LossWeights(), **values})


def open_recipe(name_or_file: str) -> Recipe:
    """A built-in recipe by its name, or a recipe file in YAML or TOML.

    A file holds `name` and a list `stages`; each stage has the fields of Stage, `base`, and optionally
    `cache`, `image_root`, `eval_cache`. Unknown keys are refused.
    """
    if name_or_file in RECIPES:
        stages = tuple(RecipeStage(stage=stage) for stage in RECIPES[name_or_file])
        return Recipe(name=name_or_file, stages=stages)
    path = Path(name_or_file)
    if not path.is_file():
        raise KdcacheError(f"recipe {name_or_file} is neither a file nor one of {', '.join(RECIPES)}")
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
        return _recipe_from(document, path)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise KdcacheError(f"recipe {path}: {' '.join(str(error).split())}; correct the file") from error


def _recipe_from(document: Any, path: Path) -> Recipe:
    if not isinstance(document, dict) or not isinstance(document.get("stages"), list):
        raise ValueError("it must hold a list `stages`")
    unknown = sorted(set(document) - {"name", "stages"})
    if unknown:
        raise ValueError(f"unknown keys {unknown}; known are name, stages")
    stages = []
    for number, entry in enumerate(document["stages"], start=1):
        where = f"stage {number}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} must be a mapping, not {entry!r}")
        data = {key: str(entry[key]) for key in ("cache", "image_root", "eval_cache") if key in entry}
        settings = {key: value for key, value in entry.items() if key not in data}
        stages.append(RecipeStage(stage=stage_from(settings, where), **data))
    names = [entry.stage.name for entry in stages]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"stage names must differ from one another, not {names}")
    return Recipe(name=str(document.get("name", path.stem)), stages=tuple(stages))


def _losses_from(start: LossWeights, document: Any, where: str) -> LossWeights:
    known = {field.name: str(field.type) for field in fields(LossWeights)}
    if not isinstance(document, Mapping):
        raise ValueError(f"{where}: losses must be a mapping of {', '.join(known)}")
    unknown = sorted(set(document) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown losses {unknown}; known are {', '.join(known)}")
    values: dict[str, Any] = {
        name: _number(value, f"{where}: losses.{name}") if known[name] == "float" else value
        for name, value in document.items()
    }
    return replace(start, **values)


def _number(value: Any, where: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where} must be a number, not {value!r}") from None
