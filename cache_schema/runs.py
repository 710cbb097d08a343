"""What a training run measured, as its folder holds it: for the trainer, for reports and for the demo."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache_schema.errors import KdcacheError

_OLD_NAMES = {"response": "response_kl", "visual": "visual_kl", "prompt": "prompt_kl"}
"""Of the terms in training lines up to version 0.1."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, empty where there is none; a truncated last line of a killed run is
    omitted."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    made = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            made.append(_renamed(json.loads(line)))
        except json.JSONDecodeError:
            break
    return made


def read_result(run: Path) -> dict[str, Any] | None:
    """The result of a finished run; None when it is not finished. KdcacheError when it is not JSON."""
    path = run / "result.json"
    if not path.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KdcacheError(f"{path} is not JSON: {error}; remove it to finish the run again") from error
    if "train" in result:
        result["train"] = _renamed(result["train"])
    return result


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a training or held-out line under the names of today."""
    return {_OLD_NAMES.get(name, name): value for name, value in values.items()}
