"""Verifies a cache: all problems at once, each with its file and remedy; repairs on request."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cache_schema.errors import CacheDamaged, KdcacheError
from cache_schema.format.block import ShardBlock
from cache_schema.format.checks import relation_problems, topk_problems
from cache_schema.format.manifest import CommitRecord, Manifest, commit_path
from cache_schema.format.shard import read_groups, read_table
from cache_schema.format.store import Store, open_store
from cache_schema.format.writer import MANIFEST, set_aside
from cache_schema.progress import Progress, Silent, task

GRACE_SECONDS = 6 * 3600.0
"""Files of an attempt without a commit record are swept when older than this: no worker is expected to take
that long between writing a shard's files and committing it."""

REMAKE = "run `kdcache verify --repair`, then the same `kdcache build` again: it captures this shard again"
STRANGER = "not a file of the committed shard"
_ATTEMPT = re.compile(r"^(?:samples|targets|quarantine)/\.?(\d{5,})-([0-9a-f]{12})\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A problem: the file, what is wrong, what to do."""

    file: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}; {self.remedy}"


@dataclass(slots=True, kw_only=True)
class VerifyReport:
    """The result of `verify`. shards, samples, quarantined: by the commit records. missing_shards: not built
    (or their commit record is gone). leftovers: files of attempts that were never committed; harmless.
    """

    url: str
    problems: list[Problem] = field(default_factory=list)
    shards: int = 0
    samples: int = 0
    quarantined: int = 0
    missing_shards: list[int] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the cache is complete and no problem was found (before any repair)."""
        return not self.problems

    @property
    def intact(self) -> bool:
        """Whether nothing is damaged; shards may be missing."""
        return all(problem.file == "commits/" for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """A JSON object of everything."""
        return asdict(self) | {"ok": self.ok, "intact": self.intact}


def verify(
    url: str | os.PathLike[str],
    *,
    repair: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check every file of the cache at `url` and its contents.

    repair: sets damaged shards aside (their commit records go below `aside/`, nothing is overwritten), so
    that a resumed build makes them again, and removes the leftovers of dead attempts, including those of
    shards set aside by an earlier repair. KdcacheError when no cache is there.
    """
    return _Verification(open_store(url, storage_options), progress or Silent()).run(repair)


