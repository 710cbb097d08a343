"""`derive`: targets from stored hidden states equal those of a build, within what 8 bits lose."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from cache_schema import KdcacheError, TargetSpec, open_cache
from cache_schema.errors import StoppedEarly, WrongUsage
from cache_schema.format.writer import CacheWriter
from cache_schema.operations.divergence import kl, relation_cosine
from cache_schema.operations.select import select
from cache_schema.operations.verify import verify
from cache_schema.progress import Silent
from models.stored_head import head_of, states_on
from pipeline import derive as module
from pipeline.capture import BuildConfig, build
from pipeline.derive import derive
from pipeline.settings import DeriveConfig
from tests.tiny_models import tiny_dataset, tiny_llava

HIDDEN = TargetSpec(targets=("response", "visual", "hidden"), top_k=4)
SPECS = {
    "default": TargetSpec(),
    "wide": TargetSpec(
        targets=("response", "visual", "relation", "hidden"),
        top_k=40,
        temperatures=(1.0, 2.0),
        tail_samples=5,
        sample_temperature=2.0,
        precision="full",
        relation="exact",
    ),
    "threshold": TargetSpec(targets=("response", "visual"), entries={"response": 0.01, "visual": 0.02}),
    "responses": TargetSpec(targets=("response", "hidden")),
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    teacher = tiny_llava(tmp_path_factory.mktemp("teacher"), hidden=48)
    data = tiny_dataset(tmp_path_factory.mktemp("data"), rows=12, images=4)
    rows = json.loads(data.data.read_text())
    rows[3]["image"] = "pictures/none.png"  # goes to quarantine
    data.data.write_text(json.dumps(rows))
    return teacher, data


def built(setting, out, spec):
    teacher, data = setting
    config = BuildConfig(
        teacher=teacher,
        data=data.data,
        image_root=data.image_root,
        out=str(out),
        spec=spec,
        shard_size=5,
        batch_tokens=300,
        device="cpu",
    )
    build(config, Silent())
    return open_cache(out)


@pytest.fixture(scope="module")
def source(setting, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "hidden"
    built(setting, out, HIDDEN)
    return out


def config_of(out, spec, **rest):
    return DeriveConfig(out=str(out), spec=spec, device="cpu", **{"batch_tokens": 200} | rest)


@pytest.mark.parametrize("name", SPECS)
def test_the_result_is_that_of_a_build(setting, source, tmp_path, name):
    spec = SPECS[name]
    asked = built(setting, tmp_path / "built", spec)
    told = derive(str(source), config_of(tmp_path / "derived", spec), Silent())
    made = open_cache(tmp_path / "derived")
    assert verify(tmp_path / "derived").ok
    assert (told["samples"], told["shards"], len(made)) == (11, 3, 11)
    assert list(made.quarantined()) == list(asked.quarantined())
    assert [made.commits[i].counts for i in made.shards] == [asked.commits[i].counts for i in made.shards]
    apart = {"response": [], "visual": []}
    for number in range(len(asked)):
        a, b = asked[number], made[number]
        assert (a.row, a.sample_id, a.images[0].path if a.images else "") == (
            b.row,
            b.sample_id,
            b.images[0].path if b.images else "",
        )
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        np.testing.assert_array_equal(a.labels, b.labels)
        for kind in apart:
            x, y = a.records[kind], b.records[kind]
            assert (x is None) == (y is None), kind
            if x is None:
                continue
            apart[kind].append(kl(x, y))
            np.testing.assert_allclose(x.logsumexp, y.logsumexp, atol=0.1)
            np.testing.assert_allclose(x.tail_logprob, y.tail_logprob, atol=0.35)
            if x.sampled_counts is not None:
                np.testing.assert_array_equal(x.sampled_counts.sum(1), y.sampled_counts.sum(1))
                same = (np.sort(x.sampled_ids, 1) == np.sort(y.sampled_ids, 1)).mean()
                assert same > 0.3  # the same random numbers
        for x, y in zip(a.relations, b.relations, strict=True):
            assert relation_cosine(x, y) > 1 - 1e-4
            assert y.norm == pytest.approx(x.norm, rel=1e-2)
    for kind, parts in apart.items():
        assert not parts or np.concatenate(parts).mean() < 1e-3, kind


def test_stored_states_are_carried_bit_by_bit_and_come_to_a_device_alike(source, tmp_path):
    derive(str(source), config_of(tmp_path / "c", SPECS["wide"]), Silent())
    ours, theirs = open_cache(source), open_cache(tmp_path / "c")
    assert (head_of(ours).weight == head_of(theirs).weight).all()
    for number in range(len(ours)):
        for kind, states in ours[number].hidden.items():
            np.testing.assert_array_equal(theirs[number].hidden[kind], states)
            on_device = states_on(theirs[number].hidden_states[kind], "cpu").numpy()
            np.testing.assert_allclose(on_device, states, rtol=1e-6, atol=1e-6)


def test_a_derived_cache_of_a_selection_keeps_shared_images(source, tmp_path):
    select(str(source), "row > 1", str(tmp_path / "s"))
    derive(str(tmp_path / "s"), config_of(tmp_path / "c", TargetSpec()), Silent())
    assert verify(tmp_path / "c").ok
    derive(str(source), config_of(tmp_path / "whole", TargetSpec()), Silent())
    assert sum(c.counts["shared_images"] for c in open_cache(tmp_path / "whole").commits.values()) == sum(
        c.counts["shared_images"] for c in open_cache(source).commits.values()
    )


def test_it_continues_where_it_was_stopped(source, tmp_path, monkeypatch):
    out, config = tmp_path / "c", config_of(tmp_path / "c", TargetSpec())
    commit, done = CacheWriter.commit, []

    def stop_after_one(self, *arguments, **options):
        if done:
            raise StoppedEarly("stopped")
        done.append(commit(self, *arguments, **options))
        return done[0]

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "commit", stop_after_one)
        with pytest.raises(StoppedEarly):
            derive(str(source), config, Silent())
    assert derive(str(source), config, Silent())["already_there"] == 1
    assert verify(out).ok
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", None)
        assert derive(str(source), config, Silent())["already_there"] == 3


def test_shards_that_are_not_there_yet_follow_later(source, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(source, part)
    (record,) = part.glob("commits/00001.json")
    record.rename(tmp_path / "kept.json")
    config = config_of(tmp_path / "c", TargetSpec())
    assert derive(str(part), config, Silent())["shards"] == 2
    shutil.copy(tmp_path / "kept.json", record)
    assert derive(str(part), config, Silent())["shards"] == 3
    assert verify(tmp_path / "c").ok


def test_what_the_states_do_not_give_is_refused_in_one_line(setting, source, tmp_path):
    for spec, told in (
        (TargetSpec(targets=("response", "prompt")), "do not give prompt; use --targets response,visual,"),
        (TargetSpec(targets=("prompt",)), "do not give prompt"),
    ):
        with pytest.raises(WrongUsage, match=told):
            derive(str(source), config_of(tmp_path / "c", spec), Silent())
    built(setting, tmp_path / "r", replace(HIDDEN, hidden=("response",)))
    with pytest.raises(WrongUsage, match="of response positions, which do not give visual, relation"):
        derive(str(tmp_path / "r"), config_of(tmp_path / "c", TargetSpec()), Silent())
    with pytest.raises(WrongUsage, match="do not give visual, hidden"):
        derive(str(tmp_path / "r"), config_of(tmp_path / "c", HIDDEN), Silent())
    built(setting, tmp_path / "none", TargetSpec(targets=("response",)))
    with pytest.raises(KdcacheError, match="has no hidden states"):
        derive(str(tmp_path / "none"), config_of(tmp_path / "c", TargetSpec()), Silent())
    with pytest.raises(WrongUsage, match="lies inside"):
        derive(str(source), config_of(source / "in", TargetSpec()), Silent())
    assert not (tmp_path / "c").exists()


def test_embedded_images_are_carried(setting, source, tmp_path):
    built(setting, tmp_path / "c", replace(open_cache(source).spec, embed_images=True))
    spec = TargetSpec(targets=("response",), top_k=4)
    derive(str(tmp_path / "c"), config_of(tmp_path / "d", spec), Silent())
    given, made = open_cache(tmp_path / "c"), open_cache(tmp_path / "d")
    for number in range(len(given)):
        contents = [image.content for image in given[number].images]
        assert None not in contents
        assert [image.content for image in made[number].images] == contents
    assert verify(tmp_path / "d").ok
    config = config_of(tmp_path / "e", replace(spec, embed_images=True))
    with pytest.raises(WrongUsage, match="does not embed its images"):
        derive(str(source), config, Silent())
