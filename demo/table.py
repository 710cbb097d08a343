"""The demo's result table: how teacher and students answer, and how near the students come to the teacher."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from demo.easy_vqa import KINDS
from views.terminal import results as terminal

DISTANCES = {"response_kl": "KL, response", "visual_kl": "KL, visual", "relation": "relation loss"}


def print_table(results: dict[str, Any], out: Path) -> None:
    """The table of a finished run on stdout; students of several seeds as mean ± standard deviation."""
    seeds = list(results["students"])
    title = f"1,000 held-out images, free generation; {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    table = Table(title=title, title_justify="left")
    for name in ("", *KINDS, *DISTANCES.values()):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("majority answer", *_majority(results["teacher"]), *("" for _ in DISTANCES))
    table.add_row("teacher", *_row([results["teacher"]]))
    for kind, name in (("distilled", "student, DPT + SFT + DFT"), ("plain", "student, PT + SFT + more SFT")):
        table.add_row(name, *_row([results["students"][seed][kind] for seed in seeds]))
    terminal.print(table)
    seconds = sum(results["seconds"].values())
    terminal.print(f"{seconds / 60:.1f} minutes in all; {out / 'results.json'}, {out / 'curves.png'}")


def _majority(evaluation: dict[str, Any]) -> list[str]:
    return [f"{evaluation['by_kind'][kind]['majority']['exact_match']:.1%}" for kind in KINDS]


def _row(evaluations: Sequence[dict[str, Any]]) -> list[str]:
    """Accuracy by kind, then the distances to the teacher."""
    accuracies = [[each["by_kind"][kind]["exact_match"] for each in evaluations] for kind in KINDS]
    distances = [[each["teacher"][name] for each in evaluations] for name in DISTANCES]
    return [_mean(values, "{:.1%}") for values in accuracies] + [
        _mean(values, "{:.4f}") for values in distances
    ]


def _mean(values: Sequence[float], form: str) -> str:
    mean = form.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format(statistics.stdev(values))}"
