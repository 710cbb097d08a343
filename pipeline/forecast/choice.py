"""The choice among the measured settings, and the build command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from cache_schema.errors import KdcacheError
from cache_schema.format.spec import (
    KINDS,
    TOP_K,
    Kind,
    TargetSpec,
    read_entries,
    write_entries,
    write_top_k,
)
from cache_schema.settings import settings_of
from pipeline.settings import BuildConfig

Row = Mapping[str, Any]
Angles = Mapping[str, float]
"""Degrees by kind of target; `relation` is one of them."""

_NO_FLAG = (
    *("spec", "teacher", "data", "image_root", "out", "prepare_threads", "retry_quarantine"),
    *("targets", "top_k", "entries", "precision", "relation", "relation_bound"),
)


def choose(
    positions: Sequence[Row], relations: Sequence[Row], *, max_angle: Angles, max_kl: float
) -> dict[str, Any]:
    """The smallest setting whose angles and KL are within the bounds at every kind of target.

    positions: rows of `target`, `rule`, `precision`, `angle`, `kl`, `dataset_bytes`; relations: rows of
    `relation`, `precision`, `angle`, `dataset_bytes`. The rule for entries is chosen for each kind of
    position by itself, as is the relation; the precision is one for all. Where no setting is within the
    bounds: the nearest, with `misses`.
    """
    found = []
    for precision in dict.fromkeys(row["precision"] for row in positions or relations):
        tried: dict[str, list[Row]] = {}
        for row in (*positions, *relations):
            if row["precision"] == precision:
                tried.setdefault(_name(row), []).append(row)
        best = {name: _best(rows, max_angle, max_kl) for name, rows in tried.items()}
        rows = list(best.values())
        misses = [miss for row in rows for miss in _misses(row, max_angle, max_kl)]
        found.append(
            {
                "rules": {name: row["rule"] for name, row in best.items() if name != "relation"},
                "precision": precision,
                "relation": best["relation"]["relation"] if "relation" in best else None,
                "angle": max(row["angle"] for row in rows),
                "target_bytes": sum(row["dataset_bytes"] for row in rows),
                "within_bounds": not misses,
                "misses": misses,
            }
        )
    return min(found, key=lambda one: (len(one["misses"]), one["target_bytes"]))


def _best(rows: Sequence[Row], max_angle: Angles, max_kl: float) -> Row:
    """The smallest row within all bounds, or else the nearest one."""

    def rank(row: Row) -> tuple[float, float]:
        excess = max(row["angle"] / max_angle[_name(row)], row.get("kl", 0.0) / max_kl)
        return (excess if excess > 1.0 else 0.0, row["dataset_bytes"])

    return min(rows, key=rank)


def _misses(row: Row, max_angle: Angles, max_kl: float) -> list[str]:
    name, found = _name(row), []
    if row["angle"] > max_angle[name]:
        found.append(f"{name}: {row['angle']:.2g} degrees, more than {max_angle[name]:g}")
    if row.get("kl", 0.0) > max_kl:
        found.append(f"{name}: KL {row['kl']:.2g}, more than {max_kl:g}")
    return found


def _name(row: Row) -> str:
    return str(row.get("target", "relation"))


def chosen_spec(spec: TargetSpec, choice: Mapping[str, Any]) -> TargetSpec:
    """The target spec of a choice, with all that was not chosen as in `spec`."""
    chosen = replace(spec, precision=choice["precision"])
    least = [f"{kind}:{rule}" for kind, rule in choice["rules"].items() if rule.startswith("p")]
    numbers: dict[Kind, int] = {kind: int(rule) for kind, rule in choice["rules"].items() if rule.isdecimal()}
    chosen = replace(chosen, top_k=numbers or TOP_K, entries=read_entries(",".join(least)))
    if choice["relation"] == "exact":
        return replace(chosen, relation="exact")
    if choice["relation"] is not None:
        return replace(chosen, relation="factor", relation_bound=choice["relation"])
    return chosen


def build_arguments(config: BuildConfig) -> list[str]:
    """The arguments of `kdcache` that build with these settings; default values are omitted, except for
    chosen ones."""
    spec = config.spec
    words = ["build", "--teacher", str(config.teacher), "--data", str(config.data)]
    words += ["--image-root", str(config.image_root), "--out", config.out]
    words += ["--targets", ",".join(spec.targets)]
    if set(KINDS) & set(spec.targets) - set(spec.entries):
        words += ["--top-k", write_top_k(spec.top_k)]
    words += ["--entries", write_entries(spec.entries)] if spec.entries else []
    words += ["--precision", spec.precision]
    if "relation" in spec.targets:
        words += ["--relation", spec.relation]
        words += ["--relation-bound", f"{spec.relation_bound:g}"] if spec.relation == "factor" else []
    return words + _given(spec) + _given(config)


def _given(settings: Any) -> list[str]:
    """The options of all settings that are not their defaults, but for those that `build_arguments` names."""
    words = []
    for name, setting in settings_of(type(settings)).items():
        value, flag = getattr(settings, name), name.replace("_", "-")
        if name in _NO_FLAG or value == setting.default:
            continue
        if is_dataclass(value):
            words += _given(value)
        elif isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif setting.help.option != "":
            listed = value if isinstance(value, tuple) else (value,)
            texts = [f"{each:g}" if isinstance(each, float) else str(each) for each in listed]
            words += [f"--{setting.help.option or flag}", ",".join(texts)]
    return words


def write_command(file: Path, arguments: Sequence[str]) -> None:
    """Saves the command: `.sh` as a script that takes further options, else one argument a line.

    KdcacheError when the file cannot be written, or an argument contains a line break.
    """
    if file.suffix == ".sh":
        text = f'#!/bin/sh\nexec {shlex.join(["kdcache", *arguments])} "$@"\n'
    elif any("\n" in word for word in arguments):
        raise KdcacheError(f"an argument contains a line break, which {file} cannot hold: give a .sh file")
    else:
        text = "".join(f"{word}\n" for word in arguments)
    try:
        file.write_text(text, encoding="utf-8")
        if file.suffix == ".sh":
            file.chmod(0o755)
    except OSError as error:
        raise KdcacheError(f"cannot write {file}: {error.strerror}; choose another file") from error
