"""Small caches for the tests of what reads caches: a seeded fake teacher, a real tokenizer, real images."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cache_schema import (
    Cache,
    CacheWriter,
    CapturedImage,
    CapturedSample,
    ImageRecord,
    QuarantinedRow,
    Relation,
    Sample,
    TargetSpec,
    TopK,
    open_cache,
)
from cache_schema.format.documents import FORMAT_VERSION
from cache_schema.format.identity import Fingerprint
from cache_schema.format.manifest import Manifest, Plan

END, IMAGE = "<|end|>", "<image>"
HIDDEN = 12
PROCESSOR = {  # square images of one grid
    "config.json": b'{"model_type": "llava"}',
    "preprocessor_config.json": b'{"image_processor_type": "SiglipImageProcessor", '
    b'"size": {"height": 28, "width": 28}}',
}
ENGINE = {"name": "fake", "version": "1"}
ANSWERS = (
    "a red circle on a white ground",
    "a blue square, naïve and small",
    "yes, a <script>alert(1)</script> triangle",
    "no circle, 海 only",
)


def tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of 320 entries, END = 0 and IMAGE = 1."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(ANSWERS, trainer)
    return made


class FakeTeacher:
    """Hidden states that depend on nothing but (seed, row), through a head of V rows: true distributions."""

    def __init__(self, vocab: int, seed: int = 0, noise: float = 0.0) -> None:
        self.head = np.random.default_rng(1000).normal(size=(vocab, HIDDEN)).astype(np.float32)
        self.seed, self.noise = seed, noise

    def hidden(self, key: int, count: int, smooth: bool = False) -> NDArray[np.float32]:
        rng = np.random.default_rng([self.seed, key])
        states = rng.normal(size=(count, HIDDEN))
        if smooth:  # neighbouring patches say alike, and all share a mean, as real ones do
            states = 2.0 + np.cumsum(states, axis=0) / 6
        extra = np.random.default_rng([7, key]).normal(size=states.shape)
        return (states + self.noise * extra).astype(np.float32)

    def topk(self, hidden: NDArray[np.float32], labels: NDArray[np.int32] | None, spec: TargetSpec) -> TopK:
        logits = (hidden @ self.head.T).astype(np.float64)
        if labels is not None:  # so that the teacher is right about two thirds of the time
            lucky = np.arange(len(labels)) % 3 != 1
            logits[lucky, labels[lucky]] = logits[lucky].max(axis=1) + 1.5
        logsumexp = np.logaddexp.reduce(logits, axis=1)
        full = logits - logsumexp[:, None]
        order = np.argsort(-full, axis=1, kind="stable")
        kept, rest = order[:, : spec.top_k], order[:, spec.top_k :]
        tails = []
        for temperature in spec.temperatures:
            scaled = logits / temperature
            scaled -= np.logaddexp.reduce(scaled, axis=1)[:, None]
            tails.append(np.logaddexp.reduce(np.take_along_axis(scaled, rest, axis=1), axis=1))
        sampled = rest[:, : spec.tail_samples].astype(np.int32) if spec.tail_samples else None
        return TopK(
            token_ids=kept.astype(np.int32),
            logprobs=np.take_along_axis(full, kept, axis=1).astype(np.float32),
            tail_logprob=np.stack(tails, axis=1).astype(np.float32),
            temperatures=np.array(spec.temperatures, np.float32),
            logsumexp=logsumexp.astype(np.float32),
            entropy=-(np.exp(full) * full).sum(axis=1).astype(np.float32),
            label_logprob=None if labels is None else full[np.arange(len(labels)), labels].astype(np.float32),
            sampled_ids=sampled,
            sampled_counts=None
            if sampled is None
            else np.arange(sampled.size, dtype=np.int32).reshape(sampled.shape),
        )

    def relation(self, hidden: NDArray[np.float32]) -> Relation:
        u, s, _ = np.linalg.svd(
            hidden.astype(np.float64) @ self.head.T.astype(np.float64), full_matrices=False
        )
        factor = (u * s)[:, :HIDDEN]
        return Relation(residual=0.0, norm=float(np.linalg.norm(s**2)), factor=factor.astype(np.float32))


def make_picture(root: Path, number: int) -> str:
    """A drawn PNG of 48 x 40 pixels below `root`; its relative path."""
    name = f"pictures/{number}.png"
    (root / "pictures").mkdir(parents=True, exist_ok=True)
    if not (root / name).exists():
        image = Image.new("RGB", (48, 40), (230, 225, 210))
        ImageDraw.Draw(image).ellipse((8 + number % 5, 8, 36, 34), fill=(40 * number % 255, 90, 160))
        image.save(root / name)
    return name


def make_cache(
    out: Path,
    image_root: Path,
    *,
    rows: int = 10,
    shard_size: int = 4,
    seed: int = 0,
    noise: float = 0.0,
    spec: TargetSpec | None = None,
    patches: Sequence[int] = (9,),
    bad: Mapping[int, str] | None = None,
    order: Sequence[int] | None = None,
    shards: Collection[int] | None = None,
    identity: Mapping[str, str] | None = None,
    ids: Mapping[int, str] | None = None,
    processor: Mapping[str, bytes] = PROCESSOR,
    version: int = FORMAT_VERSION,
) -> Cache:
    """A cache of `rows` rows, or of `shards` only. Every second row shares the picture of the one before it.

    patches: visual tokens of each image of a row (3 * row + 2 has none). bad: row -> reason.
    processor: the assets that tell how images are laid.
    """
    spec = spec or TargetSpec(top_k=8, temperatures=(1.0, 2.0))
    made = tokenizer()
    teacher = FakeTeacher(made.get_vocab_size(), seed, noise)
    plan = Plan(
        rows=rows,
        shard_size=shard_size,
        order=np.arange(rows) if order is None else np.array(order, dtype=np.int64),
    )
    capture = {"teacher_weights": "w", "dtype": "float32", "dataset": "d", "spec": spec.to_json()}
    manifest = Manifest(
        fingerprint=Fingerprint(
            capture=capture | dict(identity or {}),
            training={"vocab_size": made.get_vocab_size(), "image_token_id": 1, "template_name": "fake"},
            recorded={"device": "cpu"},
        ),
        spec=spec,
        plan=plan,
        created="2026-01-01T00:00:00+00:00",
        format_version=version,
        assets={"tokenizer.json": made.to_str().encode(), **processor},
        dataset={"data": "fake.json", "teacher": "fake-teacher", "rows": rows, "image_root": str(image_root)},
    )
    writer = CacheWriter.open(out, manifest)
    bad = bad or {}
    for shard in writer.pending():
        if shards is not None and shard not in shards:
            continue
        kept = [int(row) for row in plan.rows_of(shard) if int(row) not in bad]
        samples = [
            _sample(row, made, teacher, spec, image_root, patches, (ids or {}).get(row, f"id-{row % 7}"))
            for row in kept
        ]
        lost = [
            QuarantinedRow(
                row=int(row), sample_id=f"id-{row % 7}", reason=bad[int(row)], detail=f"row {row} is bad"
            )
            for row in plan.rows_of(shard)
            if int(row) in bad
        ]
        writer.write_shard(shard, samples, lost, engine=ENGINE, seconds=0.5 + shard)
    return open_cache(out)


def by_row(cache: Cache) -> dict[int, Sample]:
    """The samples of a cache by their row number."""
    return {cache[i].row: cache[i] for i in range(len(cache))}


def _sample(
    row: int,
    made: Tokenizer,
    teacher: FakeTeacher,
    spec: TargetSpec,
    image_root: Path,
    patches: Sequence[int],
    sample_id: str,
) -> CapturedSample:
    has_image = row % 3 != 2
    counts = list(patches) if has_image else []
    prompt = made.encode("what is it? ").ids
    answer = [*made.encode(ANSWERS[row % len(ANSWERS)]).ids, 0]
    visual = [1] * sum(counts)
    ids = np.array([*visual, *prompt, *answer], np.int32)
    spans = np.array([[len(ids) - len(answer), len(ids)]], np.int32)
    positions = np.arange(spans[0, 0] - 1, spans[0, 1] - 1)
    rest = np.array([*range(len(visual), spans[0, 0] - 1), len(ids) - 1])
    following = np.append(ids[1:], 0).astype(np.int32)
    states = teacher.hidden(row, len(ids))
    images, start = [], 0
    for number, count in enumerate(counts):
        drawn = 10 * (row // 2) + number
        path = make_picture(image_root, drawn)
        seen = teacher.hidden(10_000 + drawn, count, smooth=True)
        images.append(
            CapturedImage(
                record=ImageRecord(
                    path=path,
                    sha256=hashlib.sha256((image_root / path).read_bytes()).hexdigest(),
                    width=48,
                    height=40,
                    positions=np.arange(start, start + count, dtype=np.int32),
                ),
                prefix_key=f"prefix-{row // 2}-{number}",
                visual=teacher.topk(seen, None, spec) if "visual" in spec.targets else None,
                relation=teacher.relation(seen) if "relation" in spec.targets else None,
            )
        )
        start += count
    response = teacher.topk(states[positions], ids[positions + 1], spec)
    return CapturedSample(
        row=row,
        sample_id=sample_id,
        input_ids=ids,
        label_spans=spans,
        images=tuple(images),
        response=response if "response" in spec.targets else None,
        prompt=teacher.topk(states[rest], following[rest], spec) if "prompt" in spec.targets else None,
        model_inputs={"token_type_ids": (np.arange(len(ids)) < start).astype(np.int64)},
    )
