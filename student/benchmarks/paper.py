"""The tables of the LLaVA-KD paper (Table 1: LLaVA-1.5 and Qwen1.5 models), to print beside own values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from student.settings import BENCHMARKS

COLUMNS = BENCHMARKS
"""In the paper's order; mme is its perception sum divided by 20, pope the mean F1, the others accuracy, in
percent."""

AVERAGES = {
    "average of nine": tuple(name for name in COLUMNS if name != "mmmu"),
    "average of ten": COLUMNS,
}
"""Table 1 leaves MMMU out; Table 2 and the appendix do not."""

_ROWS: dict[str, tuple[float | None, ...]] = {
    "LLaVA-1.5 (Vicuna-7B)": (78.5, 62.0, 50.0, 66.8, 58.2, 75.5, 64.3, 58.3, 85.9, 34.4),
    "TinyLLaVA (Qwen1.5-4B)": (79.9, 63.4, 46.3, 72.9, 59.0, 69.25, 67.9, 67.1, 85.2, 38.9),
    "TinyLLaVA (Qwen1.5-1.8B)": (73.1, 55.5, 34.9, 65.3, 47.7, 61.2, 57.1, 55.5, 83.4, 34.1),
    "LLaVA-MOD (Qwen1.5-1.8B)": (None, 58.7, 39.2, 68.0, 58.5, 66.7, 66.3, 61.9, 87.0, None),
    "LLaVA-KD-2B (Qwen1.5-1.8B)": (79.0, 62.3, 44.7, 64.7, 53.4, 69.1, 64.0, 63.7, 86.3, 33.6),
    "TinyLLaVA (Qwen1.5-0.5B)": (73.9, 57.4, 24.9, 60.9, 47.4, 59.8, 55.0, 52.4, 83.7, 31.6),
    "LLaVA-MOD (Qwen1.5-0.5B)": (None, 56.2, 31.6, 62.8, 53.9, 65.3, 58.8, 50.4, None, None),
    "LLaVA-KD-1B (Qwen1.5-0.5B)": (77.0, 59.6, 35.9, 60.6, 49.9, 64.5, 60.1, 55.5, 85.9, 30.2),
}


def table(model: str, values: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """The model's row and the paper's: `model`, the columns (None: no value), and the averages of rows that
    have every value of one."""
    paper = {name: dict(zip(COLUMNS, row, strict=True)) for name, row in _ROWS.items()}
    return [_row(name, row) for name, row in {model: dict(values), **paper}.items()]


def _row(model: str, values: Mapping[str, float | None]) -> dict[str, Any]:
    row: dict[str, Any] = {"model": model, **{name: values.get(name) for name in COLUMNS}}
    for average, names in AVERAGES.items():
        known = [value for name in names if (value := row[name]) is not None]
        row[average] = sum(known) / len(names) if len(known) == len(names) else None
    return row
