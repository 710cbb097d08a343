"""The public dataset: it yields what `kdcache train` reads, on any number of workers and processes."""

import json
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoProcessor

from cache_schema import IdentityMismatch, KdcacheError, open_cache
from cache_schema.errors import WrongUsage
from cache_schema.format.spec import KINDS
from student.dataset import CachedSamples
from student.domains import discrepancy
from student.mixture import MixedStream
from student.order import Catalogue, StreamConfig
from student.sources import Mixture, Source
from tests.student_caches import fake_capture, make_world

BATCH = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("dataset"), rows=14, shard_size=4)


@pytest.fixture(scope="module")
def processor(world):
    return AutoProcessor.from_pretrained(world.student)


def dataset(world, processor, **options):
    options = {"batch_size": BATCH, "image_root": world.image_root, "seed": 3, **options}
    return CachedSamples(world.cache, processor, **options)


def rows_of(loader):
    return [[item["row"] for item in batch] for batch in loader]


def loader_of(data, workers=0):
    return DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=list)


def test_items_are_what_the_cache_holds(world, processor):
    cache = open_cache(world.cache)
    stored = {cache[i].row: cache[i] for i in range(len(cache))}
    seen = set()
    for item in dataset(world, processor):
        sample = stored[item["row"]]
        seen.add(sample.row)
        np.testing.assert_array_equal(item["input_ids"], sample.input_ids)
        np.testing.assert_array_equal(item["labels"], sample.labels)
        for kind in KINDS:
            record = sample.records[kind]
            assert (kind in item) == (record is not None)
            if record is not None:
                np.testing.assert_array_equal(item[kind]["positions"], sample.positions[kind])
                np.testing.assert_array_equal(item[kind]["token_ids"], record.token_ids)
                np.testing.assert_array_equal(item[kind]["logprobs"], record.logprobs)
        for given, relation in zip(item["relations"], sample.relations, strict=True):
            np.testing.assert_array_equal(given["factor"], relation.factor)
        assert ("pixel_values" in item["pixels"]) == bool(sample.images)
    assert len(seen) == 12  # four batches of three; two samples fill none


