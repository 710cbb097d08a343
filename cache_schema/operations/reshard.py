"""New caches out of the shards of others: whole shards are linked, or packed anew for another format version;
parts of shards are joined as stored."""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from cache_schema.errors import CacheDamaged, KdcacheError
from cache_schema.format.cache import Cache
from cache_schema.format.manifest import CommitRecord, Manifest, Plan, StoredFile
from cache_schema.format.shard import SAMPLE_SCHEMA, EncodedShard, write_table
from cache_schema.format.store import LocalStore
from cache_schema.format.writer import CacheWriter, store_failure
from cache_schema.operations.partial_shards import Piece, join_pieces, quarantine_table
from cache_schema.output import sync
from cache_schema.progress import Progress, task

_NO_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)


Shards = dict[int, list[Piece]]


def arrange(pieces: Sequence[Piece], shard_size: int) -> Shards:
    """Groups pieces into new shards: a whole piece is one shard, the others are joined up to shard_size
    rows."""
    shards: list[list[Piece]] = []
    open_pieces: list[Piece] = []
    for piece in pieces:
        size = len(piece.planned)
        if size == 0:
            continue
        if piece.whole:
            shards.append([piece])
            continue
        if open_pieces and size + sum(len(p.planned) for p in open_pieces) > shard_size:
            shards.append(open_pieces)
            open_pieces = []
        open_pieces.append(piece)
    return dict(enumerate([*shards, open_pieces] if open_pieces else shards))


def plan_of(shards: Shards) -> Plan:
    """The plan of a cache whose shards are `shards`, numbered from 0."""
    rows = [np.concatenate([piece.planned for piece in shards[i]]) for i in range(len(shards))]
    sizes = [len(part) for part in rows]
    even = len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]
    return Plan(
        rows=sum(sizes),
        shard_size=max(sizes),
        order=np.concatenate(rows),
        ends=None if even else np.cumsum(sizes, dtype=np.int64),
    )


def write_cache(
    out: str, manifest: Manifest, shards: Shards, what: str, progress: Progress
) -> dict[str, Any]:
    """Writes or continues the cache `out` of these shards and returns a summary; no target is decoded.

    KdcacheError when something else is at `out` (this cache in another format version, too), or it cannot be
    written; CacheDamaged when a source is damaged.
    """
    writer = CacheWriter.open(out, manifest)
    if (there := writer.manifest.format_version) != manifest.format_version:
        raise KdcacheError(
            f"{out}: this cache is there in format version {there}, not {manifest.format_version}; "
            "give another --out"
        )
    if writer.lacks_head:
        sources = (piece.cache for pieces in shards.values() for piece in pieces)
        writer.put_head(next(sources).head_bytes())
    ways: Counter[str] = Counter()
    with task(progress, what, len(shards)):
        for index in writer.pending():
            if index not in shards:
                continue
            pieces = shards[index]
            try:
                ways[_write(writer, index, pieces)] += 1
            except OSError as error:
                raise store_failure(error, writer.store) from error
            progress.update(sum(ways.values()))
    if ways:
        writer.finish()
    return {
        "out": out,
        "samples": sum(len(piece.keep) for pieces in shards.values() for piece in pieces),
        "quarantined": sum(len(piece.quarantined) for pieces in shards.values() for piece in pieces),
        "shards": len(shards),
        "linked_shards": ways["linked"],
        "copied_shards": ways["copied"],
        "joined_shards": ways["joined"],
        "repacked_shards": ways["repacked"],
        "already_there": len(shards) - sum(ways.values()),
    }


def _write(writer: CacheWriter, index: int, pieces: Sequence[Piece]) -> str:
    if len(pieces) > 1 or not pieces[0].whole:
        return _join(writer, index, pieces)
    (piece,) = pieces
    same = piece.cache.manifest.format_version == writer.manifest.format_version
    return _take_over(writer, index, piece) if same else _repack(writer, index, piece)


def _take_over(writer: CacheWriter, index: int, piece: Piece) -> str:
    """The shard as it is under a new number: targets linked, tables rewritten only where rows change."""
    record = piece.cache.commits[piece.shard]
    attempt = uuid.uuid4().hex[:12]
    old, new = record.name, f"{index:05d}-{attempt}"
    rewritten = _changed_tables(piece, new)
    moved = {file.path: file.path.replace(old, new, 1) for file in record.files}
    same = {path: target for path, target in moved.items() if target not in rewritten}
    way = "linked" if _link(piece.cache, writer, same) else "copied"
    if way == "copied":
        _copy(piece.cache, writer, record, same)
    for path, data in rewritten.items():
        writer.store.put(path, data)
    files = []
    for file in record.files:
        path, new_data = moved[file.path], rewritten.get(moved[file.path])
        if new_data is None:
            files.append(replace(file, path=path))
        else:
            digest = hashlib.sha256(new_data).hexdigest()
            files.append(StoredFile(path=path, bytes=len(new_data), sha256=digest))
    taken = replace(
        record,
        cache=writer.manifest.identity,
        shard=index,
        attempt=attempt,
        counts=_counts(piece),
        statistics=_statistics(piece) | {"bytes": record.statistics["bytes"] | _part_bytes(files)},
        files=tuple(sorted(files, key=lambda file: file.path)),
    )
    writer.publish(taken)
    return way


