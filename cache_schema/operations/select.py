"""A smaller cache: the samples of another that meet a condition, without running the teacher."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from cache_schema.errors import KdcacheError
from cache_schema.format.cache import Cache, open_cache
from cache_schema.format.store import refuse_inside
from cache_schema.operations.condition import FROM_TARGETS, Columns, parse
from cache_schema.operations.partial_shards import Piece
from cache_schema.operations.reshard import arrange, plan_of, write_cache
from cache_schema.operations.scores import scores_of
from cache_schema.progress import Progress, Silent, task
from cache_schema.version import VERSION


def select(cache: str, where: str, out: str, progress: Progress | None = None) -> dict[str, Any]:
    """Write the samples of `cache` that meet `where` (see `condition`) as the cache `out`.

    Rows keep their numbers; quarantine is not copied. Shards that are kept whole are hard-linked where
    both lie on one file system (else copied), the others are joined as stored, so every decoded value is
    bit-identical. Run again to continue. KdcacheError for an invalid condition or one that no sample meets.
    """
    progress = progress or Silent()
    condition = parse(where)
    source = open_cache(cache)
    refuse_inside(out, [source.store])
    needs_targets = bool(condition.fields & FROM_TARGETS)
    if needs_targets and "response" not in source.spec.targets:
        named = ", ".join(sorted(condition.fields & FROM_TARGETS))
        raise KdcacheError(f"{cache}: has no response targets, which {named} is computed from")
    pieces = []
    with task(progress, "reading", len(source.shards)):
        for number, shard in enumerate(source.shards):
            columns = columns_of(source, shard, condition.fields | {"row"})
            keep = np.flatnonzero(condition.mask(columns))
            rows = columns["row"].astype(np.int64)[keep]
            pieces.append(Piece(cache=source, shard=shard, keep=keep, rows=rows))
            progress.update(number + 1)
    shards = arrange(pieces, source.plan.shard_size)
    if not shards:
        raise KdcacheError(
            f"{cache}: none of its {len(source):,} samples meets {where!r}; nothing was written"
        )
    manifest = replace(
        source.manifest,
        plan=plan_of(shards),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        kdcache_version=VERSION,
        dataset=source.manifest.dataset | {"selected": where},
    )
    return {"of_samples": len(source)} | write_cache(out, manifest, shards, "writing", progress)


def columns_of(cache: Cache, shard: int, fields: Collection[str]) -> Columns:
    """The fields of `condition` for the samples of a shard, as `Condition.mask` takes them; response targets
    are read if needed."""
    scored = sorted(set(fields) & FROM_TARGETS)
    columns: dict[str, list[Any]] = {name: [] for name in fields}
    block = cache.read_shard(shard, parts=("response",) if scored else ())
    for j in range(len(block)):
        sample = block.sample(j)
        for name in columns.keys() - FROM_TARGETS:
            columns[name].append(_FIELD[name](sample))
        if scored:
            values = asdict(scores_of(sample))
            for name in scored:
                columns[name].append(values[name])
    return {name: _array(values) for name, values in columns.items()}


_FIELD = {
    "row": lambda sample: sample.row,
    "id": lambda sample: sample.sample_id,
    "tokens": lambda sample: len(sample.input_ids),
    "images": lambda sample: len(sample.images),
    "image": lambda sample: tuple(image.path for image in sample.images),
    "response_tokens": lambda sample: len(sample.response_positions),
}


def _array(values: list[Any]) -> Any:
    """Numbers as an array; texts and tuples of texts as a list."""
    return values if values and isinstance(values[0], (str, tuple)) else np.array(values)
