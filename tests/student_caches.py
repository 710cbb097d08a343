"""Caches for the tests of the student: the true targets of a tiny Llava teacher over made-up chats."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from cache_schema import (
    CacheWriter,
    CapturedImage,
    CapturedSample,
    ImageRecord,
    Relation,
    TargetSpec,
    TopK,
)
from cache_schema.datasets.images import open_image
from cache_schema.format.identity import Fingerprint, tokenizer_digest
from cache_schema.format.manifest import Manifest, Plan
from cache_schema.format.records import labels_of, positions_by_kind
from tests.tiny_models import END, IMAGE, tiny_llava, write_png

SPEC = TargetSpec(top_k=16, precision="full", temperatures=(1.0, 2.0))
WORDS = ("red", "blue", "green", "grey", "circle", "triangle", "rectangle", "small", "large", "yes", "no")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A student's folder, the root of the images and the folder of a cache that fits."""

    student: Path
    image_root: Path
    cache: Path


def make_world(folder: Path, **cache: Any) -> World:
    """A tiny student and the cache of a tiny teacher of another seed and width."""
    teacher = tiny_llava(folder / "teacher", seed=1, hidden=48)
    student = tiny_llava(folder / "student", seed=2)
    return World(
        student=student,
        image_root=folder / "images",
        cache=fake_capture(folder / "cache", teacher, folder / "images", **cache),
    )


def training_fingerprint(processor: Any, image_token_id: int) -> dict[str, Any]:
    """The part of a fingerprint that the student compares itself with."""
    tokenizer = processor.tokenizer
    special = {
        "eos": tokenizer.eos_token,
        "bos": tokenizer.bos_token,
        "pad": tokenizer.pad_token,
        "unk": tokenizer.unk_token,
    }
    return {
        "tokenizer": tokenizer_digest(tokenizer.get_vocab(), special),
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "image_token_id": image_token_id,
        "chat_template": processor.chat_template,
        "template_name": "processor",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "full",
        "model_type": "llava",
        "image_seq_tokens": 16,
    }


def fake_capture(
    out: Path,
    teacher: Path,
    image_root: Path,
    *,
    rows: int = 24,
    shard_size: int = 6,
    text_only: int = 5,
    image_tokens: int = 16,
    sizes: Sequence[tuple[int, int]] = ((40, 36),),
    spec: TargetSpec = SPEC,
    seed: int = 0,
    training: dict[str, Any] | None = None,
    teacher_name: str | None = None,
) -> Path:
    """Writes a cache of `rows` samples of different lengths; every `text_only`-th has no image."""
    model = AutoModelForImageTextToText.from_pretrained(teacher).eval()
    processor = AutoProcessor.from_pretrained(teacher)
    random = np.random.default_rng(seed)
    plan = Plan(rows=rows, shard_size=shard_size, order=random.permutation(rows).astype(np.int64))
    manifest = Manifest(
        fingerprint=Fingerprint(
            capture={
                "teacher_weights": teacher_name or f"tiny-{seed}",
                "dataset": f"{rows}",
                "spec": spec.to_json(),
            },
            training=training_fingerprint(processor, model.config.image_token_id) | (training or {}),
        ),
        spec=spec,
        plan=plan,
        created="2026-01-01T00:00:00+00:00",
        assets={
            path.name: path.read_bytes()
            for path in sorted(teacher.iterdir())
            if path.suffix in (".json", ".jinja")
        },
        dataset={"path": "made-up", "rows": rows, "image_root": str(image_root)},
    )
    writer = CacheWriter.open(out, manifest)
    samples = {
        row: _sample(row, random, model, processor, image_root, text_only, image_tokens, sizes, spec)
        for row in range(rows)
    }
    for shard in writer.pending():
        kept = [samples[int(row)] for row in plan.rows_of(shard)]
        writer.write_shard(shard, kept, [], engine={"name": "fake"}, seconds=1.0)
    return out


