"""The terminal: progress bars and notes on stderr, results on stdout."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from cache_schema.errors import printable
from cache_schema.format.spec import KINDS

LINE_EVERY = 60.0
"""Seconds between two lines of a task where stderr is not a terminal."""

LOSSES = ("loss", "ce", *(f"{kind}_kl" for kind in KINDS), "relation")

results = Console(highlight=False)
notes = Console(stderr=True, highlight=False)


def print_json(document: Any) -> None:
    """One JSON object on stdout and nothing else. What no terminal should get is escaped in its texts."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


class Bar:
    """A `cache_schema.progress.Progress` as a bar on stderr, with the task's own fields beside it.

    Where stderr is not a terminal, a task prints a line when it starts, one per minute, and one when it ends.
    The time left follows from the mean speed of the whole task, without work done before it started.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._fields = ""
        self._first: int | None = None  # work done before the task started
        self._began = self._told = 0.0

    def begin(self, what: str, total: int | None) -> None:
        self.end()
        self._what, self._fields, self._first = printable(what), "", None
        self._began = self._told = time.monotonic()
        if not notes.is_terminal:
            notes.print(f"{self._what} ...", markup=False)
        self._bar = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.fields[said]}", markup=False),
            console=notes,
            disable=not notes.is_terminal,
        )
        self._bar.start()
        self._task = self._bar.add_task(self._what, total=total, said="", left="")

    def update(self, done: int, **fields: str) -> None:
        if self._bar is None or self._task is None:
            return
        said = "  ".join(f"{name} {value}" for name, value in fields.items())
        self._fields = printable(said) or self._fields
        self._first = done if self._first is None else self._first
        left = self._left(done)
        self._bar.update(self._task, completed=done, said=self._fields, left=left)
        if not notes.is_terminal and time.monotonic() - self._told >= LINE_EVERY:
            self._told = time.monotonic()
            total = self._bar.tasks[0].total
            of = "" if total is None else f" of {total:,.0f}"
            said = "  ".join(part for part in (f"{done:,}{of}", left, self._fields) if part)
            notes.print(f"{self._what}: {said}", markup=False, soft_wrap=True)

    def _left(self, done: int) -> str:
        """The time left at the mean speed so far; empty if unknown."""
        assert self._bar is not None
        total, gained = self._bar.tasks[0].total, done - (self._first or 0)
        if total is None or gained <= 0:
            return ""
        seconds = (time.monotonic() - self._began) * (total - done) / gained
        return f"{timedelta(seconds=round(seconds))} left"

    def message(self, line: str) -> None:
        notes.print(printable(line), markup=False, soft_wrap=True)

    def end(self) -> None:
        if self._bar is None or self._task is None:
            return
        seconds = self._bar.tasks[0].elapsed or 0.0
        self._bar.stop()
        self._bar = self._task = None
        if not notes.is_terminal:
            notes.print(
                f"{self._what}: {seconds:.1f} s  {self._fields}".rstrip(), markup=False, soft_wrap=True
            )


def print_summary(title: str, summary: dict[str, Any]) -> None:
    """The result of a command, one fact per line; nested facts are indented."""
    results.print(printable(title), style="bold", markup=False)
    for line in _facts(summary, 1):
        results.print(printable(line), markup=False, soft_wrap=True)


def print_training(result: dict[str, Any]) -> None:
    """Each trained stage in a few lines; result.json has everything."""
    for stage in result.get("stages", [result]):
        losses = {name: value for name, value in stage["train"].items() if name in LOSSES and value}
        facts = {
            "steps": stage["steps"],
            "model": stage["model"],
            "last losses": losses,
            "time": stage["time"].removeprefix("time: "),
        }
        if stage["evaluation"]:
            facts["held out"] = stage["evaluation"]
        print_summary(f"stage {stage['stage']}", facts)


def print_problems(problems: list[dict[str, str]]) -> None:
    """Problems, one per line: the file, what is wrong, what to do."""
    for problem in problems:
        line = f"{problem['file']}: {problem['what']}; {problem['remedy']}"
        results.print(printable(line), markup=False, soft_wrap=True)


def _facts(facts: dict[str, Any], depth: int) -> list[str]:
    lines = []
    for name, value in facts.items():
        label = "  " * depth + name.replace("_", " ")
        if isinstance(value, dict):
            lines += [label, *_facts(value, depth + 1)] if value else []
        elif isinstance(value, list):
            lines.append(f"{label}: {', '.join(map(str, value)) or 'none'}")
        else:
            lines.append(f"{label}: {_short(value)}")
    return lines


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
