"""One shard as files: an Arrow table of samples, zarr arrays of targets, an Arrow table of quarantine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cache_schema.errors import first_line
from cache_schema.format.bounds import check_table
from cache_schema.format.codecs.hidden import hidden_arrays, join_hidden
from cache_schema.format.codecs.relation import encode_relation, pack_relations
from cache_schema.format.codecs.topk import Arrays, encode_records
from cache_schema.format.groups import write_groups
from cache_schema.format.records import (
    CapturedImage,
    CapturedSample,
    HiddenStates,
    QuarantinedRow,
    StoredRelation,
    TopK,
)
from cache_schema.format.spec import KINDS, TargetSpec
from cache_schema.format.statistics import relation_statistics, sample_statistics, topk_statistics

_SPANS = pa.list_(pa.list_(pa.int32(), 2))

SAMPLE_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("sample_id", pa.string()),
        ("tokens", pa.int32()),
        ("responses", pa.int32()),
        ("image_count", pa.int32()),
        ("response_start", pa.int64()),
        ("prompt_start", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("label_spans", _SPANS),
        (
            "images",
            pa.list_(
                pa.struct(
                    [
                        ("path", pa.string()),
                        ("sha256", pa.string()),
                        ("width", pa.int32()),
                        ("height", pa.int32()),
                        ("spans", _SPANS),
                        ("prefix_key", pa.string()),
                        ("visual_start", pa.int64()),
                        ("relation", pa.int64()),
                    ]
                )
            ),
        ),
        (
            "model_inputs",
            pa.list_(
                pa.struct(
                    [
                        ("name", pa.string()),
                        ("dtype", pa.string()),
                        ("shape", pa.list_(pa.int64())),
                        ("data", pa.binary()),
                    ]
                )
            ),
        ),
    ]
)
"""One row per sample. `*_start`: the first row of its targets in that group; null: not captured."""

_MAY_BE_NULL = ("response_start", "prompt_start", "prefix_key", "visual_start", "relation")

QUARANTINE_SCHEMA = pa.schema(
    [("row", pa.int64()), ("sample_id", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)


IMAGES_SCHEMA = pa.schema([("sha256", pa.string()), ("data", pa.large_binary())])
"""The files of a shard's distinct images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedShard:
    """The content of a shard, and of its commit record.

    name: "00000-<attempt>". tables: path from the cache's root -> bytes. arrays: the zarr hierarchy of its
    targets, path inside it -> bytes.
    """

    name: str
    tables: dict[str, bytes]
    arrays: dict[str, bytes]
    counts: dict[str, int]
    statistics: dict[str, Any]


class _Targets:
    """Collects the targets of a shard; targets of equal prefixes are stored once."""

    def __init__(self, spec: TargetSpec) -> None:
        self.spec = spec
        self.blocks: dict[str, list[TopK]] = {kind: [] for kind in KINDS}
        self.lengths = dict.fromkeys(self.blocks, 0)
        self.hidden: dict[str, list[HiddenStates]] = {kind: [] for kind in spec.hidden}
        self.relations: list[StoredRelation] = []
        self.shared = 0
        self._prefixes: dict[str, tuple[int | None, int | None]] = {}

    def add(self, kind: str, record: TopK | None, hidden: HiddenStates | None = None) -> int | None:
        """The first row of `record` in its group, and of `hidden` in that of its own."""
        if record is None:
            return None
        if hidden is not None:
            self.hidden[kind].append(hidden)
        start = self.lengths[kind]
        self.blocks[kind].append(record)
        self.lengths[kind] += len(record)
        return start

    def add_image(self, image: CapturedImage) -> tuple[int | None, int | None]:
        """The first visual row of an image and its row among the relations."""
        key = image.prefix_key
        if key is not None and key in self._prefixes:
            self.shared += 1
            return self._prefixes[key]
        relation = None
        if image.relation is not None:
            relation = len(self.relations)
            given = image.relation
            stored = given if isinstance(given, StoredRelation) else encode_relation(given, self.spec)
            self.relations.append(stored)
        places = (self.add("visual", image.visual, image.hidden), relation)
        if key is not None:
            self._prefixes[key] = places
        return places


def encode_shard(
    name: str, samples: Sequence[CapturedSample], quarantined: Sequence[QuarantinedRow], spec: TargetSpec
) -> EncodedShard:
    """The content of the shard `name` ("00000-<attempt>") that holds these samples."""
    targets = _Targets(spec)
    rows = [_sample_row(sample, targets) for sample in samples]
    groups: dict[str, Arrays] = {}
    statistics = sample_statistics(samples, quarantined)
    for kind, records in targets.blocks.items():
        statistics[kind] = topk_statistics(records)
        if records:
            groups[kind] = encode_records(records, spec.precision)
    for kind, states in targets.hidden.items():
        if states:
            groups[f"hidden_{kind}"] = hidden_arrays(join_hidden(states))
    stored = targets.relations
    if stored:
        groups["relation"] = pack_relations(stored)
    statistics["relation"] = relation_statistics([r.rank for r in stored], [r.residual for r in stored])
    images = [image.record for sample in samples for image in sample.images]
    return EncodedShard(
        name=name,
        tables={
            f"samples/{name}.arrow": write_table(pa.Table.from_pylist(rows, SAMPLE_SCHEMA)),
            f"quarantine/{name}.arrow": write_table(_quarantine_table(quarantined)),
        }
        | images_file(name, {image.sha256: image.content for image in images}, spec),
        arrays=write_groups(groups, {"temperatures": list(spec.temperatures)}),
        counts={
            "samples": len(samples),
            "quarantined": len(quarantined),
            "tokens": sum(len(sample.input_ids) for sample in samples),
            "images": sum(len(sample.images) for sample in samples),
            "shared_images": targets.shared,
            **{f"{kind}_positions": count for kind, count in targets.lengths.items()},
            "relations": len(stored),
        },
        statistics=statistics,
    )


