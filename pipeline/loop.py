"""The capture loop: shards, windows of prepared samples, batches, and the writer, all at once.

The main thread only launches. Threads prepare samples (pipeline.windows), another one brings records to the
host (pipeline.extract), and one more finishes shards: it waits for their last records and writes them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from cache_schema.errors import KdcacheError, StoppedEarly
from cache_schema.format.manifest import CommitRecord
from cache_schema.format.records import CapturedSample, QuarantinedRow
from cache_schema.format.writer import CacheWriter, look_every
from cache_schema.interrupt import Interrupt
from cache_schema.progress import Progress, task
from pipeline.assemble import Captured
from pipeline.engine import Engine, RecordEngine
from pipeline.extract import Extractor
from pipeline.job import Job
from pipeline.samples import PreparedSample
from pipeline.settings import MAX_BAD, MAX_BAD_FROM
from pipeline.shard_capture import ShardCapture
from pipeline.windows import Window


@dataclass(slots=True)
class _Shard:
    """A shard in progress."""

    index: int
    started: float
    capture: ShardCapture


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finished:
    """A written shard (record None: another worker was first), or its samples to capture again.

    captured: the last ones that came to the host.
    """

    captured: list[Captured]
    orphans: list[PreparedSample] = field(default_factory=list)
    record: CommitRecord | None = None


class CaptureLoop:
    """Captures the pending shards of one worker."""

    def __init__(
        self,
        job: Job,
        writer: CacheWriter,
        extractor: Extractor,
        engine: Engine | RecordEngine,
        progress: Progress,
    ) -> None:
        self._job = job
        self._writer = writer
        self._extractor = extractor
        self._engine = engine
        self._progress = progress
        self._rows = self._samples = self._tokens = self._bytes = 0  # of this run
        self._committed: set[int] = set()  # by this run
        self._elsewhere = 0  # rows of shards that others committed, or earlier runs
        self._bad: Counter[str] = Counter()  # of the whole cache, by reason
        self._good = 0
        self._finishing: tuple[_Shard, Future[_Finished]] | None = None

    def run(self, windows: Iterable[Window], commits: list[CommitRecord]) -> None:
        """Captures the shards of `windows`. commits: what the cache already has.

        StoppedEarly after Ctrl-C or SIGTERM; KdcacheError when too many rows are bad or writing fails.
        """
        plan = self._job.plan
        for commit in commits:
            self._good += commit.counts["samples"]
            self._bad.update(commit.statistics["quarantined"])
        self._look_around()
        self._started = time.monotonic()
        with (
            task(self._progress, "capturing", plan.rows),
            Interrupt() as interrupt,
            ThreadPoolExecutor(1) as disk,
        ):
            self._progress.update(self._elsewhere)
            self._disk = disk
            shard: _Shard | None = None
            finished: set[int] = set()  # by others, while they were being prepared here
            try:
                for window in windows:
                    if window.shard in finished:
                        continue
                    if shard is None:
                        if self._writer.is_committed(window.shard):  # since it was prepared
                            finished.add(window.shard)
                            continue
                        shard = _Shard(
                            index=window.shard,
                            started=time.monotonic(),
                            capture=ShardCapture(self._extractor),
                        )
                    self._capture(window, shard, interrupt)
                    if window.last:
                        self._settle()
                        self._finishing = shard, disk.submit(self._finish, shard)
                        shard = None
            finally:
                self._settle()  # also on errors: a full disk must be reported

    # ---- capturing, in the main thread ----

    def _capture(self, window: Window, shard: _Shard, interrupt: Interrupt) -> None:
        shard.capture.results |= {row.row: row for row in window.rejected}
        self._rows += len(window.rejected)
        for captured in shard.capture.launch(window.samples):
            self._count(captured)
            self._show()
            if interrupt.asked:
                raise StoppedEarly(
                    "stopped on request; finished shards are kept: run the same command again to continue"
                )

    def _count(self, captured: list[Captured]) -> None:
        self._rows += len(captured)
        for result in captured:
            if isinstance(result, CapturedSample):
                self._samples += 1
                self._tokens += len(result.input_ids)

    # ---- finishing and writing, in a thread of its own ----

    def _finish(self, shard: _Shard) -> _Finished:
        """Writes a shard once all its records are present, unless samples must be captured again."""
        captured = shard.capture.finish()
        orphans = shard.capture.orphans()
        if orphans:
            return _Finished(captured=captured, orphans=orphans)
        self._refuse_bad_data(shard)
        return _Finished(captured=captured, record=self._write(shard))

    def _refuse_bad_data(self, shard: _Shard) -> None:
        """KdcacheError when the share of bad rows, of the cache so far and this shard, is over the limit."""
        results = shard.capture.results
        bad = [result for result in results.values() if isinstance(result, QuarantinedRow)]
        self._bad.update(row.reason for row in bad)
        self._good += len(results) - len(bad)
        total, asked = self._bad.total(), self._job.config.max_bad
        seen, limit = total + self._good, MAX_BAD if asked is None else asked
        if total > limit * seen and (asked is not None or seen >= MAX_BAD_FROM):
            reasons = ", ".join(f"{reason} {count}" for reason, count in self._bad.most_common(5))
            example = f"; for example row {bad[0].row}: {bad[0].detail}" if bad else ""
            raise KdcacheError(
                f"{total} of {seen} rows so far cannot be captured ({reasons}), more than --max-bad {limit:g}"
                f"{example}; correct the cause, or continue with a higher --max-bad (1: any share)"
            )

    def _write(self, shard: _Shard) -> CommitRecord | None:
        rows = [shard.capture.results[row] for row in self._job.plan.rows_of(shard.index).tolist()]
        return self._writer.write_shard(
            shard.index,
            [row for row in rows if isinstance(row, CapturedSample)],
            [row for row in rows if isinstance(row, QuarantinedRow)],
            engine=self._engine.description,
            seconds=time.monotonic() - shard.started,
        )

    def _settle(self) -> None:
        """Waits for the shard that is being finished; its errors are raised here."""
        if self._finishing is None:
            return
        shard, future = self._finishing
        self._finishing = None
        while (finished := future.result()).orphans:
            self._count(finished.captured)
            for captured in shard.capture.launch(finished.orphans):
                self._count(captured)
            future = self._disk.submit(self._finish, shard)
        self._count(finished.captured)
        record = finished.record
        if record is None:
            self._progress.message("another worker finished this shard first; this copy is discarded")
        else:
            self._bytes += sum(file.bytes for file in record.files)
            self._committed.add(record.shard)
        if len(self._committed) % look_every(self._job.plan.shards) == 0:
            self._look_around()
        self._show()

    def _look_around(self) -> None:
        """Takes note of what other workers have finished."""
        others = self._writer.committed() - self._committed
        self._elsewhere = sum(len(self._job.plan.rows_of(shard)) for shard in others)

    def _show(self) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rows = self._job.plan.rows
        self._progress.update(
            min(self._rows + self._elsewhere, rows),  # a row that two workers captured counts once
            samples=f"{self._samples / seconds:.1f}/s",
            tokens=f"{self._tokens / seconds:,.0f}/s",
            written=f"{self._bytes / 1e6:,.1f} MB",
            batch=f"{self._extractor.batch_tokens} tokens",
        )
