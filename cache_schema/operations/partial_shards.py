"""Parts of shards of other caches, joined into one shard as stored: targets are not decoded and encoded
again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache_schema.format.cache import Cache
from cache_schema.format.codecs.hidden import hidden_arrays, hidden_of, join_hidden
from cache_schema.format.codecs.relation import RelationBlock, pack_relations
from cache_schema.format.codecs.topk import Arrays, decode_whole, join_stored
from cache_schema.format.groups import write_groups
from cache_schema.format.records import (
    CapturedSample,
    HiddenStates,
    QuarantinedRow,
    StoredRelation,
    labels_of,
    positions_by_kind,
)
from cache_schema.format.shard import (
    QUARANTINE_SCHEMA,
    SAMPLE_SCHEMA,
    EncodedShard,
    images_file,
    positions_of,
    write_table,
)
from cache_schema.format.spec import KINDS, TargetSpec
from cache_schema.format.statistics import relation_statistics, sample_statistics, topk_statistics


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """The kept part of one shard of one cache.

    keep: positions of the kept samples in the shard, ascending; rows: their row numbers there.
    quarantined: the kept rows of its quarantine. offset is added to every row number.
    """

    cache: Cache
    shard: int
    keep: NDArray[np.int64]
    rows: NDArray[np.int64]
    quarantined: tuple[QuarantinedRow, ...] = ()
    offset: int = 0

    @property
    def whole(self) -> bool:
        """Whether all samples of the shard are kept (regardless of its quarantine)."""
        return len(self.keep) == self.cache.shard_length(self.shard)

    @property
    def planned(self) -> NDArray[np.int64]:
        """Row numbers of the piece in the new cache, samples first."""
        lost = np.array([row.row for row in self.quarantined], dtype=np.int64)
        return np.concatenate([self.rows, lost]) + self.offset


def quarantine_table(pieces: Sequence[Piece]) -> pa.Table:
    """The kept quarantine of the pieces."""
    names = [name for name in QUARANTINE_SCHEMA.names if name != "row"]
    rows = [
        {"row": row.row + piece.offset} | {name: getattr(row, name) for name in names}
        for piece in pieces
        for row in piece.quarantined
    ]
    return pa.Table.from_pylist(rows, QUARANTINE_SCHEMA)


def join_pieces(name: str, pieces: Sequence[Piece], spec: TargetSpec) -> EncodedShard:
    """The content of the shard `name` ("00000-<attempt>") that holds the pieces, one after the other."""
    joined = _Joined()
    for piece in pieces:
        joined.add(piece)
    return joined.encode(name, spec, pieces)


@dataclass(slots=True)
class _Joined:
    """Samples and stored targets collected for one shard."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    blocks: dict[str, list[tuple[Arrays, slice]]] = field(
        default_factory=lambda: {kind: [] for kind in KINDS}
    )
    hidden: dict[str, list[HiddenStates]] = field(default_factory=dict)
    lengths: Counter[str] = field(default_factory=Counter)
    relations: list[StoredRelation] = field(default_factory=list)
    images: dict[str, bytes] = field(default_factory=dict)
    shared: int = 0

    def add(self, piece: Piece) -> None:
        table, groups = piece.cache.stored_shard(piece.shard, piece.cache.spec.targets)
        contents = piece.cache.images_of(piece.shard)
        taken: dict[str, list[NDArray[np.int64]]] = {kind: [] for kind in KINDS}
        relations = RelationBlock(groups["relation"]) if "relation" in groups else None
        visual: dict[int, int] = {}  # old place of shared targets -> new place
        related: dict[int, int] = {}

        def take(kind: str, start: int, count: int) -> int:
            taken[kind].append(np.arange(start, start + count))
            self.lengths[kind] += count
            return self.lengths[kind] - count

        for row in table.take(piece.keep).to_pylist():
            spans = np.array(row["label_spans"], np.int32).reshape(-1, 2)
            images = [positions_of(image["spans"]) for image in row["images"]]
            kinds = positions_by_kind(labels_of(np.array(row["input_ids"], np.int32), spans), images)
            row["row"] += piece.offset
            for kind in ("response", "prompt"):
                if row[f"{kind}_start"] is not None:
                    row[f"{kind}_start"] = take(kind, row[f"{kind}_start"], len(kinds[kind]))
            for image, positions in zip(row["images"], images, strict=True):
                if contents:
                    self.images[image["sha256"]] = contents[image["sha256"]]
                start, relation = image["visual_start"], image["relation"]
                self.shared += start in visual or relation in related
                if start is not None:
                    if start not in visual:
                        visual[start] = take("visual", start, len(positions))
                    image["visual_start"] = visual[start]
                if relation is not None and relations is not None:
                    if relation not in related:
                        related[relation] = len(self.relations)
                        self.relations.append(_own(relations.stored(relation)))
                    image["relation"] = related[relation]
            self.rows.append(row)
        for kind, spans_taken in taken.items():
            if spans_taken:
                places = np.concatenate(spans_taken)
                # Taken out at once: a shard may be joined of parts of hundreds, which are not all held.
                self.blocks[kind].append((join_stored([(groups[kind], places)]), slice(None)))
                if kind in piece.cache.spec.hidden:
                    states = hidden_of(groups[f"hidden_{kind}"], places)
                    self.hidden.setdefault(kind, []).append(states)

    def encode(self, name: str, spec: TargetSpec, pieces: Sequence[Piece]) -> EncodedShard:
        temperatures = np.array(spec.temperatures, np.float32)
        groups = {kind: join_stored(parts) for kind, parts in self.blocks.items() if parts}
        samples = [_sample_of(row) for row in self.rows]
        lost = [row for piece in pieces for row in piece.quarantined]
        statistics = sample_statistics(samples, lost)
        for kind in KINDS:
            stored = groups.get(kind)
            records = decode_whole(stored, temperatures) if stored else []
            statistics[kind] = topk_statistics(records)
            if kind == "response" and records:
                labels = np.concatenate([s.input_ids[_response_of(s) + 1] for s in samples])
                # Stored log-probabilities are rounded; ids are exact.
                firsts = np.concatenate([record.token_ids[:, 0] for record in records])
                statistics[kind]["label_is_first"] = int((firsts == labels).sum())
        for hidden_kind, states in self.hidden.items():
            groups[f"hidden_{hidden_kind}"] = hidden_arrays(join_hidden(states))
        if self.relations:
            groups["relation"] = pack_relations(self.relations)
        ranks = [r.rank for r in self.relations]
        statistics["relation"] = relation_statistics(ranks, [r.residual for r in self.relations])
        return EncodedShard(
            name=name,
            tables={
                f"samples/{name}.arrow": write_table(pa.Table.from_pylist(self.rows, SAMPLE_SCHEMA)),
                f"quarantine/{name}.arrow": write_table(quarantine_table(pieces)),
            }
            | images_file(name, self.images, spec),
            arrays=write_groups(groups, {"temperatures": list(spec.temperatures)}),
            counts={
                "samples": len(samples),
                "quarantined": len(lost),
                "tokens": sum(len(sample.input_ids) for sample in samples),
                "images": sum(len(row["images"]) for row in self.rows),
                "shared_images": self.shared,
                **{f"{kind}_positions": self.lengths[kind] for kind in KINDS},
                "relations": len(self.relations),
            },
            statistics=statistics,
        )


def _own(stored: StoredRelation) -> StoredRelation:
    """The record without the shard that it is a part of."""
    arrays = {name: getattr(stored, name).copy() for name in ("scales", "columns", "triangle")}
    return replace(stored, **arrays)


def _sample_of(row: Mapping[str, Any]) -> CapturedSample:
    return CapturedSample(
        row=row["row"],
        sample_id=row["sample_id"],
        input_ids=np.array(row["input_ids"], np.int32),
        label_spans=np.array(row["label_spans"], np.int32).reshape(-1, 2),
    )


def _response_of(sample: CapturedSample) -> NDArray[np.int32]:
    labels = labels_of(sample.input_ids, sample.label_spans)
    return positions_by_kind(labels, ())["response"]
