"""Shards without a capture: the same targets under many numbers by the real writer, or their records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks._random_cache import random_records
from cache_schema.format.cache import read_table
from cache_schema.format.identity import Fingerprint
from cache_schema.format.manifest import CommitRecord, Manifest, Plan
from cache_schema.format.records import CapturedImage, CapturedSample, ImageRecord, Relation, TopK
from cache_schema.format.shard import SAMPLE_SCHEMA, EncodedShard, encode_shard, write_table
from cache_schema.format.spec import TargetSpec
from cache_schema.format.writer import CacheWriter

SHARD = 512
VISUAL, PROMPT, RESPONSE = 729, 21, 130  # 859 positions with targets
VOCAB = 151_936
SPEC = TargetSpec(targets=("response", "visual", "relation"), top_k=2)
CREATED = "2026-01-01T00:00:00+00:00"


def first_images(rows: int) -> NDArray[np.int64]:
    """The image's key of each row, as `plan_rows` takes them."""
    numbers = np.arange(rows, dtype=np.int64)
    return 1 + image_of(numbers)


def image_of(row: Any) -> Any:
    """The number of a row's image, of numbers and of arrays alike: every second image has two rows."""
    return row - (row % 4 == 1)


def manifest_of(plan: Plan) -> Manifest:
    """The manifest of a cache of random records."""
    return Manifest(
        fingerprint=Fingerprint(
            capture={"spec": SPEC.to_json()}, training={"vocab_size": VOCAB, "image_token_id": 2}
        ),
        spec=SPEC,
        plan=plan,
        created=CREATED,
        dataset={"rows": plan.rows},
    )


def write_shards(writer: CacheWriter, shards: Iterable[int]) -> list[CommitRecord | None]:
    """Writes shards through the real writer: the same targets, in tables of their own rows."""
    plan, encoded, records = writer.manifest.plan, None, []
    for index in shards:
        rows = plan.rows_of(index)
        if encoded is None or len(rows) != encoded.counts["samples"]:  # the last shard
            encoded = _encoded(len(rows))
        attempt = f"{index:012x}"
        shard = _renamed(encoded, f"{index:05d}-{attempt}", rows)
        records.append(writer.commit(index, attempt, shard, engine={}, seconds=1.0))
    return records


def commit_record(manifest: Manifest, shard: int, like: CommitRecord) -> CommitRecord:
    """A record as `like`, of another shard."""
    attempt = f"{shard:012x}"
    files = tuple(
        replace(file, path=file.path.replace(like.name, f"{shard:05d}-{attempt}")) for file in like.files
    )
    rows = manifest.plan.rows_of(shard)
    counts = like.counts | {"samples": len(rows)}
    return replace(like, cache=manifest.identity, shard=shard, attempt=attempt, files=files, counts=counts)


def _renamed(encoded: EncodedShard, name: str, rows: NDArray[np.int64]) -> EncodedShard:
    tables = {path.replace(encoded.name, name): data for path, data in encoded.tables.items()}
    path = f"samples/{name}.arrow"
    columns = {"row": pa.array(rows), "sample_id": pa.array([f"sample-{row}" for row in rows.tolist()])}
    table = read_table(tables[path])
    for field, values in columns.items():
        table = table.set_column(SAMPLE_SCHEMA.get_field_index(field), SAMPLE_SCHEMA.field(field), values)
    tables[path] = write_table(table)
    longest = [[int(row), VISUAL + PROMPT + RESPONSE] for row in rows[:5]]
    return replace(encoded, name=name, tables=tables, statistics=encoded.statistics | {"longest": longest})


def _encoded(count: int) -> EncodedShard:
    random = np.random.default_rng(0)
    pool = random_records(random, 4096, VOCAB, SPEC.top_k)
    samples = [_sample(random, pool, row) for row in range(count)]
    return encode_shard("NAME", samples, [], SPEC)


def _sample(random: np.random.Generator, pool: TopK, row: int) -> CapturedSample:
    ids = random.integers(3, VOCAB, VISUAL + PROMPT + RESPONSE).astype(np.int32)
    ids[:VISUAL] = 2
    places = random.integers(0, len(pool.token_ids), VISUAL + RESPONSE)
    factor = random.normal(size=(VISUAL, 1)).astype(np.float32)
    image = ImageRecord(
        path=f"{row:09d}.jpg",
        sha256=f"{row:064x}",
        width=640,
        height=480,
        positions=np.arange(VISUAL, dtype=np.int32),
    )
    seen = CapturedImage(
        record=image,
        visual=_at(pool, places[:VISUAL], False),
        relation=Relation(residual=0.0, norm=float(np.linalg.norm(factor @ factor.T)), factor=factor),
    )
    return CapturedSample(
        row=row,
        sample_id=f"sample-{row}",
        input_ids=ids,
        label_spans=np.array([[VISUAL + PROMPT, len(ids)]], np.int32),
        images=(seen,),
        response=_at(pool, places[VISUAL:], True),
    )


def _at(pool: TopK, places: NDArray[np.int64], labelled: bool) -> TopK:
    names = ("token_ids", "logprobs", "tail_logprob", "logsumexp", "entropy")
    labels = np.full(len(places), -1.5, np.float32) if labelled else None
    return replace(pool, **{name: getattr(pool, name)[places] for name in names}, label_logprob=labels)
