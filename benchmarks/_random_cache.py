"""Caches of random targets, for benchmarks in which nothing depends on their values."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from cache_schema import CacheWriter, CapturedImage, CapturedSample, ImageRecord, Relation, TargetSpec, TopK
from cache_schema.format.codecs.relation import encode_relation
from cache_schema.format.identity import Fingerprint
from cache_schema.format.manifest import Manifest, Plan

IMAGE_ID, END = 2, 0


def write_cache(
    folder: Path,
    *,
    rows: int,
    shard: int,
    visual: int,
    text: int,
    answer: int,
    vocab: int,
    top_k: int,
    size: int,
    rank: int = 24,
    flat: bool = False,
) -> Path:
    """Samples of `visual` image tokens, `text` tokens of a question and `answer` supervised ones."""
    spec = TargetSpec(top_k=top_k)
    random = np.random.default_rng(0)
    plan = Plan(rows=rows, shard_size=shard, order=np.arange(rows))
    training = {
        "vocab_size": vocab,
        "image_token_id": IMAGE_ID,
        "template_name": "plain",
        "tokenizer": "none",
    }
    manifest = Manifest(
        fingerprint=Fingerprint(capture={"spec": spec.to_json()}, training=training),
        spec=spec,
        plan=plan,
        created="2026-01-01T00:00:00+00:00",
        assets={},
        dataset={"rows": rows},
    )
    writer = CacheWriter.open(folder / "cache", manifest)
    pool = random_records(random, 4 * (visual + answer), vocab, top_k)
    rank = min(rank, visual)
    scales = np.full(rank, 100.0) if flat else 0.7 ** np.minimum(np.arange(rank), 24) * 100
    columns = np.linalg.qr(random.normal(size=(visual, rank)))[0]  # orthogonal, as the codec asks for
    factor = (columns * scales).astype(np.float32)
    relation = encode_relation(
        Relation(residual=0.0, norm=float(np.linalg.norm(scales**2)), factor=factor), spec
    )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(min(rows, 32)):
        pixels = random.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((size, size)).save(folder / f"images/{number}.jpg")
    digests = [
        hashlib.sha256((folder / f"images/{number}.jpg").read_bytes()).hexdigest()
        for number in range(min(rows, 32))
    ]
    for index in writer.pending():
        samples = []
        for row in plan.rows_of(index).tolist():
            ids = random.integers(3, vocab, visual + text + answer).astype(np.int32)
            ids[:visual] = IMAGE_ID
            ids[-1] = END
            order = random.permutation(len(pool.token_ids))
            record = ImageRecord(
                path=f"{row % 32}.jpg",
                sha256=digests[row % 32],
                width=size,
                height=size,
                positions=np.arange(visual, dtype=np.int32),
            )
            samples.append(
                CapturedSample(
                    row=row,
                    sample_id=str(row),
                    input_ids=ids,
                    label_spans=np.array([[visual + text, len(ids)]], np.int32),
                    response=_rows(pool, order[:answer], ids[visual + text :]),
                    images=(
                        CapturedImage(
                            record=record,
                            visual=_rows(pool, order[answer : answer + visual], None),
                            relation=relation,
                        ),
                    ),
                )
            )
        writer.write_shard(index, samples, [], engine={"name": "random"}, seconds=0.0)
    return folder / "cache"


def random_records(random: np.random.Generator, count: int, vocab: int, top_k: int) -> TopK:
    """Records whose log-probabilities fall off as a language model's do."""
    ids = np.stack([random.choice(vocab, top_k, replace=False) for _ in range(count)]).astype(np.int32)
    logits = -1.2 * np.log1p(np.arange(top_k)) + 0.3 * random.normal(size=(count, top_k))
    logits = -np.sort(-logits, axis=1)
    tail = np.full((count, 1), np.log(0.05))
    kept = logits - np.log(np.exp(logits).sum(1, keepdims=True)) + np.log(0.95)
    return TopK(
        token_ids=ids,
        logprobs=kept.astype(np.float32),
        tail_logprob=tail.astype(np.float32),
        temperatures=np.ones(1, np.float32),
        logsumexp=np.full(count, 20.0, np.float32),
        entropy=np.full(count, 2.0, np.float32),
    )


def _rows(pool: TopK, order: np.ndarray, labels: np.ndarray | None) -> TopK:
    names = ("token_ids", "logprobs", "tail_logprob", "logsumexp", "entropy")
    label_logprob = None if labels is None else np.full(len(labels), -1.5, np.float32)
    return replace(pool, **{name: getattr(pool, name)[order] for name in names}, label_logprob=label_logprob)
