"""A file that claims more than its bytes can hold is refused in one line, before memory is taken for it.

The caches here are as a hostile author would make them: every digest is right.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numcodecs.checksum32 import CRC32C

from cache_schema import CacheDamaged, CacheWriter, TargetSpec, open_cache
from cache_schema.format import writer as writing
from cache_schema.format.archive import unpack
from cache_schema.format.bounds import MOST, check_blosc, check_table
from cache_schema.format.groups import read_groups, write_groups
from cache_schema.format.shard import EncodedShard, encode_shard, read_table, write_table
from cache_schema.operations.verify import verify
from tests.cache_teacher import capture, make_manifest

SPEC = TargetSpec(targets=("response", "visual", "relation"), top_k=4, relation="exact")
LARGE = 10_000_000_000_000
GRANTED = 1 << 30
"""Bytes that a system would grant."""

Tamper = Callable[[EncodedShard], None]


@pytest.fixture(autouse=True)
def _no_memory_is_taken() -> Iterator[None]:
    """What a test allocates through Python, numpy and Arrow stays small."""
    read_groups(write_groups({"warm": {"up": np.zeros(3)}}, {}))
    tracemalloc.start()
    before = pa.default_memory_pool().max_memory() or 0
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6
    assert (pa.default_memory_pool().max_memory() or 0) - before < 30e6


def metadata(path: str, **changed: Any) -> Tamper:
    """The array's zarr.json with other values."""

    def tamper(shard: EncodedShard) -> None:
        document = json.loads(shard.arrays[f"{path}/zarr.json"])
        for key, value in changed.items():
            if key == "chunk_shape":
                document["chunk_grid"]["configuration"][key] = value
            else:
                document[key] = value
        shard.arrays[f"{path}/zarr.json"] = json.dumps(document).encode()

    return tamper


def blosc_header(path: str, declared: int) -> Tamper:
    """A chunk whose blosc header declares another size, its checksum right."""

    def tamper(shard: EncodedShard) -> None:
        data = bytearray(shard.arrays[path][:-4])
        data[4:8] = struct.pack("<I", declared)
        shard.arrays[path] = bytes(CRC32C().encode(bytes(data)))

    return tamper


def array(group: str, name: str, values: Any) -> Tamper:
    """Another array, soundly encoded."""

    def tamper(shard: EncodedShard) -> None:
        groups = read_groups(shard.arrays)
        groups[group][name] = np.array(values, groups[group][name].dtype)
        shard.arrays.clear()
        shard.arrays.update(write_groups(groups, {}))

    return tamper


def table(change: Callable[[bytes], bytes]) -> Tamper:
    """Another table of samples."""

    def tamper(shard: EncodedShard) -> None:
        for path in shard.tables:
            if path.startswith("samples/"):
                shard.tables[path] = change(shard.tables[path])

    return tamper


def buffer_of(declared: int) -> Callable[[bytes], bytes]:
    """The first compressed buffer of a table, token ids or not, declares another size."""

    def change(data: bytes) -> bytes:
        for at in range(0, len(data) - 16, 8):
            (size,) = struct.unpack_from("<q", data, at)
            if data[at + 8 : at + 12] == b"\x28\xb5\x2f\xfd" and 0 < size < 1 << 20:  # zstd's magic number
                return data[:at] + struct.pack("<q", declared) + data[at + 8 :]
        raise AssertionError("no compressed buffer")

    return change


def rows_of(count: int) -> Callable[[bytes], bytes]:
    """Every length of `rows` in the table's metadata, another."""

    def change(data: bytes) -> bytes:
        rows = read_table(data).num_rows
        return data.replace(struct.pack("<qq", rows, 0), struct.pack("<qq", count, 0))

    return change


