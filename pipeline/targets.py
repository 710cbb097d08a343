"""From final hidden states to targets, in one chunked pass; logits of a whole sequence are never kept."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.errors import KdcacheError
from cache_schema.format.records import IGNORE_INDEX, Relation, TopK
from cache_schema.format.spec import TargetSpec
from models.head import Head
from pipeline.draws import tail_draws
from pipeline.relation import RelationMaker

_BLOCK = 64  # columns a block of the top-k search
_TINY = 1e-30  # tails below this sum are recomputed relative to their own maximum
_CACHE_BYTES = 2 << 20  # logits worked on at a time, so that passes over them stay in a CPU's cache


class TargetMaker:
    """Makes the records of one teacher. Everything is computed and returned in float32 (sums of the
    relation in float64); hidden states may be of any floating dtype.

    chunk_bytes: memory for a chunk of logits; off the CPU its temporary needs are twice as much again.
    """

    def __init__(self, head: Head, spec: TargetSpec, *, chunk_bytes: int = 256 << 20) -> None:
        if spec.top_k > head.columns:
            raise KdcacheError(f"top_k {spec.top_k} exceeds the teacher's {head.columns} tokens")
        self._head = head
        self._spec = spec
        self._rows = max(1, chunk_bytes // (4 * head.columns))
        self._scratches: dict[str, Tensor] = {}
        self._relations = RelationMaker(head, spec) if "relation" in spec.targets else None

    def topk(
        self,
        hidden: Tensor,
        labels: NDArray[np.integer] | None = None,
        *,
        rows: NDArray[np.integer] | None = None,
        positions: NDArray[np.integer] | None = None,
    ) -> TopK:
        """The records of hidden (N, D).

        labels (N,): the token that follows, IGNORE_INDEX where none does (its label_logprob is then 0);
        None: no label_logprob. rows, positions (N,): which dataset row and position each is, which decide
        the tail draws; needed when the spec asks for them. Ties may fall either way in the order of ids.
        """
        parts = []
        for start in range(0, len(hidden), self._rows):
            piece = slice(start, start + self._rows)
            parts.append(self._chunk(hidden[piece], None if labels is None else labels[piece]))
        if not parts:
            parts.append(self._empty(labels is not None))
        fields = {name: _numpy([part[name] for part in parts]) for name in parts[0]}
        samples = self._spec.tail_samples
        if samples:
            assert rows is not None
            assert positions is not None
            drawn = self._draw(hidden, fields["token_ids"], rows, positions)
            fields["sampled_ids"], fields["sampled_counts"] = drawn
        return TopK(**fields, temperatures=np.array(self._spec.temperatures, dtype=np.float32))

    def relation(self, hidden: Tensor) -> Relation:
        """The relation record of one image's hidden (P, D). See pipeline.relation."""
        assert self._relations is not None
        return self._relations(hidden)

    def _chunk(self, hidden: Tensor, labels: NDArray[np.integer] | None) -> dict[str, Tensor]:
        """The fields of at most self._rows positions, on the head's device."""
        with torch.inference_mode():
            logits = self._head.logits(hidden, self._scratch("logits", len(hidden)))
            group = len(logits) if logits.device.type != "cpu" else max(1, _CACHE_BYTES // logits[0].nbytes)
            parts = [self._group(part) for part in logits.split(group)]
            fields = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            if labels is not None:
                index = torch.from_numpy(np.asarray(labels, dtype=np.int64)).to(logits.device)
                chosen = logits.gather(1, index.clamp(min=0)[:, None])[:, 0] - fields["logsumexp"]
                fields["label_logprob"] = chosen.masked_fill(index == IGNORE_INDEX, 0.0)
        return fields

    def _scratch(self, name: str, rows: int) -> Tensor | None:
        """(rows, V) of a buffer that is kept, made at the size of its largest use; None off the CPU.

        On a CPU fresh memory costs more than what is done in it. An accelerator's allocator keeps it anyway,
        and lends it to the teacher's forward meanwhile.
        """
        if self._head.weight.device.type != "cpu":
            return None
        if name not in self._scratches or len(self._scratches[name]) < rows:
            self._scratches[name] = torch.empty(rows, self._head.columns)
        return self._scratches[name][:rows]

    def _group(self, logits: Tensor) -> dict[str, Tensor]:
        """The label-free fields of logits (n, V)."""
        k, vocab = self._spec.top_k, logits.shape[1]
        values, ids = _top(logits, k)
        peak = values[:, :1]
        shifted = torch.sub(logits, peak, out=self._scratch("shifted", len(logits)))  # (n, V), at most 0
        scratch = self._scratch("weights", len(logits))
        fields: dict[str, Tensor] = {}
        tails = []
        for temperature in self._spec.temperatures:
            if temperature == 1.0:
                weights = torch.exp(shifted, out=scratch)
                moment = torch.linalg.vecdot(weights, shifted)
            else:
                weights = torch.div(shifted, temperature, out=scratch).exp_()
            inside = weights.gather(1, ids).sum(dim=1)
            weights.scatter_(1, ids, 0.0)
            outside = weights.sum(dim=1)
            total = inside + outside
            tails.append(self._tail(outside, total, shifted, ids, temperature, full=k == vocab))
            if temperature == 1.0:
                log_total = total.log()
                fields["logsumexp"] = peak[:, 0] + log_total
                fields["entropy"] = (log_total - moment / total).clamp(min=0.0)
        fields["token_ids"] = ids.int()
        fields["logprobs"] = values - fields["logsumexp"][:, None]
        fields["tail_logprob"] = torch.stack(tails, dim=1)
        return fields

    @staticmethod
    def _tail(
        outside: Tensor, total: Tensor, shifted: Tensor, ids: Tensor, temperature: float, *, full: bool
    ) -> Tensor:
        """log(mass outside the ids) (n,); where the sum is tiny, relative to the outside's own maximum."""
        if full:
            return torch.full_like(outside, -math.inf)
        tail = outside.log() - total.log()
        tiny = torch.nonzero(outside < _TINY)[:, 0]
        if len(tiny):
            rest = shifted[tiny].scatter(1, ids[tiny], -math.inf).div(temperature)
            tail[tiny] = rest.logsumexp(dim=1) - total[tiny].log()
        return tail

    def _draw(
        self,
        hidden: Tensor,
        ids: NDArray[np.int32],
        rows: NDArray[np.integer],
        positions: NDArray[np.integer],
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Draws from the tail of every position, (N, M) ids and counts."""
        found = [np.empty((0, self._spec.tail_samples), dtype=np.int32)] * 2
        for start in range(0, len(hidden), self._rows):
            piece = slice(start, start + self._rows)
            with torch.inference_mode():
                logits = self._head.logits(hidden[piece])
                outside = torch.from_numpy(ids[piece].astype(np.int64)).to(logits.device)
                logits.scatter_(1, outside, -math.inf).div_(self._spec.sample_temperature)
            drawn = tail_draws(
                logits,
                self._spec.tail_samples,
                seed=self._spec.seed,
                rows=rows[piece],
                positions=positions[piece],
            )
            found = [np.concatenate([old, new]) for old, new in zip(found, drawn, strict=True)]
        return found[0], found[1]

    def _empty(self, labelled: bool) -> dict[str, Tensor]:
        k, n_t = self._spec.top_k, len(self._spec.temperatures)
        fields = {
            "logsumexp": torch.empty(0),
            "entropy": torch.empty(0),
            "token_ids": torch.empty((0, k), dtype=torch.int32),
            "logprobs": torch.empty((0, k)),
            "tail_logprob": torch.empty((0, n_t)),
        }
        return fields | ({"label_logprob": torch.empty(0)} if labelled else {})


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of logits (n, V) in falling order, (n, k) values and ids.

    The k largest lie within the k blocks of the largest maxima, so only those are searched.
    """
    n, vocab = logits.shape
    blocks = vocab // _BLOCK
    if blocks < 2 * k:
        values, ids = logits.topk(k, dim=1)
        return values, ids
    maxima = logits[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK)).amax(dim=2)
    chosen = maxima.topk(k, dim=1, sorted=False).indices  # (n, k)
    columns = (chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)).flatten(1)
    if vocab % _BLOCK:
        rest = torch.arange(blocks * _BLOCK, vocab, device=logits.device).expand(n, -1)
        columns = torch.cat([columns, rest], dim=1)
    values, places = logits.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, places)


def _numpy(parts: list[Tensor]) -> NDArray[Any]:
    joined: NDArray[Any] = torch.cat(parts).cpu().numpy()
    return joined
