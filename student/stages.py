"""Stages as data: trained parts, losses, learning rate, batch. DPT, SFT, DFT and any other are values."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from cache_schema.errors import KdcacheError, WrongUsage
from cache_schema.format.spec import KINDS, TARGETS
from cache_schema.settings import Help, Later, at_least, check, document_of, positive, settings_of, within
from models.parts import Part
from student.loss_weights import LossWeights
from student.sources import Mixture, mixture_from

Schedule = Literal["cosine", "linear", "constant"]

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")

CE_ONLY = LossWeights(response=0.0, visual=0.0, relation=0.0)
"""Plain supervised training: no target is read."""


_STAGE = "Overrides of the stage"

Epochs = Annotated[float, positive, Help("Passes over the cache.", _STAGE)]
MaxSteps = Annotated[int, at_least(1), Help("Optimizer steps, in place of epochs.", _STAGE)]
LearningRate = Annotated[float, positive, Help("Peak learning rate, after the warm-up.", _STAGE)]
GlobalBatch = Annotated[
    int, at_least(1), Help("Samples per step, over all ranks and accumulation steps.", _STAGE)
]
LoraRank = Annotated[
    int,
    at_least(0),
    Help("Train the language model through adapters of this rank (needs peft); 0: all its weights.", _STAGE),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One pass of training with fixed settings."""

    name: Annotated[str, Help("Names the stage in reports, folders and options.")]
    trainable: Annotated[tuple[Part, ...], Help("The parts whose parameters move; all others are frozen.")]
    losses: Annotated[LossWeights, Help("Weights of the objective's terms.")]
    learning_rate: LearningRate
    global_batch: GlobalBatch
    epochs: Epochs = 1.0
    max_steps: MaxSteps | None = None
    schedule: Annotated[Schedule, Help("Decay of the learning rate to 0.")] = "cosine"
    warmup_ratio: Annotated[
        float, within(0.0, 1.0, "[)"), Help("Share of the steps until the peak learning rate.")
    ] = 0.03
    weight_decay: Annotated[float, at_least(0), Help("Weight decay of AdamW.")] = 0.0
    beta1: Annotated[float, within(0.0, 1.0, "[)"), Help("AdamW's decay of the first moment.")] = 0.9
    beta2: Annotated[float, within(0.0, 1.0, "[)"), Help("AdamW's decay of the second moment.")] = 0.999
    epsilon: Annotated[float, positive, Help("AdamW's epsilon.")] = 1e-8
    max_grad_norm: Annotated[float, at_least(0), Help("Bound of the global gradient norm; 0 for none.")] = 1.0
    group_by_modality: Annotated[
        bool, Help("Batches are either all with or all without images, as in LLaVA's sampler.")
    ] = False
    mega_batch: Annotated[
        int,
        at_least(1),
        Help("Global batches sorted by length together, for less padding; 1: each by itself."),
        Later(),
    ] = 1
    lora_rank: LoraRank = 0
    lora_alpha: Annotated[
        float, positive, Help("Adapters are scaled by lora_alpha / lora_rank and merged at the end.")
    ] = 16.0
    lora_dropout: Annotated[float, within(0.0, 1.0, "[)"), Help("Dropout of the adapters' inputs.")] = 0.0

    preference: Annotated[
        float,
        at_least(0),
        Help(
            "Beta of preference distillation: the stage learns from pairs alone, of `cache` or of it "
            "and `rejected`, with all other losses off; 0: none."
        ),
        Later(),
    ] = 0.0

    def __post_init__(self) -> None:
        named = isinstance(self.name, str) and _NAME.fullmatch(self.name)
        faults = {
            "trainable is empty": not self.trainable,
            "all its losses are off": not any(self.losses.by_term.values()) and not self.preference,
            "preference does not go with other losses, nor with settings of theirs": bool(self.preference)
            and self.losses != replace(CE_ONLY, ce=0.0),
            "its name must be letters, digits, _, - and .": not named,
        }
        check(self, faults, where=f"stage {self.name}: ")

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets that its losses read from the cache."""
        if self.preference:
            return ("response",)
        return tuple(name for name, weight in self.losses.by_target.items() if weight > 0.0)

    @property
    def parts(self) -> tuple[str, ...]:
        """What of the cache they need: the targets, and hidden states for tail `dense`."""
        dense = self.losses.tail == "dense" and any(kind in self.targets for kind in KINDS)
        return (*self.targets, "hidden") if dense else self.targets

    def only(self, targets: tuple[str, ...]) -> Stage:
        """The stage with the losses of all other targets switched off; CE stays. WrongUsage for a target
        that it does not learn from."""
        unknown = [name for name in targets if name not in TARGETS]
        if unknown:
            raise WrongUsage(f"targets must be some of {', '.join(TARGETS)}, not {unknown}")
        absent = [name for name in targets if name not in self.targets]
        if absent:
            raise WrongUsage(
                f"stage {self.name} has no loss on {', '.join(absent)}: take a stage that has, or a recipe"
            )
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
        return {**document_of(self), "trainable": list(self.trainable)}


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
PD = replace(SFT, name="pd", losses=replace(CE_ONLY, ce=0.0), preference=0.1, group_by_modality=False)
"""LLaVA-MoD's preference distillation; its beta is the usual one of DPO."""

