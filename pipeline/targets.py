"""From final hidden states to targets, in chunks; logits of a whole sequence are never kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.format.records import IGNORE_INDEX, HiddenStates, Relation, StoredRelation, TopK
from cache_schema.format.spec import TargetSpec
from models.head import Head
from pipeline.block_statistics import BLOCK, block_statistics, kernels
from pipeline.draws import counted, tail_places, uniforms
from pipeline.entry_rules import kept, most_selected, narrow
from pipeline.hidden_states import ROUNDED, hidden_record, rounded_states
from pipeline.relation import Group, RelationMaker, on_device

_GROUP_BYTES = 16 << 20  # logits whose fields a CPU makes together
_CHUNK_BYTES = 256 << 20  # logits of a chunk
_MOST_CHUNK_BYTES = 2 << 30  # of an accelerator with much free memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The requests for a batch's hidden states (M, D).

    places (N,): rows of them whose records are wanted. labels, rows, positions (N,), limits (N, 2): see
    `TargetMaker.topk`.
    images: of each image whose relation is wanted its rows (P,).
    hidden (N,): whether the states themselves are wanted, of those whose records are.
    """

    places: NDArray[np.integer]
    labels: NDArray[np.integer]
    rows: NDArray[np.integer]
    positions: NDArray[np.integer]
    images: Sequence[NDArray[np.integer]] = ()
    limits: NDArray[np.float32] | None = None
    hidden: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecords:
    """The records of a batch. finite (N,), images_finite (I,): whether the teacher's hidden states and logits
    were finite numbers there; where not, the records mean nothing."""

    topk: TopK
    finite: NDArray[np.bool_]
    relations: list[Relation | StoredRelation]
    hidden: HiddenStates | None
    images_finite: NDArray[np.bool_]


class PendingRecords:
    """The records of a batch while they are made: `tensors` on the device, in a fixed order.

    Copy all of them to the host, asynchronously if wished, and give the arrays to `records` once they are
    there; that needs neither the device nor the hidden states. `wait` does both at once.
    """

    def __init__(
        self,
        maker: TargetMaker,
        fields: Mapping[str, Tensor],
        groups: Sequence[tuple[Group, Mapping[str, Tensor]]],
    ) -> None:
        self._maker = maker
        self._names = list(fields)
        self._groups = [(group, list(found)) for group, found in groups]
        self.tensors: list[Tensor] = [*fields.values()]
        for _, found in groups:
            self.tensors += found.values()

    def records(self, arrays: Sequence[NDArray[np.generic]]) -> BatchRecords:
        """The records from the host's copies of `tensors`."""
        left = iter(arrays)
        fields = {name: next(left) for name in self._names}
        finite = fields.pop("finite").astype(np.bool_)
        states = {name: fields.pop(f"hidden_{name}") for name in ROUNDED if f"hidden_{name}" in fields}
        count = sum(len(group.images) for group, _ in self._groups)
        relations: list[tuple[Relation | StoredRelation, bool]] = [None] * count  # type: ignore[list-item]
        for group, names in self._groups:
            own = {name: next(left) for name in names}
            for image, record in zip(group.images, self._maker.relation_records(group, own), strict=True):
                relations[image] = record
        return BatchRecords(
            topk=self._maker.topk_record(fields),
            finite=finite,
            hidden=hidden_record(states) if states else None,
            relations=[record for record, _ in relations],
            images_finite=np.array([good for _, good in relations], dtype=np.bool_),
        )

    def wait(self) -> BatchRecords:
        """The records, after waiting for the device."""
        return self.records([tensor.cpu().numpy() for tensor in self.tensors])


