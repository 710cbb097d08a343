"""The scores of an evaluation in the terminal; those of benchmarks beside the LLaVA-KD paper's rows."""

from __future__ import annotations

from typing import Any

from cache_schema.errors import printable
from views.terminal import print_summary, results

_SHORT = {"average of nine": "avg 9", "average of ten": "avg 10"}


def print_evaluation(document: dict[str, Any]) -> None:
    """The scores; for benchmarks also the model's row, and the paper's below, within 80 columns."""
    if "benchmarks" not in document:
        print_summary("evaluation", document)
        return
    for name, scores in document["benchmarks"].items():
        print_summary(name, {key: value for key, value in scores.items() if value is not None})
    own, *others = [(row.pop("model"), row) for row in map(dict, document["table"])]
    results.print("percent; mme / 20; below: the rows of the LLaVA-KD paper")
    results.print(_line({name: _SHORT.get(name, name) for name in own[1]}))
    for style, rows in (("bold", [own]), ("dim", others)):
        for model, values in rows:
            results.print(printable(model), style=style, markup=False, soft_wrap=True)
            results.print(_line({name: _cell(value) for name, value in values.items()}), style=style)


def _line(cells: dict[str, str]) -> str:
    return "".join(cell.rjust(1 + max(5, len(_SHORT.get(name, name)))) for name, cell in cells.items())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
