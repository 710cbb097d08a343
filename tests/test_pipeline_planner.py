"""The plan: deterministic, every row once, rows of one image in one shard."""

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.shard_plan import plan_rows


def shards_of(order: np.ndarray, shard_size: int) -> np.ndarray:
    shards = np.empty(len(order), dtype=np.int64)
    shards[order] = np.arange(len(order)) // shard_size
    return shards


def split_groups(images: np.ndarray, shards: np.ndarray) -> int:
    """How many images have their rows in more than one shard."""
    pairs = np.unique(np.stack([images[images != 0], shards[images != 0]]), axis=1)
    return pairs.shape[1] - len(np.unique(pairs[0]))


@given(
    images=st.lists(st.integers(-3, 6), min_size=1, max_size=80),
    shard_size=st.integers(1, 12),
    seed=st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_every_row_stands_once_and_groups_stand_together(
    images: list[int], shard_size: int, seed: int
) -> None:
    keys = np.array(images, dtype=np.int64)
    plan = plan_rows(keys, shard_size=shard_size, seed=seed)  # Plan itself checks for a permutation
    assert np.array_equal(plan.order, plan_rows(keys, shard_size=shard_size, seed=seed).order)
    for shard in range(plan.shards):
        here = keys[plan.rows_of(shard)]
        runs = 1 + np.count_nonzero(here[1:] != here[:-1])
        alone = np.count_nonzero(here == 0)
        assert len(np.unique(here[here != 0])) <= runs <= len(np.unique(here[here != 0])) + alone


def test_no_group_is_split_where_single_rows_make_room() -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(1, 2000, 3000)
    images[generator.random(3000) < 0.1] = 0
    plan = plan_rows(images, shard_size=64, seed=0)
    shards = shards_of(plan.order, 64)
    assert split_groups(images, shards) == 0
    text_only = np.bincount(shards[images == 0], minlength=plan.shards)
    assert text_only.max() <= 20, "rows without an image should be spread over the shards"
    assert not np.array_equal(plan.order, plan_rows(images, shard_size=64, seed=1).order)


def test_a_group_over_the_shard_size_is_split_as_little_as_possible() -> None:
    images = np.array([5] * 10 + [0] * 6)
    shards = shards_of(plan_rows(images, shard_size=4, seed=0).order, 4)
    assert len(np.unique(shards[images == 5])) == 3


def test_planning_665k_rows_is_quick() -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(1, 380_000, 665_000)
    start = time.process_time()
    plan = plan_rows(images, shard_size=512, seed=0)
    assert time.process_time() - start < 30.0
    assert split_groups(images, shards_of(plan.order, 512)) <= 3
