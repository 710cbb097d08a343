"""Settings of training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cache_schema.file_cache import FileCacheConfig
from cache_schema.settings import DatasetImageRoot, Device, Help, at_least, check, positive, within
from student.sources import Mixture, Source
from student.stages import Epochs, GlobalBatch, LearningRate, LoraRank, MaxSteps, Stage, recipe_from

Precision = Literal["fp32", "bf16", "fp16"]

QuestionBatch = Annotated[int, at_least(1), Help("Questions answered at a time.")]
QUESTION_BATCH = 64
LONGEST_ANSWER = 32
"""Tokens of an answer of `evaluate` without benchmarks."""

_OVERRIDES = ("epochs", "max_steps", "learning_rate", "global_batch", "lora_rank")
"""Settings of a run that override those of its stage."""

BENCHMARKS = ("vqav2", "gqa", "vizwiz", "sqa", "textvqa", "mme", "mmb", "mmb-cn", "pope", "mmmu")
"""In the order of the paper's tables."""

_BENCHMARKS = "Benchmarks of the LLaVA-KD paper"
_HELD_OUT, _RECORDS, _SPEED = "Held-out data", "Checkpoints and records", "Speed and memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewStudentConfig:
    """A student to assemble: vision tower, a projector of two linear layers with GELU, language model.

    Without `like` the language model's tokenizer gains `<image>` where it has none.
    """

    vision_tower: Annotated[
        Path, Help("Folder of a SigLIP or CLIP vision model, or of a model that has such a tower.")
    ]
    language_model: Annotated[Path, Help("Folder of any causal language model of transformers.")]
    out: Annotated[Path, Help("Folder of the student.")]
    like: Annotated[
        str | None, Help("Take image token, tokenizer, feature layer and template of this cache's teacher.")
    ] = None
    projector_from: Annotated[
        Path | None,
        Help(
            "Keep the projector of this Llava teacher; with another width of the language models a linear "
            "adapter is folded into it."
        ),
    ] = None
    projector_images: Annotated[
        Path | None,
        Help("Folder of some images, to which a narrower student's kept projector is fitted."),
    ] = None
    experts: Annotated[
        int | None,
        at_least(2),
        Help(
            "Make a mixture of so many experts of every feed-forward layer of a Qwen2 language model, each a "
            "copy at the start."
        ),
    ] = None
    active: Annotated[
        int | None,
        at_least(2),
        Help("Experts that each token goes through, 2 at least: the router of one would learn nothing."),
    ] = None
    seed: Annotated[int, at_least(0), Help("Seed of the projector's and the router's weights.")] = 0
    feature_layer: Annotated[
        int | None, Help("The tower's layer whose features are taken. Default: as `like`, or -2.")
    ] = None
    select_strategy: Annotated[
        Literal["default", "full"] | None,
        Help("default drops a CLS token, full keeps it. Default: as `like`, or dropped where there is one."),
    ] = None

    def __post_init__(self) -> None:
        alone = self.projector_images is not None and self.projector_from is None
        one = (self.experts is None) != (self.active is None)
        many = self.experts is not None and (self.active or 0) > self.experts
        check(
            self,
            {
                "projector_images needs projector_from": alone,
                "experts and active need each other": one,
                f"active may be {self.experts} at most, the number of experts": many,
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One stage of training."""

    stage: Annotated[Stage, Help("A stage with the paper's settings: dpt, sft, dft, pt or pd.")]
    student: Annotated[Path, Help("Folder of the student to start from.")]
    cache: Annotated[
        str | None,
        Help("The cache to learn from: a folder or an fsspec URL; STAGE=CACHE for one stage of a recipe."),
    ]
    image_root: Annotated[
        str | None,
        Help(
            "Folder or fsspec URL that the cache's image paths start from; STAGE=FOLDER for one stage of a "
            "recipe. Not needed where the cache embeds its images."
        ),
    ] = None
    rejected: Annotated[
        str | None,
        Help(
            "Stage pd: the cache of the rejected answers, where --cache holds the chosen ones alone, with "
            "the same ids. Not for a cache of rows with both."
        ),
    ] = None
    mixture: Annotated[
        Mixture | None, Help("Several caches in place of one, as a recipe lists them.", option="")
    ] = None
    out: Annotated[Path, Help("Folder of the run; a recipe makes one folder per stage in it.")]
    resume: Annotated[bool, Help("Continue from the newest checkpoint in --out.")] = False
    seed: Annotated[int, at_least(0), Help("Seed of the order of samples and of dropout.")] = 0
    epochs: Epochs | None = None
    max_steps: MaxSteps | None = None
    learning_rate: LearningRate | None = None
    global_batch: GlobalBatch | None = None
    lora_rank: LoraRank | None = None
    micro_batch: Annotated[
        int,
        at_least(1),
        Help("Samples per forward pass on one device; changes nothing but rounding.", _SPEED),
    ] = 8
    precision: Annotated[
        Precision,
        Help("Number format of products; trained weights and optimizer stay float32.", _SPEED),
    ] = "fp32"
    gradient_checkpointing: Annotated[
        bool | None,
        Help(
            "Recompute activations. Default: where they would not fit an accelerator's memory by estimate.",
            _SPEED,
        ),
    ] = None
    compile: Annotated[
        bool,
        Help(
            "Compile the language model's layers, with bf16 their states too; kept only if results agree.",
            _SPEED,
        ),
    ] = False
    eval_cache: Annotated[str | None, Help("Held-out cache to measure on.", _HELD_OUT)] = None
    eval_image_root: Annotated[str | None, Help("Its image root. Default: --image-root.", _HELD_OUT)] = None
    eval_every: Annotated[
        int, at_least(0), Help("Steps between measurements; 0: at the end only.", _HELD_OUT)
    ] = 0
    eval_samples: Annotated[
        int | None, at_least(1), Help("Measure the first EVAL_SAMPLES samples of it.", _HELD_OUT)
    ] = 512
    early_stop: Annotated[
        int | None,
        at_least(1),
        Help(
            "Stop after this many measurements without improvement; the best weights are the result.",
            _HELD_OUT,
        ),
    ] = None
    watch: Annotated[
        Literal["loss", "ce"],
        Help("Held-out value that chooses the best weights: the loss, or ce of the labels.", _HELD_OUT),
    ] = "loss"
    log_every: Annotated[int, at_least(1), Help("Steps between lines of metrics.jsonl.", _RECORDS)] = 10
    save_every: Annotated[
        int, at_least(0), Help("Steps between checkpoints; 0: only when stopped.", _RECORDS)
    ] = 500
    keep: Annotated[
        int, at_least(1), Help("Newest checkpoints that stay, beside the best one.", _RECORDS)
    ] = 2
    workers: Annotated[
        int | None,
        at_least(0),
        Help("Threads that make batches. Default: this process's cores, less one, from 2 to 8.", _SPEED),
    ] = None
    window: Annotated[int, at_least(1), Help("Shards mixed by the shuffle.", _SPEED)] = 8
    files: FileCacheConfig = field(default_factory=FileCacheConfig)
    trackers: Annotated[tuple[str, ...], Help("Trackers of accelerate, or none.", _RECORDS, "tracker")] = (
        "tensorboard",
    )
    device: Annotated[Literal["auto", "cpu"], Help("auto: an accelerator where there is one.", _SPEED)] = (
        "auto"
    )
    wait: Annotated[
        bool, Help("Wait until `kdcache build` has finished the caches; else what is there is used.")
    ] = False
    wait_minutes: Annotated[float, positive, Help("End --wait when nothing was added for so long.")] = 60.0
    adopt_template: Annotated[
        bool, Help("Give the student the cache's chat template instead of refusing another one.")
    ] = False

    def __post_init__(self) -> None:
        needs = self.early_stop is not None and not (self.eval_cache and self.eval_every)
        mixed = "none" in self.trackers and len(self.trackers) > 1
        cut = self.mixture is not None and self.mixture.rule == "ddk" and self.stage.mega_batch > 1
        check(
            self,
            {
                "early_stop needs eval_cache and eval_every": needs,
                "trackers cannot be none and others": mixed,
                f"stage {self.stage.name}: mega_batch above 1 does not go with mixture ddk": cut,
            },
        )

    def refuse_half_pairs(self) -> None:
        """WrongUsage where a stage of preference distillation has what it does not go with, or another one a
        rejected cache."""
        stage, pairs = self.stage, self.stage.preference > 0.0
        faults = {
            "rejected is for preference distillation: take stage pd": bool(self.rejected) and not pairs,
            "preference does not go with a mixture": pairs and self.mixture is not None,
            "early_stop needs --watch ce, the held-out labels": pairs
            and self.early_stop is not None
            and self.watch == "loss",
        }
        check(self, faults, where=f"stage {stage.name}: ")

    @classmethod
    def check_alone(cls, recipe: Any, options: Mapping[str, Any]) -> None:
        """WrongUsage where a run with these settings would refuse the only stage of a recipe's document."""
        (entry,) = recipe_from(recipe, "recipe").stages
        settings = {**options, "stage": entry.stage, "cache": None, "mixture": entry.mixture}
        cls(**settings).refuse_half_pairs()

    @property
    def sources(self) -> tuple[Source, ...]:
        """The caches to learn from, each with its image root where one is given; empty without any. The
        rejected one comes second."""
        if self.mixture is None or not self.mixture.sources:
            caches = [cache for cache in (self.cache, self.rejected if self.cache else None) if cache]
            return tuple(Source(cache=cache, image_root=self.image_root) for cache in caches)
        return tuple(
            replace(source, image_root=source.image_root or self.image_root)
            for source in self.mixture.sources
        )

    @property
    def used_trackers(self) -> tuple[str, ...]:
        """The trackers to start; `none` is the word for no tracker."""
        return tuple(name for name in self.trackers if name != "none")

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
            for name, value in {
                **asdict(replace(self, stage=self.resolved_stage)),
                **asdict(self.files),
            }.items()
            if name not in ("stage", "mixture", "resume", "wait", "wait_minutes", "files", *_OVERRIDES)
        }
        values |= {**self.mixture.to_json()} if self.mixture else {}
        values |= {"cache": None} if self.mixture and self.mixture.sources else {}
        return {"stage": self.resolved_stage.to_json(), **values, "trackers": list(self.trackers)}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Free answers to a file of questions.

    Every answer of a row is a question, asked after the turns before it as they are in the data. A row may
    carry `kind` (a text, or one per question) and `answers` (the references of its only question, or a list
    of them per question).
    """

    model: Annotated[Path, Help("Folder of the model: student, teacher or any other.")]
    data: Annotated[
        Path,
        Help("Rows to answer, in the formats of `build`; for benchmarks LLaVA's eval folder or questions."),
    ]
    image_root: Annotated[
        str | None,
        Help(
            "Folder or fsspec URL that the image paths start from. Default for benchmarks: as in LLaVA's "
            "eval folder."
        ),
    ] = None
    cache: Annotated[
        str | None, Help("Also measure the distance to the teacher of this cache: KL and relation loss.")
    ] = None
    batch_size: QuestionBatch = QUESTION_BATCH
    limit: Annotated[int | None, at_least(1), Help("Only LIMIT rows, drawn by --seed.")] = None
    max_new_tokens: Annotated[
        int | None,
        at_least(1),
        Help(
            f"Longest answer in tokens. Default: {LONGEST_ANSWER}; as LLaVA's scripts, 128 or 1024, for "
            "benchmarks."
        ),
    ] = None
    seed: Annotated[int, at_least(0), Help("Seed of sampling.")] = 0
    device: Device = "auto"
    files: FileCacheConfig = field(default_factory=FileCacheConfig)
    predictions: Annotated[Path | None, Help("JSONL file for every answer.")] = None
    benchmarks: Annotated[
        tuple[str, ...],
        Help(f"A benchmark: {', '.join(BENCHMARKS)}, or all; several with commas.", _BENCHMARKS, "benchmark"),
    ] = ()
    annotations: Annotated[
        Path | None, Help("Its annotations. Default: as in LLaVA's eval folder.", _BENCHMARKS)
    ] = None
    out: Annotated[
        Path | None, Help("Folder of answers, upload files and results; run again to continue.", _BENCHMARKS)
    ] = None

    def __post_init__(self) -> None:
        unknown = {*self.benchmarks} - {*BENCHMARKS, "all"}
        single = len(self.benchmarks) == 1 and "all" not in self.benchmarks
        shared = self.image_root or self.annotations or self.data.is_file()
        rows_only = self.cache or self.limit or self.predictions
        check(
            self,
            {
                f"benchmark must be {', '.join(BENCHMARKS)} or all": bool(unknown),
                "image_root is needed without benchmark": not self.benchmarks and self.image_root is None,
                "out is needed with benchmark": bool(self.benchmarks) and self.out is None,
                "annotations and out are for benchmark": not self.benchmarks
                and bool(self.annotations or self.out),
                "cache, limit and predictions are not for benchmark": bool(self.benchmarks and rows_only),
                "several benchmarks need LLaVA's eval folder, without image_root or annotations": bool(
                    self.benchmarks and not single and shared
                ),
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswersConfig:
    """A model's own answers to the questions of a dataset, as new rows."""

    model: Annotated[Path, Help("Folder of the model that answers.")]
    data: Annotated[Path, Help("Rows with the questions, in the formats of `build`.")]
    image_root: DatasetImageRoot
    out: Annotated[Path, Help("JSONL file of the new rows; `build --data` reads it.")]
    temperature: Annotated[float, at_least(0), Help("Temperature of the answers; 0: greedy.")] = 0.0
    top_p: Annotated[
        float, within(0.0, 1.0, "(]"), Help("Mass of the most likely tokens that are drawn from.")
    ] = 1.0
    seed: Annotated[int, at_least(0), Help("Seed of the draws, and of the rows of --limit.")] = 0
    limit: Annotated[int | None, at_least(1), Help("Only LIMIT rows.")] = None
    max_new_tokens: Annotated[int, at_least(1), Help("Longest answer in tokens.")] = 256
    batch_size: QuestionBatch = QUESTION_BATCH
    device: Device = "auto"
    files: FileCacheConfig = field(default_factory=FileCacheConfig)

    def __post_init__(self) -> None:
        check(
            self,
            {
                "top_p needs a temperature: greedy answers draw nothing": self.top_p < 1.0
                and not self.temperature
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig:
    """A reference model's log-likelihood of the labels of a cache."""

    model: Annotated[
        Path, Help("Folder of the reference model: a small one with the tokenizer of the cache's teacher.")
    ]
    image_root: Annotated[
        str | None,
        Help(
            "Folder or fsspec URL that the cache's image paths start from. Not needed where the cache embeds "
            "its images."
        ),
    ] = None
    batch_size: Annotated[int, at_least(1), Help("Samples per forward pass, of similar length.")] = 16
    device: Device = "auto"
    files: FileCacheConfig = field(default_factory=FileCacheConfig)

    def __post_init__(self) -> None:
        check(self)
