"""A cache as a plain Parquet dataset, one row per sample, for notebooks, `datasets` and DuckDB."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cache_schema.format.cache import Cache, open_cache
from cache_schema.format.records import Relation, Sample, TopK
from cache_schema.format.spec import KINDS, Kind, TargetSpec
from cache_schema.format.store import refuse_inside
from cache_schema.operations.scores import scores_of
from cache_schema.output import require_folder, writing_folder
from cache_schema.progress import Progress, Silent, task

ROWS = 64
"""Samples per row group."""

_MATRICES = ("token_ids", "logprobs", "tail_logprob")
_ENTRIES = ("token_ids", "logprobs")
_NUMBERS = ("logsumexp", "entropy")
_SCORES = ("confidence", "disagreement", "perplexity")


def to_arrow(
    cache: str,
    out: Path,
    progress: Progress | None = None,
    table: Callable[[Sequence[Sample]], pa.Table] | None = None,
) -> dict[str, Any]:
    """Write `cache` to the new folder `out` as out/data/train-*.parquet, one file per shard.

    Columns: row, sample_id, tokens, input_ids, labels, images (list of path, sha256, width, height,
    positions); for each captured kind (response, visual, prompt) positions (N), token_ids and logprobs
    (N, K), tail_logprob (N, n_T), logsumexp, entropy and, where it exists, label_logprob (N), where hidden
    states are stored hidden (N, D), all prefixed with the kind's name; confidence, disagreement, perplexity
    of the response; relation_factor (images, P, r) or relation_gram (images, P, P), relation_residual,
    relation_norm (images). Nested lists throughout. The spec and the temperatures are in the files' metadata
    under `kdcache`. Targets are decoded: expect several times the size of the cache. KdcacheError when `out`
    is not empty. `out` appears only when it is complete. table: other columns for some samples; for none, a
    table of the same schema.
    """
    progress = progress or Silent()
    source = open_cache(cache)
    refuse_inside(out, [source.store])
    require_folder(out, new=True)
    table = table or partial(table_of, spec=source.spec)
    told = json.dumps({"spec": source.spec.to_json(), "dataset": source.manifest.dataset})
    files = 0
    with writing_folder(out) as part, task(progress, "exporting", len(source.shards)):
        (part / "data").mkdir()
        for number, shard in enumerate(source.shards):
            name = f"train-{number:05d}-of-{len(source.shards):05d}.parquet"
            files += _write_shard(source, shard, part / "data" / name, told, table)
            progress.update(number + 1)
    size = sum(file.stat().st_size for file in (out / "data").iterdir())
    return {"out": str(out), "samples": len(source), "files": files, "bytes": size}


def _write_shard(
    cache: Cache, shard: int, path: Path, told: str, table: Callable[[Sequence[Sample]], pa.Table]
) -> int:
    """The number of files written: 0 for a shard without samples."""
    block = cache.read_shard(shard)
    if not len(block):
        return 0
    schema = table([]).schema.with_metadata({"kdcache": told})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, len(block), ROWS):
            samples = [block.sample(j) for j in range(start, min(start + ROWS, len(block)))]
            writer.write_table(table(samples).cast(schema))
    return 1


def table_of(samples: Sequence[Sample], spec: TargetSpec) -> pa.Table:
    """The samples as a table; its schema depends on the spec alone."""
    columns: dict[str, pa.Array] = {
        "row": pa.array([sample.row for sample in samples], pa.int64()),
        "sample_id": pa.array([sample.sample_id for sample in samples], pa.string()),
        "tokens": pa.array([len(sample.input_ids) for sample in samples], pa.int32()),
        "input_ids": lists([sample.input_ids for sample in samples], np.int32),
        "labels": lists([sample.labels for sample in samples], np.int32),
        "images": _images(samples),
    }
    for kind in KINDS:
        if kind in spec.targets:
            columns |= _kind(samples, kind, spec)
    for kind in spec.hidden:
        states = [sample.hidden_states.get(kind) for sample in samples]
        arrays = [np.zeros((0, 0), np.float32) if own is None else own.decode() for own in states]
        columns[f"{kind}_hidden"] = lists(arrays, np.float32, ndim=2)
    if "response" in spec.targets:
        scores = [scores_of(sample) for sample in samples]
        columns |= {name: pa.array([getattr(s, name) for s in scores], pa.float64()) for name in _SCORES}
    if "relation" in spec.targets:
        columns |= _relations([sample.relations for sample in samples], spec)
    return pa.table(columns)


def _kind(samples: Sequence[Sample], kind: Kind, spec: TargetSpec) -> dict[str, pa.Array]:
    """The columns of one kind of position; a sample without such positions has empty lists."""
    records = [sample.records[kind] for sample in samples]
    columns = {f"{kind}_positions": lists([sample.positions[kind] for sample in samples], np.int32)}
    names = [*_MATRICES, *(name for name in _NUMBERS if name not in spec.without)]
    names += ["label_logprob"] if kind != "visual" else []
    names += ["sampled_ids", "sampled_counts"] if spec.tail_samples else []
    for name in names:
        dtype = np.int32 if name in ("token_ids", "sampled_ids", "sampled_counts") else np.float32
        empty = np.zeros((0,) if name in (*_NUMBERS, "label_logprob") else (0, 0), dtype)
        values = [None if record is None else getattr(record, name) for record in records]
        arrays = [empty if value is None else value for value in values]
        columns[f"{kind}_{name}"] = lists(arrays, dtype, empty.ndim, records if name in _ENTRIES else ())
    return columns


def _images(samples: Sequence[Sample]) -> pa.ListArray:
    images = [image for sample in samples for image in sample.images]
    struct = pa.StructArray.from_arrays(
        [
            pa.array([image.path for image in images], pa.string()),
            pa.array([image.sha256 for image in images], pa.string()),
            pa.array([image.width for image in images], pa.int32()),
            pa.array([image.height for image in images], pa.int32()),
            lists([image.positions for image in images], np.int32),
        ],
        ["path", "sha256", "width", "height", "positions"],
    )
    return _nested([len(sample.images) for sample in samples], struct)


def _relations(relations: Sequence[Sequence[Relation]], spec: TargetSpec) -> dict[str, pa.Array]:
    flat = [relation for group in relations for relation in group]
    counts = [len(group) for group in relations]
    name = "factor" if spec.relation == "factor" else "gram"
    columns = {
        f"relation_{name}": _nested(counts, lists([getattr(r, name) for r in flat], np.float32, ndim=2))
    }
    for name in ("residual", "norm"):
        numbers = pa.array([getattr(relation, name) for relation in flat], pa.float64())
        columns[f"relation_{name}"] = _nested(counts, numbers)
    return columns


def lists(
    arrays: Sequence[NDArray[Any]],
    dtype: type[np.generic],
    ndim: int = 1,
    records: Sequence[TopK | None] = (),
) -> pa.ListArray:
    """Arrays of `ndim` dimensions as nested lists, one entry per array; their shapes may differ. records: of
    each array the record whose entries it holds, with as many in a row as are there."""
    there = [None if record is None else record.there for record in records] or [None] * len(arrays)
    parts = [a if mask is None else a[mask] for a, mask in zip(arrays, there, strict=True)]
    values = pa.array(np.concatenate([np.zeros(0, dtype), *(np.asarray(a, dtype).ravel() for a in parts)]))
    if ndim == 2:
        widths = [
            np.full(len(array), array.shape[1]) if mask is None else mask.sum(axis=1)
            for array, mask in zip(arrays, there, strict=True)
        ]
        values = _nested(np.concatenate([np.zeros(0, np.int64), *widths]), values)
    return _nested([len(array) for array in arrays], values)


def _nested(counts: Sequence[int] | NDArray[np.int64], values: pa.Array) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    assert offsets[-1] < 1 << 31, "ROWS keeps a row group below what 32-bit offsets reach"
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)
