"""Settings of `build` and `plan`, and the summary of a build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cache_schema.file_cache import FileCacheConfig
from cache_schema.format.spec import KINDS, TARGETS, EntryRule, Precision, Target, TargetSpec
from cache_schema.settings import (
    DatasetImageRoot,
    Device,
    Help,
    Only,
    Panel,
    at_least,
    check,
    positive,
    within,
)

EngineName = Literal["transformers", "vllm"]
EngineMode = Literal["hidden", "extracted", "logprobs"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
OverLong = Literal["quarantine", "cut"]
RelationChoice = float | Literal["exact"]

MAX_BAD = 0.05
MAX_BAD_FROM = 100
"""Without --max-bad: the share of bad rows that stops a build, and the rows seen from which on it counts."""

BATCH_TOKENS = 16384
"""Padded tokens of a batch where the device's memory does not decide."""

_TEACHER, _DATA, _VLLM, _RUN, _RAY = "Teacher", "Data", "The engine vllm", "Run", "A Ray cluster"
_PRIVATE = "Private spans (Swing)"
_GRID, _BOUNDS = "Settings to try", "Bounds of the recommended settings"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig:
    """What `build` needs to know."""

    teacher: Annotated[
        Path, Help("Folder of the teacher: a transformers image-text-to-text model.", _TEACHER)
    ]
    data: Annotated[
        Path, Help("Dataset: LLaVA JSON or JSONL, or `messages` rows in JSONL or Parquet.", _DATA)
    ]
    image_root: Annotated[DatasetImageRoot, Panel(_DATA)]
    out: Annotated[str, Help("The cache: a folder or an fsspec URL. An unfinished one is continued.")]
    spec: TargetSpec = field(default_factory=TargetSpec)
    template: Annotated[
        str | None,
        Help("Chat template: plain, llava_v1 or a Jinja file. Default: the processor's own.", _DATA),
    ] = None
    engine: Annotated[EngineName, Help("What runs the teacher; vllm is an extra.", _TEACHER)] = "transformers"
    dtype: Annotated[DtypeName, Help("Number format of the weights; auto: as saved.", _TEACHER)] = "auto"
    device: Annotated[Device, Panel(_TEACHER)] = "auto"
    device_map: Annotated[
        str | None, Help("Spread one teacher over several devices, as in accelerate.", _TEACHER)
    ] = None
    quantization: Annotated[
        Literal["8bit", "4bit"] | None, Help("Quantise the weights through bitsandbytes.", _TEACHER)
    ] = None
    compile: Annotated[
        bool, Help("Compile the teacher's layers with torch.compile; engine transformers.", _TEACHER)
    ] = False
    batch_tokens: Annotated[
        int | None,
        at_least(1),
        Help(
            "Padded tokens per batch; halved when memory runs out. Default: by the free memory of a CUDA "
            f"device, else {BATCH_TOKENS}.",
            _RUN,
        ),
    ] = None
    shard_size: Annotated[
        int, at_least(1), Help("Rows per shard, the unit of writing and resuming.", _RUN)
    ] = 512
    max_length: Annotated[
        int, at_least(1), Help("Longest sample in tokens, image tokens included.", _DATA)
    ] = 2048
    over_long: Annotated[OverLong, Help("What happens to longer samples.", _DATA)] = "quarantine"
    private: Annotated[
        str | None,
        Help(
            "Regular expression of private text: records of tokens in it no longer hold their distribution.",
            _PRIVATE,
        ),
    ] = None
    private_field: Annotated[
        str | None, Help("Key of a row with a list of its private texts, in the same sense.", _PRIVATE)
    ] = None
    private_temperature: Annotated[
        float, at_least(1.0), Help("Temperature of the records of private tokens.", _PRIVATE)
    ] = 4.0
    private_noise: Annotated[
        float,
        at_least(0.0),
        Help("Scale of the Laplace noise on their log-probabilities, in nats.", _PRIVATE),
    ] = 1.0
    limit: Annotated[int | None, at_least(1), Help("Only the first LIMIT rows of the dataset.", _DATA)] = None
    max_bad: Annotated[
        float | None,
        within(0.0, 1.0),
        Help(
            f"Stop when more than this share of the rows is bad. Default: {MAX_BAD} of {MAX_BAD_FROM} or "
            "more rows.",
            _RUN,
        ),
    ] = None
    retry_quarantine: Annotated[bool, Help("Try the rows in quarantine again.", _RUN)] = False
    rank: Annotated[
        int | None, at_least(0), Help("Number of this worker. Default: from the launcher, or 0.", _RUN)
    ] = None
    world_size: Annotated[
        int | None, at_least(1), Help("Number of workers. Default: from the launcher, or 1.", _RUN)
    ] = None
    files: FileCacheConfig = field(default_factory=FileCacheConfig)
    engine_mode: Annotated[
        EngineMode,
        Help(
            "hidden states through pooling; the same extracted, with a prefix cache; or logprobs, for "
            "response and prompt targets only.",
            _VLLM,
        ),
    ] = "hidden"
    memory_share: Annotated[
        float, within(0.0, 1.0, "(]"), Help("Share of the accelerator's memory for vLLM.", _VLLM)
    ] = 0.8
    spot_check: Annotated[
        int, at_least(1), Help("Samples compared with transformers before the capture.", _VLLM)
    ] = 4
    prepare_threads: Annotated[
        int | None,
        at_least(1),
        Help(
            "Threads that prepare samples. Default: this process's cores, less one, at most 8.",
            _RUN,
        ),
    ] = None

    def __post_init__(self) -> None:
        named = self.private is not None or self.private_field is not None
        faults = {
            "private spans do not go with hidden states, which hold every distribution": named
            and bool(self.spec.hidden),
            "private spans do not go with tail samples": named and self.spec.tail_samples > 0,
            "private and private_field must not be empty": "" in (self.private, self.private_field),
        }
        check(self, faults)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Where the workers of a build run."""

    cluster: Annotated[
        str | None,
        Help("Run workers on a Ray cluster: auto, its address, or local for one that is started here.", _RAY),
    ] = None
    workers: Annotated[
        int | None, at_least(1), Help("Workers on the cluster. Default: as many as its GPUs, or cores.", _RAY)
    ] = None
    gpus_per_worker: Annotated[
        float | None, at_least(0), Help("GPUs of a worker. Default: 1 where the cluster has any.", _RAY)
    ] = None

    def __post_init__(self) -> None:
        alone = self.cluster is None and (self.workers is not None or self.gpus_per_worker is not None)
        check(self, {"workers and gpus_per_worker need cluster": alone})


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastConfig:
    """What `forecast` needs to know; entries, precision and relation of `build.spec` are what is looked
    for."""

    build: Annotated[
        BuildConfig,
        Only(
            *("teacher", "data", "image_root", "targets", "temperatures", "template", "dtype", "device"),
            *(
                "quantization",
                "device_map",
                "compile",
                "batch_tokens",
                "shard_size",
                "max_length",
                "over_long",
                "limit",
                "file_cache",
                "file_cache_gib",
            ),
            out="cache",
        ),
    ]
    samples: Annotated[int, at_least(1), Help("Rows drawn and measured.", _GRID)] = 64
    top_ks: Annotated[
        tuple[Annotated[int, at_least(1)], ...], Help("Numbers of entries to try.", _GRID, "top-k")
    ] = (8, 16, 32, 64, 128)
    least: Annotated[
        tuple[Annotated[float, within(0.0, 1.0, "()")], ...],
        Help("Least probabilities of entries to try, as --entries of build.", _GRID, "entries"),
    ] = (0.01, 0.003, 0.001)
    precisions: Annotated[tuple[Precision, ...], Help("Precisions to try.", _GRID, "precision")] = (
        "compact",
        "full",
    )
    relations: Annotated[
        tuple[Annotated[float, within(0.0, 1.0, "()")] | Literal["exact"], ...],
        Help("Bounds of 1 - cos to try for relation factors, or exact.", _GRID, "relation"),
    ] = (1e-3, 1e-4, 1e-5, 1e-6)
    student: Annotated[
        Path | None, Help("Folder of a student to try. Default: the teacher with noise.", _GRID)
    ] = None
    noise_kl: Annotated[
        float, positive, Help("Mean KL in nats between the teacher and the noisy teacher.", _GRID)
    ] = 0.7
    positions: Annotated[
        int, at_least(1), Help("Positions of each kind whose gradients are compared.", _GRID)
    ] = 2048
    max_angle: Annotated[
        Mapping[Target, Annotated[float, within(0.0, 180.0, "(]")]],
        Help(
            "Largest angle in degrees between stored and dense gradient; 5,visual=15 for one target.", _BOUNDS
        ),
    ] = field(default_factory=lambda: dict.fromkeys(TARGETS, 5.0))
    max_kl: Annotated[float, positive, Help("Largest mean KL in nats due to storage.", _BOUNDS)] = 1e-4
    seed: Annotated[int, at_least(0), Help("Seed of sampling and of the noise.", _GRID)] = 0

    def __post_init__(self) -> None:
        lists = ("precisions", "relations")
        faults = {f"{name} is empty: give at least one": not getattr(self, name) for name in lists}
        faults["top_ks and least are empty: give at least one"] = not self.top_ks + self.least
        check(self, faults)

    @property
    def rules(self) -> tuple[EntryRule, ...]:
        """The rules for entries in the grid."""
        spec = self.build.spec
        named = [replace(spec, top_k=k, entries={}) for k in dict.fromkeys(self.top_ks)]
        named += [replace(spec, entries=dict.fromkeys(KINDS, p)) for p in dict.fromkeys(self.least)]
        return tuple(one.rule("response") for one in named)

    @property
    def widest(self) -> TargetSpec:
        """The spec that every record of the grid can be cut from."""
        bounds = [one for one in self.relations if one != "exact"]
        return replace(
            self.build.spec,
            targets=tuple(name for name in self.build.spec.targets if name != "hidden"),
            hidden=(),
            top_k=max(rule.most for rule in self.rules),
            entries={},
            tail_samples=0,
            relation="factor",
            relation_bound=min(bounds, default=1e-6),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeriveConfig:
    """What `derive` needs to know beside the cache."""

    out: Annotated[str, Help("The new cache: a folder or an fsspec URL. An unfinished one is continued.")]
    spec: TargetSpec = field(default_factory=TargetSpec)
    device: Annotated[Device, Panel(_RUN)] = "auto"
    batch_tokens: Annotated[
        int, at_least(1), Help("Tokens per batch; halved when memory runs out.", _RUN)
    ] = BATCH_TOKENS

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSummary:
    """What the cache holds after a build.

    captured: samples; cut: those of them that --over-long cut short; quarantined: rows by reason; tokens,
    images: of the captured samples. seconds: of this run.
    already_done: this run found nothing left to do.
    """

    captured: int
    cut: int
    quarantined: dict[str, int]
    shards: int
    tokens: int
    images: int
    seconds: float
    already_done: bool

    def to_json(self) -> dict[str, Any]:
        """The summary as a JSON object."""
        return asdict(self)
