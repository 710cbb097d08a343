"""What grows with a cache, counted: listings, requests, bytes read, shards held."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeline.loop
from cache_schema import Cache, CacheWriter, TargetSpec, open_cache
from cache_schema.format.manifest import Plan
from cache_schema.format.store import LocalStore
from cache_schema.format.writer import look_every
from cache_schema.operations.select import select
from cache_schema.progress import Silent
from pipeline.capture import build
from pipeline.settings import BuildConfig
from tests.fake_caches import make_cache
from tests.test_merge_select import assert_same
from tests.tiny_models import tiny_dataset, tiny_llava
from views.sample_document import find_sample, sample_document

TARGETS = TargetSpec(top_k=8, temperatures=(1.0, 2.0))
SPECS = {
    "fixed": TARGETS,
    "exact": replace(TARGETS, relation="exact"),
}


class Calls:
    """What is asked of directories: the paths read, those looked for, and the listings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[str] = []
        self.looked: list[str] = []
        self.listed = 0
        read, exists, listing = LocalStore.read_many, LocalStore.exists, LocalStore.list

        def reading(store: LocalStore, ranges: Any) -> list[bytes]:
            self.read += [place.path for place in ranges]
            return read(store, ranges)

        def looking(store: LocalStore, path: str) -> bool:
            self.looked.append(path)
            return exists(store, path)

        def listed(store: LocalStore, folder: str = "") -> dict[str, int]:
            self.listed += 1
            return listing(store, folder)

        monkeypatch.setattr(LocalStore, "read_many", reading)
        monkeypatch.setattr(LocalStore, "exists", looking)
        monkeypatch.setattr(LocalStore, "list", listed)


def test_a_row_is_looked_for_in_its_shard_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = np.random.default_rng(0).permutation(20).tolist()
    cache = make_cache(tmp_path / "c", tmp_path / "images", rows=20, order=order, bad={order[6]: "broken"})
    calls = Calls(monkeypatch)
    for place, row in enumerate(order):
        del calls.read[:]
        found = cache.find(row)
        assert [Path(path).name.split("-")[0] for path in calls.read] == [f"{place // 4:05d}"]
        assert found == ([] if place == 6 else [place - (place > 6)])
    del calls.read[:]
    assert cache.find(99) == []
    assert not calls.read
    assert find_sample(cache, order[9]).row == order[9]


def test_a_row_is_found_where_shards_are_uneven_and_missing(tmp_path: Path) -> None:
    whole = make_cache(tmp_path / "a", tmp_path / "images", rows=17, shards=(0, 1, 3, 4))
    select(str(tmp_path / "a"), "row != 5", str(tmp_path / "b"))
    for cache in (whole, open_cache(tmp_path / "b")):
        rows = cache.index().row.tolist()
        assert [cache.find(row) for row in range(17)] == [
            [rows.index(row)] if row in rows else [] for row in range(17)
        ]
    plan = Plan(rows=9, shard_size=4, order=np.arange(9), ends=np.array([2, 6, 9]))
    assert [plan.shard_at(place) for place in range(9)] == [0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_the_rows_of_a_label_come_from_one_pass_over_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path / "c", tmp_path / "images", rows=20)
    calls = Calls(monkeypatch)
    assert cache.rows_labelled("id-3") == [3, 10, 17]
    assert len(calls.read) == len(set(calls.read)) == len(cache.shards)
    assert sample_document(cache, 10)["rows_with_this_id"] == [3, 17]


def test_a_finished_cache_is_listed_and_not_asked_for_every_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path / "c", tmp_path / "images", rows=40, shards=[n for n in range(10) if n != 7])
    writer = CacheWriter.open(tmp_path / "c", cache.manifest)
    calls = Calls(monkeypatch)
    assert list(writer.pending(1, 4)) == [7]
    assert (calls.listed, len(calls.looked)) == (2, 1)


def test_what_a_listing_shows_is_looked_for_again_when_its_turn_comes(tmp_path: Path) -> None:
    """Another worker commits a shard between the listing and its turn."""
    cache = make_cache(tmp_path / "c", tmp_path / "images", rows=12, shards=(0,))
    pending = CacheWriter.open(tmp_path / "c", cache.manifest).pending()
    assert next(pending) == 1
    make_cache(tmp_path / "c", tmp_path / "images", rows=12, shards=(1, 2))
    assert list(pending) == []


def test_a_build_lists_the_commit_records_a_bounded_number_of_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert look_every(1) == look_every(200) == 1
    assert all(shards // look_every(shards) <= 256 for shards in (1_300, 20_000, 2_000_000))
    tiny_llava(tmp_path / "teacher")
    data = tiny_dataset(tmp_path / "data", rows=24)
    listings = []
    committed = CacheWriter.committed
    monkeypatch.setattr(CacheWriter, "committed", lambda self: listings.append(1) or committed(self))
    monkeypatch.setattr(pipeline.loop, "look_every", lambda shards: shards // 3)
    config = BuildConfig(
        teacher=tmp_path / "teacher",
        data=data.data,
        image_root=str(data.image_root),
        out=str(tmp_path / "c"),
        shard_size=2,
        dtype="float32",
        device="cpu",
    )
    build(config, Silent())
    assert len(open_cache(tmp_path / "c").shards) == 12
    assert len(listings) == 1 + 3


@pytest.mark.parametrize("name", ["fixed", "exact"])
def test_a_selection_holds_no_shard_that_it_has_taken_samples_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A new shard is joined of a few samples of each of many shards: they are not held together."""
    cache = make_cache(tmp_path / "c", tmp_path / "images", rows=48, shard_size=8, spec=SPECS[name])
    arrays: list[weakref.ref[Any]] = []
    held: list[int] = []
    stored = Cache.stored_shard

    def watched(self: Cache, shard: int, parts: Any) -> Any:
        held.append(sum(array() is not None for array in arrays))
        table, groups = stored(self, shard, parts)
        arrays.extend(weakref.ref(whole(array)) for group in groups.values() for array in group.values())
        return table, groups

    monkeypatch.setattr(Cache, "stored_shard", watched)
    made = select(str(tmp_path / "c"), "row in (1, 9, 17, 25, 33, 40)", str(tmp_path / "few"))
    assert (made["samples"], made["joined_shards"]) == (6, 1)
    assert len(arrays) > 6 * 10
    assert set(held) == {0}
    few = open_cache(tmp_path / "few")
    for index in range(6):
        (before,) = cache.find(few[index].row)
        assert_same(few[index], cache[before])


def whole(array: Any) -> Any:
    """The array that a view is of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
