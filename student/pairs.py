"""Pairs of a chosen and a rejected answer, step after step: of one cache, or of two with the same ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from cache_schema.datasets.preferences import partner_of
from cache_schema.errors import IdentityMismatch, KdcacheError, WrongUsage
from cache_schema.format.cache import Cache
from student.order import Catalogue, EpochOrder, Int64, StreamConfig
from student.stream import Located, OrderedStream

MOST_ALONE = 0.1
"""Of the chosen samples, the share that may be without a rejected one."""


def halves(cache: Cache) -> tuple[Int64, Int64]:
    """(indices of chosen samples (N,), ascending, and those of their partners (N,)) in a cache of rows with
    both answers. WrongUsage when there is no such pair."""
    rows, ids = cache.index().row.tolist(), cache.sample_ids()
    place = dict(zip(rows, range(len(rows)), strict=True))
    found = [
        (at, other)
        for at, (row, each) in enumerate(zip(rows, ids, strict=True))
        if (partner := partner_of(each)) is not None
        and (other := place.get(row + 1)) is not None
        and ids[other] == partner
    ]
    if not found:
        raise WrongUsage(
            f"{cache.url} holds no pairs: build it from rows with `chosen` and `rejected`, or give "
            "--rejected, the cache of the rejected answers"
        )
    return np.array([at for at, _ in found], np.int64), np.array([other for _, other in found], np.int64)


def partners(chosen: Cache, rejected: Cache) -> tuple[Int64, Int64]:
    """(indices in `chosen` (N,), ascending, and those of their partners in `rejected` (N,)): of the ids that
    stand once in each. IdentityMismatch for caches of two teachers; KdcacheError when more than MOST_ALONE
    of the chosen samples are without partner."""
    if _teacher(chosen) != _teacher(rejected):
        raise IdentityMismatch(
            f"{rejected.url} and {chosen.url} were captured from two teachers: their log-likelihoods have no "
            "common reference; build both with one"
        )
    ids, theirs = chosen.sample_ids(), rejected.sample_ids()
    once, place = Counter(ids), {each: index for index, each in enumerate(theirs)}
    counts = Counter(theirs)
    found = [(at, place[each]) for at, each in enumerate(ids) if once[each] == counts[each] == 1]
    alone = len(ids) - len(found)
    if not found or alone > MOST_ALONE * len(ids):
        first = next(each for each in ids if not once[each] == counts[each] == 1)
        raise KdcacheError(
            f"{alone} of {len(ids)} samples of {chosen.url} have no partner in {rejected.url} (first: id "
            f"{first!r}): an id must stand once in each; give both rows of a pair one id of their own"
        )
    return np.array([at for at, _ in found], np.int64), np.array([other for _, other in found], np.int64)


def _teacher(cache: Cache) -> object:
    return cache.manifest.fingerprint.capture.get("teacher_weights")


class PairStream(OrderedStream):
    """Global batches of pairs: `global_batch` counts pairs, every pair is read once an epoch.

    The order is that of the chosen samples, a function of (seed, epoch, index). A pair is never parted: it
    stands in one micro-batch, the chosen sample first; `micro_batch` counts samples, two at least. caches:
    one of pairs, or those of the chosen and of the rejected answers. alone: samples of the first that are in
    no pair. Not promised: few shards of a rejected cache in memory where its rows are in another order.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        config: StreamConfig,
        *,
        micro_batch: int,
        targets: tuple[str, ...] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        first, *others = caches
        catalogue = Catalogue(caches)
        if others:
            chosen, rejected = partners(first, others[0])
            rejected = len(first) + rejected
        else:
            chosen, rejected = halves(first)
        self.alone = len(first) - (1 if others else 2) * len(chosen)
        self._partner = np.full(len(first), -1, np.int64)
        self._partner[chosen] = rejected
        super().__init__(
            catalogue,
            EpochOrder(catalogue, config, chosen),
            micro_batch=micro_batch,
            targets=targets,
            rank=rank,
            world_size=world_size,
        )

    def _mine(self, epoch: int, batch: int) -> tuple[Int64, Int64]:
        """This rank's samples of a global batch, pair after pair."""
        chosen, turns = super()._mine(epoch, batch)
        samples = np.stack([chosen, self._partner[chosen]], axis=1).reshape(-1)
        return samples, np.repeat(turns, 2)

    def _cut(self, located: list[Located], batch: int, epoch: int) -> tuple[tuple[Located, ...], ...]:
        """Micro-batches of whole pairs."""
        busiest = 2 * -(-len(self.batches(epoch)[batch]) // self._world_size)
        size = 2 * max(1, self._micro_batch // 2)
        return tuple(tuple(located[i : i + size]) for i in range(0, busiest, size))
