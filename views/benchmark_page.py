"""The scores of an evaluation in the terminal; those of benchmarks beside the LLaVA-KD paper's rows."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from views.terminal import print_summary, results


def print_evaluation(document: dict[str, Any]) -> None:
    """The scores; for benchmarks also one table: the model first, the paper's models below."""
    if "benchmarks" not in document:
        print_summary("evaluation", document)
        return
    for name, scores in document["benchmarks"].items():
        print_summary(name, {key: value for key, value in scores.items() if value is not None})
    rows = document["table"]
    table = Table(title="percent; mme / 20; the paper's rows below", title_justify="left", box=None)
    for number, column in enumerate(rows[0]):
        table.add_column(column.replace("average of ", "avg "), justify="right" if number else "left")
    for number, row in enumerate(rows):
        cells = [_cell(value) for value in row.values()]
        table.add_row(*cells, style="bold" if number == 0 else "dim", end_section=number == 0)
    results.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
