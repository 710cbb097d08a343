"""Samples step after step, read in whole blocks ahead of time, in an order that is a function of the step.

Only the slice that a rank reads depends on the number of ranks, nothing on loader workers. So the position in
the stream is one integer, the step, for any world size.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from cache_schema.format.block import ShardBlock
from cache_schema.format.cache import Cache
from cache_schema.format.records import Sample
from student.order import Catalogue, EpochOrder, Int64, Order
from student.order import StreamConfig as StreamConfig

AHEAD = 2
"""Shards that are read before their first sample is due."""

_Key = tuple[int, int, int]
"""Epoch, turn, place of the shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A sample in its decoded block; it is built in a loader worker. source: which cache of a mixture it is
    from."""

    block: ShardBlock
    place: int
    source: int = 0

    def sample(self) -> Sample:
        sample = self.block.sample(self.place)
        return replace(sample, source=self.source) if self.source else sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The samples of one rank for one optimizer step: micro-batches, of which the last may be empty."""

    number: int
    micro_batches: tuple[tuple[Located, ...], ...]


class OrderedStream:
    """Global batches of caches in a given order, step after step, epoch after epoch.

    Every rank forms the same global batches and reads its own strided slice of each. Within a batch the
    samples are sorted by length, longest first, so that ranks and micro-batches are alike and padding is
    small; the loss does not depend on that order. All ranks have the same number of micro-batches.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        order: Order,
        *,
        micro_batch: int,
        targets: tuple[str, ...] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert micro_batch >= 1, micro_batch
        assert 0 <= rank < world_size, (rank, world_size)
        self._catalogue, self._order = catalogue, order
        self._micro_batch = micro_batch
        self._targets = targets
        self._rank = rank
        self._world_size = world_size

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch, the same in every epoch."""
        return self._order.steps_per_epoch

    def batches(self, epoch: int) -> list[Int64]:
        """The sample numbers of every global batch of an epoch, each sorted by length, longest first."""
        return self._order.batches(epoch)

    def read(self, start: int, stop: int) -> Generator[Step]:
        """This rank's part of steps start..stop-1, any number of epochs on; shards are read ahead."""
        loading: dict[_Key, Future[ShardBlock]] = {}
        left: dict[_Key, int] = {}
        scout = self._first_uses(start, stop)
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shards")
        entered: set[_Key] = set()  # of the shards that are loaded, those in use
        begun = requested = 0
        try:
            for number in range(start, stop):
                epoch, batch = divmod(number - self._order.start, self.steps_per_epoch)
                located = []
                samples, turns = self._mine(epoch, batch)
                for sample, turn in zip(samples, turns, strict=True):
                    place = int(self._catalogue.shard[sample])
                    key = (epoch, int(turn), place)
                    if key not in entered:
                        entered.add(key)
                        begun += 1
                        while requested < begun + AHEAD and (found := next(scout, None)) is not None:
                            shard, uses = found
                            loading[shard] = pool.submit(self._catalogue.load, shard[2], self._targets)
                            left[shard] = uses
                            requested += 1
                    block = loading[key].result()
                    at = int(sample - self._catalogue.starts[place])
                    located.append(Located(block=block, place=at, source=self._catalogue.source(place)))
                    left[key] -= 1
                    if left[key] == 0:
                        del loading[key], left[key]
                        entered.remove(key)
                yield Step(number=number, micro_batches=self._cut(located, batch, epoch))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _mine(self, epoch: int, batch: int) -> tuple[Int64, Int64]:
        """This rank's samples of a global batch, and the turn of each."""
        samples = self.batches(epoch)[batch][self._rank :: self._world_size]
        turns = self._order.turns(epoch)
        if turns is None:
            return samples, np.zeros_like(samples)
        return samples, turns[batch][self._rank :: self._world_size]

    def _cut(self, located: list[Located], batch: int, epoch: int) -> tuple[tuple[Located, ...], ...]:
        """Micro-batches, padded with empty ones to the largest number of any rank."""
        busiest = -(-len(self.batches(epoch)[batch]) // self._world_size)
        size = self._micro_batch
        return tuple(tuple(located[i : i + size]) for i in range(0, busiest, size))

    def _first_uses(self, start: int, stop: int) -> Iterator[tuple[_Key, int]]:
        """(key, how many of its samples this rank reads) in the order of first use."""
        per_epoch = self.steps_per_epoch
        begin, end = start - self._order.start, stop - self._order.start
        shards = len(self._catalogue.starts) - 1
        for epoch in range(begin // per_epoch, -(-end // per_epoch)):
            steps = range(max(0, begin - epoch * per_epoch), min(per_epoch, end - epoch * per_epoch))
            mine = [self._mine(epoch, step) for step in steps]
            samples = np.concatenate([samples for samples, _ in mine])
            turns = np.concatenate([turns for _, turns in mine])
            codes, firsts, uses = np.unique(
                turns * shards + self._catalogue.shard[samples], return_index=True, return_counts=True
            )
            for at in np.argsort(firsts):
                turn, place = divmod(int(codes[at]), shards)
                yield (epoch, turn, place), int(uses[at])


class Stream(OrderedStream):
    """Global batches of a cache: every sample once an epoch.

    Not guaranteed: a uniform permutation of a cache larger than the window. A shard's samples are spread over
    the next `window` shards' worth of steps.
    """

    def __init__(
        self,
        cache: Cache,
        config: StreamConfig,
        *,
        micro_batch: int,
        targets: tuple[str, ...] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        catalogue = Catalogue([cache])
        self._epoch = EpochOrder(catalogue, config)
        super().__init__(
            catalogue,
            self._epoch,
            micro_batch=micro_batch,
            targets=targets,
            rank=rank,
            world_size=world_size,
        )

    def __len__(self) -> int:
        """Samples of an epoch."""
        return len(self._epoch)
