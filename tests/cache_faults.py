"""Counts what a build does to its directory, and strikes at one of these moments."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cache_schema.format import store


class Moments:
    """Every write, fsync, rename and link of a `LocalStore`, numbered; `strike` is called at number `at`.

    A write is struck when half of the file is written, everything else just before it happens.
    """

    def __init__(self, at: int, strike: Callable[[], None]) -> None:
        self.names: list[str] = []
        self.at = at
        self.strike = strike
        self._lock = threading.Lock()

    def reached(self, name: str) -> bool:
        with self._lock:
            self.names.append(name)
            return len(self.names) == self.at

    def before(self, name: str, function: Callable[..., None]) -> Callable[..., None]:
        def struck(*arguments: object) -> None:
            if self.reached(f"{name} {Path(str(arguments[-1])).name}"):
                self.strike()
            function(*arguments)

        return struck

    def write(self, path: Path, data: bytes) -> None:
        if self.reached(f"write {path.name}"):
            path.write_bytes(data[: len(data) // 2])
            self.strike()
        path.write_bytes(data)


@contextmanager
def moments(at: int, strike: Callable[[], None]) -> Iterator[Moments]:
    """Within the block every change to a directory is counted, and struck at number `at` (from 1)."""
    counter = Moments(at, strike)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_write", counter.write)
        patch.setattr(store, "sync", counter.before("sync", store.sync))
        patch.setattr(os, "rename", counter.before("rename", os.rename))
        patch.setattr(os, "link", counter.before("link", os.link))
        yield counter


def die() -> None:
    """What a power cut is to a process."""
    os.kill(os.getpid(), signal.SIGKILL)
