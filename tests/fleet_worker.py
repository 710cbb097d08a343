"""A torch-free worker of a fleet: the stand-in build in a process that may be killed at any moment."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

from cache_schema.format import manifest, writer
from tests import cache_teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What the workers of a fleet share. log: a file to which each appends a line per shard it begins."""

    url: str
    options: dict[str, Any]
    rows: int
    workers: int
    log: Path


def work(fleet: Fleet, rank: int, clock_error: float, version: str) -> None:
    """Builds what is pending. clock_error: seconds that this worker's clock is ahead. version: of kdcache, as
    this worker records it."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=clock_error)

    writer.datetime = Clock  # type: ignore[misc]
    for kind in (manifest.Manifest, manifest.CommitRecord):
        defaults = kind.__init__.__kwdefaults__
        assert defaults["kdcache_version"]
        kind.__init__.__kwdefaults__ = defaults | {"kdcache_version": version}
    capture = cache_teacher.capture

    def noted(rows: list[int], *arguments: Any, **options: Any) -> Any:
        line = os.open(fleet.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(line, f"{rows[0]}\n".encode())
        os.close(line)
        return capture(rows, *arguments, **options)

    cache_teacher.capture = noted
    cache_teacher.build_cache(
        fleet.url,
        cache_teacher.KILL_SPEC,
        rows=fleet.rows,
        workers=(rank, fleet.workers),
        storage_options=fleet.options,
    )
    assert "torch" not in sys.modules
