"""Metadata of caches as large as wished: one shard by the real writer, its record under many numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._random_cache import random_records
from cache_schema.format.identity import Fingerprint
from cache_schema.format.manifest import CommitRecord, Manifest, Plan
from cache_schema.format.records import CapturedImage, CapturedSample, ImageRecord, Relation, TopK
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


def write_shard(writer: CacheWriter) -> CommitRecord:
    """The record of the first shard, written through the real writer."""
    random = np.random.default_rng(0)
    pool = random_records(random, 4096, VOCAB, SPEC.top_k)
    samples = [_sample(random, pool, row) for row in writer.manifest.plan.rows_of(0).tolist()]
    record = writer.write_shard(0, samples, [], engine={}, seconds=1.0)
    assert record is not None
    return record


def commit_record(manifest: Manifest, shard: int, like: CommitRecord) -> CommitRecord:
    """A record as `like`, of another shard."""
    attempt = f"{shard:012x}"
    files = tuple(
        replace(file, path=file.path.replace(like.name, f"{shard:05d}-{attempt}")) for file in like.files
    )
    rows = manifest.plan.rows_of(shard)
    counts = like.counts | {"samples": len(rows)}
    return replace(like, cache=manifest.identity, shard=shard, attempt=attempt, files=files, counts=counts)


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