def _sample(
    row: int,
    random: np.random.Generator,
    model: Any,
    processor: Any,
    image_root: Path,
    text_only: int,
    image_tokens: int,
    sizes: Sequence[tuple[int, int]],
    spec: TargetSpec,
) -> CapturedSample:
    tokenizer = processor.tokenizer
    with_image = row % text_only != text_only - 1
    pixels, records = {}, []
    if with_image:
        size = sizes[row % len(sizes)]
        path = write_png(image_root / "pictures" / f"{row // 2}-{size[0]}.png", seed=row // 2, size=size)
        name = path.relative_to(image_root).as_posix()
        pixels = dict(
            processor.image_processor(images=[open_image(image_root, name).image], return_tensors="pt")
        )
        records = [
            ImageRecord(
                path=name,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                width=size[0],
                height=size[1],
                positions=np.arange(2, 2 + image_tokens, dtype=np.int32),
            )
        ]
    words = " ".join(random.choice(WORDS, size=int(random.integers(1, 12))))
    question = tokenizer.encode("USER: What? ASSISTANT:")
    answer = [*tokenizer.encode(" " + words), tokenizer.convert_tokens_to_ids(END)]
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    ids = np.array(
        [*question[:2], *[image_id] * (image_tokens if with_image else 0), *question[2:], *answer], np.int32
    )
    spans = np.array([[len(ids) - len(answer), len(ids)]], np.int32)
    labels = labels_of(ids, spans)
    positions = positions_by_kind(labels, (record.positions for record in records))
    response, visual, rest = positions["response"], positions["visual"], positions["prompt"]
    logits = _logits(model, ids, pixels, visual, len(tokenizer))
    images = tuple(
        CapturedImage(
            record=record,
            visual=topk_of(logits[visual], None, spec) if "visual" in spec.targets else None,
            relation=relation_of(logits[visual]) if "relation" in spec.targets else None,
        )
        for record in records
    )
    following = np.append(ids[1:], 0)
    return CapturedSample(
        row=row,
        sample_id=f"sample-{row}",
        input_ids=ids,
        label_spans=spans,
        images=images,
        response=topk_of(logits[response], following[response], spec) if "response" in spec.targets else None,
        prompt=topk_of(logits[rest], following[rest], spec) if "prompt" in spec.targets else None,
    )


def _logits(
    model: Any, ids: np.ndarray, pixels: dict[str, Any], visual: np.ndarray, vocab: int
) -> np.ndarray:
    """(T, V) float64; a number of placeholders that the teacher itself would not make is filled up."""
    inputs = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs)
        if len(visual):
            features = model.get_image_features(**pixels).pooler_output[0]
            repeated = features.repeat(-(-len(visual) // len(features)), 1)[: len(visual)]
            embeds[0, torch.from_numpy(visual).long()] = repeated
        logits = model(inputs_embeds=embeds).logits[0, :, :vocab]
    return logits.double().numpy()


def topk_of(logits: np.ndarray, labels: np.ndarray | None, spec: TargetSpec) -> TopK:
    """The record of dense logits (N, V)."""
    tensor = torch.from_numpy(logits)
    log_softmax = torch.log_softmax(tensor, -1)
    values, ids = log_softmax.topk(min(spec.top_k, tensor.shape[1]), dim=-1)
    rest = torch.ones_like(tensor, dtype=torch.bool).scatter(1, ids, False)
    tails = [
        torch.where(rest, torch.log_softmax(tensor / t, -1), -torch.inf).logsumexp(-1)
        for t in spec.temperatures
    ]
    label_logprob = None
    if labels is not None:
        label_logprob = log_softmax.gather(1, torch.from_numpy(labels.astype(np.int64))[:, None])[:, 0]
    return TopK(
        token_ids=ids.numpy().astype(np.int32),
        logprobs=values.float().numpy(),
        tail_logprob=torch.stack(tails, -1).float().numpy(),
        temperatures=np.array(spec.temperatures, np.float32),
        logsumexp=tensor.logsumexp(-1).float().numpy(),
        entropy=-(log_softmax.exp() * log_softmax).sum(-1).float().numpy(),
        label_logprob=None if label_logprob is None else label_logprob.float().numpy(),
    )


def relation_of(logits: np.ndarray) -> Relation:
    """The exact factor of R = Z Z^T."""
    left, singular, _ = np.linalg.svd(logits, full_matrices=False)
    return Relation(
        residual=0.0, norm=float(np.linalg.norm(singular**2)), factor=(left * singular).astype(np.float32)
    )