def test_a_collated_batch_is_that_of_the_trainer(world, processor):
    data = dataset(world, processor)
    items = [item for _, item in zip(range(BATCH), data, strict=False)]
    made = data.collate(items)
    stream, collator = data._opened
    (step,) = stream.read(0, 1)
    theirs = collator([located.sample() for located in step.micro_batches[0]])
    assert made.keys() == {*theirs.inputs, "labels", "targets"}
    for name, value in theirs.inputs.items():
        torch.testing.assert_close(made[name], value, rtol=0, atol=0)
    torch.testing.assert_close(made["labels"], theirs.labels, rtol=0, atol=0)
    for kind, target in theirs.targets.positions.items():
        ours = made["targets"].positions[kind]
        for name in ("positions", "token_ids", "logprobs", "tail_logprob"):
            torch.testing.assert_close(getattr(ours, name), getattr(target, name), rtol=0, atol=0)
    for ours, target in zip(made["targets"].relations, theirs.targets.relations, strict=True):
        torch.testing.assert_close(ours.factor, target.factor, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_change_nothing(world, processor):
    alone = dataset(world, processor)
    epochs = [rows_of(loader_of(alone)) for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert all(sorted(map(len, epoch)) == [BATCH] * 4 for epoch in epochs)
    shared = dataset(world, processor)
    for epoch, expected in enumerate(epochs):
        shared.set_epoch(epoch)
        assert rows_of(loader_of(shared, workers=2)) == expected


def test_processes_share_every_global_batch(world, processor):
    whole = rows_of(DataLoader(dataset(world, processor, batch_size=4), batch_size=4, collate_fn=list))
    two = [dataset(world, processor, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    parts = [rows_of(DataLoader(data, batch_size=2, collate_fn=list)) for data in two]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]


@pytest.mark.parametrize("stop", range(4))
def test_a_restored_place_goes_on_where_it_was(world, processor, stop):
    undisturbed = dataset(world, processor)
    expected = rows_of(loader_of(undisturbed)) + rows_of(loader_of(undisturbed))
    first = dataset(world, processor)
    batches = iter(loader_of(first))
    done = [[item["row"] for item in next(batches)] for _ in range(stop)]
    state = first.state_dict()
    second = dataset(world, processor)
    second.load_state_dict(state)
    rest = rows_of(loader_of(second)) + rows_of(loader_of(second))
    assert done + rest == expected


class Workers:
    """What torchdata's StatefulDataLoader does: its workers' copies of a dataset, asked in turn, each with
    the state that it had after its last batch."""

    def __init__(self, copies, monkeypatch, states=None, asked=0):
        self.copies, self.asked = copies, asked
        for copy, state in zip(copies, states or [], strict=False):
            copy.load_state_dict(state)
        self.states = [copy.state_dict() for copy in copies]
        self.open = [iter(copy) for copy in copies]
        self.patch = lambda number: monkeypatch.setattr(
            "student.dataset.get_worker_info", lambda: SimpleNamespace(id=number, num_workers=len(copies))
        )

    def batches(self, count):
        """The next batches, until the first worker that has none is asked."""
        for _ in range(count):
            number = self.asked % len(self.copies)
            self.asked += 1
            self.patch(number)
            batch = [item["row"] for item in islice(self.open[number], BATCH)]
            if not batch:
                return
            self.states[number] = self.copies[number].state_dict()
            yield batch


@pytest.mark.parametrize("stop", range(5))
@pytest.mark.parametrize("workers", [2, 3])
def test_the_states_of_workers_go_on_where_they_were(world, processor, monkeypatch, workers, stop):
    expected = rows_of(loader_of(dataset(world, processor)))
    assert len(expected) == 4
    first = Workers([dataset(world, processor) for _ in range(workers)], monkeypatch)
    done = list(first.batches(stop))
    states = json.loads(json.dumps(first.states))
    second = Workers([dataset(world, processor) for _ in range(workers)], monkeypatch, states, first.asked)
    assert done + list(second.batches(9)) == expected


def test_what_cannot_be_read_is_refused(world, processor):
    with pytest.raises(KdcacheError, match="has no prompt targets"):
        dataset(world, processor, targets=["prompt"])
    with pytest.raises(KdcacheError, match="give image_root"):
        dataset(world, processor, image_root=None)
    with pytest.raises(KdcacheError, match="14 samples, a batch 15"):
        dataset(world, processor, batch_size=15)
    with pytest.raises(KdcacheError, match="make no batches"):
        dataset(world, processor, rank=2, world_size=2)


@pytest.fixture(scope="module")
def sources(world):
    folder = world.cache.parent
    fake_capture(folder / "second", folder / "teacher", folder / "elsewhere", seed=7, rows=10, shard_size=4)
    return [
        Source(cache=str(world.cache), weight=1.0),
        Source(cache=str(folder / "second"), image_root=str(folder / "elsewhere"), weight=3.0),
    ]


def mixture(world, sources, processor, **options):
    options = {"batch_size": 4, "image_root": world.image_root, "seed": 3, "window": 2, **options}
    return CachedSamples(sources, processor, **options)


def places_of(data, workers=0, size=4):
    loader = DataLoader(data, batch_size=size, num_workers=workers, collate_fn=list)
    return [[(item["source"], item["row"]) for item in batch] for batch in loader]


def the_trainers(sources, steps, weights=(1.0, 3.0), start=0, later=None):
    """As `kdcache train` reads the same settings: `student.feed`. later: the shares from `start` on."""
    caches = [open_cache(source.cache) for source in sources]
    catalogue = Catalogue(caches)
    domains = [catalogue.samples_of(number) for number in range(2)]
    order = StreamConfig(seed=3, global_batch=4, window=2)
    stream = MixedStream(catalogue, order, domains, weights, micro_batch=2, targets=("response",))
    if later is not None:
        stream.order.reweigh(start, later)
    samples = [
        [each.sample() for part in step.micro_batches for each in part] for step in stream.read(start, steps)
    ]
    return [[(sample.source, sample.row) for sample in batch] for batch in samples]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_mixture_has_the_order_of_the_trainer_on_all_ranks_and_workers(world, sources, processor):
    data = mixture(world, sources, processor)
    assert data.steps_per_epoch == 6  # 24 samples, four a batch
    expected = the_trainers(sources, 12)
    assert [places_of(data), places_of(data)] == [expected[:6], expected[6:]]
    drawn = [source for batch in expected for source, _ in batch]
    assert (drawn.count(0), drawn.count(1)) == (12, 36)
    shared = mixture(world, sources, processor)
    for epoch in range(2):
        shared.set_epoch(epoch)
        assert places_of(shared, workers=2) == expected[6 * epoch : 6 * epoch + 6]
    ranks = [mixture(world, sources, processor, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    parts = [places_of(data, size=2) for data in ranks]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in expected[:6]]


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_mixture_goes_on_where_it_was_on_other_processes(world, sources, processor, stop):
    expected = the_trainers(sources, 18)
    first = mixture(world, sources, processor)
    done = []
    while len(done) < stop:
        for batch in DataLoader(first, batch_size=4, collate_fn=list):
            done.append([(item["source"], item["row"]) for item in batch])
            if len(done) == stop:
                state = first.state_dict()
                break
    assert done == expected[:stop]
    found = []
    for rank in range(2):
        data = mixture(world, sources, processor, batch_size=2, rank=rank, world_size=2)
        data.load_state_dict(state)
        found.append(places_of(data, size=2) + places_of(data, size=2))
    together = [sorted(a + b) for a, b in zip(*found, strict=True)]
    assert together == [sorted(batch) for batch in expected[stop : stop + len(together)]]
    assert len(together) == 12 - stop % 6


def test_the_pixels_of_a_mixture_are_those_of_each_caches_images(world, sources, processor):
    alone = {
        (number, item["row"]): item["pixels"]
        for number, source in enumerate(sources)
        for item in CachedSamples(
            source.cache, processor, batch_size=1, image_root=source.image_root or world.image_root
        )
    }
    for item in mixture(world, sources, processor):
        expected = alone[item["source"], item["row"]]
        assert item["pixels"].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(item["pixels"][name], value, rtol=0, atol=0)


def test_caches_that_do_not_mix_are_refused(world, sources, processor, tmp_path):
    strange = fake_capture(
        tmp_path / "strange", world.cache.parent / "teacher", tmp_path / "i", training={"tokenizer": "0" * 64}
    )
    both = [Source(cache=str(world.cache)), Source(cache=str(strange), image_root=str(tmp_path / "i"))]
    with pytest.raises(IdentityMismatch, match=r"strange and .* have different tokenizers"):
        mixture(world, both, processor)
    with pytest.raises(KdcacheError, match="either all caches have a weight or none"):
        mixture(world, [sources[0], Source(cache=sources[1].cache)], processor)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("stop", [0, 2, 6])
def test_shares_that_are_set_on_the_way_are_those_of_ddk_in_the_trainer(world, sources, processor, stop):
    shares = discrepancy([2.0, 3.0], [1.5, 1.0], None, 0.5)  # cross entropies of student and teacher
    expected = the_trainers(sources, 18, start=stop, later=shares)
    data = mixture(world, sources, processor)
    before = islice(DataLoader(data, batch_size=4, collate_fn=list), stop)
    found = [[(item["source"], item["row"]) for item in batch] for batch in before]
    data.set_shares(shares)
    found += places_of(data)
    assert found[:stop] == the_trainers(sources, stop)
    assert found[stop:] == expected[: len(found) - stop]
    fewer = sum(source == 0 for batch in found[stop:] for source, _ in batch)
    assert abs(fewer - shares[0] * 4 * (len(found) - stop)) < 1

    state = json.loads(json.dumps(data.state_dict()))
    ranks = []
    for rank in range(2):  # a checkpoint has the shares, for any number of processes and workers
        again = mixture(world, sources, processor, batch_size=2, rank=rank, world_size=2)
        again.load_state_dict(state)
        ranks.append(places_of(again, size=2, workers=rank))
    begin = len(found) - stop
    together = [sorted(a + b) for a, b in zip(*ranks, strict=True)]
    assert together == [sorted(batch) for batch in expected[begin : begin + len(together)]]
    again.load_state_dict({"step": 0})
    assert again.state_dict() == {"step": 0}


def test_an_iteration_ends_where_shares_are_set(world, sources, processor):
    data, found = mixture(world, sources, processor), []
    while len(found) < 7:
        for batch in DataLoader(data, batch_size=4, collate_fn=list):
            found.append([(item["source"], item["row"]) for item in batch])
            if len(found) == 4:
                data.set_shares([1.0, 0.0])
    assert found == the_trainers(sources, 4) + the_trainers(sources, len(found), start=4, later=[1.0, 0.0])
    assert {source for batch in found[4:] for source, _ in batch} == {0}
    with pytest.raises(WrongUsage, match="epoch 0 begins before step 4"):
        data.set_epoch(0)


def test_shares_that_cannot_be_set_are_refused(world, sources, processor):
    data = mixture(world, sources, processor)
    for wrong in ([1.0], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]):
        with pytest.raises(WrongUsage, match="shares must be 2 numbers"):
            data.set_shares(wrong)
    with pytest.raises(WrongUsage, match="here is one cache"):
        dataset(world, processor).set_shares([1.0])
    with pytest.raises(WrongUsage, match="give them to set_shares"):
        mixture(world, Mixture(sources=tuple(Source(cache=s.cache) for s in sources), rule="ddk"), processor)
