"""The order of samples and how they are read: a function of (seed, epoch, index) alone, in whole blocks.

Only the slice that a rank reads depends on the number of ranks, nothing on loader workers. So the position in
the stream is one integer, the step, for any world size.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cache_schema.errors import KdcacheError
from cache_schema.format.block import ShardBlock
from cache_schema.format.cache import Cache
from cache_schema.format.records import Sample

Int64 = NDArray[np.int64]

AHEAD = 2
"""Shards that are read before their first sample is due."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """The order of an epoch.

    global_batch: samples per step over all ranks. window: how many shards the shuffle mixes at a time;
    memory holds about `window` + AHEAD decoded shards per rank. A cache of at most `window` shards is
    permuted freely. group_by_modality: a batch is either all with or all without images, but for the last
    ones of an epoch. mega_batch: so many global batches are sorted by length together before they are cut,
    and shuffled again; 1: only within a batch. shuffle off: ascending order, for evaluation. samples: only
    the first so many.
    """

    seed: int = 0
    global_batch: int
    window: int = 8
    group_by_modality: bool = False
    mega_batch: int = 1
    shuffle: bool = True
    samples: int | None = None

    def __post_init__(self) -> None:
        if min(self.global_batch, self.window, self.mega_batch) < 1:
            raise ValueError(
                "global_batch, window and mega_batch must be at least 1, not "
                f"{self.global_batch}, {self.window} and {self.mega_batch}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A sample in its decoded block; it is built in a loader worker."""

    block: ShardBlock
    place: int

    def sample(self) -> Sample:
        return self.block.sample(self.place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The samples of one rank for one optimizer step: micro-batches, of which the last may be empty."""

    number: int
    micro_batches: tuple[tuple[Located, ...], ...]


class Stream:
    """Global batches of a cache, step after step, epoch after epoch.

    Every rank forms the same global batches and reads its own strided slice of each. Within a batch the
    samples are sorted by length, longest first, so that ranks and micro-batches are alike and padding is
    small; the loss does not depend on that order. All ranks have the same number of micro-batches.

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
        assert micro_batch >= 1, micro_batch
        assert 0 <= rank < world_size, (rank, world_size)
        if len(cache) == 0:
            raise KdcacheError(f"cache {cache.url} has no samples yet; let `kdcache build` finish a shard")
        index = cache.index()
        self._cache = cache
        self._config = config
        self._micro_batch = micro_batch
        self._targets = targets
        self._rank = rank
        self._world_size = world_size
        self._tokens = np.asarray(index.tokens, dtype=np.int64)[: config.samples]  # (N,)
        self._with_image = np.asarray(index.images)[: config.samples] > 0  # (N,)
        lengths = [cache.shard_length(shard) for shard in cache.shards]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._shard = np.repeat(np.arange(len(lengths)), lengths)[
            : config.samples
        ]  # (N,) place in cache.shards
        self._kept = lru_cache(maxsize=2)(self._make_batches)

    def __len__(self) -> int:
        """Samples of an epoch."""
        return len(self._tokens)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch, the same in every epoch; the last may be short."""
        size = self._config.global_batch
        if not self._config.group_by_modality:
            return -(-len(self) // size)
        kinds = [int(self._with_image.sum()), int((~self._with_image).sum())]
        return sum(count // size for count in kinds) + -(-sum(count % size for count in kinds) // size)

    def batches(self, epoch: int) -> list[Int64]:
        """The sample numbers of every global batch of an epoch, each sorted by length, longest first."""
        return self._kept(epoch)

    def read(self, start: int, stop: int) -> Generator[Step]:
        """This rank's part of steps start..stop-1, any number of epochs on; shards are read ahead."""
        loading: dict[tuple[int, int], Future[ShardBlock]] = {}
        left: dict[tuple[int, int], int] = {}
        scout = self._first_uses(start, stop)
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shards")
        entered: set[tuple[int, int]] = set()  # of the shards that are loaded, those in use
        begun = requested = 0
        try:
            for number in range(start, stop):
                epoch, batch = divmod(number, self.steps_per_epoch)
                located = []
                for sample in self._mine(self.batches(epoch)[batch]):
                    key = (epoch, int(self._shard[sample]))
                    if key not in entered:
                        entered.add(key)
                        begun += 1
                        while requested < begun + AHEAD and (found := next(scout, None)) is not None:
                            shard, uses = found
                            loading[shard] = pool.submit(self._load, shard[1])
                            left[shard] = uses
                            requested += 1
                    block = loading[key].result()
                    located.append(Located(block=block, place=int(sample - self._starts[key[1]])))
                    left[key] -= 1
                    if left[key] == 0:
                        del loading[key], left[key]
                        entered.remove(key)
                yield Step(number=number, micro_batches=self._cut(located, batch, epoch))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, place: int) -> ShardBlock:
        return self._cache.read_shard(self._cache.shards[place], parts=self._targets, images=True)

    def _mine(self, batch: Int64) -> Int64:
        return batch[self._rank :: self._world_size]

    def _cut(self, located: list[Located], batch: int, epoch: int) -> tuple[tuple[Located, ...], ...]:
        """Micro-batches, padded with empty ones to the largest number of any rank."""
        busiest = -(-len(self.batches(epoch)[batch]) // self._world_size)
        size = self._micro_batch
        return tuple(tuple(located[i : i + size]) for i in range(0, busiest, size))

    def _first_uses(self, start: int, stop: int) -> Iterator[tuple[tuple[int, int], int]]:
        """((epoch, shard), how many of its samples this rank reads) in the order of first use."""
        per_epoch = self.steps_per_epoch
        for epoch in range(start // per_epoch, -(-stop // per_epoch)):
            first = max(0, start - epoch * per_epoch)
            last = min(per_epoch, stop - epoch * per_epoch)
            mine = [self._mine(batch) for batch in self.batches(epoch)[first:last]]
            shards, firsts, uses = np.unique(
                self._shard[np.concatenate(mine)], return_index=True, return_counts=True
            )
            for place in np.argsort(firsts):
                yield (epoch, int(shards[place])), int(uses[place])

    def _make_batches(self, epoch: int) -> list[Int64]:
        order = self._order(epoch)
        size = self._config.global_batch
        random = np.random.default_rng([self._config.seed, epoch, 1])
        if self._config.group_by_modality:
            flags = self._with_image[order]
            places = [self._by_length(np.flatnonzero(kind), order, random) for kind in (flags, ~flags)]
            groups = [kind[i : i + size] for kind in places for i in range(0, len(kind) - size + 1, size)]
            groups.sort(key=lambda group: int(group.max()))  # a batch is due when its last sample is
            rest = np.sort(np.concatenate([kind[len(kind) - len(kind) % size :] for kind in places]))
            groups += [rest[i : i + size] for i in range(0, len(rest), size)]
            batches = [order[group] for group in groups]
        else:
            order = order[self._by_length(np.arange(len(order)), order, random)]
            batches = [order[i : i + size] for i in range(0, len(order), size)]
        return [batch[np.lexsort((batch, -self._tokens[batch]))] for batch in batches]

    def _by_length(self, places: Int64, order: Int64, random: np.random.Generator) -> Int64:
        """`places` in `order` with mega_batch global batches at a time sorted by length, longest first, and
        the batches of each shuffled. The last, which is short, stays at the end."""
        size, together = self._config.global_batch, self._config.mega_batch
        if together == 1 or not self._config.shuffle:
            return places
        made = []
        for start in range(0, len(places), size * together):
            block = places[start : start + size * together]
            block = block[np.argsort(-self._tokens[order[block]], kind="stable")]
            whole = len(block) // size
            batches = block[: whole * size].reshape(whole, size)
            made += [random.permutation(batches).reshape(-1), block[whole * size :]]
        return np.concatenate(made) if made else places

    def _order(self, epoch: int) -> Int64:
        """A permutation of 0..N-1 in which about `window` shards are in use at any place."""
        if not self._config.shuffle:
            return np.arange(len(self), dtype=np.int64)
        random = np.random.default_rng([self._config.seed, epoch])
        shards = len(self._starts) - 1
        if shards <= self._config.window:
            return random.permutation(len(self)).astype(np.int64)
        turn = random.permutation(shards)[self._shard]  # (N,)
        key = turn + self._config.window * random.random(len(self))
        return np.argsort(key, kind="stable").astype(np.int64)