def _repack(writer: CacheWriter, index: int, piece: Piece) -> str:
    """The shard in another format version, its arrays as stored."""
    record, attempt = piece.cache.commits[piece.shard], uuid.uuid4().hex[:12]
    name = f"{index:05d}-{attempt}"
    tables, arrays = piece.cache.files_of(piece.shard)
    shard = EncodedShard(
        name=name,
        tables={path.replace(record.name, name, 1): data for path, data in tables.items()}
        | _changed_tables(piece, name),
        arrays=arrays,
        counts=_counts(piece),
        statistics=_statistics(piece),
    )
    writer.commit(index, attempt, shard, engine=record.engine, seconds=record.seconds)
    return "repacked"


def _counts(piece: Piece) -> dict[str, int]:
    """Those of a shard that is kept whole."""
    return piece.cache.commits[piece.shard].counts | {"quarantined": len(piece.quarantined)}


def _statistics(piece: Piece) -> dict[str, Any]:
    """Those of a shard that is kept whole, but for its bytes."""
    statistics = piece.cache.commits[piece.shard].statistics
    return statistics | {
        "longest": [[row + piece.offset, tokens] for row, tokens in statistics["longest"]],
        "slowest": [[row + piece.offset, spent] for row, spent in statistics.get("slowest", [])],
        "quarantined": dict(Counter(row.reason for row in piece.quarantined)),
    }


def _changed_tables(piece: Piece, name: str) -> dict[str, bytes]:
    """The tables of a shard that must be rewritten, by their new path."""
    changed = {}
    if piece.offset:
        table, _ = piece.cache.stored_shard(piece.shard, ())
        rows = pa.array(table["row"].to_numpy() + piece.offset)
        changed[f"samples/{name}.arrow"] = write_table(table.set_column(0, SAMPLE_SCHEMA.field("row"), rows))
    if piece.offset or len(piece.quarantined) != piece.cache.commits[piece.shard].counts["quarantined"]:
        changed[f"quarantine/{name}.arrow"] = write_table(quarantine_table([piece]))
    return changed


def _part_bytes(files: Sequence[StoredFile]) -> dict[str, int]:
    """Bytes of the two tables, which may have changed."""
    return {
        part: sum(file.bytes for file in files if file.path.startswith(f"{part}/"))
        for part in ("samples", "quarantine")
    }


def _link(cache: Cache, writer: CacheWriter, paths: Mapping[str, str]) -> bool:
    """Hard-link files, source path -> path here: files never change, so two caches may share one. False, with
    nothing left behind, where the two locations cannot share files."""
    source, target = cache.store, writer.store
    if not (isinstance(source, LocalStore) and isinstance(target, LocalStore)):
        return False
    made: list[str] = []
    try:
        for path, new in paths.items():
            (target.root / new).parent.mkdir(parents=True, exist_ok=True)
            os.link((source.root / path).resolve(), target.root / new)  # what a symbolic link names
            made.append(new)
    except FileNotFoundError as error:
        target.remove(made)
        raise CacheDamaged(f"{cache.url}: {error.filename}: missing; run `kdcache verify` on it") from error
    except OSError as error:
        target.remove(made)
        if error.errno not in _NO_LINK:
            raise
        return False
    for folder in {parent for new in made for parent in (target.root / new).relative_to(target.root).parents}:
        sync(target.root / folder)
    return True


def _copy(cache: Cache, writer: CacheWriter, record: CommitRecord, paths: Mapping[str, str]) -> None:
    """Copy files whose bytes are as committed, source path -> path here."""
    for file in record.files:
        if file.path in paths:
            (data,) = cache.store.read_many([*file.whole])
            if hashlib.sha256(data).hexdigest() != file.sha256:
                raise CacheDamaged(f"{cache.url}/{file.path}: altered; run `kdcache verify` on it")
            writer.store.put(paths[file.path], data)


def _join(writer: CacheWriter, index: int, pieces: Sequence[Piece]) -> str:
    """One shard of parts of several."""
    attempt = uuid.uuid4().hex[:12]
    shard = join_pieces(f"{index:05d}-{attempt}", pieces, writer.manifest.spec)
    records = [piece.cache.commits[piece.shard] for piece in pieces]
    seconds = sum(
        record.seconds * len(piece.keep) / max(piece.cache.shard_length(piece.shard), 1)
        for record, piece in zip(records, pieces, strict=True)
    )
    writer.commit(index, attempt, shard, engine=records[0].engine, seconds=round(seconds, 3))
    return "joined"
