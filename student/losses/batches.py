"""Batches of positions that a divergence compares with each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from student.divergences import BATCH
from student.losses.records import Entries


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batches:
    """M consecutive rows in G batches of at most BATCH, and the tokens that each batch has in common.

    ends: where each batch ends, the last at M. slots (M,) int64: BATCH times the number of a row's batch,
    plus its place in it. tokens (G, U): all ids that any row of a batch keeps, -1 where it has fewer; columns
    (M, K) int64: where each entry's id stands among them, U for a blank. None: every token is an event.
    """

    ends: tuple[int, ...]
    slots: Tensor
    tokens: Tensor | None = None
    columns: Tensor | None = None

    @classmethod
    def of(cls, ends: tuple[int, ...], entries: Entries | None, device: torch.device) -> Batches:
        """Those of rows whose batches end at `ends`; entries (M, K): None for those of every token. What the
        ids decide is waited for."""
        sizes = torch.tensor([end - start for start, end in zip((0, *ends), ends, strict=False)])
        number = torch.arange(len(sizes)).repeat_interleave(sizes)
        begins = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        slots = (number * BATCH + torch.arange(len(number)) - begins).to(device)
        if entries is None:
            return cls(ends=ends, slots=slots)
        there = (entries.ids >= 0) & (entries.logprobs > -math.inf)
        most = int(entries.ids.max()) + 1 if entries.ids.numel() else 1
        keys = (number.to(device)[:, None] * most + entries.ids)[there].long()
        kept, place = keys.unique(return_inverse=True)
        owner = kept // most
        first = torch.searchsorted(owner, torch.arange(len(sizes), device=device))
        rank = torch.arange(len(kept), device=device) - first[owner]
        width = int(rank.max()) + 1 if len(rank) else 1
        tokens = torch.full((len(sizes), width), -1, dtype=entries.ids.dtype, device=device)
        tokens[owner, rank] = (kept - owner * most).to(tokens.dtype)
        columns = torch.full(entries.ids.shape, width, device=device)
        columns[there] = rank[place]
        return cls(ends=ends, slots=slots, tokens=tokens, columns=columns)

    @property
    def row_elements(self) -> int:
        """Elements of a row's comparison with all rows of its batch."""
        return 0 if self.tokens is None else BATCH * self.tokens.shape[1]

    def chunks(self, size: int) -> Iterator[slice]:
        """Rows in parts of whole batches, at most `size` rows or one batch each."""
        start = before = 0
        for end in self.ends:
            if end - start > size and before > start:
                yield slice(start, before)
                start = before
            before = end
        if before > start:
            yield slice(start, before)

    def cut(self, rows: slice) -> Batches:
        """Those of a part, of whole batches."""
        ends = tuple(end - rows.start for end in self.ends if rows.start < end <= rows.stop)
        first = sum(end <= rows.start for end in self.ends)
        return replace(
            self,
            ends=ends,
            slots=self.slots[rows] - first * BATCH,
            tokens=None if self.tokens is None else self.tokens[first : first + len(ends)],
            columns=None if self.columns is None else self.columns[rows],
        )

    def in_common(self, entries: Entries) -> Entries:
        """The entries (M, K) over the U tokens of a row's batch: logprobs -inf where the row keeps none."""
        if self.tokens is None or self.columns is None:
            return entries
        ids = self.tokens.index_select(0, self.slots // BATCH)
        table = entries.logprobs.new_full((len(ids), ids.shape[1] + 1), -math.inf)
        logprobs = table.scatter_(1, self.columns, entries.logprobs)[:, :-1].contiguous()
        return replace(entries, ids=ids, logprobs=logprobs)

    def stacked(self, values: Tensor, fill: float) -> Tensor:
        """(G, BATCH, m) of the rows of values (M, m), `fill` where a batch has fewer."""
        table = values.new_full((len(self.ends) * BATCH, values.shape[1]), fill)
        return table.index_copy(0, self.slots, values).view(len(self.ends), BATCH, values.shape[1])

    def to(self, device: torch.device | str) -> Batches:
        """The same on `device`."""
        return replace(
            self,
            slots=self.slots.to(device, non_blocking=True),
            tokens=None if self.tokens is None else self.tokens.to(device, non_blocking=True),
            columns=None if self.columns is None else self.columns.to(device, non_blocking=True),
        )
