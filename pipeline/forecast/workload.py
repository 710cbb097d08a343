"""Extrapolates from samples to the whole dataset: bytes, time, and when the capture pays off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.format.manifest import Plan
from pipeline.forecast.footprint import Footprint


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSample:
    """The counts of one captured sample. prefix: tokens through the end of its last image."""

    tokens: int
    prefix: int
    images: tuple[int, ...]  # tokens of each
    positions: Mapping[str, int]  # by kind, visual left out: it goes by images


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A dataset as a build would capture it, estimated from samples drawn at random.

    rows, with_image, text_only: of the plan. captured: rows expected to be captured. groups: distinct first
    images, counted once per shard. stored_images: images whose targets are stored. positions: by kind.
    tokens: of all captured rows; computed_tokens: without the prefixes that are computed once for several.
    errors: the standard error from sampling rows, as a share of the count.
    """

    rows: int
    with_image: int
    text_only: int
    shards: int
    captured: float
    groups: int
    images: float
    stored_images: float
    positions: Mapping[str, float]
    tokens: float
    computed_tokens: float
    errors: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """A JSON object; counts as whole numbers."""
        return {
            "rows": self.rows,
            "rows_with_image": self.with_image,
            "rows_text_only": self.text_only,
            "rows_captured": round(self.captured),
            "shards": self.shards,
            "distinct_first_images": self.groups,
            "images": round(self.images),
            "stored_images": round(self.stored_images),
            "positions": {kind: round(count) for kind, count in self.positions.items()},
            "tokens": round(self.tokens),
            "computed_tokens": round(self.computed_tokens),
            "standard_error": dict(self.errors),
        }


def workload_of(
    plan: Plan,
    first_images: NDArray[np.int64],
    drawn: Mapping[bool, int],
    samples: Sequence[MeasuredSample],
    kinds: Sequence[str],
    *,
    sharing: float,
    packing: bool,
) -> Workload:
    """The workload of a plan, rows with and without images estimated apart.

    first_images (rows,): 0 for none. drawn: rows drawn with an image (True) and without. samples: those of
    them that could be captured. sharing: the share of rows about the same first image that have the same
    targets for it, 0 where the teacher does not allow it. packing: such prefixes are computed once, too.
    """
    rows = {True: int((first_images[: plan.rows] != 0).sum())}
    rows[False] = plan.rows - rows[True]
    parts = {side: [s for s in samples if bool(s.images) == side] for side in (True, False)}
    good = {side: _share(len(parts[side]), drawn[side], len(samples), sum(drawn.values())) for side in parts}
    captured = {side: good[side] * rows[side] for side in parts}
    groups = _groups(plan, first_images)
    alike = sharing * max(captured[True] - good[True] * groups, 0.0)  # rows whose first image is another's
    each = [len(s.images) for s in parts[True]]
    images = captured[True] * _mean(each)
    stored = max(images - alike, 0.0)

    def count(values: Mapping[bool, Sequence[float]]) -> tuple[float, float]:
        """(sum over the dataset, its standard error)."""
        sums = {side: captured[side] * _mean(values[side]) for side in values}
        spread = [captured[side] * _deviation(values[side]) for side in values]
        return sum(sums.values()), float(np.linalg.norm(spread))

    def by_side(value: Callable[[MeasuredSample], float]) -> dict[bool, list[float]]:
        """Of samples with and without an image; of all where none of a side was drawn."""
        return {side: [value(s) for s in part or samples] for side, part in parts.items()}

    tokens, token_error = count(by_side(lambda s: s.tokens))
    reused = alike * _mean([s.prefix for s in parts[True] if len(s.images) == 1]) if packing else 0.0
    positions: dict[str, float] = {}
    errors = {"tokens": token_error / tokens if tokens else 0.0}
    for kind in kinds:
        if kind == "visual":
            of_image = [size for s in parts[True] for size in s.images]
            positions[kind] = stored * _mean(of_image)
            errors[kind] = _deviation(of_image) / (_mean(of_image) or 1.0)
        else:
            positions[kind], error = count(by_side(partial(_positions_of, kind)))
            errors[kind] = error / positions[kind] if positions[kind] else 0.0
    errors["images"] = _deviation(each) / (_mean(each) or 1.0)
    return Workload(
        rows=plan.rows,
        with_image=rows[True],
        text_only=rows[False],
        shards=plan.shards,
        captured=sum(captured.values()),
        groups=groups,
        images=images,
        stored_images=stored,
        positions=positions,
        tokens=tokens,
        computed_tokens=max(tokens - reused, 0.0),
        errors=errors,
    )


def bytes_by_part(
    workload: Workload, footprints: Mapping[str, Footprint], tables: Footprint
) -> dict[str, float]:
    """Bytes on disk by part: every kind of position and its hidden states (`hidden_response`, ...),
    `relation`, and `samples` for the tables."""
    found = {}
    for part, footprint in footprints.items():
        kind = part.removeprefix("hidden_")
        items = workload.stored_images if part == "relation" else workload.positions[kind]
        found[part] = footprint.total(items, workload.shards)
    found["samples"] = tables.total(workload.captured, workload.shards)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The time of the samples. seconds: of the teacher and its targets, for `tokens` tokens; preparing: of
    decoding and processing one sample, in one of `threads` threads that work meanwhile."""

    seconds: float
    tokens: int
    preparing: float
    threads: int

    def capture_seconds(self, workload: Workload) -> float:
        """Of the whole capture by one worker like this one."""
        return self._at_least(self.seconds / max(self.tokens, 1) * workload.computed_tokens, workload)

    def epoch_seconds(self, workload: Workload) -> float:
        """That the teacher alone takes in an epoch of training beside it: every row in full, nothing shared.

        The images are prepared for the student anyway.
        """
        return self.seconds / max(self.tokens, 1) * workload.tokens

    def _at_least(self, seconds: float, workload: Workload) -> float:
        return max(seconds, self.preparing * workload.captured / self.threads)


def break_even(speed: Speed, workload: Workload) -> dict[str, float]:
    """The number of epochs after which the capture has taken less time than a teacher in memory, and the
    saving of each later epoch. Reading the cache is counted as free: its reader runs beside the training
    step."""
    capture, epoch = speed.capture_seconds(workload), speed.epoch_seconds(workload)
    return {
        "capture_seconds": capture,
        "teacher_seconds_per_epoch": epoch,
        "epochs": capture / epoch if epoch else 0.0,
        "seconds_saved_after_3_epochs": 3 * epoch - capture,
    }


def _positions_of(kind: str, sample: MeasuredSample) -> float:
    return sample.positions[kind]


def _groups(plan: Plan, first_images: NDArray[np.int64]) -> int:
    """Distinct first images, counted once in every shard that has them: a shard shares with no other."""
    keys = first_images[plan.order]
    fresh = np.ones(len(keys), dtype=bool)
    fresh[1:] = keys[1:] != keys[:-1]  # the plan puts equal ones next to each other
    fresh[:: plan.shard_size] = True
    return int((fresh & (keys != 0)).sum())


def _share(part: int, whole: int, all_parts: int, all_wholes: int) -> float:
    """part / whole; of everything together where none of this kind was drawn."""
    return part / whole if whole else all_parts / max(all_wholes, 1)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _deviation(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
