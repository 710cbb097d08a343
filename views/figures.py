"""The figures of a cache's summary in readable form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from cache_schema.format.spec import KINDS, TargetSpec
from cache_schema.operations.build_state import seconds_since

PARTS = (
    *KINDS,
    "relation",
    *(f"hidden_{kind}" for kind in KINDS),
    "head",
    "images",
    "samples",
    "quarantine",
    "other",
)
"""The parts of the bytes on disk, in the order in which they are shown."""

GAPS = 8
"""The number of ranges of missing shards that are listed."""


def count(number: int) -> str:
    """1,234,567."""
    return f"{number:,}"


def size(number: float) -> str:
    """Bytes in decimal units: 1.23 GB."""
    value = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def mass(share: float) -> str:
    """A probability mass in percent, with as many nines as are significant."""
    if share > 0.9999995:
        return "> 99.9999%"
    return f"{share:.2%}" if share < 0.999 else f"{share:.4%}"


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def bin_label(edges: Sequence[float], place: int) -> str:
    """The label of the bin between two edges: integers as those it holds, the last one open-ended."""
    low, high = edges[place], edges[place + 1]
    if not all(float(edge).is_integer() for edge in edges):
        return f"{low:g} - {high:g}"
    if low == 0 and high == 1:
        return "exact"
    if high >= 1 << 30:
        return f"{low:g} and more"
    return f"{low:g}" if high - low == 1 else f"{low:g} - {high - 1:g}"


def units_of(part: str, counts: Mapping[str, int]) -> tuple[int, str]:
    """The number and the kind of the items in a part of the bytes on disk."""
    if part == "relation":
        return counts.get("relations", 0), "images"
    if part in ("samples", "images"):
        return counts.get(part, 0), part
    if part == "quarantine":
        return counts.get("quarantined", 0), "rows"
    if part == "head":
        return 1, "teacher"
    return counts.get(f"{part.removeprefix('hidden_')}_positions", 0), "positions"


def what_it_is(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Teacher, data, template, targets and format as lines of name and value."""
    teacher, spec, built = summary["teacher"], summary["spec"], summary["built"]
    capture, training = teacher["capture"], teacher["training"]
    named = summary["dataset"].get("teacher") or training.get("model_type") or "?"
    lines = [
        (
            "teacher",
            f"{named}, {capture.get('dtype', '?')}, weights {str(capture.get('teacher_weights'))[:12]}",
        ),
        ("data", _dataset(summary["dataset"])),
        ("template", _template(training.get("template_name"))),
        (
            "targets",
            f"{', '.join(spec['targets'])}; {TargetSpec.from_json(spec).entry_words}, temperatures "
            f"{', '.join(f'{t:g}' for t in spec['temperatures'])}, {spec['precision']}"
            + (f", {spec['tail_samples']} tail samples" if spec["tail_samples"] else ""),
        ),
        ("format", f"version {summary['format_version']}, made {summary['created']}"),
        ("identity", summary["identity"][:16]),
    ]
    if built["seconds"]:
        speed = summary["counts"].get("samples", 0) / built["seconds"]
        lines.append(("capture", f"{duration(built['seconds'])}, {speed:.3g} samples/s per worker"))
    lines += [
        (
            "engine",
            f"{_engine(entry['engine'])} ({count(entry['shards'])} shard{'s' * (entry['shards'] != 1)})",
        )
        for entry in built["engines"]
    ]
    return lines


def _template(name: str | None) -> str:
    return "the processor's own" if name in (None, "processor") else str(name)


def progress_of(summary: Mapping[str, Any], now: datetime | None = None) -> list[str]:
    """An incomplete build in lines: progress, missing shards, speed and time left; with the time `now`, also
    the age of the last shard."""
    built = summary["built"]
    lines = [
        f"{count(built['shards'])} of {count(built['of_shards'])} shards, "
        f"{count(built['rows'])} of {count(built['of_rows'])} rows"
    ]
    if summary["bytes"]["when_complete"]:
        lines[0] += f"; about {size(summary['bytes']['when_complete'])} when complete"
    gaps = [f"{first}" if first == last else f"{first}-{last}" for first, last in built["missing"]]
    more = f" and {count(len(gaps) - GAPS)} more ranges" if len(gaps) > GAPS else ""
    lines.append(f"missing shards: {', '.join(gaps[:GAPS])}{more}")
    if built["rows_per_second"]:
        pace = f"recently {built['rows_per_second']:.3g} rows/s: about {duration(built['seconds_left'])} left"
        if now is not None:
            pace += f"; last shard {duration(max(seconds_since(built['last_commit'], now), 0.0))} ago"
        lines.append(pace)
    return lines


def _engine(engine: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in engine.items())


def _dataset(dataset: Mapping[str, Any]) -> str:
    if "merged" in dataset:
        return " + ".join(_dataset(part) for part in dataset["merged"])
    told = str(dataset.get("data", "?"))
    rows = dataset.get("rows")
    told += f" ({count(rows)} rows)" if isinstance(rows, int) else ""
    return told + (f", where {dataset['selected']}" if "selected" in dataset else "")
