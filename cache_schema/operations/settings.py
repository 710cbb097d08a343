"""What a user decides about checking and comparing caches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cache_schema.settings import Help, at_least, check


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyConfig:
    """How a cache is verified."""

    repair: Annotated[bool, Help("Set damaged shards aside and remove leftovers.")] = False
    quick: Annotated[bool, Help("Sizes and digests of files alone; nothing is decoded.")] = False
    jobs: Annotated[int, at_least(1), Help("Processes that share the shards; one per 64 MB.")] = 1

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeConfig:
    """How caches are merged."""

    format: Annotated[
        Literal[2] | None,
        Help(
            "Format version of the new cache, else the newest among the given ones. With it one cache is "
            "enough: its arrays are taken over bit by bit."
        ),
    ] = None

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectConfig:
    """How many of the samples that meet a condition are taken, and which are likelier."""

    sample: Annotated[
        int | None, at_least(1), Help("Draw SAMPLE of them without replacement; default: all of them.")
    ] = None
    by: Annotated[
        str | None,
        Help(
            "Draw by rank in this field: of N samples the highest is drawn with N times the probability of "
            "the lowest."
        ),
    ] = None
    seed: Annotated[int, at_least(0), Help("Seed of the draw.")] = 0

    def __post_init__(self) -> None:
        check(self, {"by needs sample": self.by is not None and self.sample is None})


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrowConfig:
    """Where a cache is written to as Parquet, and with which columns."""

    out: Annotated[Path, Help("Folder of the Parquet files.")]
    layout: Annotated[
        Literal["kdcache", "axolotl", "distillkit"],
        Help(
            "kdcache: all that the cache holds. axolotl, distillkit: the response targets as these trainers "
            "read them."
        ),
    ] = "kdcache"

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffConfig:
    """The bounds within which two caches count as the same. The bounds hold over all positions of a kind, and
    over all images.

    bfloat16 against float32 of one model is well below the defaults, another checkpoint well above.
    """

    kl_bound: Annotated[float, at_least(0), Help("Largest mean KL in nats per position.")] = 1e-2
    relation_bound: Annotated[float, at_least(0), Help("Largest mean 1 - cos of relations.")] = 1e-3
    hidden_bound: Annotated[float, at_least(0), Help("Largest mean |a - b| / |a| of hidden states.")] = 0.05
    may_differ: Annotated[
        tuple[str, ...],
        Help("Keys of the identity that may differ, as dtype; a key covers all dotted keys below it."),
    ] = ()

    def __post_init__(self) -> None:
        check(self)
