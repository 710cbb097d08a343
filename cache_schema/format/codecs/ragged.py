"""Rows of varying length as one flat array: where each row stands in it, and the orders of its entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Counts = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """N rows of `counts` (N,) entries each in a flat array; row n begins at `starts[n]`."""

    starts: Int64
    counts: Int64

    @classmethod
    def of(cls, counts: Counts) -> Rows:
        """Rows of these lengths, one after the other from entry 0 on."""
        lengths = counts.astype(np.int64)
        return cls(np.cumsum(lengths) - lengths, lengths)

    def at(self, places: slice | Int64) -> Rows:
        """Some of the rows, where they stand."""
        return Rows(self.starts[places], self.counts[places])

    @property
    def entries(self) -> Int64:
        """(E,): the places of all entries of the rows, row after row."""
        return self.ranks + np.repeat(self.starts, self.counts)

    @property
    def ranks(self) -> Int64:
        """(E,): of every entry its number within its row, row after row."""
        begins = np.cumsum(self.counts) - self.counts
        return np.arange(int(self.counts.sum())) - np.repeat(begins, self.counts)


def by_rank(counts: Counts) -> Int64:
    """(E,): the places of entries that stand row after row, in the order of their ranks: the first entry of
    every row, then the second of those that have one, and so on."""
    ranks = Rows.of(counts).ranks
    small = ranks.max(initial=0) < 1 << 16
    return np.argsort(ranks.astype(np.uint16) if small else ranks, kind="stable")
