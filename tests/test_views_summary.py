"""The page of a cache tells what its commit records hold, and quickly."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cache_schema import Cache, TargetSpec, open_cache
from cache_schema.format.cache import CacheIndex
from cache_schema.format.manifest import CommitRecord, Plan
from cache_schema.operations.build_state import build_state, seconds_since
from cache_schema.operations.summary import summarise
from tests.fake_caches import make_cache
from views.figures import bin_label, duration, progress_of, size
from views.html_summary import summary_html
from views.inspect_page import print_summary_page


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return make_cache(
        tmp_path / "a", tmp_path / "images", rows=14, shard_size=4, shards=(0, 1, 3), bad={5: "broken_image"}
    )


def printed(cache: Cache, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_summary_page(summarise(cache), console)
    return console.file.getvalue()


def test_counts_and_means_are_those_of_the_samples(cache: Cache) -> None:
    summary = summarise(cache)
    samples = [cache[i] for i in range(len(cache))]
    records = [s.response for s in samples]
    labels = np.concatenate([r.label_logprob for r in records])
    found = summary["positions"]["response"]
    assert summary["counts"]["samples"] == len(samples) == 9
    assert summary["counts"]["tokens"] == sum(len(s.input_ids) for s in samples)
    assert found["positions"] == len(labels)
    assert found["perplexity"] == pytest.approx(np.exp(-labels.mean()), rel=1e-3)
    tails = np.concatenate([np.exp(r.tail_logprob[:, 0]) for r in records])
    assert found["mean_covered_mass"] == pytest.approx(1 - tails.mean(), rel=1e-3)
    assert sum(found["covered_mass"]["counts"]) == len(labels)
    right = sum(
        int((s.response.token_ids[:, 0] == s.labels[s.response_positions + 1]).sum()) for s in samples
    )
    assert found["label_accuracy"] == pytest.approx(right / len(labels))
    assert summary["positions"]["visual"]["perplexity"] is None
    residuals = [r.residual for s in samples for r in s.relations]
    assert summary["relation"]["max_residual"] == pytest.approx(max(residuals))
    assert summary["quarantine"] == {"broken_image": 1}


def test_bytes_are_those_on_disk(cache: Cache, tmp_path: Path) -> None:
    summary = summarise(cache)
    files = [f for part in ("samples", "targets", "quarantine") for f in (tmp_path / "a" / part).rglob("*")]
    assert summary["bytes"]["total"] == sum(file.stat().st_size for file in files if file.is_file())
    parts = summary["bytes"]["by_part"]
    expected = parts["response"] / summary["counts"]["response_positions"]
    assert summary["bytes"]["per_position"]["response"] == pytest.approx(expected)


def test_sharing_saves_what_a_second_record_would_cost(tmp_path: Path) -> None:
    """Rows 0 and 1 share their picture: one record stands for two images, a second would double the bytes."""
    cache = make_cache(tmp_path / "a", tmp_path / "images", rows=2, patches=(16,))
    summary = summarise(cache)
    parts = summary["bytes"]["by_part"]
    assert summary["sharing"]["images"] == 2
    assert summary["sharing"]["shared"] == 1
    assert summary["sharing"]["bytes_saved"] == parts["visual"] + parts["relation"]


def test_how_far_the_build_is(cache: Cache) -> None:
    built = summarise(cache)["built"]
    assert (built["shards"], built["of_shards"], built["complete"]) == (3, 4, False)
    assert (built["rows"], built["of_rows"]) == (10, 14)
    assert built["missing"] == [[2, 2]]
    page = printed(cache)
    for told in ("71.4% built", "3 of 4 shards", "missing shards: 2", "rows/s", "left", "last shard", "ago"):
        assert told in page, told
    assert "missing shards: 2" in summary_html(summarise(cache))


def commit(record: CommitRecord, shard: int, second: float, took: float) -> CommitRecord:
    created = datetime.fromtimestamp(1_700_000_000 + second, UTC).isoformat(timespec="milliseconds")
    return replace(record, shard=shard, created=created, seconds=took)


def test_the_pace_is_that_of_all_workers_without_pauses(cache: Cache) -> None:
    record, plan = cache.commits[0], replace(cache.plan, rows=400, shard_size=4, order=np.arange(400))
    one_by_one = [commit(record, shard, 10 * (shard + 1), 10) for shard in range(6)]
    assert build_state(one_by_one, plan)["rows_per_second"] == pytest.approx(0.4)
    assert build_state(one_by_one, plan)["seconds_left"] == pytest.approx((400 - 24) / 0.4)
    two_workers = [commit(record, shard, 10 * (shard // 2 + 1), 10) for shard in range(6)]
    assert build_state(two_workers, plan)["rows_per_second"] == pytest.approx(0.8)
    after_a_night = [commit(record, 8, 80_000, 10), *one_by_one]
    state = build_state(after_a_night, plan)
    assert state["rows_per_second"] == pytest.approx(0.4)
    assert state["missing"] == [[6, 7], [9, 99]]
    assert seconds_since(state["last_commit"], datetime.fromtimestamp(1_700_080_030, UTC)) == 30
    faster_now = [commit(record, 10 + n, 90_000 + n, 1) for n in range(16)]
    assert build_state([*one_by_one, *faster_now], plan)["rows_per_second"] == pytest.approx(4.0)
    for workers in (4, 32):  # one after the other, each with a shard of 100 seconds
        many = [commit(record, n, 100 + 100 * n / workers, 100) for n in range(max(24, 3 * workers))]
        assert build_state(many, plan)["rows_per_second"] == pytest.approx(4 * workers / 100, rel=0.01)
    nothing = build_state([], plan)
    assert (nothing["rows_per_second"], nothing["seconds_left"], nothing["missing"]) == (
        None,
        None,
        [[0, 99]],
    )


def test_many_stretches_are_not_all_named(cache: Cache) -> None:
    summary = summarise(cache)
    summary["built"]["missing"] = [[2 * n, 2 * n] for n in range(20)]
    assert "12, 14 and 12 more ranges" in progress_of(summary)[1]


def test_the_slowest_samples_of_all_shards(cache: Cache) -> None:
    for shard, slowest in ((0, [[3, 0.25], [1, 0.125]]), (1, [[5, 61.0]])):
        record = cache.commits[shard]
        cache.commits[shard] = replace(record, statistics=record.statistics | {"slowest": slowest})
    rows = [entry["row"] for entry in summarise(cache)["slowest_samples"]]
    assert rows == [5, 3, 1]
    assert "row 5 (1 min 01 s), row 3 (0.25 s), row 1 (0.125 s)" in printed(cache, 120)


def test_a_cache_without_a_shard_has_a_page(tmp_path: Path) -> None:
    empty = make_cache(tmp_path / "a", tmp_path / "images", shards=())
    json.dumps(summarise(empty), allow_nan=False)
    assert "0.0% built" in printed(empty)


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_page_fits_its_terminal_and_says_what_matters(cache: Cache, width: int) -> None:
    page = printed(cache, width)
    assert all(len(line) <= width for line in page.splitlines())
    for told in ("broken_image", "perplexity", "residual", "float32", "fake.json", "share", "█"):
        assert told in page, told


def test_markup_in_names_is_only_text(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "[red]a", tmp_path / "images", rows=4, bad={1: "[/bold]\x1b[31m"})
    page = printed(cache)
    assert "[red]a" in page
    assert "[/bold]\\x1b[31m" in page
    assert "\x1b" not in page


def test_json_values_only_and_the_same_every_time(cache: Cache) -> None:
    text = json.dumps(summarise(cache), allow_nan=False)
    assert json.loads(text) == summarise(cache)


def test_a_summary_reads_the_manifest_and_the_commit_records_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a cache of 100,000 samples these are 197 files; nothing else of it is even there."""
    small = make_cache(
        tmp_path / "a", tmp_path / "images", rows=512, shard_size=512, spec=TargetSpec(targets=("response",))
    )
    record = small.commits[0]
    rows, shards = 196 * 512, 196
    order = np.random.default_rng(0).permutation(rows)
    manifest = replace(small.manifest, plan=Plan(rows=rows, shard_size=512, order=order))
    big = tmp_path / "big"
    (big / "commits").mkdir(parents=True)
    (big / "manifest.json").write_bytes(manifest.to_bytes())
    for shard in range(shards):
        copy = replace(record, shard=shard, cache=manifest.identity)
        (big / copy.path).write_bytes(copy.to_bytes())

    def forbidden(self: Cache) -> CacheIndex:
        raise AssertionError("the summary read tables")

    monkeypatch.setattr(Cache, "index", forbidden)
    summary = summarise(open_cache(big))
    assert summary["counts"]["samples"] == shards * record.counts["samples"]


def test_figures_read_well() -> None:
    assert [size(n) for n in (0, 999, 1500, 2.5e6, 1e12)] == ["0 B", "999 B", "1.5 kB", "2.5 MB", "1 TB"]
    assert [duration(s) for s in (0.25, 65, 4000)] == ["0.25 s", "1 min 05 s", "1 h 06 min"]
    assert [bin_label([0, 1, 2, 4, 1 << 30], i) for i in range(4)] == ["exact", "1", "2 - 3", "4 and more"]
    assert bin_label([0.0, 0.95, 1.0], 1) == "0.95 - 1"
