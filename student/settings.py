"""What a user decides about a training run, and what of it a resumed run must share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cache_schema.errors import WrongUsage
from cache_schema.format.cache import Cache
from cache_schema.format.identity import digest_of
from student.folder import folder_digest
from student.stages import Stage

Precision = Literal["fp32", "bf16", "fp16"]

_OVERRIDES = ("epochs", "max_steps", "learning_rate", "global_batch", "lora_rank")
"""Settings of a run that stand before those of its stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One stage of training.

    stage: what trains and how. student: the folder to start from. cache: a folder or an fsspec URL (None:
    the recipe says it).
    image_root: where the cache's image paths start. out: the run's folder. resume: go on from the newest
    checkpoint in `out`. epochs, max_steps, learning_rate, global_batch, lora_rank: override the stage's
    (the last one only where the language model trains). micro_batch:
    samples a forward pass on one device, which changes nothing but rounding. precision: of the forward and
    backward products; trained weights and optimizer are always float32. gradient_checkpointing: None: on
    where there is an accelerator. eval_cache: a held-out cache, measured every `eval_every` steps (0: at
    the end only) on its first `eval_samples` samples. early_stop: so many evaluations without an
    improvement end the stage, and the best weights are the result. save_every: steps between checkpoints
    (0: only when interrupted); the newest `keep` and the best one stay. workers: threads that decode
    images. window: shards that the shuffle mixes. trackers: of accelerate. device: `auto` or `cpu`.
    adopt_template: give the student the cache's chat template instead of refusing another one.
    """

    stage: Stage
    student: Path
    cache: str | None
    image_root: Path
    out: Path
    resume: bool = False
    seed: int = 0
    epochs: float | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    global_batch: int | None = None
    lora_rank: int | None = None
    micro_batch: int = 8
    precision: Precision = "fp32"
    gradient_checkpointing: bool | None = None
    eval_cache: str | None = None
    eval_image_root: Path | None = None
    eval_every: int = 0
    eval_samples: int | None = 512
    early_stop: int | None = None
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    workers: int = 2
    window: int = 8
    trackers: tuple[str, ...] = ("tensorboard",)
    device: Literal["auto", "cpu"] = "auto"
    adopt_template: bool = False

    def __post_init__(self) -> None:
        if min(self.micro_batch, self.keep, self.log_every, self.window) < 1 or self.workers < 0:
            raise WrongUsage(
                "micro_batch, keep, log_every and window must be at least 1, workers not negative"
            )
        if self.early_stop is not None and not (self.eval_cache and self.eval_every):
            raise WrongUsage("early_stop needs eval_cache and eval_every")

    @property
    def resolved_stage(self) -> Stage:
        """The stage with the overrides of this run."""
        given = {name: getattr(self, name) for name in _OVERRIDES if getattr(self, name) is not None}
        if "language_model" not in self.stage.trainable:
            given.pop("lora_rank", None)
        return replace(self.stage, **given)

    def to_json(self) -> dict[str, Any]:
        """All of it, resolved, as JSON values."""
        values = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(replace(self, stage=self.resolved_stage)).items()
            if name not in ("stage", "resume", *_OVERRIDES)
        }
        return {"stage": self.resolved_stage.to_json(), **values, "trackers": list(self.trackers)}


def identity_of(config: TrainConfig, cache: Cache) -> dict[str, Any]:
    """What decides every step of a run: only a run with the same can use its checkpoints.

    Micro-batch, ranks and workers are not in it: they change rounding only.
    """
    attempts = [[shard, cache.commits[shard].attempt] for shard in cache.shards]
    return {
        "stage": config.resolved_stage.to_json(),
        "seed": config.seed,
        "precision": config.precision,
        "window": config.window,
        "student": folder_digest(config.student),
        "cache": {
            "identity": cache.manifest.identity,
            "samples": len(cache),
            "shards": digest_of(attempts),
        },
    }
