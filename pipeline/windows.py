"""Windows of prepared samples, made by threads: from them the capture forms its batches."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from cache_schema.datasets.conversations import writable
from cache_schema.datasets.image_roots import FolderRoot
from cache_schema.errors import RowRejected
from cache_schema.format.records import QuarantinedRow
from pipeline.job import Job
from pipeline.samples import PreparedSample, SamplePreparer

WINDOW_BYTES = 256 << 20
"""Pixels prepared at once; up to three windows are in memory."""

_ASKED_AHEAD = 64  # rows whose images are fetched from a remote root before their turn
_FIRST = 8  # the first window of a shard is this many times smaller, so that a build begins soon


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Consecutive rows of a shard, prepared or rejected. last: the shard ends with it."""

    shard: int
    samples: list[PreparedSample]
    rejected: list[QuarantinedRow]
    last: bool


class Windows:
    """Prepares the rows of shards. Nothing of it uses the job's own preparer, which checks of the teacher may
    use meanwhile."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._preparer = copy.deepcopy(job.preparer)
        self._threads = threading.local()

    def of(self, shards: Iterable[int]) -> Iterator[Window]:
        """The rows of every shard, in windows of limited size, prepared by several threads.

        The end of a window depends on its shard's rows alone, so that every machine forms the same batches.
        """
        with ThreadPoolExecutor(self._job.prepare_threads) as pool:
            for shard in shards:
                samples: list[PreparedSample] = []
                rejected: list[QuarantinedRow] = []
                pixels, limit = 0, WINDOW_BYTES // _FIRST
                rows = self._job.plan.rows_of(shard).tolist()
                step = 2 * self._job.prepare_threads
                for start in range(0, len(rows), step):
                    if not isinstance(self._job.image_root, FolderRoot):
                        for row in rows[start + _ASKED_AHEAD if start else 0 : start + step + _ASKED_AHEAD]:
                            pool.submit(self._ask_for_images, row)
                    for result in pool.map(self._prepare, rows[start : start + step]):
                        if isinstance(result, QuarantinedRow):
                            rejected.append(result)
                        else:
                            samples.append(result)
                            pixels += result.pixel_bytes
                        last = result.row == rows[-1]
                        if last or pixels >= limit:
                            yield Window(shard=shard, samples=samples, rejected=rejected, last=last)
                            samples, rejected, pixels = [], [], 0
                            limit = min(2 * limit, WINDOW_BYTES)

    def _ask_for_images(self, row: int) -> None:
        """Has the images of a row fetched from a remote root."""
        with contextlib.suppress(RowRejected):  # its preparation reports it
            conversation = self._job.dataset[row]
            named = set(conversation.images) - set(conversation.embedded)
            self._job.image_root.prefetch((path, None) for path in named)

    def _prepare(self, row: int) -> PreparedSample | QuarantinedRow:
        """One row; every thread has its own processor, because tokenizers are not thread-safe."""
        preparer: SamplePreparer | None = getattr(self._threads, "preparer", None)
        if preparer is None:
            preparer = self._threads.preparer = copy.deepcopy(self._preparer)
        dataset = self._job.dataset
        began = time.monotonic()
        try:
            sample = preparer.prepare(dataset[row])
            return replace(sample, seconds=time.monotonic() - began)
        except RowRejected as error:
            return QuarantinedRow(
                row=row,
                sample_id=dataset.label_of(row),
                reason=error.reason,
                detail=writable(error.detail),
            )