def _sample_row(sample: CapturedSample, targets: _Targets) -> dict[str, Any]:
    images = []
    for image in sample.images:
        visual, relation = targets.add_image(image)
        record = image.record
        images.append(
            {
                "path": record.path,
                "sha256": record.sha256,
                "width": record.width,
                "height": record.height,
                "spans": spans_of(record.positions).tolist(),
                "prefix_key": image.prefix_key,
                "visual_start": visual,
                "relation": relation,
            }
        )
    inputs = [
        {
            "name": name,
            "dtype": array.dtype.newbyteorder("<").str,
            "shape": list(array.shape),
            "data": array.astype(array.dtype.newbyteorder("<")).tobytes(),
        }
        for name, array in sorted(sample.model_inputs.items())
    ]
    return {
        "row": sample.row,
        "sample_id": sample.sample_id,
        "tokens": len(sample.input_ids),
        "responses": response_count(sample.label_spans),
        "image_count": len(images),
        "response_start": targets.add("response", sample.response, sample.hidden),
        "prompt_start": targets.add("prompt", sample.prompt),
        "input_ids": sample.input_ids,
        "label_spans": sample.label_spans.tolist(),
        "images": images,
        "model_inputs": inputs,
    }


def response_count(label_spans: NDArray[np.int32]) -> int:
    """The number of response positions of the spans: a supervised token 0 has no position before it."""
    return int(sum(int(end) - max(int(start), 1) for start, end in label_spans if end > max(start, 1)))


def spans_of(positions: NDArray[np.int32]) -> NDArray[np.int32]:
    """Ascending positions (P,) as half-open runs (S, 2)."""
    if len(positions) == 0:
        return np.zeros((0, 2), np.int32)
    breaks = np.flatnonzero(np.diff(positions) != 1)
    starts = positions[np.concatenate([[0], breaks + 1])]
    ends = positions[np.concatenate([breaks, [len(positions) - 1]])] + 1
    return np.stack([starts, ends], axis=1).astype(np.int32)


def positions_of(spans: NDArray[np.int32]) -> NDArray[np.int32]:
    """The positions (P,) of half-open runs (S, 2)."""
    runs = [np.arange(start, end, dtype=np.int32) for start, end in spans]
    return np.concatenate(runs) if runs else np.zeros(0, np.int32)


def _quarantine_table(quarantined: Sequence[QuarantinedRow]) -> pa.Table:
    names = QUARANTINE_SCHEMA.names
    rows = [{name: getattr(row, name) for name in names} for row in quarantined]
    return pa.Table.from_pylist(rows, QUARANTINE_SCHEMA)


def images_file(name: str, images: Mapping[str, bytes | None], spec: TargetSpec) -> dict[str, bytes]:
    """The file of the images of a shard, by its path; none where the spec does not ask for it. Not
    compressed, since images are. ValueError for bytes that are missing or are not those of their SHA-256."""
    if not spec.embed_images:
        return {}
    for digest, content in images.items():
        if content is None or hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"shard {name}: the bytes of image {digest} are not at hand")
    table = pa.table([list(images), list(images.values())], schema=IMAGES_SCHEMA)
    return {f"images/{name}.arrow": write_table(table, None)}


def write_table(table: pa.Table, compression: str | None = "zstd") -> bytes:
    """An Arrow IPC file, buffers compressed with zstd."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(
        sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)
    ) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def check_samples(table: pa.Table) -> None:
    """ValueError unless a table of samples has the columns of SAMPLE_SCHEMA, without nulls where none may be,
    and counts its tokens and images rightly."""
    check_columns(table, SAMPLE_SCHEMA)
    for column, counts in (("input_ids", "tokens"), ("images", "image_count")):
        if not pc.list_value_length(table[column]).equals(table[counts]):
            raise ValueError(f"{counts} of the table of samples is not the number of its {column}")


def check_columns(table: pa.Table, schema: pa.Schema) -> None:
    """ValueError unless a table has the columns of `schema`, without nulls where none may be."""
    for field in schema:
        place = table.schema.get_field_index(field.name)
        if place < 0 or table.schema.field(place).type != field.type:
            raise ValueError(f"the table has no column {field.name} of {field.type}")
        if field.name not in _MAY_BE_NULL:
            for chunk in table.column(place).chunks:
                _refuse_nulls(chunk, field.name)


def _refuse_nulls(array: pa.Array, name: str) -> None:
    if array.null_count:
        raise ValueError(f"{name} of the table is null")
    if pa.types.is_struct(array.type):
        for number, field in enumerate(array.type):
            if field.name not in _MAY_BE_NULL:
                _refuse_nulls(array.field(number), f"{name}.{field.name}")
    elif hasattr(array, "values"):
        _refuse_nulls(array.values, name)


def read_table(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of an Arrow IPC file; only `columns` are decompressed. ValueError when it is none, or claims
    more than its bytes can hold."""
    check_table(data)
    try:
        options = pa.ipc.IpcReadOptions()
        if columns is not None:
            schema = pa.ipc.open_file(data).schema
            options.included_fields = [schema.get_field_index(name) for name in columns]
        table = pa.ipc.open_file(data, options=options).read_all()
        table.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"an Arrow table that cannot be read ({first_line(error)})") from error
    return table
