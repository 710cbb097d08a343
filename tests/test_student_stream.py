"""The stream: its order, its whole-block reads, and that a step number is all of its state."""

import time
import weakref
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from student.loader import load_ahead
from student.stream import AHEAD, Stream, StreamConfig


class FakeBlock:
    """A block whose samples are (shard, place)."""

    def __init__(self, shard, length, payload=0):
        self.shard, self.length, self.payload = shard, length, bytearray(payload)

    def sample(self, place):
        assert 0 <= place < self.length
        return (self.shard, place)


class FakeCache:
    """Sizes and reads of a cache, without a disk; counts what is read and what is alive."""

    url = "fake"

    def __init__(self, lengths, seed=0, text_share=0.3, payload=0):
        random = np.random.default_rng(seed)
        self.lengths, self.payload = lengths, payload
        self.shards = [2 * shard + 1 for shard in range(len(lengths))]
        count = sum(lengths)
        self._index = SimpleNamespace(
            tokens=random.integers(5, 200, count), images=(random.random(count) > text_share).astype(int)
        )
        self.reads, self.parts, self.alive = [], set(), weakref.WeakSet()

    def __len__(self):
        return sum(self.lengths)

    def index(self):
        return self._index

    def shard_length(self, shard):
        return self.lengths[self.shards.index(shard)]

    def read_shard(self, shard, *, parts=None, images=False):
        self.reads.append(shard)
        self.parts.add(tuple(parts))
        block = FakeBlock(shard, self.shard_length(shard), self.payload)
        self.alive.add(block)
        return block


def numbers(cache):
    """(shard, place) -> sample number."""
    starts = np.concatenate([[0], np.cumsum(cache.lengths)])
    return {
        (shard, place): int(starts[i]) + place
        for i, shard in enumerate(cache.shards)
        for place in range(cache.lengths[i])
    }


def read_all(stream, cache, start, stop):
    number = numbers(cache)
    return [
        [[number[located.sample()] for located in part] for part in step.micro_batches]
        for step in stream.read(start, stop)
    ]


def stream_of(cache, *, batch=8, micro=3, rank=0, world=1, **config):
    return Stream(
        cache,
        StreamConfig(global_batch=batch, **config),
        micro_batch=micro,
        rank=rank,
        world_size=world,
        targets=("response",),
    )


