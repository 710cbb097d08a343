"""The order of samples as a function of (seed, epoch, index) alone, and where each sample stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cache_schema.errors import KdcacheError
from cache_schema.format.block import ShardBlock
from cache_schema.format.cache import Cache

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]


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


class Catalogue:
    """The samples of caches, numbered on from one cache to the next, and their shards likewise.

    tokens (N,): lengths. with_image (N,). shard (N,): the place of each sample's shard among all shards.
    Tokens and shard are int32, since every rank holds them for all samples. starts (shards + 1,): the first
    sample of each.
    """

    def __init__(self, caches: Sequence[Cache]) -> None:
        for cache in caches:
            if len(cache) == 0:
                raise KdcacheError(
                    f"cache {cache.url} has no samples yet; let `kdcache build` finish a shard"
                )
        indices = [cache.index() for cache in caches]
        self.tokens = np.concatenate([np.asarray(index.tokens, dtype=np.int32) for index in indices])
        self.with_image = np.concatenate([np.asarray(index.images) for index in indices]) > 0
        lengths = [cache.shard_length(shard) for cache in caches for shard in cache.shards]
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.shard = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        self._caches = caches
        self._places = [(source, shard) for source, cache in enumerate(caches) for shard in cache.shards]

    def source(self, place: int) -> int:
        """Which of the caches holds the shard at this place."""
        return self._places[place][0]

    def samples_of(self, source: int) -> Int64:
        """The numbers of the samples of a cache."""
        before = sum(len(cache) for cache in self._caches[:source])
        return np.arange(before, before + len(self._caches[source]), dtype=np.int64)

    def load(self, place: int, targets: tuple[str, ...]) -> ShardBlock:
        """The shard at this place, with the targets named and its images."""
        source, shard = self._places[place]
        return self._caches[source].read_shard(shard, parts=targets, images=True)


class Order(Protocol):
    """Global batches, step after step. Steps are counted in epochs from step `start` on."""

    @property
    def start(self) -> int:
        """The first step of the first epoch."""

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch, the same in every epoch."""

    def batches(self, epoch: int) -> list[Int64]:
        """The sample numbers of every global batch of an epoch, each sorted by length, longest first."""

    def turns(self, epoch: int) -> list[Int64] | None:
        """For every sample of the batches a number: those of one turn and shard are read together. None: all
        samples of the epoch are of one turn."""


class EpochOrder:
    """Every sample of a catalogue once an epoch, but for `config.samples`, or those with numbers in `among`
    (ascending)."""

    start = 0

    def __init__(self, catalogue: Catalogue, config: StreamConfig, among: Int64 | None = None) -> None:
        self._config = config
        numbers = np.arange(len(catalogue.tokens)) if among is None else among
        self._numbers = numbers[: config.samples]
        part = self._numbers if among is not None else slice(config.samples)  # of all: no copies
        self._tokens = catalogue.tokens[part]
        self._with_image = catalogue.with_image[part]
        self._shard = catalogue.shard[part]
        self._shards = len(catalogue.starts) - 1
        self.batches = lru_cache(maxsize=2)(self._make_batches)

    def __len__(self) -> int:
        """Samples of an epoch."""
        return len(self._tokens)

    @property
    def steps_per_epoch(self) -> int:
        """The last global batch of an epoch may be short."""
        size = self._config.global_batch
        if not self._config.group_by_modality:
            return -(-len(self) // size)
        kinds = [int(self._with_image.sum()), int((~self._with_image).sum())]
        return sum(count // size for count in kinds) + -(-sum(count % size for count in kinds) // size)

    def turns(self, epoch: int) -> list[Int64] | None:
        del epoch
        return None

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
        return [self._numbers[batch[np.lexsort((batch, -self._tokens[batch]))]] for batch in batches]

    def _by_length(self, places: Int64, order: Int64, random: np.random.Generator) -> Int64:
        together = self._config.mega_batch if self._config.shuffle else 1
        size = self._config.global_batch
        return places[by_length(self._tokens[order[places]], size, together, random)]

    def _order(self, epoch: int) -> Int64:
        if not self._config.shuffle:
            return np.arange(len(self), dtype=np.int64)
        random = np.random.default_rng([self._config.seed, epoch])
        return shuffled(self._shard, self._shards, self._config.window, random)


def shuffled(shard: Int32 | Int64, shards: int, window: int, random: np.random.Generator) -> Int64:
    """A permutation of 0..N-1 in which about `window` shards are in use at any place; shard (N,): of each of
    the samples, below `shards`."""
    if shards <= window:
        return random.permutation(len(shard)).astype(np.int64)
    turn = random.permutation(shards)
    key = random.random(len(shard))  # (N,), in place: the largest arrays of a run
    key *= window
    key += turn[shard]
    return np.argsort(key, kind="stable").astype(np.int64)


def by_length(tokens: Int32, size: int, together: int, random: np.random.Generator) -> Int64:
    """Places of samples with `together` batches of `size` at a time sorted by length, longest first, and the
    batches of each shuffled. The last, which is short, stays at the end."""
    places = np.arange(len(tokens))
    if together == 1:
        return places
    made = []
    for start in range(0, len(places), size * together):
        block = places[start : start + size * together]
        block = block[np.argsort(-tokens[block], kind="stable")]
        whole = len(block) // size
        batches = block[: whole * size].reshape(whole, size)
        made += [random.permutation(batches).reshape(-1), block[whole * size :]]
    return np.concatenate(made) if made else places
