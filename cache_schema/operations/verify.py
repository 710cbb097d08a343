"""Verifies a cache: all problems at once, each with its file and remedy; repairs on request."""

from __future__ import annotations

import os
import re
import signal
import time
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from multiprocessing import get_context
from typing import Any

from cache_schema.errors import CacheDamaged, KdcacheError
from cache_schema.format.manifest import CommitRecord, Manifest, commit_path
from cache_schema.format.roll import ROLL
from cache_schema.format.sealed import unseal
from cache_schema.format.store import Range, Store, open_store
from cache_schema.format.writer import MANIFEST, set_aside
from cache_schema.operations.reference_scores import SCORES
from cache_schema.operations.verify_shard import REMAKE, Problem, check_shard
from cache_schema.progress import Progress, Silent, task

GRACE_SECONDS = 6 * 3600.0
"""Files of an attempt without a commit record are swept when older than this: no worker is expected to take
that long between writing a shard's files and committing it."""

LEAST_BYTES = 64 << 20
"""Of a cache for each further process of `verify`: starting one costs as much as checking half of it."""

_QUICKER = 16  # times, without decoding

UNCHECKED = "contents: files have the committed sizes and digests, but nothing in them was decoded or counted"
DAMAGED_HEAD = "truncated or altered: it is not the teacher's head of the manifest"
DAMAGED_ROLL = "truncated or altered; readers go by the commit records themselves"
DAMAGED_SCORES = "truncated or altered: the scores of this shard are lost"
STRANGER = "not a file of the committed shard"
_ATTEMPT = re.compile(r"^(?:samples|targets|quarantine|images)/\.?(\d{5,})-([0-9a-f]{12})\.")


