"""Merges several caches of the same teacher into one, without running the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.errors import IdentityMismatch, KdcacheError, WrongUsage
from cache_schema.format.cache import Cache, open_cache
from cache_schema.format.identity import Fingerprint, compare, digest_of
from cache_schema.format.manifest import Manifest
from cache_schema.format.records import QuarantinedRow
from cache_schema.format.store import refuse_inside
from cache_schema.operations.partial_shards import Piece
from cache_schema.operations.reshard import Shards, arrange, plan_of, write_cache
from cache_schema.operations.settings import MergeConfig
from cache_schema.progress import Progress, Silent, task
from cache_schema.version import VERSION


def merge(
    caches: Sequence[str], out: str, progress: Progress | None = None, config: MergeConfig | None = None
) -> dict[str, Any]:
    """Write the samples of all `caches` as the cache `out`; whole shards are linked where possible.

    `out` has the newest format version among them, or the one that is asked for: shards of another are packed
    anew, their arrays as stored, bit by bit. One cache alone is taken for that.

    All must have the teacher, template, tokenizer and targets of the first (IdentityMismatch otherwise).
    Parts of one build, with one plan, become that build, and `build` can continue it. For the same dataset,
    rows keep their numbers, and a row in several caches is taken from the first. For different datasets, rows
    are numbered as if the data files were concatenated: `dataset` in the manifest gives each start. A row in
    quarantine stays there unless some cache holds it.
    """
    progress = progress or Silent()
    config = config or MergeConfig()
    if len(caches) < 2 and config.format is None:
        raise WrongUsage(
            "merge: give at least two caches, or one and --format, which writes it in another version"
        )
    opened = [open_cache(cache) for cache in caches]
    refuse_inside(out, [cache.store for cache in opened])
    for other in opened[1:]:
        _refuse_others(opened[0], other)
    if len({cache.manifest.identity for cache in opened}) == 1:
        manifest, shards = opened[0].manifest, _same_plan(opened)
    else:
        manifest, shards = _new_plan(opened, progress)
    newest = max(cache.manifest.format_version for cache in opened)
    manifest = replace(manifest, format_version=config.format or newest)
    return write_cache(out, manifest, shards, "merging", progress)


def _refuse_others(first: Cache, other: Cache) -> None:
    ours, theirs = first.manifest, other.manifest
    found = [
        f"{difference.key} {difference.ours!r} and {difference.theirs!r}"
        for difference in compare(ours.fingerprint, theirs.fingerprint)
        if difference.blocks != "nothing" and not _of_rows(difference.key)
    ]
    found += [
        f"{key} {a!r} and {b!r}"
        for key, (a, b) in ours.spec.differences(theirs.spec).items()
        if not _named(key, found)
    ]
    if ours.head != theirs.head:
        found.append("their teachers' heads")
    if found:
        raise IdentityMismatch(
            f"{first.url} and {other.url} are not of the same teacher and targets: {'; '.join(found)}; "
            "only caches that differ in their rows alone can be merged"
        )


def _of_rows(key: str) -> bool:
    """Whether a key of the fingerprint only concerns which rows there are and how they were cut."""
    return key.split(".")[0] in ("dataset", "rules")


def _named(key: str, found: Sequence[str]) -> bool:
    return any(f"{text.split(' ')[0]}.".startswith(f"spec.{key}.") for text in found)


def _same_plan(caches: Sequence[Cache]) -> Shards:
    """Every shard that any of the caches has, taken from the one with the fewest rows in quarantine."""
    shards: Shards = {}
    for cache in caches:
        lost = _quarantine(cache)
        for shard, rows in _rows(cache).items():
            piece = Piece(
                cache=cache,
                shard=shard,
                keep=np.arange(len(rows)),
                rows=rows,
                quarantined=lost.get(shard, ()),
            )
            if shard not in shards or len(piece.keep) > len(shards[shard][0].keep):
                shards[shard] = [piece]
    return shards


def _new_plan(caches: Sequence[Cache], progress: Progress) -> tuple[Manifest, Shards]:
    """The manifest and the shards of a cache that is not the result of one build."""
    first_rows = _first_rows(caches)
    offsets = [first_rows[_dataset(cache)] for cache in caches]
    rows = [_rows(cache) for cache in caches]
    captured = {
        row
        for parts, offset in zip(rows, offsets, strict=True)
        for part in parts.values()
        for row in (part + offset).tolist()
    }
    taken: set[int] = set()
    pieces: list[Piece] = []
    with task(progress, "arranging shards", len(caches)):
        for number, (cache, parts, offset) in enumerate(zip(caches, rows, offsets, strict=True)):
            lost = _quarantine(cache)
            for shard, part in parts.items():
                keep = np.flatnonzero([row not in taken for row in (part + offset).tolist()])
                bad = tuple(row for row in lost.get(shard, ()) if row.row + offset not in captured)
                bad = tuple(row for row in bad if row.row + offset not in taken)
                taken.update((part + offset).tolist(), [row.row + offset for row in bad])
                pieces.append(
                    Piece(
                        cache=cache, shard=shard, keep=keep, rows=part[keep], quarantined=bad, offset=offset
                    )
                )
            progress.update(number + 1)
    shards = arrange(pieces, max(cache.plan.shard_size for cache in caches))
    if not shards:
        raise KdcacheError("merge: none of the caches has a committed shard; finish a build first")
    manifest = replace(
        caches[0].manifest,
        fingerprint=_fingerprint(caches),
        plan=plan_of(shards),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        kdcache_version=VERSION,
        dataset=_about(caches, first_rows),
    )
    return manifest, shards


def _rows(cache: Cache) -> dict[int, NDArray[np.int64]]:
    """The captured row numbers of every shard."""
    rows = cache.index().row
    ends = np.cumsum([cache.shard_length(shard) for shard in cache.shards])
    return dict(zip(cache.shards, np.split(rows, ends[:-1]), strict=True)) if cache.shards else {}


def _quarantine(cache: Cache) -> dict[int, tuple[QuarantinedRow, ...]]:
    """The quarantined rows of every shard that has some."""
    shard_of = {
        int(row): shard
        for shard in cache.shards
        if cache.commits[shard].counts["quarantined"]
        for row in cache.plan.rows_of(shard)
    }
    found: dict[int, list[QuarantinedRow]] = {}
    for row in cache.quarantined():
        found.setdefault(shard_of[row.row], []).append(row)
    return {shard: tuple(rows) for shard, rows in found.items()}


def _dataset(cache: Cache) -> str:
    """The identity of a cache's dataset, from its fingerprint."""
    return digest_of(cache.manifest.fingerprint.capture.get("dataset"))


