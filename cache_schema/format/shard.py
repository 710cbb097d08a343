"""One shard as files: an Arrow table of samples, zarr arrays of targets, an Arrow table of quarantine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from numcodecs import blosc
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype

from cache_schema.errors import CacheDamaged
from cache_schema.format.codecs.hidden import hidden_arrays, join_hidden
from cache_schema.format.codecs.relation import encode_relation, pack_relations
from cache_schema.format.codecs.topk import Arrays, encode_records
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

QUARANTINE_SCHEMA = pa.schema(
    [("row", pa.int64()), ("sample_id", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)

CHUNK_BYTES = 256 << 20
"""Arrays are one chunk up to this size; blosc takes at most 2 GiB."""

_PLAIN_TYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("int8", "uint8", "uint16", "uint32", "int32", "int64", "float16", "float32", "float64")
}
"""Types that `read_groups` decodes itself."""


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
    return EncodedShard(
        name=name,
        tables={
            f"samples/{name}.arrow": write_table(pa.Table.from_pylist(rows, SAMPLE_SCHEMA)),
            f"quarantine/{name}.arrow": write_table(_quarantine_table(quarantined)),
        },
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


def write_table(table: pa.Table) -> bytes:
    """An Arrow IPC file, buffers compressed with zstd."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def read_table(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of an Arrow IPC file; only `columns` are decompressed."""
    if columns is None:
        return pa.ipc.open_file(data).read_all()
    schema = pa.ipc.open_file(data).schema
    options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in columns])
    return pa.ipc.open_file(data, options=options).read_all()


def write_groups(groups: Mapping[str, Arrays], attributes: dict[str, Any]) -> dict[str, bytes]:
    """A zarr v3 hierarchy in memory: path inside it -> bytes. Every array carries a checksum."""
    files: dict[str, Any] = {}
    root = zarr.open_group(
        zarr.storage.MemoryStore(files), mode="w", zarr_format=3, attributes={"kdcache": 1, **attributes}
    )
    for group, arrays in groups.items():
        for name, values in arrays.items():
            target = root.create_array(
                f"{group}/{name}",
                shape=values.shape,
                dtype=values.dtype,
                chunks=_chunks(values),
                compressors=[_compressor(name, values), Crc32cCodec()],
                config={"write_empty_chunks": True},
            )
            if values.size:
                target[...] = values
    return {path: buffer.to_bytes() for path, buffer in sorted(files.items())}


def read_groups(files: Mapping[str, bytes | memoryview]) -> dict[str, Arrays]:
    """The arrays of a hierarchy, group -> name -> values.

    The caller must ensure that no file is missing: zarr reads a missing chunk as zeros. CacheDamaged when a
    chunk is missing, ValueError when one does not decode.
    """
    groups: dict[str, Arrays] = {}
    for path, data in files.items():
        group, _, name = path.removesuffix("/zarr.json").partition("/")
        if name and path.endswith("/zarr.json"):
            groups.setdefault(group, {})[name] = _read_array(
                files, f"{group}/{name}", json.loads(bytes(data))
            )
    return groups


def _read_array(files: Mapping[str, bytes | memoryview], base: str, metadata: dict[str, Any]) -> NDArray[Any]:
    """An array as zarr would read it, in a quarter of the time if it is encoded as by `write_groups`."""
    shape, inner = metadata["shape"], metadata["shape"][1:]
    if not _is_ours(metadata):
        return _read_by_zarr(files, base)
    values = np.empty(shape, _PLAIN_TYPES[metadata["data_type"]])
    step = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
    count = -(-shape[0] // step) if values.size else 0
    chunks = [path for path in files if path.startswith(f"{base}/c/")]
    if len(chunks) != count:
        raise CacheDamaged(f"{base}: {len(chunks)} of {count} chunks are present")
    for number in range(count):
        encoded = files["/".join([base, "c", str(number), *("0" for _ in inner)])]
        place = values[number * step : (number + 1) * step]
        try:
            compressed = CRC32C().decode(encoded)
            if len(place) == step:
                blosc.decompress(compressed, place)
            else:  # chunks are whole on disk, the last one filled up
                whole = np.frombuffer(blosc.decompress(compressed), values.dtype).reshape(step, *inner)
                place[...] = whole[: len(place)]
        except RuntimeError as error:
            raise ValueError(f"{base}: chunk {number} does not decode: {error}") from error
    return values


def _is_ours(metadata: dict[str, Any]) -> bool:
    """Whether an array is in chunks along its first dimension, little-endian, blosc, crc32c."""
    codecs, chunks = metadata["codecs"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
    return (
        [codec["name"] for codec in codecs] == ["bytes", "blosc", "crc32c"]
        and codecs[0].get("configuration", {}).get("endian", "little") == "little"
        and metadata["data_type"] in _PLAIN_TYPES
        and metadata["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
        and len(chunks) > 0
        and chunks[1:] == [max(size, 1) for size in metadata["shape"][1:]]
    )


def _read_by_zarr(files: Mapping[str, bytes | memoryview], base: str) -> NDArray[Any]:
    """An array in any other encoding that zarr can read."""
    prototype = default_buffer_prototype()
    mine = {
        path: prototype.buffer.from_bytes(data) for path, data in files.items() if path.startswith(f"{base}/")
    }
    array = zarr.open_array(zarr.storage.MemoryStore(mine), path=base, mode="r", zarr_format=3)
    chunks = sum(path.startswith(f"{base}/c/") for path in files)
    if chunks != array.nchunks:
        raise CacheDamaged(f"{base}: {chunks} of {array.nchunks} chunks are present")
    values: NDArray[Any] = array[...]
    return values


def _chunks(values: NDArray[Any]) -> tuple[int, ...]:
    width = max(values.nbytes // max(len(values), 1), 1)
    return (max(min(len(values), CHUNK_BYTES // width), 1), *(max(size, 1) for size in values.shape[1:]))


def _compressor(name: str, values: NDArray[Any]) -> BloscCodec:
    # Bytes of floats and of flat ids, and bits of other integers, repeat across values: see
    # benchmarks/codecs.py and benchmarks/entries.py.
    if values.dtype == np.int8:
        shuffle = "noshuffle"
    elif values.dtype.kind == "f" or name == "vocabulary" or (name == "ids" and values.ndim == 1):
        shuffle = "shuffle"
    else:
        shuffle = "bitshuffle"
    return BloscCodec(cname="zstd", clevel=3, shuffle=shuffle, typesize=values.dtype.itemsize)