@dataclass(slots=True, kw_only=True)
class VerifyReport:
    """The result of `verify`. shards, samples, quarantined: by the commit records. missing_shards: not built
    (or their commit record is gone). leftovers: files of attempts that were never committed; harmless.
    bytes, seconds: of the shards' files, and what checking them took. unchecked: what was left out.
    """

    url: str
    problems: list[Problem] = field(default_factory=list)
    shards: int = 0
    samples: int = 0
    quarantined: int = 0
    missing_shards: list[int] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0
    unchecked: str = ""

    @property
    def ok(self) -> bool:
        """Whether the cache is complete and no problem was found (before any repair)."""
        return not self.problems

    @property
    def intact(self) -> bool:
        """Whether nothing is damaged; shards may be missing."""
        return all(problem.file == "commits/" for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """A JSON object of everything; `unchecked` only where something was left out."""
        seconds = max(self.seconds, 1e-9)
        document = asdict(self)
        if not self.unchecked:
            del document["unchecked"]
        return document | {
            "ok": self.ok,
            "intact": self.intact,
            "samples_per_second": round(self.samples / seconds, 1),
            "megabytes_per_second": round(self.bytes / 1e6 / seconds, 1),
        }


def verify(
    url: str | os.PathLike[str],
    *,
    repair: bool = False,
    quick: bool = False,
    jobs: int = 1,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check every file of the cache at `url` and its contents.

    repair: sets damaged shards aside (their commit records go below `aside/`, nothing is overwritten), so
    that a resumed build makes them again, and removes the leftovers of dead attempts, including those of
    shards set aside by an earlier repair. quick: sizes and digests of files alone, nothing is decoded.
    jobs: processes that share the shards, fewer where a cache is small. KdcacheError when no cache is there.
    """
    store = open_store(url, storage_options)
    if store.url.startswith("memory:"):  # which other processes do not see
        jobs = 1
    verification = _Verification(store, progress or Silent(), quick=quick, jobs=jobs)
    verification.storage_options = storage_options
    return verification.run(repair)


_shared: list[Any] = []  # of a process that checks shards: store, manifest, quick


def _open_in_process(
    url: str, storage_options: Mapping[str, Any] | None, manifest: Manifest | None, quick: bool
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for it ends it
    _shared[:] = [open_store(url, storage_options), manifest, quick]


def _check_in_process(record: CommitRecord, present: Mapping[str, int]) -> list[Problem]:
    store, manifest, quick = _shared
    return check_shard(record, store, present, manifest, quick=quick)


class _Verification:
    def __init__(self, store: Store, progress: Progress, *, quick: bool, jobs: int) -> None:
        self.store = store
        self.storage_options: Mapping[str, Any] | None = None
        self.progress = progress
        self.quick = quick
        self.jobs = jobs
        self.report = VerifyReport(url=store.url, unchecked=UNCHECKED if quick else "")
        self.manifest: Manifest | None = None
        self.records: dict[int, CommitRecord] = {}
        self.damaged: set[str] = set()  # commit records to set aside

    def run(self, repair: bool) -> VerifyReport:
        files = self.store.list()
        if not any(path == MANIFEST or path.startswith("commits/") for path in files):
            raise KdcacheError(
                f"{self.store.url}: no cache here; give the directory that `kdcache build` made"
            )
        self._check_manifest()
        self._read_records([path for path in files if path.startswith("commits/")])
        self._check_head(files)
        if ROLL in files:
            self._check_roll()
        self._check_shards(files)
        self._sort_the_rest(files)
        if repair:
            self._repair(files)
        return self.report

    def _check_roll(self) -> None:
        try:
            unseal(self.store.read(ROLL), ROLL)
        except CacheDamaged:
            self._problem(ROLL, DAMAGED_ROLL, "run `kdcache verify --repair`: it is set aside")

    def _check_manifest(self) -> None:
        try:
            self.manifest = Manifest.from_bytes(self.store.read(MANIFEST), MANIFEST)
        except (CacheDamaged, FileNotFoundError) as error:
            what = "missing" if isinstance(error, FileNotFoundError) else "truncated or altered"
            self._problem(
                MANIFEST,
                what,
                "run `kdcache verify --repair`, then the same `kdcache build` again: it is written again",
            )

    def _check_head(self, files: Mapping[str, int]) -> None:
        """The teacher's head, which is there before any shard is."""
        head = None if self.manifest is None else self.manifest.head
        if head is None:
            return
        again = "run `kdcache verify --repair`, then the same `kdcache build` again: it is written again"
        if head.path not in files:
            if self.records:
                self._problem(head.path, "missing", again)
            return
        try:
            (data,) = self.store.read_many([Range(head.path, 0, head.size)])
            head.check(data, self.store.url)
        except CacheDamaged:
            self._problem(head.path, DAMAGED_HEAD, again)

    def _read_records(self, paths: list[str]) -> None:
        for path in paths:
            if path.startswith("commits/."):
                continue
            try:
                record = CommitRecord.from_bytes(self.store.read(path), path)
            except CacheDamaged:
                self._problem(path, "truncated or altered", REMAKE)
                self.damaged.add(path)
                continue
            if record.path != path:
                self._problem(path, f"it is the record of shard {record.shard}", REMAKE)
                self.damaged.add(path)
            elif self.manifest is not None and record.cache != self.manifest.identity:
                self._problem(path, "it belongs to another cache", REMAKE)
                self.damaged.add(path)
            else:
                self.records[record.shard] = record
        if self.manifest is not None:
            planned = range(self.manifest.plan.shards)
            self.report.missing_shards = [i for i in planned if i not in self.records]
            for shard in self.records.keys() - set(planned):
                self._problem(commit_path(shard), "no such shard in the plan", REMAKE)
                self.damaged.add(commit_path(shard))
                del self.records[shard]
            if missing := self.report.missing_shards:
                listed = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
                what = f"{len(missing)} of {len(planned)} shards are missing ({listed})"
                self._problem("commits/", what, "run the same `kdcache build` again: it captures them")

    def _check_shards(self, files: dict[str, int]) -> None:
        """Every shard, in as many processes as asked for; what is found comes in their order."""
        records = [record for _, record in sorted(self.records.items())]
        present = [{file.path: files[file.path] for file in r.files if file.path in files} for r in records]
        each = LEAST_BYTES * (_QUICKER if self.quick else 1)
        jobs = min(self.jobs, len(records), 1 + sum(file.bytes for r in records for file in r.files) // each)
        started = time.monotonic()
        with task(self.progress, "verify", len(records)), ExitStack() as stack:
            found: Iterable[list[Problem]]
            if jobs > 1:
                pool = ProcessPoolExecutor(
                    jobs,
                    mp_context=get_context("spawn"),
                    initializer=_open_in_process,
                    initargs=(self.store.url, self.storage_options, self.manifest, self.quick),
                )
                stack.callback(pool.shutdown, wait=True, cancel_futures=True)
                found = pool.map(_check_in_process, records, present)
            else:
                found = (
                    check_shard(record, self.store, own, self.manifest, quick=self.quick)
                    for record, own in zip(records, present, strict=True)
                )
            for record, own, problems in zip(records, present, found, strict=True):
                self.report.problems += problems
                if problems:
                    self.damaged.add(record.path)
                self.report.shards += 1
                self.report.samples += record.counts["samples"]
                self.report.quarantined += record.counts["quarantined"]
                self.report.bytes += sum(own.values())
                self.progress.update(self.report.shards)
        self.report.seconds = time.monotonic() - started

    def _sort_the_rest(self, files: dict[str, int]) -> None:
        """Files that no commit record lists: leftovers of attempts, or unknown files."""
        head = None if self.manifest is None else self.manifest.head
        named = {file.path for record in self.records.values() for file in record.files}
        committed = {(r.shard, r.attempt) for r in self.records.values()}
        for path in files:
            attempt = _ATTEMPT.match(path)
            if head is not None and path == head.path:
                continue
            if path in named or path in (MANIFEST, ROLL) or path.startswith("aside/"):
                continue
            if path.startswith(SCORES) and "/." not in path:
                self._check_scores(path)
                continue
            if path.startswith(".manifest.") or "/." in path:
                self.report.leftovers.append(path)
            elif attempt and (int(attempt[1]), attempt[2]) in committed:
                self._problem(path, STRANGER, "run `kdcache verify --repair`: it is set aside")
            elif attempt:
                self.report.leftovers.append(path)
            elif not path.startswith("commits/"):
                self._problem(path, "not a file of a cache", "move it elsewhere")

    def _check_scores(self, path: str) -> None:
        """A file of `kdcache score`; of an attempt that is no longer committed it is harmless."""
        try:
            unseal(self.store.read(path), path)
        except CacheDamaged:
            self._problem(path, DAMAGED_SCORES, "run `kdcache verify --repair`, then `kdcache score` again")

    def _repair(self, files: dict[str, int]) -> None:
        if self.manifest is None and MANIFEST in files:
            self.store.move(MANIFEST, f"aside/{MANIFEST}.{int(time.time())}")
            self.report.repaired.append(f"set aside {MANIFEST}")
        for path in sorted(self.damaged):
            set_aside(self.store, path)
            self.report.repaired.append(f"set aside {path}")
        for problem in self.report.problems:
            if problem.what in (STRANGER, DAMAGED_HEAD, DAMAGED_ROLL, DAMAGED_SCORES):
                self.store.move(problem.file, f"aside/{problem.file}")
                self.report.repaired.append(f"set aside {problem.file}")
        dead = [path for path in self.report.leftovers if self._is_dead(path)]
        if dead:
            self.store.remove(dead)
            self.report.repaired += [f"removed leftover {path}" for path in dead]

    def _is_dead(self, path: str) -> bool:
        attempt = _ATTEMPT.match(path)
        if attempt and int(attempt[1]) in self.records:
            return True
        try:
            return self._now - self.store.modified(path) > GRACE_SECONDS
        except FileNotFoundError:
            return False

    @cached_property
    def _now(self) -> float:
        """The time by the store's clock, which dates its files: this machine's may be hours off."""
        path = f"samples/.clock-{uuid.uuid4().hex[:8]}"
        self.store.put(path, b"")
        try:
            return self.store.modified(path)
        finally:
            self.store.remove([path])

    def _problem(self, file: str, what: str, remedy: str) -> None:
        self.report.problems.append(Problem(file=file, what=what, remedy=remedy))
