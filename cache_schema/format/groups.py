"""Groups of arrays as a zarr v3 hierarchy in memory, and back."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import zarr
from numcodecs import blosc
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype

from cache_schema.errors import UNDECODABLE, CacheDamaged
from cache_schema.format.bounds import array_bytes, check_blosc
from cache_schema.format.codecs.topk import Arrays

CHUNK_BYTES = 256 << 20
"""Arrays are one chunk up to this size; blosc takes at most 2 GiB."""

COLUMN_CHUNK_BYTES = 32 << 20
"""The same for the columns of relations, most of a shard at full rank: chunks are compressed in parallel."""

_COLUMN_BLOCK = 1 << 20
_MOST_THREADS = 8  # that compress arrays

_PLAIN_TYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("int8", "uint8", "uint16", "uint32", "int32", "int64", "float16", "float32", "float64")
}
"""Types that `read_groups` decodes itself."""

Files = Mapping[str, bytes | memoryview]
"""Files of a hierarchy, or of one array, by their path in it."""


def write_groups(groups: Mapping[str, Arrays], attributes: dict[str, Any]) -> dict[str, bytes]:
    """A zarr v3 hierarchy in memory: path inside it -> bytes. Every array carries a checksum. Arrays, and the
    chunks of one, are compressed in parallel."""
    files: dict[str, Any] = {}
    root = zarr.open_group(
        zarr.storage.MemoryStore(files), mode="w", zarr_format=3, attributes={"kdcache": 1, **attributes}
    )
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        written = []
        for group, arrays in groups.items():
            for name, values in arrays.items():
                target = root.create_array(
                    f"{group}/{name}",
                    shape=values.shape,
                    dtype=values.dtype,
                    chunks=_chunks(name, values),
                    compressors=[_compressor(name, values), Crc32cCodec()],
                    config={"write_empty_chunks": True},
                )
                if values.size:
                    written.append(pool.submit(target.__setitem__, ..., values))
        for each in written:
            each.result()
    return {path: buffer.to_bytes() for path, buffer in sorted(files.items())}


def read_groups(files: Files) -> dict[str, Arrays]:
    """The arrays of a hierarchy, group -> name -> values.

    The caller must ensure that no file is missing: zarr reads a missing chunk as zeros. CacheDamaged when a
    chunk is missing, ValueError when one does not decode, or declares more than its bytes can hold: nothing
    is allocated for it.
    """
    groups: dict[str, Arrays] = {}
    for path, data in files.items():
        group, _, name = path.removesuffix("/zarr.json").partition("/")
        if name and path.endswith("/zarr.json"):
            base = f"{group}/{name}"
            chunks = {p: d for p, d in files.items() if p.startswith(f"{base}/c/") or p == f"{base}/c"}
            try:
                metadata = json.loads(bytes(data))
                read = _read_array if _is_ours(metadata) else _read_by_zarr
                groups.setdefault(group, {})[name] = read(base, data, metadata, chunks)
            except (*UNDECODABLE, RuntimeError) as error:
                raise ValueError(f"{base}: not an array of a cache ({error!r})") from error
    return groups


def _read_array(base: str, _: bytes | memoryview, metadata: dict[str, Any], chunks: Files) -> NDArray[Any]:
    """An array as zarr would read it, in a quarter of the time if it is encoded as by `write_groups`."""
    shape, dtype = metadata["shape"], _PLAIN_TYPES[metadata["data_type"]]
    size = array_bytes(shape, dtype.itemsize, sum(map(len, chunks.values())), base)
    inner = shape[1:]
    step, *_ = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    _refuse_missing(base, chunks, -(-shape[0] // step) if size else 0)
    each = step * math.prod(inner) * dtype.itemsize
    values = np.empty(shape, dtype)
    for number in range(len(chunks)):
        encoded = chunks["/".join([base, "c", str(number), *("0" for _ in inner)])]
        place = values[number * step : (number + 1) * step]
        try:
            compressed = CRC32C().decode(encoded)
            check_blosc(memoryview(compressed), each, f"{base}: chunk {number}")
            if len(place) == step:
                blosc.decompress(compressed, place)
            else:  # chunks are whole on disk, the last one filled up
                whole = np.frombuffer(blosc.decompress(compressed), dtype).reshape(step, *inner)
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


def _read_by_zarr(
    base: str, document: bytes | memoryview, metadata: dict[str, Any], chunks: Files
) -> NDArray[Any]:
    """An array in any other encoding that zarr can read."""
    dtype, stored = _PLAIN_TYPES[metadata["data_type"]], sum(map(len, chunks.values()))
    array_bytes(metadata["shape"], dtype.itemsize, stored, base)
    grid = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    array_bytes(grid, dtype.itemsize, min(map(len, chunks.values()), default=0), f"{base}: a chunk")
    mine = {f"{base}/zarr.json": document, **chunks}
    buffers = {path: default_buffer_prototype().buffer.from_bytes(bytes(d)) for path, d in mine.items()}
    array = zarr.open_array(zarr.storage.MemoryStore(buffers), path=base, mode="r", zarr_format=3)
    _refuse_missing(base, chunks, array.nchunks)
    values: NDArray[Any] = array[...]
    return values


def _refuse_missing(base: str, chunks: Files, count: int) -> None:
    if len(chunks) != count:
        raise CacheDamaged(f"{base}: {len(chunks)} of {count} chunks are present")


def _chunks(name: str, values: NDArray[Any]) -> tuple[int, ...]:
    width = max(values.nbytes // max(len(values), 1), 1)
    most = min(CHUNK_BYTES, COLUMN_CHUNK_BYTES) if name == "columns" else CHUNK_BYTES
    return (max(min(len(values), most // width), 1), *(max(size, 1) for size in values.shape[1:]))


def _compressor(name: str, values: NDArray[Any]) -> BloscCodec:
    # Bytes of floats and of flat ids, and bits of other integers, repeat across values: see
    # benchmarks/codecs.py and benchmarks/entries.py.
    if values.dtype == np.int8:
        shuffle = "noshuffle"
    elif values.dtype.kind == "f" or name == "vocabulary" or (name == "ids" and values.ndim == 1):
        shuffle = "shuffle"
    else:
        shuffle = "bitshuffle"
    size = values.dtype.itemsize
    if name == "columns":  # of relations: a third of the time of level 3, and fewer bytes in larger blocks
        return BloscCodec(cname="zstd", clevel=1, shuffle=shuffle, typesize=size, blocksize=_COLUMN_BLOCK)
    return BloscCodec(cname="zstd", clevel=3, shuffle=shuffle, typesize=size)
