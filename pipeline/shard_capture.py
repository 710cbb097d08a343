"""The samples of one shard under way: launched in batches, collected in order as they come to the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from cache_schema.format.records import CapturedSample
from pipeline.assemble import Captured
from pipeline.extract import Extractor, Launched
from pipeline.packing import Wanted
from pipeline.samples import PreparedSample


class ShardCapture:
    """What a shard has come to so far. Images with equal prefix keys are captured once per shard.

    results: by row. One thread at a time may use it: the one that launches, then the one that finishes it.
    """

    def __init__(self, extractor: Extractor) -> None:
        self.results: dict[int, Captured] = {}
        self._extractor = extractor
        self._claimed: set[str] = set()  # keys that a launched sample brings
        self._brought: set[str] = set()  # keys whose records are there
        self._coming: deque[Launched] = deque()
        self._referring: dict[int, tuple[PreparedSample, Wanted]] = {}  # to records that are not there yet

    def launch(self, samples: Sequence[PreparedSample]) -> Iterator[list[Captured]]:
        """Launches samples batch by batch; after each, the results that are new on the host meanwhile."""
        for launched in self._extractor.launch(samples, self._claimed):
            self._coming += launched
            yield self._collect(wait=False)

    def finish(self) -> list[Captured]:
        """Waits for all that is launched: the results that are new. Its `orphans` are then to be launched."""
        return self._collect(wait=True)

    def orphans(self) -> list[PreparedSample]:
        """Captured samples whose records of an image another one was to bring that could not be captured."""
        orphans = [sample for sample, _ in self._referring.values()]
        self._referring.clear()
        self._claimed = set(self._brought)
        return orphans

    def run(self, samples: Sequence[PreparedSample]) -> dict[int, Captured]:
        """Captures samples to the end; the results of the shard by row."""
        while samples:
            for _ in self.launch(samples):
                pass
            self.finish()
            samples = self.orphans()
        return self.results

    def _collect(self, *, wait: bool) -> list[Captured]:
        found: list[Captured] = []
        while self._coming and (wait or self._coming[0][1].done()):
            packs, future = self._coming.popleft()
            captured = future.result()
            found += [result for result in captured if result.row not in self.results]
            wanted = [pair for pack in packs for pair in zip(pack.samples, pack.wanted, strict=True)]
            for (sample, want), result in zip(wanted, captured, strict=True):
                self.results[result.row] = result
                if isinstance(result, CapturedSample):
                    owned = zip(want.keys, want.owned, strict=True)
                    self._brought.update(key for key, own in owned if own and key is not None)
                    self._referring[sample.row] = (sample, want)
        for row, (_, want) in list(self._referring.items()):
            if self._brought.issuperset(filter(None, want.keys)):
                del self._referring[row]
        return found
