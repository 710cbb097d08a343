"""The demo's result table: accuracy of teacher and students, and the students' distance to the teacher."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from demo.easy_vqa import KINDS
from views.terminal import results as terminal

DISTANCES = {"response_kl": "KL text", "visual_kl": "KL visual", "relation": "1 - cos"}


def print_table(results: dict[str, Any], out: Path) -> None:
    """The table of a finished run on stdout; students of several seeds as mean ± standard deviation."""
    seeds = list(results["students"])
    title = "1,000 held-out images: exact match in %, distance to the teacher"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=0)
    for name in ("", *KINDS, *DISTANCES.values()):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_row("majority", *_majority(results["teacher"]), *("" for _ in DISTANCES))
    table.add_row("teacher", *_row([results["teacher"]]))
    for kind in ("distilled", "plain"):
        table.add_row(kind, *_row([results["students"][seed][kind] for seed in seeds]))
    terminal.print(table)
    terminal.print(f"distilled: DPT, SFT, DFT; plain: PT, SFT, more SFT; seeds: {', '.join(seeds)}")
    seconds = sum(results["seconds"].values())
    terminal.print(f"{seconds / 60:.1f} minutes in all; {out / 'results.json'}, {out / 'curves.png'}")


def _majority(evaluation: dict[str, Any]) -> list[str]:
    return [f"{100 * evaluation['by_kind'][kind]['majority']['exact_match']:.1f}" for kind in KINDS]


def _row(evaluations: Sequence[dict[str, Any]]) -> list[str]:
    """Accuracy by kind, then the distances to the teacher."""
    accuracies = [[100 * each["by_kind"][kind]["exact_match"] for each in evaluations] for kind in KINDS]
    distances = [[each["teacher"][name] for each in evaluations] for name in DISTANCES]
    return [_mean(values, "{:.1f}") for values in accuracies] + [
        _mean(values, "{:.3f}") for values in distances
    ]


def _mean(values: Sequence[float], form: str) -> str:
    mean = form.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean}±{form.format(statistics.stdev(values))}"