def _first_rows(caches: Sequence[Cache]) -> dict[str, int]:
    """The first row of each dataset in the merged cache, in the order of the caches."""
    lengths: dict[str, int] = {}
    for cache in caches:
        lengths[_dataset(cache)] = max(_length(cache), lengths.get(_dataset(cache), 0))
    ends = np.cumsum([0, *lengths.values()]).tolist()
    return dict(zip(lengths, ends[:-1], strict=True))


def _length(cache: Cache) -> int:
    """The number of rows of a cache's dataset, at least as many as its plan needs."""
    told = cache.manifest.dataset.get("rows")
    return max(int(cache.plan.order.max()) + 1, told if isinstance(told, int) else 0)


def _fingerprint(caches: Sequence[Cache]) -> Fingerprint:
    """The first cache's, with the datasets and rules of all where they differ."""
    first = caches[0].manifest.fingerprint
    capture = dict(first.capture)
    for key in ("dataset", "rules"):
        values = [cache.manifest.fingerprint.capture.get(key) for cache in caches]
        different = [value for n, value in enumerate(values) if value not in values[:n]]
        if len(different) > 1:
            capture[key] = digest_of({"merged": different})
    return replace(first, capture=capture)


def _about(caches: Sequence[Cache], first_rows: Mapping[str, int]) -> dict[str, Any]:
    """The manifest's description of the dataset: for several, each with its first row."""
    told = {
        _dataset(cache): {key: value for key, value in cache.manifest.dataset.items() if key != "selected"}
        for cache in reversed(caches)
    }
    if len(told) == 1:
        return told.popitem()[1]
    return {"merged": [{"first_row": first} | told[digest] for digest, first in first_rows.items()]}