def spans_to(end: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        rows = read_table(data).to_pylist()
        for row in rows:
            for image in row["images"]:
                image["spans"] = [[0, end]]
        return write_table(pa.Table.from_pylist(rows, read_table(data).schema))

    return change


TAMPERED = {
    "shape": metadata("response/logsumexp", shape=[LARGE], chunk_shape=[LARGE]),
    "shape alone": metadata("response/logsumexp", shape=[LARGE]),
    "chunk shape": metadata("response/logsumexp", chunk_shape=[LARGE]),
    "a granted shape": metadata("response/logsumexp", shape=[GRANTED // 4], chunk_shape=[GRANTED // 4]),
    "a second dimension": metadata("response/ids", shape=[3, LARGE], chunk_shape=[3, LARGE]),
    "a negative shape": metadata("response/logsumexp", shape=[-1]),
    "a shape of words": metadata("response/logsumexp", shape=["9"]),
    "no array": metadata("response/logsumexp", codecs=7),
    "zarr reads it": metadata("response/logsumexp", shape=[LARGE], codecs=[{"name": "gzip"}]),
    "zarr's chunk": metadata(
        "response/logsumexp",
        chunk_shape=[GRANTED],
        codecs=[{"name": "bytes", "configuration": {"endian": "little"}}],
    ),
    "blosc": blosc_header("response/logsumexp/c/0", GRANTED),
    "a buffer": table(buffer_of(LARGE)),
    "a granted buffer": table(buffer_of(GRANTED)),
    "rows": table(rows_of(LARGE)),
    "granted rows": table(rows_of(GRANTED)),
    "cut off": table(lambda data: data[:-30]),
    "nothing": table(lambda data: b""),
    "spans": table(spans_to(2**31 - 1)),
    "a triangle": array("relation", "tokens", [2**31 - 1]),
    "a negative triangle": array("relation", "tokens", [-3]),
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", TAMPERED)
def test_it_is_refused_in_one_line(tmp_path: Path, name: str, version: int) -> None:
    writer = CacheWriter.open(tmp_path, make_manifest(SPEC, rows=1, shard_size=1, version=version))
    samples, bad = capture([0], SPEC)
    shard = encode_shard("00000-0123456789ab", samples, bad, SPEC)
    TAMPERED[name](shard)
    assert writer.commit(0, "0123456789ab", shard, engine={}, seconds=0.0) is not None
    cache = open_cache(tmp_path)
    with pytest.raises(CacheDamaged, match=r"verify --repair|not ascending") as caught:
        cache.read_shard(0).sample(0)
    assert "\n" not in str(caught.value)
    report = verify(tmp_path)
    assert not report.intact
    assert all("\n" not in str(problem) for problem in report.problems)
    if "response" not in name and name not in ("a triangle", "a negative triangle"):
        return
    cache.read_shard(0, parts=("response",)).sample(0)


@pytest.mark.parametrize("at", [18, 22])
@pytest.mark.parametrize("claimed", [LARGE & 0xFFFFFFFF, GRANTED, 0xFFFFFFFF, 3])
def test_an_entry_of_a_zip_claims_another_size(tmp_path: Path, monkeypatch, at: int, claimed: int) -> None:
    """In its local header, where our reader looks; the directory says otherwise, which `verify` tells."""

    def pack(files: dict[str, bytes]) -> Any:
        data, places = original(files)
        start = places["response"].start + at
        return data[:start] + struct.pack("<I", claimed) + data[start + 4 :], places

    original = writing.pack
    monkeypatch.setattr(writing, "pack", pack)
    writer = CacheWriter.open(tmp_path, make_manifest(SPEC, rows=1, shard_size=1))
    samples, bad = capture([0], SPEC)
    writer.write_shard(0, samples, bad, engine={}, seconds=0.0)
    for parts in (("response",), SPEC.targets):
        with pytest.raises(CacheDamaged, match=r"zarr\.zip: cannot be decoded"):
            open_cache(tmp_path).read_shard(0, parts=parts)
    assert not verify(tmp_path).intact


def test_a_directory_that_differs_from_the_entries_is_told(tmp_path: Path, monkeypatch) -> None:
    """Other readers go by the directory of a zip: it must name the same bytes."""

    def pack(files: dict[str, bytes]) -> Any:
        data, places = original(files)
        at = data.rindex(b"response/ids/zarr.json")
        return data[:at] + b"response/idz/zarr.json" + data[at + 22 :], places

    original = writing.pack
    monkeypatch.setattr(writing, "pack", pack)
    writer = CacheWriter.open(tmp_path, make_manifest(SPEC, rows=1, shard_size=1))
    samples, bad = capture([0], SPEC)
    writer.write_shard(0, samples, bad, engine={}, seconds=0.0)
    assert open_cache(tmp_path)[0].response is not None
    (problem,) = verify(tmp_path).problems
    assert "its zip directory" in problem.what


def test_what_repeats_is_not_refused(tmp_path: Path) -> None:
    """Zeros compress most: the bound lies beyond what the writer can reach."""
    values = np.zeros(1 << 20, np.uint16)
    files = write_groups({"response": {"zeros": values}}, {})
    stored = len(files["response/zeros/c/0"])
    assert 200 < values.nbytes / stored < MOST
    np.testing.assert_array_equal(read_groups(files)["response"]["zeros"], values)
    check_blosc(files["response/zeros/c/0"][:-4], values.nbytes, "zeros")
    column = pa.table({"zeros": np.zeros(1 << 17, np.int64)})
    assert read_table(write_table(column)).equals(column)


def test_garbage_is_no_table() -> None:
    good = write_table(pa.table({"row": [1, 2, 3], "text": ["a", "b", "c"]}))
    check_table(good)
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(good)
        for at in rng.integers(0, len(data), 3):
            data[at] ^= 1 << int(rng.integers(8))
        try:
            read_table(bytes(data)).to_pylist()
        except (ValueError, KeyError, pa.ArrowException):
            continue


def test_entries_that_are_not_plain_are_refused() -> None:
    with pytest.raises(ValueError, match="cut off"):
        unpack(b"PK\x03\x04" + bytes(9))
    header = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 33, 0, 2, 2, 1, 0)
    assert {path: bytes(data) for path, data in unpack(header + b"abc").items()} == {"a": b"bc"}
    for place, number in ((6, 8), (6, 1), (8, 8)):
        with pytest.raises(ValueError, match="not stored plainly"):
            unpack(header[:place] + struct.pack("<H", number) + header[place + 2 :] + b"abc")
    with pytest.raises(ValueError, match="twice"):
        unpack(2 * (header + b"abc"))
