"""The state of a build: its rows, the missing shards, its speed and the time left"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

from cache_schema.format.manifest import CommitRecord, Plan

RECENT = 16
"""Newest commit records from which the speed is computed, or more where many workers wrote them in less than
two shards' time: workers may have joined or left since the build started."""


def build_state(commits: Sequence[CommitRecord], plan: Plan) -> dict[str, Any]:
    """The state of a plan with the commit records so far, JSON values only.

    missing: shards without a commit record as [first, last], both included. rows_per_second: of all workers
    together, over the time in which the newest shards were captured (pauses do not count); seconds_left at
    that speed. last_commit: ISO 8601, UTC, of the newest record. Both None if unknown.
    """
    rows = sum(_rows(record) for record in commits)
    newest = sorted(commits, key=lambda record: record.created)
    since = _since(newest)
    recent = [record for record in newest if _interval(record)[1] > since]
    busy = _covered([(max(start, since), end) for start, end in map(_interval, recent)])
    pace = sum(_rows(record) for record in recent) / busy if busy > 0 else None
    return {
        "complete": len(commits) == plan.shards,
        "shards": len(commits),
        "of_shards": plan.shards,
        "rows": rows,
        "of_rows": plan.rows,
        "missing": _gaps(sorted(record.shard for record in commits), plan.shards),
        "rows_per_second": pace,
        "seconds_left": (plan.rows - rows) / pace if pace else None,
        "last_commit": newest[-1].created if newest else None,
        "seconds": round(sum(record.seconds for record in commits), 3),
    }


def seconds_since(moment: str, now: datetime) -> float:
    """Seconds from an ISO 8601 time until now."""
    return (now - datetime.fromisoformat(moment)).total_seconds()


def _rows(record: CommitRecord) -> int:
    return record.counts["samples"] + record.counts["quarantined"]


def _since(newest: Sequence[CommitRecord]) -> float:
    """The time from which on commits count for the speed. Work that started before it does not count:
    otherwise more workers would look slower."""
    if len(newest) <= RECENT:
        return float("-inf")
    longest = max(record.seconds for record in newest[-RECENT:])
    return min(_interval(newest[-RECENT - 1])[1], _interval(newest[-1])[1] - 2 * longest)


def _interval(record: CommitRecord) -> tuple[float, float]:
    end = datetime.fromisoformat(record.created).timestamp()
    return end - record.seconds, end


def _covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of the intervals."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered


def _gaps(present: Sequence[int], shards: int) -> list[list[int]]:
    bounds = [-1, *present, shards]
    return [[before + 1, after - 1] for before, after in pairwise(bounds) if after - before > 1]
