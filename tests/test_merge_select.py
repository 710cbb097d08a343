"""New caches out of others hold the same values, bit by bit."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cache_schema.operations.reshard
from cache_schema import (
    Cache,
    CacheDamaged,
    CacheWriter,
    IdentityMismatch,
    KdcacheError,
    TargetSpec,
    open_cache,
)
from cache_schema.format.records import Sample, TopK
from cache_schema.format.store import ObjectStore
from cache_schema.operations.diff import diff
from cache_schema.operations.merge import merge
from cache_schema.operations.select import select
from cache_schema.operations.settings import MergeConfig
from cache_schema.operations.verify import verify
from tests.cache_teacher import assert_same_cache, holding
from tests.fake_caches import by_row, make_cache

COMPACT = TargetSpec(top_k=8, temperatures=(1.0, 2.0))
EVERYTHING = replace(
    COMPACT, targets=("response", "visual", "relation", "prompt"), tail_samples=3, sample_temperature=2.0
)
SPECS = {
    "compact": COMPACT,
    "everything": EVERYTHING,
    "full": replace(EVERYTHING, precision="full"),
    "exact": replace(COMPACT, relation="exact"),
    "response": replace(COMPACT, targets=("response",)),
}


def assert_same(a: Sample, b: Sample, offset: int = 0) -> None:
    """Every field equal, arrays bit by bit."""
    assert b.row == a.row + offset
    assert (a.sample_id, len(a.images), len(a.relations)) == (b.sample_id, len(b.images), len(b.relations))
    for name in ("input_ids", "labels", "response_positions", "visual_positions", "prompt_positions"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    for kind in ("response", "visual", "prompt"):
        x, y = getattr(a, kind), getattr(b, kind)
        assert (x is None) == (y is None), kind
        for name in TopK.__dataclass_fields__ if x is not None else ():
            left, right = getattr(x, name), getattr(y, name)
            assert (left is None) == (right is None), (kind, name)
            if left is not None:
                assert left.dtype == right.dtype
                np.testing.assert_array_equal(left, right, err_msg=f"{kind} {name}")
    for x, y in zip(a.relations, b.relations, strict=True):
        assert (x.residual, x.norm) == (y.residual, y.norm)
        for name in ("factor", "gram"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name), err_msg=name)
    for x, y in zip(a.images, b.images, strict=True):
        assert (x.path, x.sha256, x.width, x.height) == (y.path, y.sha256, y.width, y.height)
        np.testing.assert_array_equal(x.positions, y.positions)
    assert a.model_inputs.keys() == b.model_inputs.keys()
    for name in a.model_inputs:
        np.testing.assert_array_equal(a.model_inputs[name], b.model_inputs[name])


def sound(path: Path) -> Cache:
    report = verify(path)
    assert report.ok, report.problems
    assert not report.missing_shards
    return open_cache(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return tmp_path / "images"


# Selecting


@pytest.mark.parametrize("name", SPECS)
def test_a_selection_decodes_to_the_same_bits(tmp_path: Path, pictures: Path, name: str) -> None:
    source = make_cache(
        tmp_path / "a", pictures, rows=22, spec=SPECS[name], patches=(9, 5), order=range(21, -1, -1)
    )
    wanted = {1, 2, 3, 8, 9, 10, 11, 12, 20}
    told = select(str(tmp_path / "a"), f"row in {sorted(wanted)}", str(tmp_path / "b"))
    chosen = sound(tmp_path / "b")
    before, after = by_row(source), by_row(chosen)
    assert after.keys() == wanted
    for row in wanted:
        assert_same(before[row], after[row])
    assert told["samples"] == 9
    assert told["joined_shards"] >= 1
    assert told["of_samples"] == 22
    assert chosen.manifest.dataset["selected"].startswith("row in")


def test_whole_shards_are_linked_and_outlive_their_source(tmp_path: Path, pictures: Path) -> None:
    source = make_cache(tmp_path / "a", pictures, rows=12, shard_size=4, patches=(16,))
    before = by_row(source)
    told = select(str(tmp_path / "a"), "row < 8 or row == 9", str(tmp_path / "b"))
    assert (told["linked_shards"], told["joined_shards"]) == (2, 1)
    chosen = sound(tmp_path / "b")
    inodes = {file.stat().st_ino for file in (tmp_path / "a" / "targets").rglob("*") if file.is_file()}
    for shard in (0, 1):
        targets = [f.path for f in chosen.commits[shard].files if f.path.startswith("targets/")]
        assert targets
        assert all((tmp_path / "b" / path).stat().st_ino in inodes for path in targets)
    shutil.rmtree(tmp_path / "a")
    after = by_row(sound(tmp_path / "b"))
    for row in (*range(8), 9):
        assert_same(before[row], after[row])


def test_shared_prefixes_stay_shared(tmp_path: Path, pictures: Path) -> None:
    source = make_cache(tmp_path / "a", pictures, rows=12, shard_size=12, patches=(16,))
    select(str(tmp_path / "a"), "row in [0, 1, 3, 6, 7]", str(tmp_path / "b"))
    counts = sound(tmp_path / "b").commits[0].counts
    assert source.commits[0].counts["shared_images"] == 2
    assert (counts["images"], counts["shared_images"], counts["relations"]) == (5, 2, 3)
    assert counts["visual_positions"] == 3 * 16


def test_statistics_of_a_joined_shard_are_those_of_its_samples(tmp_path: Path, pictures: Path) -> None:
    make_cache(tmp_path / "a", pictures, rows=12, shard_size=6)
    select(str(tmp_path / "a"), "row in [1, 4, 5, 7]", str(tmp_path / "b"))
    chosen = sound(tmp_path / "b")
    statistics = chosen.commits[0].statistics
    samples = [chosen[i] for i in range(4)]
    right = sum(
        int((s.response.token_ids[:, 0] == s.labels[s.response_positions + 1]).sum()) for s in samples
    )
    assert statistics["response"]["label_is_first"] == right
    assert statistics["response"]["positions"] == sum(len(s.response_positions) for s in samples)
    assert sorted(row for row, _ in statistics["longest"]) == [1, 4, 5, 7]


def test_a_selection_of_a_selection(tmp_path: Path, pictures: Path) -> None:
    source = make_cache(tmp_path / "a", pictures, rows=20, shard_size=4)
    select(str(tmp_path / "a"), "row != 3 and row != 9", str(tmp_path / "b"))
    assert open_cache(tmp_path / "b").plan.ends is not None, "uneven shards are what is tried here"
    select(str(tmp_path / "b"), "tokens > 0 and row >= 4", str(tmp_path / "c"))
    before, after = by_row(source), by_row(sound(tmp_path / "c"))
    assert set(after) == set(range(4, 20)) - {9}
    for row in after:
        assert_same(before[row], after[row])


def test_scores_decide_which_samples_stay(tmp_path: Path, pictures: Path) -> None:
    source = make_cache(tmp_path / "a", pictures, rows=12)
    values = {}
    for row, sample in by_row(source).items():
        first = np.exp(sample.response.logprobs[:, 0].astype(np.float64)).mean()
        wrong = (sample.response.token_ids[:, 0] != sample.labels[sample.response_positions + 1]).mean()
        surprise = np.exp(-sample.response.label_logprob.astype(np.float64).mean())
        values[row] = (first, wrong, surprise)
    middle = [float(np.median([v[i] for v in values.values()])) for i in range(3)]
    where = f"confidence > {middle[0]} and disagreement <= {middle[1]} or perplexity > {middle[2]}"
    select(str(tmp_path / "a"), where, str(tmp_path / "b"))
    expected = {r for r, (c, d, p) in values.items() if (c > middle[0] and d <= middle[1]) or p > middle[2]}
    assert 0 < len(expected) < 12
    assert set(by_row(open_cache(tmp_path / "b"))) == expected


def test_quarantine_stays_behind(tmp_path: Path, pictures: Path) -> None:
    make_cache(tmp_path / "a", pictures, rows=8, shard_size=4, bad={2: "broken_image", 6: "no_turns"})
    select(str(tmp_path / "a"), "row < 6", str(tmp_path / "b"))
    chosen = sound(tmp_path / "b")
    assert list(chosen.quarantined()) == []
    assert set(by_row(chosen)) == {0, 1, 3, 4, 5}


def test_a_shard_of_nothing_but_quarantine(tmp_path: Path, pictures: Path) -> None:
    bad = dict.fromkeys(range(4), "broken_image")
    make_cache(tmp_path / "a", pictures, rows=8, shard_size=4, bad=bad)
    make_cache(tmp_path / "b", pictures, rows=4, shard_size=4, identity={"dataset": "e"})
    select(str(tmp_path / "a"), "not id == 'x' and perplexity > 0", str(tmp_path / "c"))
    assert set(by_row(sound(tmp_path / "c"))) == {4, 5, 6, 7}
    merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "d"))
    merged = sound(tmp_path / "d")
    assert set(by_row(merged)) == set(range(4, 12))
    assert [row.row for row in merged.quarantined()] == [0, 1, 2, 3]


def test_an_interrupted_selection_goes_on(tmp_path: Path, pictures: Path) -> None:
    make_cache(tmp_path / "a", pictures, rows=16, shard_size=4)
    arguments = (str(tmp_path / "a"), "row != 5", str(tmp_path / "b"))
    select(*arguments)
    (tmp_path / "b" / "commits" / "00001.json").unlink()
    told = select(*arguments)
    assert (told["already_there"], told["linked_shards"] + told["joined_shards"]) == (3, 1)
    assert set(by_row(open_cache(tmp_path / "b"))) == set(range(16)) - {5}
    assert select(*arguments)["already_there"] == 4


def test_a_lost_reply_to_the_commit_keeps_the_copied_files(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_cache(tmp_path / "a", pictures, rows=8, shard_size=4)
    create = ObjectStore.create
    monkeypatch.setattr(ObjectStore, "create", lambda *given: create(*given) and False)
    assert select(str(tmp_path / "a"), "row >= 0", "memory://lost-reply")["copied_shards"] == 2
    assert verify("memory://lost-reply").ok
    after = by_row(open_cache("memory://lost-reply"))
    for row, sample in by_row(source).items():
        assert_same(sample, after[row])


def test_where_links_are_impossible_files_are_copied(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_cache(tmp_path / "a", pictures, rows=8, shard_size=4)

    class NoLinks:
        def __getattr__(self, name: str) -> object:
            return getattr(os, name)

        @staticmethod
        def link(source: Path, target: Path) -> None:
            raise OSError(errno.EXDEV, "cross-device link")

    monkeypatch.setattr(cache_schema.operations.reshard, "os", NoLinks())
    assert select(str(tmp_path / "a"), "row >= 0", str(tmp_path / "b"))["copied_shards"] == 2
    after = by_row(sound(tmp_path / "b"))
    for row, sample in by_row(source).items():
        assert_same(sample, after[row])
    assert select(str(tmp_path / "a"), "row >= 0", "memory://selected")["copied_shards"] == 2
    assert len(open_cache("memory://selected")) == 8


@pytest.mark.parametrize("version", [1, 2])
def test_a_damaged_source_is_not_copied(tmp_path: Path, pictures: Path, version: int) -> None:
    make_cache(tmp_path / "a", pictures, rows=4, shard_size=4, version=version)
    path = holding(tmp_path / "a", 0, "response/steps/c/0/0")
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheDamaged, match=path.name):
        select(str(tmp_path / "a"), "row >= 0", f"memory://damaged-{version}")
    with pytest.raises(CacheDamaged, match=path.name):
        select(str(tmp_path / "a"), "row > 0", str(tmp_path / "b"))
    if version == 1:
        with pytest.raises(CacheDamaged, match=path.name):
            merge([str(tmp_path / "a")], str(tmp_path / "c"), config=MergeConfig(format=2))


def test_nothing_selected_writes_nothing(tmp_path: Path, pictures: Path) -> None:
    make_cache(tmp_path / "a", pictures, rows=4)
    with pytest.raises(KdcacheError, match="none of its 4 samples"):
        select(str(tmp_path / "a"), "row > 99", str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_scores_need_response_targets(tmp_path: Path, pictures: Path) -> None:
    make_cache(tmp_path / "a", pictures, rows=4, spec=replace(COMPACT, targets=("visual",)))
    with pytest.raises(KdcacheError, match="which confidence is computed from"):
        select(str(tmp_path / "a"), "confidence > 0.5", str(tmp_path / "b"))


# Merging


def test_parts_of_one_build_become_that_build(tmp_path: Path, pictures: Path) -> None:
    whole = make_cache(tmp_path / "whole", pictures, rows=14, shard_size=4)
    make_cache(tmp_path / "a", pictures, rows=14, shard_size=4, shards=(0, 2))
    make_cache(tmp_path / "b", pictures, rows=14, shard_size=4, shards=(1, 2))
    told = merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "c"))
    assert (told["linked_shards"], told["shards"], told["samples"]) == (3, 3, 12)
    merged = open_cache(tmp_path / "c")
    assert merged.manifest.identity == whole.manifest.identity
    assert list(CacheWriter.open(tmp_path / "c", whole.manifest).pending()) == [3]
    before = by_row(whole)
    for row, sample in by_row(merged).items():
        assert_same(before[row], sample)
    report = verify(tmp_path / "c")
    assert [problem.file for problem in report.problems] == ["commits/"], "shard 3 is still to be built"


def test_of_a_row_in_several_the_first_is_taken(tmp_path: Path, pictures: Path) -> None:
    first = make_cache(tmp_path / "a", pictures, rows=10, shard_size=4)
    noisy = make_cache(tmp_path / "b", pictures, rows=10, shard_size=3, noise=0.5)
    select(str(tmp_path / "a"), "row in [1, 2, 3, 7]", str(tmp_path / "a2"))
    merge([str(tmp_path / "a2"), str(tmp_path / "b")], str(tmp_path / "c"))
    merged = by_row(sound(tmp_path / "c"))
    assert set(merged) == set(range(10))
    before = by_row(noisy) | {row: sample for row, sample in by_row(first).items() if row in (1, 2, 3, 7)}
    for row, sample in merged.items():
        assert_same(before[row], sample)


def test_rows_of_another_dataset_are_numbered_on(tmp_path: Path, pictures: Path) -> None:
    a = make_cache(tmp_path / "a", pictures, rows=6, bad={4: "broken_image"})
    b = make_cache(tmp_path / "b", pictures, rows=5, seed=3, identity={"dataset": "e"}, bad={0: "no_turns"})
    merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "c"))
    cache = sound(tmp_path / "c")
    merged = by_row(cache)
    assert set(merged) == {0, 1, 2, 3, 5, 7, 8, 9, 10}
    for row, sample in by_row(a).items():
        assert_same(sample, merged[row])
    for row, sample in by_row(b).items():
        assert_same(sample, merged[row + 6], offset=6)
    assert [(q.row, q.reason) for q in cache.quarantined()] == [(4, "broken_image"), (6, "no_turns")]
    assert [part["first_row"] for part in cache.manifest.dataset["merged"]] == [0, 6]
    longest = [row for shard in cache.shards for row, _ in cache.commits[shard].statistics["longest"]]
    assert set(longest) == set(merged)


def test_a_row_captured_anywhere_leaves_quarantine(tmp_path: Path, pictures: Path) -> None:
    make_cache(tmp_path / "a", pictures, rows=8, shard_size=4, bad={2: "broken_image", 5: "broken_image"})
    make_cache(tmp_path / "b", pictures, rows=8, shard_size=8, bad={5: "no_turns"})
    merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "c"))
    merged = sound(tmp_path / "c")
    assert sorted(by_row(merged)) == [0, 1, 2, 3, 4, 6, 7]
    assert [(row.row, row.reason) for row in merged.quarantined()] == [(5, "broken_image")]


# Format versions


@pytest.mark.parametrize("name", SPECS)
def test_one_cache_of_version_1_becomes_version_2(tmp_path: Path, pictures: Path, name: str) -> None:
    """As stored, bit by bit, and nothing else of the cache changes."""
    old = make_cache(
        tmp_path / "a", pictures, rows=11, spec=SPECS[name], patches=(9, 5), bad={4: "no_turns"}, version=1
    )
    told = merge([str(tmp_path / "a")], str(tmp_path / "b"), config=MergeConfig(format=2))
    assert (told["repacked_shards"], told["shards"], told["samples"]) == (3, 3, 10)
    assert_same_cache(tmp_path / "b", tmp_path / "a")
    new = open_cache(tmp_path / "b")
    assert (old.manifest.format_version, new.manifest.format_version) == (1, 2)
    assert replace(new.manifest, format_version=1).to_bytes() == old.manifest.to_bytes()
    for shard, record in new.commits.items():
        before = old.commits[shard]
        assert len(record.files) == 3
        assert (record.counts, record.engine, record.seconds) == (
            before.counts,
            before.engine,
            before.seconds,
        )
        ours, theirs = (
            {k: v for k, v in r.statistics.items() if k != "bytes"} | {"slowest": []}
            for r in (record, before)
        )
        assert ours == theirs
    again = merge([str(tmp_path / "a")], str(tmp_path / "b"), config=MergeConfig(format=2))
    assert again["already_there"] == 3


def test_versions_are_merged_into_the_newest_among_them(tmp_path: Path, pictures: Path) -> None:
    """Parts of one build, and other datasets; whole shards and parts of shards."""
    parts = {"a": (1, (0, 2)), "b": (2, (1, 3))}
    for name, (version, shards) in parts.items():
        make_cache(tmp_path / name, pictures, rows=14, shards=shards, version=version)
    make_cache(tmp_path / "c", pictures, rows=5, identity={"dataset": "e"}, bad={0: "no_turns"}, version=1)
    whole = make_cache(tmp_path / "whole", pictures, rows=14)
    told = merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "d"))
    assert (told["repacked_shards"], told["linked_shards"]) == (2, 2)
    assert sound(tmp_path / "d").manifest.format_version == 2
    assert_same_cache(tmp_path / "d", tmp_path / "whole")
    select(str(tmp_path / "whole"), "row != 5", str(tmp_path / "e"))
    told = merge([str(tmp_path / name) for name in "ace"], str(tmp_path / "f"))
    merged = by_row(sound(tmp_path / "f"))
    assert set(merged) == {*range(14), 15, 16, 17, 18} - {5}
    before = by_row(whole)
    for row in {*range(14)} - {5}:
        assert_same(before[row], merged[row])
    for row, sample in by_row(open_cache(tmp_path / "c")).items():
        assert_same(sample, merged[row + 14], offset=14)


def test_old_caches_stay_in_their_version(tmp_path: Path, pictures: Path) -> None:
    for name in "ab":
        make_cache(tmp_path / name, pictures, rows=6, identity={"dataset": name}, version=1)
    merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "c"))
    select(str(tmp_path / "a"), "row != 1", str(tmp_path / "d"))
    assert [sound(tmp_path / name).manifest.format_version for name in "cd"] == [1, 1]
    with pytest.raises(KdcacheError, match=r"in format version 1, not 2; give another --out"):
        merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "c"), config=MergeConfig(format=2))


def test_other_teachers_are_not_merged(tmp_path: Path, pictures: Path) -> None:
    make_cache(tmp_path / "a", pictures, rows=4)
    make_cache(tmp_path / "b", pictures, rows=4, identity={"teacher_weights": "other"})
    make_cache(tmp_path / "k", pictures, rows=4, spec=replace(COMPACT, top_k=4))
    with pytest.raises(IdentityMismatch, match="teacher_weights 'w' and 'other'"):
        merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "c"))
    with pytest.raises(IdentityMismatch, match="top_k 8 and 4"):
        merge([str(tmp_path / "a"), str(tmp_path / "k")], str(tmp_path / "c"))
    ruled = replace(COMPACT, max_entries=100)
    make_cache(tmp_path / "e", pictures, rows=4, spec=ruled)
    for first, second in ("ae", "ea"):  # a field that only one of the manifests names
        with pytest.raises(IdentityMismatch, match=r"max_entries.*100"):
            merge([str(tmp_path / first), str(tmp_path / second)], str(tmp_path / "c"))
        told = diff(open_cache(tmp_path / first), open_cache(tmp_path / second))
        assert any(each["key"] == "spec.max_entries" for each in told.identity)
    with pytest.raises(IdentityMismatch, match=r"max_entries.*100"):
        make_cache(tmp_path / "a", pictures, rows=4, spec=ruled)
    with pytest.raises(KdcacheError, match="at least two"):
        merge([str(tmp_path / "a")], str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()
