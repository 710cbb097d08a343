"""A mixture of caches, or of domains in them: which sample stands at which place of which step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from student.order import Catalogue, Int64, StreamConfig, by_length, shuffled
from student.stream import OrderedStream

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighting:
    """Shares of the samples from a step on.

    shares (domains,): they sum to 1. drawn (pools,): samples taken of each pool before `start`.
    """

    start: int
    shares: tuple[float, ...]
    drawn: tuple[int, ...]


class MixedOrder:
    """Global batches of domains, whose samples are taken in proportion to their shares.

    Each domain is passed through again and again, in another order of (seed, domain, pass) every time; how
    far it is at a step follows from the shares alone. Any stretch of steps holds of every domain its share
    of samples, give or take less than one sample per domain (and kind, with group_by_modality). An epoch has
    as many samples as the domains together. With group_by_modality the batches with and without images
    alternate in proportion, and all are full.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        config: StreamConfig,
        domains: Sequence[Int64],
        shares: Sequence[float] | None = None,
    ) -> None:
        """domains: the samples of each, by their number in the catalogue, ascending. shares: of them, of any
        sum; None: in proportion to their sizes."""
        assert domains, "a mixture has domains"
        assert all(len(domain) for domain in domains), [len(domain) for domain in domains]
        self._catalogue, self._config = catalogue, config
        self._sizes = np.array([len(domain) for domain in domains], dtype=np.float64)
        flags = catalogue.with_image
        self._pools: list[Int64] = []
        self._domain: list[int] = []
        self._lane: list[
            int
        ] = []  # the batches that a pool goes to: all, or those with images and those without
        for number, domain in enumerate(domains):
            parts = [domain[flags[domain]], domain[~flags[domain]]] if config.group_by_modality else [domain]
            for lane, samples in enumerate(parts):
                if len(samples):
                    self._pools.append(samples)
                    self._domain.append(number)
                    self._lane.append(lane)
        given = self._sizes if shares is None else np.asarray(shares, dtype=np.float64)
        self._weighting = Weighting(start=0, shares=_normal(given), drawn=(0,) * len(self._pools))
        self._pass = lru_cache(maxsize=2 * len(self._pools))(self._make_pass)
        self._made = lru_cache(maxsize=2)(self._make)

    @property
    def start(self) -> int:
        """The first step of the shares that count now."""
        return self._weighting.start

    @property
    def weighting(self) -> Weighting:
        """The shares that count now: all that `restore` needs."""
        return self._weighting

    @property
    def steps_per_epoch(self) -> int:
        """Global batches with as many samples as the domains together have."""
        return -(-int(self._sizes.sum()) // self._config.global_batch)

    def batches(self, epoch: int) -> list[Int64]:
        """The sample numbers of every global batch of an epoch, each sorted by length, longest first."""
        return self._made(epoch)[0]

    def turns(self, epoch: int) -> list[Int64] | None:
        """For every sample its pass through its domain."""
        return self._made(epoch)[1]

    def reweigh(self, step: int, shares: Sequence[float]) -> None:
        """Takes other shares from `step` on, which is not before the last such step."""
        assert self._config.mega_batch == 1, "a mega-batch may not be cut"
        assert step >= self.start, (step, self.start)
        drawn = self._before(step - self.start)
        self.restore(Weighting(start=step, shares=_normal(np.asarray(shares, dtype=np.float64)), drawn=drawn))

    def restore(self, weighting: Weighting) -> None:
        """Goes on with the shares of a checkpoint."""
        assert len(weighting.drawn) == len(self._pools), (len(weighting.drawn), len(self._pools))
        self._weighting = weighting
        self._made.cache_clear()

    def _weights(self) -> Float64:
        """The share of every pool: of its domain's, in proportion to its samples."""
        sizes = np.array([len(pool) for pool in self._pools], dtype=np.float64)
        return np.asarray(self._weighting.shares)[self._domain] * sizes / self._sizes[self._domain]

    def _lanes(self) -> tuple[Float64, list[tuple[Int64, Float64]]]:
        """The share of every lane, and its pools with their shares of it."""
        weights, lane = self._weights(), np.array(self._lane)
        lanes = [np.flatnonzero(lane == number) for number in range(max(self._lane) + 1)]
        return (
            np.array([weights[pools].sum() for pools in lanes]),
            [(pools, weights[pools] / max(weights[pools].sum(), 1e-300)) for pools in lanes],
        )

    def _before(self, step: int) -> tuple[int, ...]:
        """Samples taken of each pool before a step, which counts from the start of the shares."""
        shares, lanes = self._lanes()
        _, batches = interleaved(shares, step, 0)
        drawn = np.array(self._weighting.drawn)
        for (pools, inside), count in zip(lanes, batches, strict=True):
            if len(pools):
                drawn[pools] += interleaved(inside, int(count) * self._config.global_batch, 0)[1]
        return tuple(drawn.tolist())

    def _make(self, epoch: int) -> tuple[list[Int64], list[Int64]]:
        size, first, count = self._config.global_batch, epoch * self.steps_per_epoch, self.steps_per_epoch
        shares, lanes = self._lanes()
        lane_of, batches_before = interleaved(shares, first, count)
        samples = np.empty((count, size), dtype=np.int64)
        turns = np.empty((count, size), dtype=np.int64)
        for lane, (pools, inside) in enumerate(lanes):
            steps = np.flatnonzero(lane_of == lane)
            if not len(steps):
                continue
            slots, before = interleaved(inside, int(batches_before[lane]) * size, len(steps) * size)
            taken, turn = np.empty_like(slots), np.empty_like(slots)
            for place, pool in enumerate(pools):
                mine = np.flatnonzero(slots == place)
                begin = self._weighting.drawn[pool] + int(before[place])
                taken[mine], passes = self._take(int(pool), begin, len(mine))
                turn[mine] = passes * len(self._pools) + pool
            random = np.random.default_rng([self._config.seed, self.start, epoch, lane])
            together = by_length(self._catalogue.tokens[taken], size, self._config.mega_batch, random)
            samples[steps] = taken[together].reshape(len(steps), size)
            turns[steps] = turn[together].reshape(len(steps), size)
        orders = [np.lexsort((batch, -self._catalogue.tokens[batch])) for batch in samples]
        return (
            [batch[order] for batch, order in zip(samples, orders, strict=True)],
            [turn[order] for turn, order in zip(turns, orders, strict=True)],
        )

    def _take(self, pool: int, begin: int, count: int) -> tuple[Int64, Int64]:
        """The samples begin..begin+count-1 of a pool that is passed through again and again, and the pass of
        each."""
        numbers = np.arange(begin, begin + count)
        passes, places = np.divmod(numbers, len(self._pools[pool]))
        taken = np.empty(count, dtype=np.int64)
        for one in np.unique(passes):
            taken[passes == one] = self._pass(pool, int(one))[places[passes == one]]
        return taken, passes

    def _make_pass(self, pool: int, number: int) -> Int64:
        samples = self._pools[pool]
        shards, shard = np.unique(self._catalogue.shard[samples], return_inverse=True)
        random = np.random.default_rng([self._config.seed, pool, number, 2])
        return samples[shuffled(shard, len(shards), self._config.window, random)]


class MixedStream(OrderedStream):
    """Global batches of domains, each with its share of the samples; see MixedOrder.

    A shard is read once per pass through each domain in it, again at every epoch of the mixture and at every
    change of the shares.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        config: StreamConfig,
        domains: Sequence[Int64],
        shares: Sequence[float] | None = None,
        *,
        micro_batch: int,
        targets: tuple[str, ...] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """domains, shares: as for MixedOrder."""
        self.order = MixedOrder(catalogue, config, domains, shares)
        super().__init__(
            catalogue,
            self.order,
            micro_batch=micro_batch,
            targets=targets,
            rank=rank,
            world_size=world_size,
        )


def interleaved(shares: Float64, start: int, count: int) -> tuple[Int64, Int64]:
    """Places start..start+count-1 of the endless sequence in which each part i appears in proportion to
    shares[i], evenly spaced.

    The k-th appearance of part i is at time (k + 1/2) / shares[i]; the sequence is ordered by time, then by
    part. Returns the part at each of the places (count,), and how often each part appears before them
    (parts,). Parts of share 0 do not appear.
    """
    parts = len(shares)
    # All appearances before this time are among the first `start`.
    sure = max(0.0, start - parts / 2 - 1)
    base = np.maximum(np.ceil(sure * shares - 0.5).astype(np.int64) - 1, 0)
    ahead = start - int(base.sum()) + count
    times, owners = [], []
    for part in np.flatnonzero(shares > 0):
        enough = min(ahead, int(np.ceil((ahead + parts + 2) * shares[part])) + 3)
        times.append((base[part] + np.arange(enough) + 0.5) / shares[part])
        owners.append(np.full(enough, part, dtype=np.int64))
    joined = np.concatenate(owners)[np.argsort(np.concatenate(times), kind="stable")]
    rest = start - int(base.sum())
    return joined[rest : rest + count], base + np.bincount(joined[:rest], minlength=parts)


def _normal(shares: Float64) -> tuple[float, ...]:
    assert (shares >= 0).all(), shares
    assert shares.sum() > 0, shares
    return tuple((shares / shares.sum()).tolist())
