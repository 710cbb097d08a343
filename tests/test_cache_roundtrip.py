"""What the writer is given is what a reader gets back."""

from __future__ import annotations

import numpy as np
import pytest

from cache_schema import (
    CacheDamaged,
    Sample,
    TargetSpec,
    TopK,
    open_cache,
)
from cache_schema.format.records import CapturedSample, labels_of, positions_by_kind
from tests.cache_teacher import build_cache, capture, holding, make_manifest

SPECS = {
    "compact": TargetSpec(top_k=8),
    "full": TargetSpec(top_k=8, precision="full"),
    "everything": TargetSpec(
        targets=("response", "visual", "relation", "prompt"),
        top_k=6,
        temperatures=(0.5, 1.0, 2.0),
        tail_samples=3,
    ),
    "exact": TargetSpec(targets=("relation",), relation="exact"),
    "text": TargetSpec(targets=("response",), top_k=1),
}


def assert_topk(found: TopK | None, given: TopK | None, precision: str) -> None:
    assert (found is None) == (given is None)
    if found is None or given is None:
        return
    np.testing.assert_array_equal(found.token_ids, given.token_ids)
    np.testing.assert_array_equal(found.logsumexp, given.logsumexp)
    np.testing.assert_array_equal(found.temperatures, given.temperatures)
    for name in ("sampled_ids", "sampled_counts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(given, name))
    exact = precision == "full"
    for name in ("logprobs", "tail_logprob", "entropy", "label_logprob"):
        a, b = getattr(found, name), getattr(given, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == np.float32
            np.testing.assert_allclose(a, b, rtol=0 if exact else 1e-3, atol=0 if exact else 0.03)


def assert_sample(found: Sample, given: CapturedSample, spec: TargetSpec) -> None:
    assert (found.row, found.sample_id) == (given.row, given.sample_id)
    np.testing.assert_array_equal(found.input_ids, given.input_ids)
    labels = labels_of(given.input_ids, given.label_spans)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.response_positions, positions_by_kind(labels, ())["response"])
    assert len(found.images) == len(given.images)
    for a, b in zip(found.images, given.images, strict=True):
        assert (a.path, a.sha256, a.width, a.height) == (b.record.path, b.record.sha256, 24, 24)
        np.testing.assert_array_equal(a.positions, b.record.positions)
    assert found.model_inputs.keys() == given.model_inputs.keys()
    for name, values in given.model_inputs.items():
        np.testing.assert_array_equal(found.model_inputs[name], values)
        assert found.model_inputs[name].dtype == values.dtype
    assert_topk(found.response, given.response, spec.precision)
    assert_topk(found.prompt, given.prompt, spec.precision)
    start = 0
    for image in given.images:
        if image.visual is not None:
            assert found.visual is not None
            rows = slice(start, start + len(image.visual))
            part = {
                n: getattr(found.visual, n)
                if n == "temperatures" or getattr(found.visual, n) is None
                else getattr(found.visual, n)[rows]
                for n in TopK.__dataclass_fields__
            }
            assert_topk(TopK(**part), image.visual, spec.precision)
            start = rows.stop
    if "relation" in spec.targets:
        assert len(found.relations) == len(given.images)
    for a, image in zip(found.relations, given.images, strict=False):
        assert image.relation is not None
        exact = image.relation.factor.astype(np.float64) @ image.relation.factor.T.astype(np.float64)
        kept = a.gram if a.gram is not None else a.factor @ a.factor.T
        kept = kept.astype(np.float64)
        cosine = (exact * kept).sum() / np.linalg.norm(exact) / np.linalg.norm(kept)
        assert 1 - cosine == pytest.approx(a.residual, abs=1e-9)
        assert a.residual <= spec.relation_bound
        assert a.norm == pytest.approx(np.linalg.norm(exact), rel=1e-6)
        assert np.linalg.norm(kept) == pytest.approx(a.norm, rel=1e-2)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_round_trip(tmp_path, name: str, share: bool) -> None:
    spec = SPECS[name]
    build_cache(str(tmp_path / "cache"), spec, share=share)
    cache = open_cache(tmp_path / "cache")
    order = cache.plan.order.tolist()
    given, bad = capture(order, spec, share=share)
    assert len(cache) == len(given)
    for index, sample in enumerate(given):
        assert_sample(cache[index], sample, spec)
    assert [q.row for q in cache.quarantined()] == [q.row for q in bad]
    index = cache.index()
    assert index.row.tolist() == [s.row for s in given]
    assert index.tokens.tolist() == [len(s.input_ids) for s in given]
    assert index.images.tolist() == [len(s.images) for s in given]
    assert cache.find(given[3].row) == [3]
    assert 4 in cache.find(given[4].sample_id)
    assert cache.assets == make_manifest(spec).assets


def test_parts_of_a_shard_are_read_alone(tmp_path) -> None:
    spec = SPECS["compact"]
    build_cache(str(tmp_path / "cache"), spec)
    cache = open_cache(tmp_path / "cache")
    block = cache.read_shard(0, parts=("response",))
    assert block.sample(0).response is not None
    assert block.sample(0).visual is None
    assert block.sample(0).relations == []
    assert cache.read_shard(0, parts=()).sample(0).response is None
    with pytest.raises(ValueError, match="prompt"):
        cache.read_shard(0, parts=("prompt",))


@pytest.mark.parametrize("version", [1, 2])
def test_a_missing_or_altered_target_raises(tmp_path, version: int) -> None:
    build_cache(str(tmp_path / "cache"), SPECS["compact"], version=version)
    cache = open_cache(tmp_path / "cache")
    chunk = holding(tmp_path / "cache", 1, "visual/ids/c/0/0")
    data = chunk.read_bytes()
    at = len(data) - 3 if version == 1 else cache.commits[1].files[-1].parts["visual"][1] - 3
    chunk.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    named = "visual/ids/c/0/0" if version == 1 else r"zarr\.zip"
    with pytest.raises(CacheDamaged, match=rf"{named}: truncated or altered.*verify --repair"):
        cache.read_shard(1)
    with pytest.raises(CacheDamaged, match="truncated or altered"):
        cache.read_shard(1, parts=("visual",))
    cache.read_shard(1, parts=("response",))
    chunk.unlink()
    with pytest.raises(CacheDamaged, match="missing"):
        cache.read_shard(1)