class _Verification:
    def __init__(self, store: Store, progress: Progress) -> None:
        self.store = store
        self.progress = progress
        self.report = VerifyReport(url=store.url)
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
        with task(self.progress, "verify", len(self.records)):
            for done, (shard, record) in enumerate(sorted(self.records.items())):
                self._check_shard(shard, record, files)
                self.progress.update(done + 1)
        self._sort_the_rest(files)
        if repair:
            self._repair(files)
        return self.report

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

    def _check_shard(self, shard: int, record: CommitRecord, present: dict[str, int]) -> None:
        before = len(self.report.problems)
        content = self._check_files(record, present)
        if content is not None and self.manifest is not None:
            try:
                self._check_content(record, content, self.manifest)
            except (CacheDamaged, ValueError, KeyError, IndexError) as error:
                self._problem(record.path, f"its files cannot be decoded ({error})", REMAKE)
        if len(self.report.problems) > before:
            self.damaged.add(record.path)
        self.report.shards += 1
        self.report.samples += record.counts["samples"]
        self.report.quarantined += record.counts["quarantined"]

    def _check_files(self, record: CommitRecord, present: dict[str, int]) -> dict[str, bytes] | None:
        """The shard's files by path, None when one is missing or altered."""
        whole = {f.path: f.bytes for f in record.files if present.get(f.path) == f.bytes}
        found = self.store.read_many(whole)
        for file in record.files:
            if file.path not in present:
                self._problem(file.path, "missing", REMAKE)
            elif file.path not in whole:
                what = f"{present[file.path]} bytes, {file.bytes} were committed"
                self._problem(file.path, what, REMAKE)
            elif hashlib.sha256(found[file.path]).hexdigest() != file.sha256:
                self._problem(file.path, "altered: it does not match its digest", REMAKE)
                del whole[file.path]
        return found if len(whole) == len(record.files) else None

    def _check_content(self, record: CommitRecord, files: dict[str, bytes], manifest: Manifest) -> None:
        name = f"{record.shard:05d}-{record.attempt}"
        base = f"targets/{name}.zarr/"
        quarantine = read_table(files[f"quarantine/{name}.arrow"])
        groups = read_groups({p.removeprefix(base): d for p, d in files.items() if p.startswith(base)})
        block = ShardBlock(
            read_table(files[f"samples/{name}.arrow"]),
            groups,
            manifest.spec,
            frozenset(manifest.spec.targets),
        )
        spec, vocab_size = manifest.spec, manifest.fingerprint.training.get("vocab_size")
        rows = quarantine["row"].to_pylist()
        counts = Counter(samples=len(block), quarantined=len(rows))
        for position in range(len(block)):
            sample = block.sample(position)
            rows.append(sample.row)
            counts.update(tokens=len(sample.input_ids), images=len(sample.images))
            where = f"sample {position} (row {sample.row})"
            for kind, topk in sample.records.items():
                if kind not in spec.targets or (kind == "visual" and not sample.images):
                    continue
                if topk is None or len(topk) != len(sample.positions[kind]):
                    self._problem(base + kind, f"{where}: its targets are missing", REMAKE)
                    continue
                if kind != "visual":  # an image's rows may serve several samples
                    counts[f"{kind}_positions"] += len(topk)
                for what in topk_problems(topk, spec, vocab_size):
                    self._problem(base + kind, f"{where}: {what}", REMAKE)
            if "relation" in spec.targets and len(sample.relations) != len(sample.images):
                self._problem(base + "relation", f"{where}: not one relation per image", REMAKE)
            for relation, image in zip(sample.relations, sample.images, strict=False):
                for what in relation_problems(relation, len(image.positions)):
                    self._problem(base + "relation", f"{where}: {what}", REMAKE)
        if sorted(rows) != np.sort(manifest.plan.rows_of(record.shard)).tolist():
            self._problem(record.path, "samples and quarantine do not match the rows of the plan", REMAKE)
        for name, count in counts.items():
            if record.counts[name] != count:
                self._problem(record.path, f"{name}: {record.counts[name]} counted, {count} there", REMAKE)

    def _sort_the_rest(self, files: dict[str, int]) -> None:
        """Files that no commit record lists: leftovers of attempts, or unknown files."""
        named = {file.path for record in self.records.values() for file in record.files}
        committed = {(r.shard, r.attempt) for r in self.records.values()}
        for path in files:
            attempt = _ATTEMPT.match(path)
            if path in named or path == MANIFEST or path.startswith("aside/"):
                continue
            if path.startswith(".manifest.") or "/." in path:
                self.report.leftovers.append(path)
            elif attempt and (int(attempt[1]), attempt[2]) in committed:
                self._problem(path, STRANGER, "run `kdcache verify --repair`: it is set aside")
            elif attempt:
                self.report.leftovers.append(path)
            elif not path.startswith("commits/"):
                self._problem(path, "not a file of a cache", "move it elsewhere")

    def _repair(self, files: dict[str, int]) -> None:
        if self.manifest is None and MANIFEST in files:
            self.store.move(MANIFEST, f"aside/{MANIFEST}.{int(time.time())}")
            self.report.repaired.append(f"set aside {MANIFEST}")
        for path in sorted(self.damaged):
            set_aside(self.store, path)
            self.report.repaired.append(f"set aside {path}")
        for problem in self.report.problems:
            if problem.what == STRANGER:
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
            return time.time() - self.store.modified(path) > GRACE_SECONDS
        except FileNotFoundError:
            return False

    def _problem(self, file: str, what: str, remedy: str) -> None:
        self.report.problems.append(Problem(file=file, what=what, remedy=remedy))
