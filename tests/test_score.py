"""`kdcache score`: log-likelihoods of a reference model beside a cache, and selection by advantage."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cache_schema import CacheDamaged, IdentityMismatch, KdcacheError, open_cache
from cache_schema.datasets.image_roots import open_root
from cache_schema.operations.reference_scores import read_scores, score_path
from cache_schema.operations.select import select
from cache_schema.operations.settings import SelectConfig
from cache_schema.operations.verify import verify
from cache_schema.progress import Silent
from models.folder import load_model, load_processor
from models.inputs import open_recorded
from student.score import score_cache
from student.settings import ScoreConfig
from tests.student_caches import fake_capture, make_world
from tests.tiny_models import tiny_llava


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), rows=20)


@pytest.fixture(scope="module")
def scored(world):
    """The cache's scores by the world's student, one batch of five at a time."""
    config = ScoreConfig(model=world.student, image_root=str(world.image_root), batch_size=5, device="cpu")
    first = score_cache(str(world.cache), config, Silent())
    assert (first["samples"], first["scored_now"]) == (20, 4)
    return config


def advantages(cache):
    """By row, from the records and the scores."""
    found = {}
    for shard in cache.shards:
        total, tokens, _ = read_scores(cache, shard)
        block = cache.read_shard(shard)
        for place in range(len(block)):
            sample = block.sample(place)
            found[sample.row] = sample.response.label_logprob.mean() - total[place] / tokens[place]
    return found


def test_scores_are_those_of_one_sample_at_a_time_by_the_models_own_logits(world, scored):
    cache = open_cache(world.cache)
    model, processor = load_model(world.student, torch.float32).eval(), load_processor(world.student)
    root = open_root(str(world.image_root))
    for shard in cache.shards:
        total, tokens, digest = read_scores(cache, shard)
        assert len(digest) == 64
        block = cache.read_shard(shard)
        for place in range(len(block)):
            sample = block.sample(place)
            images = [open_recorded(root, image, recorded="") for image in sample.images]
            pixels = processor.image_processor(images=images, return_tensors="pt") if images else {}
            ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
            with torch.no_grad():
                logits = model(input_ids=ids, **pixels).logits[0, :, : len(processor.tokenizer)].double()
            labels = torch.from_numpy(sample.labels.astype(np.int64))[1:]
            where = labels != -100
            values = torch.log_softmax(logits[:-1][where], -1).gather(1, labels[where][:, None])
            assert total[place] == pytest.approx(float(values.sum()), abs=1e-4)
            assert tokens[place] == int(where.sum())


def test_a_second_run_does_nothing_and_a_lost_or_damaged_shard_is_scored_again(world, scored):
    again = score_cache(str(world.cache), scored, Silent())
    assert again["already_done"]
    assert again["scored_now"] == 0
    cache = open_cache(world.cache)
    before = [read_scores(cache, shard)[0] for shard in cache.shards]
    lost, damaged = (world.cache / score_path(cache, shard) for shard in cache.shards[1:3])
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes().replace(b"log_likelihood", b"log_likelihooD"))
    with pytest.raises(KdcacheError, match="run `kdcache score` on the cache"):
        read_scores(cache, cache.shards[1])
    with pytest.raises(CacheDamaged):
        read_scores(cache, cache.shards[2])
    (problem,) = verify(world.cache).problems
    assert problem.file == score_path(cache, cache.shards[2])
    assert score_cache(str(world.cache), replace(scored, batch_size=2), Silent())["scored_now"] == 2
    assert verify(world.cache).ok
    for shard, values in zip(cache.shards, before, strict=True):
        np.testing.assert_allclose(read_scores(cache, shard)[0], values, atol=1e-4)


def test_another_reference_model_and_another_tokenizer_are_refused(world, scored, tmp_path):
    other = tiny_llava(tmp_path / "other", seed=9)
    with pytest.raises(KdcacheError, match="scores of another reference model"):
        score_cache(str(world.cache), replace(scored, model=other), Silent())
    strange = tiny_llava(tmp_path / "strange", seed=9, words=330)
    fresh = fake_capture(tmp_path / "fresh", world.cache.parent / "teacher", world.image_root, rows=4)
    with pytest.raises(IdentityMismatch, match="tokenizer"):
        score_cache(str(fresh), replace(scored, model=strange), Silent())
    assert not (fresh / "scores").exists()


def test_advantage_and_quantiles_select_what_they_say(world, scored, tmp_path):
    by_row = advantages(open_cache(world.cache))
    middle = float(np.quantile(list(by_row.values()), 0.75))
    select(str(world.cache), "advantage >= quantile(0.75)", str(tmp_path / "top"))
    kept = open_cache(tmp_path / "top")
    assert {sample.row for sample in kept} == {row for row, value in by_row.items() if value >= middle}
    assert len(kept) == 5
    bound = float(sorted(by_row.values())[3])
    select(str(world.cache), f"advantage > {bound!r} and reference < 0", str(tmp_path / "more"))
    assert len(open_cache(tmp_path / "more")) == 16
    with pytest.raises(KdcacheError, match="run `kdcache score`"):
        select(str(tmp_path / "top"), "advantage > 0", str(tmp_path / "none"))


def test_a_draw_by_rank_is_seeded_and_prefers_high_ranks(world, scored, tmp_path):
    by_row = advantages(open_cache(world.cache))
    order = sorted(by_row, key=by_row.get)

    def drawn(seed, out):
        select(
            str(world.cache),
            None,
            str(tmp_path / out),
            None,
            SelectConfig(sample=4, by="advantage", seed=seed),
        )
        return {sample.row for sample in open_cache(tmp_path / out)}

    first = drawn(3, "a")
    assert len(first) == 4
    assert drawn(3, "b") == first
    # The first draw is by rank: of 20 samples that of rank r with probability r / 210.
    from cache_schema.operations.select import _drawn

    columns = [{"x": np.array([by_row[row] for row in order])}]
    counts = np.zeros(20)
    for seed in range(4000):
        counts += _drawn([np.ones(20, dtype=bool)], columns, 1, "x", seed)[0]
    expected = 4000 * np.arange(1, 21) / 210
    assert np.abs(counts - expected).max() < 4 * np.sqrt(expected.max())
    even = sum(
        _drawn([np.ones(20, dtype=bool)], columns, 5, None, seed)[0].astype(int) for seed in range(800)
    )
    assert np.abs(even - 200).max() < 4 * np.sqrt(200)


def test_the_files_are_sealed_json(world, scored):
    cache = open_cache(world.cache)
    document = json.loads((world.cache / score_path(cache, cache.shards[0])).read_bytes())
    assert document["cache"] == cache.manifest.identity
    assert document["attempt"] == cache.commits[cache.shards[0]].attempt
    assert len(document["log_likelihood"]) == cache.shard_length(cache.shards[0])