CONFIGS = [
    {"window": 3},
    {"window": 3, "group_by_modality": True},
    {"window": 100, "seed": 5},
    {"window": 3, "group_by_modality": True, "mega_batch": 4},
    {"window": 3, "mega_batch": 3},
    {"shuffle": False},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_restored_at_every_step_it_gives_exactly_the_rest(config):
    cache = FakeCache([7, 5, 9, 1, 6, 8, 4])
    whole = stream_of(cache, **config)
    total = 2 * whole.steps_per_epoch + 1
    expected = read_all(whole, cache, 0, total)
    for step in range(total):
        assert read_all(stream_of(cache, **config), cache, step, total) == expected[step:]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("world", [2, 3, 11])
def test_ranks_share_out_the_same_global_batches(config, world):
    cache = FakeCache([7, 5, 9, 1, 6, 8, 4])
    alone = stream_of(cache, **config)
    total = alone.steps_per_epoch + 2
    parts = [read_all(stream_of(cache, rank=r, world=world, **config), cache, 1, total) for r in range(world)]
    for step, expected in enumerate(read_all(alone, cache, 1, total)):
        shares = [parts[rank][step] for rank in range(world)]
        assert len({len(share) for share in shares}) == 1  # FSDP counts on equally many forward passes
        together = sorted(number for share in shares for micro in share for number in micro)
        assert together == sorted(number for micro in expected for number in micro)


@pytest.mark.parametrize("config", CONFIGS)
def test_an_epoch_is_every_sample_once_and_the_next_another_order(config):
    cache = FakeCache([7, 5, 9, 1, 6, 8, 4])
    stream = stream_of(cache, **config)
    epochs = [np.concatenate(stream.batches(epoch)).tolist() for epoch in range(2)]
    assert all(sorted(epoch) == list(range(len(cache))) for epoch in epochs)
    assert len(stream.batches(0)) == stream.steps_per_epoch
    assert (epochs[0] != epochs[1]) == config.get("shuffle", True)


def test_the_order_is_a_function_of_the_seed():
    cache = FakeCache([50] * 6)
    first, again, other = (stream_of(cache, seed=seed).batches(0) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_batches_are_of_one_modality_but_for_the_last():
    cache = FakeCache([40] * 10)
    stream = stream_of(cache, group_by_modality=True, window=4)
    kinds = [set((cache.index().images[batch] > 0).tolist()) for batch in stream.batches(0)]
    full = [kind for kind, batch in zip(kinds, stream.batches(0), strict=True) if len(batch) == 8]
    assert sum(len(kind) == 2 for kind in kinds) <= 2
    assert {frozenset(kind) for kind in full[:-2]} == {frozenset({True}), frozenset({False})}


def test_batches_are_sorted_by_length():
    cache = FakeCache([40] * 10)
    for batch in stream_of(cache, window=4).batches(3):
        assert (np.diff(cache.index().tokens[batch]) <= 0).all()


def test_each_shard_is_read_once_an_epoch_and_few_are_held():
    cache = FakeCache([50] * 40)
    stream = stream_of(cache, window=4, batch=10)
    alive = []
    for step in stream.read(0, stream.steps_per_epoch):
        del step
        alive.append(len(cache.alive))
    assert sorted(cache.reads) == sorted(cache.shards)
    assert cache.parts == {("response",)}
    assert 4 <= max(alive) <= 8  # the window, what is read ahead, the batch in hand


def test_the_next_shards_are_on_their_way_while_a_step_is_taken():
    cache = FakeCache([20] * 8)
    steps = stream_of(cache, batch=5, micro=5, shuffle=False).read(0, 32)
    for number in (0, 1, 4, 12, 31):
        while next(steps).number < number:
            pass
        due = min(number // 4 + 1 + AHEAD, 8)  # the shard in use, and those that nobody has asked for yet
        for _ in range(1000):
            if len(cache.reads) == due:
                break
            time.sleep(0.01)
        assert cache.reads == cache.shards[:due]


def test_the_window_mixes_shards():
    cache = FakeCache([50] * 40)
    order = np.concatenate(stream_of(cache, window=4, batch=10).batches(0))
    shards = order // 50
    middle = [len(set(shards[i : i + 50].tolist())) for i in range(500, 1500, 50)]
    assert np.mean(middle) >= 4


def test_reading_stops_cleanly_in_the_middle():
    cache = FakeCache([50] * 40)
    steps = stream_of(cache, window=4).read(0, 100)
    next(steps)
    steps.close()
    assert len(cache.reads) < 10


def test_a_damaged_shard_reaches_the_loop():
    cache = FakeCache([5] * 4)

    def broken(shard, *, parts=None, images=False):
        raise OSError("shard is gone")

    cache.read_shard = broken
    with pytest.raises(OSError, match="shard is gone"):
        list(load_ahead(stream_of(cache).read(0, 1), list, workers=2))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_do_not_change_what_comes_out(workers):
    cache = FakeCache([7, 5, 9, 1, 6, 8, 4])
    stream = stream_of(cache, window=3)
    expected = list(load_ahead(stream.read(0, 9), list, workers=0))
    assert list(load_ahead(stream.read(0, 9), list, workers=workers)) == expected
    assert [step for step, _ in expected] == list(range(9))


def test_memory_stays_flat_over_an_epoch_of_100000_samples():
    cache = FakeCache([500] * 200, payload=2_000_000)
    stream = stream_of(cache, window=4, batch=100, micro=25)
    process = psutil.Process()
    seen = []
    for step, _ in load_ahead(stream.read(0, stream.steps_per_epoch), list, workers=2):
        if step % 50 == 0:
            seen.append(process.memory_info().rss / 1e6)
    assert max(seen[4:]) - seen[3] < 20  # MB; the epoch's blocks are 400 MB


def test_mega_batches_are_a_function_of_seed_and_epoch_and_lessen_padding():
    cache = FakeCache([8] * 12)
    lengths = np.asarray(cache.index().tokens)

    def batches(mega, seed=0, epoch=0):
        config = StreamConfig(seed=seed, global_batch=4, window=100, mega_batch=mega)
        return Stream(cache, config, micro_batch=4).batches(epoch)

    def padding(made):
        return sum(int((lengths[batch].max() - lengths[batch]).sum()) for batch in made)

    grouped = batches(8)
    assert sorted(np.concatenate(grouped).tolist()) == list(range(96))
    assert all(np.array_equal(a, b) for a, b in zip(grouped, batches(8), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(grouped, batches(8, epoch=1), strict=True))
    assert padding(grouped) < 0.5 * padding(batches(1))
    # Within a mega-batch the order of lengths is shuffled again: no step trains on ever shorter samples.
    means = [lengths[batch].mean() for batch in grouped[:8]]
    assert means != sorted(means, reverse=True)
