"""Reading a cache: whole shards at a time, every byte checked against its commit record."""

from __future__ import annotations

import bisect
import hashlib
import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cache_schema.errors import REMEDY, CacheDamaged, KdcacheError, decoding
from cache_schema.file_cache import FileCache, FileCacheConfig
from cache_schema.format.archive import unpack
from cache_schema.format.block import ShardBlock, check_targets
from cache_schema.format.codecs.topk import Arrays
from cache_schema.format.groups import read_groups
from cache_schema.format.manifest import CommitRecord, Manifest, Plan
from cache_schema.format.records import QuarantinedRow, Sample
from cache_schema.format.roll import rolled
from cache_schema.format.shard import QUARANTINE_SCHEMA, check_columns, read_table
from cache_schema.format.spec import TargetSpec
from cache_schema.format.store import LocalStore, Range, Store, document, open_store
from cache_schema.format.writer import MANIFEST

KEPT_SHARDS = 3
"""Shards that `cache[i]` keeps in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheIndex:
    """Per captured sample, in cache order: row, tokens T, images, response positions R; each (len,) int64."""

    row: NDArray[np.int64]
    tokens: NDArray[np.int64]
    images: NDArray[np.int64]
    responses: NDArray[np.int64]


class Cache:
    """An open cache: the samples of its committed shards, in (shard, position) order.

    What is committed after opening is not seen. Not safe to share between threads; cheap to open again.
    """

    def __init__(self, store: Store, blocks: FileCache | None = None) -> None:
        self.store = store
        self.url = store.url
        try:
            self.manifest = _read_manifest(store)
            self.commits = _read_commits(store, self.manifest)
        except OSError as error:
            raise _unreadable(store, error) from error
        self._blocks = blocks
        self.shards = sorted(self.commits)
        self._starts = np.cumsum([0] + [self.commits[i].counts["samples"] for i in self.shards]).tolist()
        self._kept: OrderedDict[int, ShardBlock] = OrderedDict()

    @property
    def spec(self) -> TargetSpec:
        """What was captured."""
        return self.manifest.spec

    @property
    def plan(self) -> Plan:
        """Which rows are in which shard."""
        return self.manifest.plan

    @property
    def assets(self) -> dict[str, bytes]:
        """The teacher's tokenizer and processor files, name -> bytes."""
        return self.manifest.assets

    def head_bytes(self) -> bytes:
        """The file of the teacher's head. KdcacheError in a cache without hidden states, CacheDamaged when it
        is missing or not as it was."""
        head = self.manifest.head
        if head is None:
            raise KdcacheError(
                f"{self.url}: has no hidden states; build it with `hidden` among its --targets"
            )
        place = Range(head.path, 0, head.size)
        if kept := self._from_blocks({place: head.sha256}):
            return kept[place]
        try:
            (data,) = self.store.read_many([place])
        except FileNotFoundError as error:
            raise CacheDamaged(
                f"{self.url}/{head.path}: missing; run the same `kdcache build` again: it is written again"
            ) from error
        except OSError as error:
            raise _unreadable(self.store, error) from error
        head.check(data, self.url)
        if self._blocks is not None:
            self._blocks.put({head.sha256: data})
        return data

    def write_assets(self, folder: Path) -> None:
        """Write the assets as files into `folder`, which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.assets.items():
            (folder / Path(name).name).write_bytes(data)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        shard, position = self.shard_of(index)
        if shard not in self._kept:
            self._kept[shard] = self.read_shard(shard, images=True)
            if len(self._kept) > KEPT_SHARDS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(shard)
        return self._kept[shard].sample(position)

    def shard_of(self, index: int) -> tuple[int, int]:
        """(shard, position in it) of a sample. IndexError outside -len..len-1."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        place = bisect.bisect_right(self._starts, index) - 1
        return self.shards[place], index - int(self._starts[place])

    def shard_length(self, shard: int) -> int:
        """Captured samples of a committed shard."""
        return self.commits[shard].counts["samples"]

    def read_shard(
        self, shard: int, *, parts: Collection[str] | None = None, images: bool = False
    ) -> ShardBlock:
        """A shard in memory. parts: which of the captured targets to read; None: all, (): none. images: the
        bytes of its images too, where the cache embeds them."""
        wanted = frozenset(self.spec.targets if parts is None else parts)
        stored = self.stored_shard(shard, wanted)
        with decoding(where := f"{self.url}/{self.commits[shard].path}"):
            contents = self.images_of(shard) if images else None
            check_targets(stored[1], self.manifest.vocab_size)
            block = ShardBlock(*stored, self.manifest, wanted, contents, where)
            if len(block) != self.shard_length(shard):
                raise ValueError(f"{len(block)} samples, not {self.shard_length(shard)}")
            return block

    def stored_shard(self, shard: int, parts: Collection[str]) -> tuple[pa.Table, dict[str, Arrays]]:
        """The table of samples and the arrays of the targets `parts`, by group and name, as stored."""
        if unknown := set(parts) - set(self.spec.targets):
            raise ValueError(f"{self.url}: has no {', '.join(sorted(unknown))} targets")
        record = self.commits[shard]
        found = self._read(record.extents("samples") | record.target_extents(parts))
        with decoding(f"{self.url}/{record.path}"):
            ((path, data),) = ((p.path, data) for p, data in found.items() if p.path.startswith("samples/"))
        with decoding(f"{self.url}/{path}"):
            table = read_table(data)
        with decoding(f"{self.url}/{record.targets}"):
            return table, read_groups(hierarchy(record, found))

    def images_of(self, shard: int) -> dict[str, bytes]:
        """The bytes of the images of a shard by SHA-256; empty where the cache does not embed them."""
        if not self.spec.embed_images:
            return {}
        table = self._table(shard, "images")
        return dict(zip(table["sha256"].to_pylist(), table["data"].to_pylist(), strict=True))

    def files_of(self, shard: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """A shard as stored: its tables by their path, and the zarr hierarchy of its targets."""
        record = self.commits[shard]
        wanted = {place: digest for file in record.files for place, digest in file.whole.items()}
        found = self._read(wanted)
        tables = {place.path: data for place, data in found.items() if not place.path.startswith("targets/")}
        with decoding(f"{self.url}/{record.targets}"):
            return tables, {path: bytes(data) for path, data in hierarchy(record, found).items()}

    def index(self) -> CacheIndex:
        """Sizes of every sample, without reading a target."""
        columns = ["row", "tokens", "image_count", "responses"]
        found: dict[str, list[NDArray[np.int64]]] = {name: [np.zeros(0, np.int64)] for name in columns}
        for shard in self.shards:
            table = self._table(shard, "samples", columns)
            with decoding(f"{self.url}/{self.commits[shard].path}"):
                if len(table) != self.shard_length(shard) or any(table[name].null_count for name in columns):
                    raise ValueError(f"the table of samples has not {self.shard_length(shard)} whole rows")
            for name in columns:
                found[name].append(table[name].to_numpy().astype(np.int64))
        row, tokens, images, responses = (np.concatenate(found[name]) for name in columns)
        return CacheIndex(row=row, tokens=tokens, images=images, responses=responses)

    def sample_ids(self) -> list[str]:
        """The label of every sample, in order."""
        tables = (self._table(shard, "samples", ["sample_id"]) for shard in self.shards)
        return [each for table in tables for each in table["sample_id"].to_pylist()]

    def find(self, row_or_id: int | str) -> list[int]:
        """The indices of the samples with this row number (looked for in its shard alone) or with this
        label (labels may repeat)."""
        found, only = [], None
        if isinstance(row_or_id, int):
            places = np.flatnonzero(self.plan.order == row_or_id)
            only = {self.plan.shard_at(int(place)) for place in places}
        for start, shard in zip(self._starts, self.shards, strict=False):
            if only is not None and shard not in only:
                continue
            table = self._table(shard, "samples", ["row", "sample_id"])
            column = table["row" if isinstance(row_or_id, int) else "sample_id"].to_pylist()
            found += [int(start) + place for place, value in enumerate(column) if value == row_or_id]
        return found

    def rows_labelled(self, sample_id: str) -> list[int]:
        """The row numbers of the samples with this label."""
        found = []
        for shard in self.shards:
            table = self._table(shard, "samples", ["row", "sample_id"])
            with decoding(f"{self.url}/{self.commits[shard].path}"):
                found += table.filter(pc.equal(table["sample_id"], sample_id))["row"].to_pylist()
        return found

    def quarantined(self) -> Iterator[QuarantinedRow]:
        """The rows that could not be captured, of all committed shards."""
        for shard in self.shards:
            table = self._table(shard, "quarantine")
            with decoding(f"{self.url}/{self.commits[shard].path}"):
                check_columns(table, QUARANTINE_SCHEMA)
            for row in table.select(QUARANTINE_SCHEMA.names).to_pylist():
                yield QuarantinedRow(**row)

    def _table(self, shard: int, kind: str, columns: list[str] | None = None) -> Any:
        record = self.commits[shard]
        with decoding(f"{self.url}/{record.path}"):
            ((place, data),) = self._read(record.extents(kind)).items()
        with decoding(f"{self.url}/{place.path}"):
            return read_table(data, columns)

    def _read(self, wanted: Mapping[Range, str]) -> dict[Range, bytes]:
        """Parts of files, each with its SHA-256, by which it is checked."""
        found = self._from_blocks(wanted)
        absent = [place for place in wanted if place not in found]
        try:
            fetched = dict(zip(absent, self.store.read_many(absent), strict=True))
        except FileNotFoundError as error:
            missing = next((place.path for place in wanted if not self.store.exists(place.path)), "a file")
            raise CacheDamaged(f"{self.url}/{missing}: missing; {REMEDY}") from error
        except OSError as error:
            raise _unreadable(self.store, error) from error
        for place, data in fetched.items():
            if not _is(data, place, wanted[place]):
                raise CacheDamaged(f"{self.url}/{place.path}: truncated or altered; {REMEDY}")
        if self._blocks is not None and fetched:
            self._blocks.put({wanted[place]: data for place, data in fetched.items()})
        return found | fetched

    def _from_blocks(self, wanted: Mapping[Range, str]) -> dict[Range, bytes]:
        """Those that the local file cache holds, verified."""
        if self._blocks is None:
            return {}
        here = self._blocks.get(set(wanted.values()))
        found = {place: here[digest] for place, digest in wanted.items() if digest in here}
        for place in [place for place, data in found.items() if not _is(data, place, wanted[place])]:
            self._blocks.forget(wanted[place])
            del found[place]
        return found


def hierarchy(record: CommitRecord, read: Mapping[Range, bytes]) -> dict[str, bytes | memoryview]:
    """The zarr hierarchy of a shard's targets, path inside it -> bytes, of what was read of it.

    ValueError when a zip cannot be taken apart.
    """
    of_targets = {place: data for place, data in read.items() if place.path.startswith("targets/")}
    if record.format_version == 1:
        return {place.path.removeprefix(f"{record.targets}/"): data for place, data in of_targets.items()}
    return {path: entry for data in of_targets.values() for path, entry in unpack(data).items()}


def open_cache(
    path: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    file_cache: str | os.PathLike[str] | None = None,
    file_cache_bytes: int = 32 << 30,
    files: FileCacheConfig | None = None,
) -> Cache:
    """Open the cache at a path or fsspec URL for reading.

    file_cache: a local folder where what is read of the cache is kept, up to file_cache_bytes. files: the
    same as settings, for a cache that is not in a folder of this machine; a folder needs no copy.
    KdcacheError when no cache is there; CacheDamaged when its manifest or a commit record is altered.
    """
    store = open_store(path, storage_options)
    if file_cache is not None:
        return Cache(store, FileCache(Path(file_cache), file_cache_bytes))
    return Cache(store, None if files is None or isinstance(store, LocalStore) else files.open())


def _read_manifest(store: Store) -> Manifest:
    try:
        return Manifest.from_bytes(store.read(MANIFEST), f"{store.url}/{MANIFEST}")
    except FileNotFoundError as error:
        raise KdcacheError(
            f"{store.url}: no cache here (no {MANIFEST}); give the directory that `kdcache build` made"
        ) from error


def _read_commits(store: Store, manifest: Manifest) -> dict[int, CommitRecord]:
    commits, identity = {}, manifest.identity
    listed = store.listed("commits")
    found = rolled(store, listed)
    rest = [path for path in listed if path not in found and not path.startswith("commits/.")]
    wanted = [document(store, path, listed[path].bytes) for path in rest]
    found |= zip(rest, store.read_many(wanted), strict=True)
    for path, data in sorted(found.items()):
        record = CommitRecord.from_bytes(data, f"{store.url}/{path}")
        mine = record.cache == identity and record.format_version == manifest.format_version
        if record.path != path or not mine or not 0 <= record.shard < manifest.plan.shards:
            raise CacheDamaged(f"{store.url}/{path}: it belongs to another shard or cache; {REMEDY}")
        rows = record.counts["samples"] + record.counts["quarantined"]
        if rows != len(manifest.plan.rows_of(record.shard)):
            raise CacheDamaged(f"{store.url}/{path}: it counts {rows} rows, the plan others; {REMEDY}")
        commits[record.shard] = record
    return commits


def _is(data: bytes, place: Range, digest: str) -> bool:
    return len(data) == place.end - place.start and hashlib.sha256(data).hexdigest() == digest


def _unreadable(store: Store, error: OSError) -> KdcacheError:
    return KdcacheError(
        f"{store.url}: cannot be read ({error}); check the connection or disk, then run again"
    )
