"""The plan: which rows are in which shard."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache_schema.format.manifest import Plan


def plan_rows(groups: NDArray[np.int64], *, shard_size: int, seed: int) -> Plan:
    """A plan in which rows of the same group are adjacent in one shard.

    groups (rows,) int64: the key of its first image, of its pair, or 0: a row of 0 is a group of one. Groups
    are shuffled by `seed`, so that every shard is a representative sample of the data. A group over
    shard_size starts with a shard and is split; so is one for which no single rows are left as padding.
    """
    rows = len(groups)
    members, starts = _sorted(groups)
    sizes = np.diff(starts)
    generator = np.random.Generator(np.random.Philox(seed))
    shuffled = generator.permutation(len(sizes))
    alone = shuffled[sizes[shuffled] == 1]
    together = shuffled[sizes[shuffled] > 1]
    # Groups and single rows in overall proportion, so that no shard is all of one kind.
    turn = (len(alone) + 1) / (len(together) + 1)
    order = np.empty(rows, dtype=np.int64)
    filled = used = 0  # rows placed, single rows used
    for done, group in enumerate(together, start=1):
        size = int(sizes[group])
        room = -filled % shard_size or shard_size
        singles = min(len(alone) - used, max(0, int(turn * done) - used))
        if room < size:
            singles = min(room, len(alone) - used)  # the shard is filled up with single rows instead
        elif size <= room < size + singles:
            singles = room - size
        taken = alone[used : used + singles]
        order[filled : filled + singles] = members[starts[taken]]
        filled, used = filled + singles, used + singles
        order[filled : filled + size] = members[starts[group] : starts[group + 1]]
        filled += size
    order[filled:] = members[starts[alone[used:]]]
    return Plan(rows=rows, shard_size=shard_size, order=order)


def _sorted(groups: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows sorted by group, and where each group starts (groups + 1,); a row of 0 is alone."""
    members = np.argsort(groups, kind="stable")
    keys = groups[members]
    fresh = np.ones(len(keys), dtype=bool)
    fresh[1:] = (keys[1:] != keys[:-1]) | (keys[1:] == 0)
    return members, np.append(np.flatnonzero(fresh), len(keys))