STAGES: Mapping[str, Stage] = {stage.name: stage for stage in (DPT, SFT, DFT, PT, PD)}
RECIPES: Mapping[str, tuple[Stage, ...]] = {"llava-kd": (DPT, SFT, DFT), "llava": (PT, SFT)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeStage:
    """A stage in a recipe, with its data where the recipe sets them: one cache, or a mixture of several."""

    stage: Stage
    cache: str | None = None
    rejected: str | None = None
    mixture: Mixture | None = None
    image_root: str | None = None
    eval_cache: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Consecutive stages: each starts from the model of the previous one."""

    name: str
    stages: tuple[RecipeStage, ...]

    @property
    def image_roots(self) -> dict[str, str]:
        """By stage name, where the recipe sets them."""
        found = {}
        for entry in self.stages:
            sources = entry.mixture.sources if entry.mixture is not None else ()
            inner = [source.image_root for source in sources if source.image_root]
            if root := entry.image_root or (inner[0] if inner and len(inner) == len(sources) else None):
                found[entry.stage.name] = root
        return found


def stage_named(name: str, targets: str | None = None) -> Stage:
    """A built-in stage; targets: those that it keeps, with commas, or `none`. WrongUsage for other names."""
    if name not in STAGES:
        raise WrongUsage(f"stage {name!r} is not one of {', '.join(STAGES)}")
    if targets is None:
        return STAGES[name]
    return STAGES[name].only(() if targets == "none" else tuple(part.strip() for part in targets.split(",")))


def stage_from(document: Mapping[str, Any], where: str = "recipe") -> Stage:
    """The stage that `document` describes; `base` names a built-in stage whose settings it starts from.

    WrongUsage names every unknown key and every value out of range.
    """
    values = dict(document)
    base = values.pop("base", None)
    if base is not None and (not isinstance(base, str) or base not in STAGES):
        raise WrongUsage(f"{where}: base {base!r} is not one of {', '.join(STAGES)}")
    known = settings_of(Stage)
    if unknown := sorted(set(values) - set(known)):
        raise WrongUsage(f"{where}: unknown keys {unknown}; known are {', '.join(['base', *known])}")
    if "losses" in values:
        start = STAGES[base].losses if base else LossWeights()
        values["losses"] = _losses_from(start, values["losses"], where)
    if "trainable" in values:
        listed = [values["trainable"]] if isinstance(values["trainable"], str) else values["trainable"]
        if not isinstance(listed, list):
            raise WrongUsage(f"{where}: trainable must be a list of parts, not {listed!r}")
        values["trainable"] = tuple(listed)
    values = _with_numbers(Stage, values)
    if base is not None:
        return replace(STAGES[base], **values)
    missing = sorted({"name", "trainable", "learning_rate", "global_batch"} - set(values))
    if missing:
        raise WrongUsage(f"{where}: a stage without `base` needs {', '.join(missing)}")
    return Stage(**{"losses": LossWeights(), **values})


def open_recipe(name_or_file: str) -> Recipe:
    """A built-in recipe by its name, or a recipe file in YAML or TOML.

    A file holds `name` and a list `stages`; each stage has the fields of Stage, `base`, and optionally
    `cache` or `caches`, `rejected`, `image_root`, `eval_cache`. Unknown keys are refused.
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
        return recipe_from(document, path.stem)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise WrongUsage(f"recipe {path}: {' '.join(str(error).split())}; correct the file") from error


def recipe_from(document: Any, name: str) -> Recipe:
    """The recipe that a document describes; name: where it has none. WrongUsage where it is no recipe."""
    if not isinstance(document, dict) or not isinstance(document.get("stages"), list):
        raise WrongUsage("it must hold a list `stages`")
    unknown = sorted(set(document) - {"name", "stages"})
    if unknown:
        raise WrongUsage(f"unknown keys {unknown}; known are name, stages")
    stages = []
    for number, entry in enumerate(document["stages"], start=1):
        where = f"stage {number}"
        if not isinstance(entry, dict):
            raise WrongUsage(f"{where} must be a mapping, not {entry!r}")
        data = {key: entry[key] for key in ("cache", "rejected", "image_root", "eval_cache") if key in entry}
        for key, value in data.items():
            if not isinstance(value, str) or not value:
                raise WrongUsage(f"{where}: {key} must be a path, not {value!r}")
        settings = {key: value for key, value in entry.items() if key not in {*data, "caches", "mixture"}}
        if "cache" in entry and "caches" in entry:
            raise WrongUsage(f"{where}: give either cache or caches")
        mixture = None
        if "caches" in entry or "mixture" in entry:
            mixture = mixture_from(entry.get("caches"), entry.get("mixture", {}), where)
        stages.append(RecipeStage(stage=stage_from(settings, where), mixture=mixture, **data))
    names = [entry.stage.name for entry in stages]
    if not names or len(set(names)) != len(names):
        raise WrongUsage(f"stage names must be distinct, not {names}")
    name = document.get("name", name)
    if not isinstance(name, str):
        raise WrongUsage(f"name must be a text, not {name!r}")
    return Recipe(name=name, stages=tuple(stages))


def _losses_from(start: LossWeights, document: Any, where: str) -> LossWeights:
    known = settings_of(LossWeights)
    if not isinstance(document, Mapping):
        raise WrongUsage(f"{where}: losses must be a mapping of {', '.join(known)}")
    if unknown := sorted(set(document) - set(known)):
        raise WrongUsage(f"{where}: unknown losses {unknown}; known are {', '.join(known)}")
    try:
        return replace(start, **_with_numbers(LossWeights, document))
    except WrongUsage as error:
        raise WrongUsage(f"{where}: losses: {error}") from error


def _with_numbers(owner: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file, with text that is a number as one: YAML reads 1e-3 as text."""
    known = settings_of(owner)
    return {
        name: _number(value) if known[name].kind is float and isinstance(value, str) else value
        for name, value in values.items()
    }


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
