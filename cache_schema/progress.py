"""How long-running work reports its progress, independent of the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """A sink for progress: one task at a time, counted in whatever unit `begin` names."""

    def begin(self, what: str, total: int | None) -> None:
        """Start a task; `total` is None where the end is unknown."""

    def update(self, done: int, **fields: str) -> None:
        """`done` is the absolute count so far; `fields` are short values to show beside the bar."""

    def message(self, line: str) -> None:
        """A line that stays on the screen (a warning, a note)."""

    def end(self) -> None:
        """End the task."""


@contextmanager
def task(progress: Progress, what: str, total: int | None = None) -> Iterator[None]:
    """A task from `begin` to `end`; `end` is called on errors too."""
    progress.begin(what, total)
    try:
        yield
    finally:
        progress.end()


class Silent:
    """A sink that shows nothing."""

    def begin(self, what: str, total: int | None) -> None: ...

    def update(self, done: int, **fields: str) -> None: ...

    def message(self, line: str) -> None: ...

    def end(self) -> None: ...
