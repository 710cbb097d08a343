"""The choice among the measured settings, and the build command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cache_schema.errors import KdcacheError
from cache_schema.format.spec import TargetSpec
from pipeline.settings import BuildConfig

Row = Mapping[str, Any]
Angles = Mapping[str, float]
"""Degrees by kind of target; `relation` is one of them."""

_NO_FLAG = ("spec", "teacher", "data", "image_root", "out", "prepare_threads", "retry_quarantine")


def choose(
    positions: Sequence[Row], relations: Sequence[Row], *, max_angle: Angles, max_kl: float
) -> dict[str, Any]:
    """The smallest setting whose angles and KL are within the bounds at every kind of target.

    positions: rows of `target`, `top_k`, `precision`, `angle`, `kl`, `dataset_bytes`; relations: rows of
    `relation`, `precision`, `angle`, `dataset_bytes`. Top-k and relation are chosen separately, the precision
    for both. Where no setting is within the bounds: the nearest, with `misses`.
    """
    found = []
    for precision in dict.fromkeys(row["precision"] for row in positions or relations):
        of_k: dict[int, list[Row]] = {}
        for row in positions:
            if row["precision"] == precision:
                of_k.setdefault(row["top_k"], []).append(row)
        entries = _best(list(of_k.items()), max_angle, max_kl)
        forms = [(row["relation"], [row]) for row in relations if row["precision"] == precision]
        relation = _best(forms, max_angle, max_kl)
        rows = [*entries, *relation]
        misses = [miss for row in rows for miss in _misses(row, max_angle, max_kl)]
        found.append(
            {
                "top_k": entries[0]["top_k"] if entries else None,
                "precision": precision,
                "relation": relation[0]["relation"] if relation else None,
                "angle": max(row["angle"] for row in rows),
                "target_bytes": sum(row["dataset_bytes"] for row in rows),
                "within_bounds": not misses,
                "misses": misses,
            }
        )
    return min(found, key=lambda one: (len(one["misses"]), one["target_bytes"]))


def _best(settings: Sequence[tuple[Any, list[Row]]], max_angle: Angles, max_kl: float) -> list[Row]:
    """The rows of the smallest setting within all bounds, or else of the nearest one."""

    def rank(setting: tuple[Any, list[Row]]) -> tuple[Any, ...]:
        rows = setting[1]
        size = sum(row["dataset_bytes"] for row in rows)
        excess = max(max(row["angle"] / max_angle[_name(row)], row.get("kl", 0.0) / max_kl) for row in rows)
        return (excess, size) if excess > 1.0 else (0, size)

    return min(settings, key=rank)[1] if settings else []


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
    if choice["top_k"] is not None:
        chosen = replace(chosen, top_k=choice["top_k"])
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
    words += ["--targets", ",".join(spec.targets), "--top-k", str(spec.top_k), "--precision", spec.precision]
    if "relation" in spec.targets:
        words += ["--relation", spec.relation]
        words += ["--relation-bound", f"{spec.relation_bound:g}"] if spec.relation == "factor" else []
    if spec.temperatures != (1.0,):
        words += ["--temperatures", ",".join(f"{value:g}" for value in spec.temperatures)]
    if spec.seed:
        words += ["--seed", str(spec.seed)]
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in _NO_FLAG and value != field.default:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
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