class TargetMaker:
    """Makes the records of one teacher. Everything is computed and returned in float32; hidden states may be
    of any floating dtype.

    chunk_bytes: memory for a chunk of logits; None: 256 MB, on CUDA up to 2 GB where an eighth of the free
    memory is more.
    """

    def __init__(self, head: Head, spec: TargetSpec, *, chunk_bytes: int | None = None) -> None:
        self._k = most_selected(spec, head.columns)
        self._head = head
        self._spec = spec
        self._rows = max(1, (chunk_bytes or _chunk_bytes(head.weight.device)) // (4 * head.columns))
        self._buffer: Tensor | None = None
        self._relations = RelationMaker(head, spec) if "relation" in spec.targets else None

    def topk(
        self,
        hidden: Tensor,
        labels: NDArray[np.integer] | None = None,
        *,
        rows: NDArray[np.integer] | None = None,
        positions: NDArray[np.integer] | None = None,
        limits: NDArray[np.float32] | None = None,
    ) -> TopK:
        """The records of hidden (N, D).

        labels (N,): the token that follows, IGNORE_INDEX where none does (its label_logprob is then 0);
        None: no label_logprob. rows, positions (N,): which dataset row and position each is, which decide
        the tail draws; needed when the spec asks for them. limits (N, 2): see pipeline.entry_rules; None: the
        most entries of any kind. The order of ids with equal logits is not defined.
        """
        fields = self._fields(hidden, labels, rows, positions, limits)
        return self.topk_record({name: field.cpu().numpy() for name, field in fields.items()})

    def rows_of(self, count: int) -> int:
        """Rows a chunk of `count` positions, in even chunks."""
        chunks = max(1, -(-count // self._rows))
        return max(1, -(-count // chunks))

    def relation(self, hidden: Tensor) -> Relation:
        """The relation record of one image's hidden (P, D), not rounded. See pipeline.relation."""
        assert self._relations is not None
        return self._relations(hidden)

    def batch(self, states: Tensor, asked: Asked) -> PendingRecords:
        """Starts to make the records of a batch's hidden states (M, D); on CUDA nothing waits for the device.

        Hidden states that are not finite count as zeros, and are reported.
        """
        with torch.inference_mode():
            hidden = states.index_select(0, on_device(asked.places.astype(np.int64), states.device))
            finite = hidden.isfinite().all(dim=1)
            hidden = hidden.masked_fill(~finite[:, None], 0.0)
            fields = self._fields(hidden, asked.labels, asked.rows, asked.positions, asked.limits)
            if asked.hidden is not None:
                kept = on_device(np.flatnonzero(asked.hidden), hidden.device)
                rounded = rounded_states(hidden.index_select(0, kept))
                fields |= {f"hidden_{name}": values for name, values in rounded.items()}
            fields["finite"] = finite & fields["logsumexp"].isfinite().to(finite.device)
        groups = []
        if asked.images:
            assert self._relations is not None
            groups = self._relations.batch(states, asked.images)
        return PendingRecords(self, fields, groups)

    def topk_record(self, fields: Mapping[str, NDArray[np.generic]]) -> TopK:
        """The record from the arrays of its fields on the host."""
        kept = dict(fields)
        if "places" in kept:
            kept["sampled_ids"], kept["sampled_counts"] = counted(kept.pop("places").astype(np.int32))
        return TopK(**kept, temperatures=np.array(self._spec.temperatures, dtype=np.float32))  # type: ignore[arg-type]

    def relation_records(
        self, group: Group, arrays: Mapping[str, NDArray[np.generic]]
    ) -> list[tuple[Relation | StoredRelation, bool]]:
        """See RelationMaker.records."""
        assert self._relations is not None
        return self._relations.records(group, arrays)

    def _fields(
        self,
        hidden: Tensor,
        labels: NDArray[np.integer] | None,
        rows: NDArray[np.integer] | None,
        positions: NDArray[np.integer] | None,
        limits: NDArray[np.float32] | None,
    ) -> dict[str, Tensor]:
        """The fields of a record as tensors on the head's device; `places` (N, M): the tail draws."""
        device, spec = self._head.weight.device, self._spec
        given: dict[str, Tensor] = {}
        if labels is not None:
            given["labels"] = on_device(np.asarray(labels, dtype=np.int64), device)
        if spec.tail_samples:
            assert rows is not None
            assert positions is not None
            numbers = uniforms(spec.tail_samples, seed=spec.seed, rows=rows, positions=positions)
            given["numbers"] = on_device(numbers, device)
        if limits is not None:
            given["limits"] = on_device(limits, device)
        with torch.inference_mode():
            step = self.rows_of(len(hidden))
            pieces = [slice(start, start + step) for start in range(0, max(len(hidden), 1), step)]
            parts = [
                self._chunk(hidden[piece], **{name: values[piece] for name, values in given.items()})
                for piece in pieces
            ]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _chunk(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        numbers: Tensor | None = None,
        limits: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The fields of at most self._rows positions, on the head's device."""
        logits = self._head.logits(hidden, self._scratch(len(hidden)))
        on_cpu = logits.device.type == "cpu"
        group = max(1, _GROUP_BYTES // (4 * logits.shape[1])) if on_cpu else max(1, len(logits))
        pieces = logits.split(group)
        bounds = [None] * len(pieces) if limits is None else limits.split(group)
        parts = [self._group(part, bound) for part, bound in zip(pieces, bounds, strict=True)]
        fields = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if labels is not None:
            chosen = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0] - fields["logsumexp"]
            fields["label_logprob"] = chosen.masked_fill(labels == IGNORE_INDEX, 0.0)
        inside = None if limits is None else kept(fields["logprobs"], limits)
        if numbers is not None:
            ids = fields["token_ids"].long()
            left: float | Tensor = -math.inf
            if inside is not None:
                taken = inside | fields["logprobs"].isneginf()  # with the first id where none was looked for
                ids = torch.where(fields["logprobs"].isneginf(), ids[:, :1], ids)
                left = logits.gather(1, ids).masked_fill_(taken, -math.inf)
            logits.scatter_(1, ids, left).div_(self._spec.sample_temperature)
            fields["places"] = tail_places(logits, numbers)
        return fields if inside is None else narrow(fields, inside, self._spec.temperatures)

    def _scratch(self, rows: int) -> Tensor | None:
        """(rows, V) of a buffer that is kept, made at the size of its largest use; None off the CPU.

        On a CPU fresh memory costs more than what is done in it. An accelerator's allocator keeps it anyway,
        and lends it to the teacher's forward meanwhile.
        """
        if self._head.weight.device.type != "cpu":
            return None
        if self._buffer is None or len(self._buffer) < rows:
            self._buffer = torch.empty(rows, self._head.columns)
        return self._buffer[:rows]

    def _group(self, logits: Tensor, limits: Tensor | None = None) -> dict[str, Tensor]:
        """The label-free fields of logits (n, V); entries outside of limits (n, 2) may be left to the tails.

        The k largest lie within the k blocks of the largest entries, so only those are searched. What lies
        outside the k is summed from the other blocks and from what is left of these: never as a difference.
        """
        k, vocab = self._k, logits.shape[1]
        blocks = block_statistics(logits, self._spec.temperatures)
        fused = kernels(logits.device)
        if fused and fused.selects(vocab, k, BLOCK, limited=limits is not None):
            statistics = blocks.peak, blocks.mass, blocks.moment
            found: dict[str, Tensor] = fused.fused_fields(
                logits, statistics, self._spec.temperatures, k, BLOCK, limits
            )
            return found
        chosen = blocks.peak.topk(min(k, blocks.peak.shape[1]), dim=1, sorted=False).indices
        columns = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
        near = logits.gather(1, columns.clamp(max=vocab - 1))
        if vocab % BLOCK:
            near.masked_fill_(columns >= vocab, -math.inf)
        values, places = near.topk(k, dim=1)
        ids = columns.gather(1, places)
        near.scatter_(1, places, -math.inf)
        far = blocks.peak.scatter(1, chosen, -math.inf)
        highest = torch.maximum(near.amax(dim=1), far.amax(dim=1))  # outside the k; -inf where nothing is
        anchor = highest.masked_fill(highest == -math.inf, 0.0)[:, None]
        near -= anchor
        far -= anchor
        peak = values[:, :1]
        inside = values - peak
        fields: dict[str, Tensor] = {}
        tails = []
        for temperature, mass in zip(self._spec.temperatures, blocks.mass, strict=True):
            outside = (near / temperature).exp_().sum(dim=1)
            outside += torch.linalg.vecdot((far / temperature).exp_(), mass)
            lift = (highest - peak[:, 0]) / temperature
            total = (inside / temperature).exp_().sum(dim=1) + outside * lift.exp()
            tails.append(outside.log() + lift - total.log())
            if temperature == 1.0:
                log_total = total.log()
                low = blocks.peak - peak
                moment = torch.linalg.vecdot(low.exp(), torch.addcmul(blocks.moment, mass, low))
                fields["logsumexp"] = peak[:, 0] + log_total
                fields["entropy"] = (log_total - moment / total).clamp(min=0.0)
        fields["token_ids"] = ids.int()
        fields["logprobs"] = values - fields["logsumexp"][:, None]
        fields["tail_logprob"] = torch.stack(tails, dim=1)
        return fields


def _chunk_bytes(device: torch.device) -> int:
    """Memory for a chunk of logits; the passes over it need about a tenth as much again."""
    if device.type != "cuda":
        return _CHUNK_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return max(_CHUNK_BYTES, min(_MOST_CHUNK_BYTES, free // 8))
