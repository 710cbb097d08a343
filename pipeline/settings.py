"""What a build is asked to do, and what it tells when it is over."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cache_schema.errors import WrongUsage
from cache_schema.format.spec import TargetSpec
from pipeline.samples import OverLong

ENGINES = ("transformers", "vllm")
ENGINE_MODES = ("hidden", "logprobs")
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig:
    """What `build` needs to know.

    template: None for the processor's own, `plain`, `llava_v1`, or a Jinja file. dtype: `auto` (as
    saved), float32, bfloat16 or float16. device: `auto`, or torch's name of one; device_map: spreads the
    teacher as in accelerate. quantization: `8bit` or `4bit` through bitsandbytes. batch_tokens: padded
    tokens a batch. max_length: tokens a sample, images included; over_long: what becomes of longer ones.
    limit: only the first rows. max_bad: the share of rows in quarantine above which the build stops, asked
    after every shard; None: never. rank, world_size: None to take them from the launcher.
    prepare_threads: for decoding and processing images. Of the engine vllm only: engine_mode, `hidden`
    states or `logprobs` alone; memory_share of the accelerator that vLLM may take; spot_check:
    samples that are compared with transformers before anything is captured.
    """

    teacher: Path
    data: Path
    image_root: Path
    out: str
    spec: TargetSpec = field(default_factory=TargetSpec)
    template: str | None = None
    engine: str = "transformers"
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    quantization: str | None = None
    batch_tokens: int = 16384
    shard_size: int = 512
    max_length: int = 2048
    over_long: OverLong = "quarantine"
    limit: int | None = None
    max_bad: float | None = None
    retry_quarantine: bool = False
    rank: int | None = None
    world_size: int | None = None
    engine_mode: str = "hidden"
    memory_share: float = 0.8
    spot_check: int = 4
    prepare_threads: int = field(default_factory=lambda: max(1, min(8, (os.cpu_count() or 2) // 2)))

    def __post_init__(self) -> None:
        problems = []
        choices = {
            "engine": ENGINES,
            "engine_mode": ENGINE_MODES,
            "dtype": DTYPE_NAMES,
            "quantization": (None, "8bit", "4bit"),
            "over_long": ("quarantine", "cut"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                told = ", ".join(str(one) for one in allowed if one is not None)
                problems.append(f"{name} must be one of {told}, not {getattr(self, name)!r}")
        for name in ("batch_tokens", "shard_size", "max_length", "limit", "prepare_threads", "spot_check"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} must be at least 1, not {value}")
        if self.max_bad is not None and not 0.0 <= self.max_bad <= 1.0:
            problems.append(f"max_bad must lie in [0, 1], not {self.max_bad}")
        if not 0.0 < self.memory_share <= 1.0:
            problems.append(f"memory_share must lie in (0, 1], not {self.memory_share}")
        if problems:
            raise WrongUsage("build: " + "; ".join(problems))


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
