"""A torch-free stand-in for the teacher: targets that depend on nothing but the row number."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from cache_schema.format.cache import open_cache
from cache_schema.format.documents import FORMAT_VERSION
from cache_schema.format.identity import Fingerprint
from cache_schema.format.manifest import Manifest, Plan
from cache_schema.format.records import (
    CapturedImage,
    CapturedSample,
    HiddenStates,
    ImageRecord,
    QuarantinedRow,
    Relation,
    TopK,
    labels_of,
    positions_by_kind,
)
from cache_schema.format.shard import response_count
from cache_schema.format.spec import Kind, TargetSpec
from cache_schema.format.stored_head import StoredHead
from cache_schema.format.writer import CacheWriter
from cache_schema.operations.verify import verify

VOCAB = 500
WIDTH = 16


def make_head() -> tuple[StoredHead, bytes]:
    """A head in bfloat16 with a bias, and what a manifest says of it."""
    rng = np.random.default_rng(11)
    weight, bias = (rng.normal(size=shape).astype("<f4") for shape in ((VOCAB, WIDTH), (VOCAB,)))
    data = b"".join((values.view("<u4") >> 16).astype("<u2").tobytes() for values in (weight, bias))
    ends = 2 * weight.size, 2 * (weight.size + bias.size)
    header = json.dumps(
        {
            "weight": {"dtype": "BF16", "shape": [VOCAB, WIDTH], "data_offsets": [0, ends[0]]},
            "bias": {"dtype": "BF16", "shape": [VOCAB], "data_offsets": [ends[0], ends[1]]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    file = len(header).to_bytes(8, "little") + header + data
    return StoredHead(
        sha256=hashlib.sha256(file).hexdigest(),
        size=len(file),
        rows=VOCAB,
        width=WIDTH,
        dtype="bfloat16",
        bias=True,
        softcap=30.0,
        logit_scale=0.5,
    ), file


def make_hidden(key: int, positions: int) -> HiddenStates:
    """Stored states of some positions; three keys in a row have the same channels."""
    channels = np.random.default_rng(key // 3).normal(size=(1, 2, WIDTH)).astype(np.float32)
    rng = np.random.default_rng([13, key])
    return HiddenStates(
        values=rng.integers(-127, 128, size=(positions, WIDTH)).astype(np.int8),
        scales=rng.uniform(0.01, 0.1, size=positions).astype(np.float32),
        channels=channels,
        channel_of=np.zeros(positions, np.int32),
    )


def make_topk(
    rng: np.random.Generator,
    positions: int,
    spec: TargetSpec,
    vocab: int = VOCAB,
    kind: Kind = "response",
) -> TopK:
    """A true softmax of random logits, cut to the entries that the rule of the kind keeps."""
    logits = rng.normal(size=(positions, vocab)).astype(np.float32) * 3
    logsumexp = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    order = np.argsort(-logits, axis=1, kind="stable")
    logprobs = logits - logsumexp[:, None]
    ranked = np.take_along_axis(logprobs, order, 1)
    rule = spec.rule(kind)
    counts = np.full(positions, rule.most)
    if rule.least_p is not None:
        counts = np.clip((np.exp(ranked) >= rule.least_p).sum(axis=1), 1, rule.most)
    there = np.arange(vocab) < counts[:, None]
    width = rule.most if rule.least_p is None else int(counts.max(initial=1))
    tails = []
    with np.errstate(divide="ignore"):
        for t in spec.temperatures:
            scaled = np.exp(logits.astype(np.float64) / t)
            scaled /= scaled.sum(axis=1, keepdims=True)
            tails.append(np.log(np.where(there, 0.0, np.take_along_axis(scaled, order, 1)).sum(axis=1)))
    sampled = {}
    if spec.tail_samples:
        drawn = rng.integers(width, vocab, size=(positions, spec.tail_samples))
        sampled = {
            "sampled_ids": np.take_along_axis(order, drawn, 1).astype(np.int32),
            "sampled_counts": rng.integers(1, 4, size=drawn.shape).astype(np.int32),
        }
    return TopK(
        token_ids=np.where(there, order, 0)[:, :width].astype(np.int32),
        logprobs=np.where(there, ranked, -np.inf)[:, :width].astype(np.float32),
        tail_logprob=np.stack(tails, axis=1).astype(np.float32),
        temperatures=np.array(spec.temperatures, np.float32),
        logsumexp=logsumexp.astype(np.float32),
        entropy=-(np.exp(logprobs) * logprobs).sum(axis=1).astype(np.float32),
        label_logprob=logprobs[:, 0].astype(np.float32),
        counts=None if rule.least_p is None else counts.astype(np.int32),
        **sampled,
    )


def make_relation(rng: np.random.Generator, tokens: int, width: int = 8) -> Relation:
    factor = (rng.normal(size=(tokens, width)) * 100 / (1 + np.arange(width)) ** 2).astype(np.float32)
    factor[:, 0] += 300
    left, singular, _ = np.linalg.svd(factor, full_matrices=False)
    factor = (left * singular).astype(np.float32)
    gram = factor.astype(np.float64) @ factor.T.astype(np.float64)
    return Relation(residual=0.0, norm=float(np.linalg.norm(gram)), factor=factor)


def make_sample(row: int, spec: TargetSpec, *, tokens: int = 9, share: bool = False) -> CapturedSample:
    """Row `row`: two images when it is a multiple of 5, none when of 7, else one; turns of varying length."""
    rng = np.random.default_rng(row)
    image_count = 2 if row % 5 == 0 else 0 if row % 7 == 0 else 1
    length = 4 + image_count * (tokens + 1) + int(rng.integers(3, 12))
    spans = np.array(
        [[length - 3, length]] if row % 3 else [[length - 6, length - 4], [length - 3, length]], np.int32
    )
    images, start = [], 1
    for number in range(image_count):
        source = row // 2 if share and number == 0 else 1000 * (number + 1) + row
        of_image = np.random.default_rng(source)
        content = str(source).encode() if spec.embed_images else None
        record = ImageRecord(
            path=f"images/{source}.png",
            sha256=hashlib.sha256(content).hexdigest() if content else f"{source:064x}",
            content=content,
            width=24,
            height=24,
            positions=np.arange(start, start + tokens, dtype=np.int32),
        )
        visual = make_topk(of_image, tokens, spec, kind="visual") if "visual" in spec.targets else None
        if visual is not None:
            visual = TopK(
                **{n: getattr(visual, n) for n in TopK.__dataclass_fields__ if n != "label_logprob"}
            )
        images.append(
            CapturedImage(
                record=record,
                prefix_key=f"{source:064x}" if share and number == 0 else None,
                visual=visual,
                hidden=make_hidden(source, tokens) if "visual" in spec.hidden else None,
                relation=make_relation(of_image, tokens) if "relation" in spec.targets else None,
            )
        )
        start += tokens + 1
    responses = response_count(spans)
    ids = rng.integers(0, VOCAB, size=length).astype(np.int32)
    kinds = positions_by_kind(labels_of(ids, spans), (image.record.positions for image in images))
    prompts = len(kinds["prompt"])
    return CapturedSample(
        row=row,
        sample_id=f"id-{row // 2}",
        input_ids=ids,
        label_spans=spans,
        images=tuple(images),
        response=make_topk(rng, responses, spec) if "response" in spec.targets else None,
        prompt=make_topk(rng, prompts, spec, kind="prompt") if "prompt" in spec.targets else None,
        hidden=make_hidden(row, responses) if "response" in spec.hidden else None,
        model_inputs={"token_type_ids": (np.arange(length) % 2).astype(np.int64)} if row % 2 else {},
    )


def make_manifest(
    spec: TargetSpec,
    rows: int = 20,
    shard_size: int = 4,
    weights: str = "a" * 64,
    version: int = FORMAT_VERSION,
) -> Manifest:
    order = np.random.default_rng(7).permutation(rows).astype(np.int64)
    return Manifest(
        fingerprint=Fingerprint(
            capture={"teacher_weights": weights, "spec": spec.to_json()},
            training={"tokenizer": "t" * 64, "vocab_size": VOCAB},
            recorded={"engine": "stand-in"},
        ),
        spec=spec,
        plan=Plan(rows=rows, shard_size=shard_size, order=order),
        created="2026-01-01T00:00:00+00:00",
        assets={"tokenizer.json": b'{"vocab": "\xc3\xa4"}', "chat_template.jinja": b"{{ messages }}"},
        dataset={"name": "stand-in", "rows": rows},
        format_version=version,
        head=make_head()[0] if spec.hidden else None,
    )


def capture(
    rows: list[int], spec: TargetSpec, *, share: bool = False
) -> tuple[list[CapturedSample], list[QuarantinedRow]]:
    """The samples of these rows; every row that is 3 mod 11 is quarantined."""
    good = [make_sample(row, spec, share=share) for row in rows if row % 11 != 3]
    bad = [
        QuarantinedRow(
            row=row, sample_id=f"id-{row // 2}", reason="missing_image", detail=f"no file {row}.png"
        )
        for row in rows
        if row % 11 == 3
    ]
    return good, bad


KILL_SPEC = TargetSpec(targets=("response", "visual", "relation", "prompt"), top_k=4)

EVERYTHING = TargetSpec(
    targets=("response", "visual", "relation", "prompt", "hidden"),
    top_k={"prompt": 3},
    entries={"response": 0.01, "visual": 0.02},
    temperatures=(0.5, 1.0),
    embed_images=True,
)
"""All that version 2 can hold."""


def disturbed_spec(version: int) -> TargetSpec:
    """What is captured where builds and caches of a format version are disturbed."""
    return KILL_SPEC if version == 1 else EVERYTHING


def build_cache(
    url: object,
    spec: TargetSpec,
    *,
    share: bool = False,
    rows: int = 20,
    workers: tuple[int, ...] = (0, 1),
    version: int = FORMAT_VERSION,
    **options: object,
) -> list[int]:
    """Build, or complete, the stand-in cache at `url`, as worker (rank, world size); the shards it made."""
    writer = CacheWriter.open(url, make_manifest(spec, rows, version=version), **options)
    if writer.lacks_head:
        writer.put_head(make_head()[1])
    made = []
    for shard in writer.pending(*workers):
        samples, bad = capture(writer.manifest.plan.rows_of(shard).tolist(), spec, share=share)
        if writer.write_shard(shard, samples, bad, engine={"engine": "stand-in"}, seconds=0.5) is not None:
            made.append(shard)
    return made


def holding(cache: Path, shard: int, chunk: str) -> Path:
    """The file of a cache in a directory that holds this chunk of a shard's targets."""
    alone = list(cache.glob(f"targets/{shard:05d}-*.zarr/{chunk}"))
    (path,) = alone or cache.glob(f"targets/{shard:05d}-*.zarr.zip")
    return path


def assert_same_cache(url: object, undisturbed: object, **options: object) -> None:
    """Both hold the same samples, quarantine and arrays, bit by bit, and `verify` finds nothing wrong."""
    report = verify(url, **options)
    assert report.ok, report.problems
    assert report.missing_shards == []
    found, expected = open_cache(url, **options), open_cache(undisturbed)
    assert found.shards == expected.shards
    assert list(found.quarantined()) == list(expected.quarantined())
    for shard in expected.shards:
        table, groups = found.stored_shard(shard, expected.spec.targets)
        other, arrays = expected.stored_shard(shard, expected.spec.targets)
        assert table.equals(other)
        assert groups.keys() == arrays.keys()
        for group, members in arrays.items():
            assert groups[group].keys() == members.keys()
            for name, values in members.items():
                assert groups[group][name].dtype == values.dtype
                np.testing.assert_array_equal(groups[group][name], values, err_msg=f"{shard} {group}/{name}")
