"""Mixtures of caches: the order of their samples, and training from several with weights."""

import shutil
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from cache_schema import IdentityMismatch, open_cache
from cache_schema.errors import WrongUsage
from cache_schema.progress import Silent
from student.collate import _position_targets
from student.mixture import MixedOrder, MixedStream, interleaved
from student.order import Catalogue, StreamConfig
from student.settings import TrainConfig
from student.sources import Mixture, Source
from student.stages import DFT, open_recipe
from student.train import train
from tests.student_caches import SPEC, fake_capture, make_world
from tests.test_student_stream import FakeCache
from tests.tiny_models import tiny_llava


@dataclass(frozen=True)
class Numbered:
    shard: int
    place: int
    source: int = 0


class Cache(FakeCache):
    """Its samples know where they stand."""

    def read_shard(self, shard, *, parts=None, images=False):
        block = super().read_shard(shard, parts=parts, images=images)
        block.sample = lambda place: Numbered(shard, place)
        return block


def caches():
    return [Cache([7, 5, 9], seed=1), Cache([6, 8, 4, 9, 9, 3], seed=2), Cache([11], seed=3)]


def stream_of(*, shares=(5, 3, 2), batch=8, micro=3, rank=0, world=1, **config):
    catalogue = Catalogue(caches())
    return MixedStream(
        catalogue,
        StreamConfig(global_batch=batch, **config),
        [catalogue.samples_of(source) for source in range(3)],
        shares,
        micro_batch=micro,
        targets=("response",),
        rank=rank,
        world_size=world,
    )


def read(stream, start, stop):
    return [
        [[located.sample() for located in part] for part in step.micro_batches]
        for step in stream.read(start, stop)
    ]


CONFIGS = [
    {"window": 3},
    {"window": 3, "group_by_modality": True},
    {"window": 100, "seed": 5},
    {"window": 3, "group_by_modality": True, "mega_batch": 4},
    {"window": 2, "shares": None},
    {"shares": (0.98, 0.01, 0.01)},
]


@pytest.mark.parametrize(
    "shares", [(0.5, 0.3, 0.2), (0.9, 0.05, 0.05), (1 / 3,) * 3, (1.0,), (0.7, 0.3, 0.0)]
)
def test_parts_are_interleaved_evenly_wherever_one_begins(shares):
    shares = np.array(shares)
    whole, _ = interleaved(shares, 0, 3000)
    counts = np.stack([np.cumsum(whole == part) for part in range(len(shares))], axis=1)
    assert np.abs(counts - np.arange(1, 3001)[:, None] * shares).max() < 1
    for start in (0, 1, 2, 3, 10, 333, 1777, 2499):
        found, before = interleaved(shares, start, 500)
        assert found.tolist() == whole[start : start + 500].tolist()
        assert before.tolist() == np.bincount(whole[:start], minlength=len(shares)).tolist()


@pytest.mark.parametrize("config", CONFIGS)
def test_restored_at_every_step_it_gives_exactly_the_rest(config):
    whole = stream_of(**config)
    total = 2 * whole.steps_per_epoch + 1
    expected = read(whole, 0, total)
    for step in range(total):
        assert read(stream_of(**config), step, total) == expected[step:]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("world", [2, 3, 11])
def test_ranks_share_out_the_same_global_batches(config, world):
    alone = stream_of(**config)
    total = alone.steps_per_epoch + 2
    parts = [read(stream_of(rank=rank, world=world, **config), 1, total) for rank in range(world)]
    for step, expected in enumerate(read(alone, 1, total)):
        shares = [parts[rank][step] for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        together = Counter(sample for share in shares for micro in share for sample in micro)
        assert together == Counter(sample for micro in expected for sample in micro)


@pytest.mark.parametrize("config", CONFIGS)
def test_samples_come_by_their_caches_shares_and_each_pass_is_whole(config):
    stream = stream_of(**config)
    steps = read(stream, 0, 40)
    seen = [sample for step in steps for micro in step for sample in micro]
    assert len(seen) == 40 * 8
    sizes = np.array([21, 39, 11])
    shares = np.array(config.get("shares", (5, 3, 2)) or sizes)
    counts = np.bincount([sample.source for sample in seen], minlength=3)
    slack = 9 if config.get("group_by_modality") else 1
    assert np.abs(counts - 320 * shares / shares.sum()).max() < slack
    if not config.get("group_by_modality"):
        for source, size in enumerate(sizes):
            drawn = Counter(sample for sample in seen if sample.source == source)
            assert len(drawn) == min(size, counts[source])
            assert max(drawn.values()) - min(drawn.values()) <= 1 or len(drawn) < size
            assert max(drawn.values()) == -(-counts[source] // size)


def test_batches_are_of_one_modality_and_full():
    stream = stream_of(group_by_modality=True)
    catalogue = Catalogue(caches())
    for batch in stream.batches(0) + stream.batches(1):
        assert len(batch) == 8
        assert len(set(catalogue.with_image[batch].tolist())) == 1
    kinds = [bool(catalogue.with_image[batch[0]]) for batch in stream.batches(0)]
    assert {True, False} == set(kinds)


def test_other_shares_go_on_where_every_domain_was():
    catalogue = Catalogue(caches())
    domains = [catalogue.samples_of(source) for source in range(3)]

    def order(shares):
        return MixedOrder(catalogue, StreamConfig(global_batch=8, group_by_modality=True), domains, shares)

    def walked(made, changes, steps):
        """The batches of steps with other shares from each of `changes` on."""
        found = []
        for step in range(steps):
            if step in changes:
                made.reweigh(step, changes[step])
            epoch, batch = divmod(step - made.start, made.steps_per_epoch)
            found.append(made.batches(epoch)[batch].tolist())
        return found

    changes = {3: (1, 1, 8), 7: (8, 1, 1), 20: (1, 8, 1)}
    expected = walked(order((1, 1, 1)), changes, 30)
    # As if nothing had changed, with the same shares.
    same = walked(order((1, 1, 1)), {3: (1, 1, 1), 11: (1, 1, 1)}, 30)
    assert same[:3] == expected[:3]
    assert same[4:] != expected[4:]
    stretch = np.bincount(
        np.searchsorted([21, 60], np.concatenate(expected[7:20]), side="right"), minlength=3
    )
    assert np.abs(stretch - 13 * 8 * np.array([0.8, 0.1, 0.1])).max() < 9
    for step in range(30):
        before = order((1, 1, 1))
        walked(before, changes, step)
        after = order((1, 1, 1))
        after.restore(before.weighting)
        rest = {at: shares for at, shares in changes.items() if at >= step}
        found = []
        for number in range(step, 30):
            if number in rest:
                after.reweigh(number, rest[number])
            epoch, batch = divmod(number - after.start, after.steps_per_epoch)
            found.append(after.batches(epoch)[batch].tolist())
        assert found == expected[step:]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    made = make_world(folder)
    fake_capture(folder / "second", folder / "teacher", folder / "elsewhere", seed=7, rows=10, shard_size=4)
    return made


def settings(world, out, sources=None, **changes):
    first = Source(cache=str(world.cache), weight=3.0)
    folder = world.cache.parent
    second = Source(cache=str(folder / "second"), image_root=str(folder / "elsewhere"), weight=1.0)
    return TrainConfig(
        stage=replace(DFT, global_batch=8, max_steps=4, learning_rate=1e-3),
        student=world.student,
        cache=None,
        mixture=Mixture(sources=sources or (first, second)),
        image_root=str(world.image_root),
        out=out,
        **{
            "log_every": 1,
            "trackers": (),
            "workers": 1,
            "save_every": 1,
            "keep": 9,
            "device": "cpu",
            **changes,
        },
    )


def test_a_stage_learns_from_two_caches_each_with_its_images(world, tmp_path):
    result = train(settings(world, tmp_path / "run"), Silent())
    assert result["samples"] == 32
    assert {place: each["weight"] for place, each in result["identity"]["caches"].items()} == {
        "0": 3.0,
        "1": 1.0,
    }
    recipe = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert [each["weight"] for each in recipe["caches"]] == [3.0, 1.0]
    # A run from one of the caches alone is another one.
    train(replace(settings(world, tmp_path / "one"), mixture=None, cache=str(world.cache)), Silent())
    mixed, alone = (load_file(tmp_path / name / "model/model.safetensors") for name in ("run", "one"))
    assert any(not torch.equal(mixed[name], alone[name]) for name in mixed)


def test_caches_of_other_temperatures_and_numbers_of_entries_are_mixed(world, tmp_path):
    spec = replace(SPEC, top_k=8, temperatures=(1.0, 1.5, 2.0))
    other = fake_capture(
        tmp_path / "other", world.cache.parent / "teacher", world.image_root, rows=8, spec=spec, seed=5
    )
    config = settings(world, tmp_path / "run", (Source(cache=str(world.cache)), Source(cache=str(other))))
    train(replace(config, max_steps=2), Silent())
    first, second = (next(iter(open_cache(cache))) for cache in (world.cache, other))
    together = _position_targets([first, second], 400, "response", 1.0, dense=False)
    assert together.temperatures.tolist() == [1.0, 2.0]
    count = len(first.response)
    np.testing.assert_array_equal(together.tail_logprob[:count], first.response.tail_logprob)
    np.testing.assert_array_equal(together.tail_logprob[count:], second.response.tail_logprob[:, [0, 2]])


def test_a_resumed_mixture_ends_with_the_same_bits(world, tmp_path):
    whole = settings(world, tmp_path / "whole")
    train(whole, Silent())
    expected = load_file(tmp_path / "whole/model/model.safetensors")
    for step in (1, 2, 3):
        out = tmp_path / str(step)
        kept = f"checkpoints/step-{step:08d}"
        shutil.copytree(whole.out / kept, out / kept)
        train(replace(whole, out=out, resume=True), Silent())
        found = load_file(out / "model/model.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_weight_or_cache_is_another_run(world, tmp_path):
    config = settings(world, tmp_path)
    train(config, Silent())
    first, second = config.mixture.sources
    with pytest.raises(IdentityMismatch, match=r"caches\.1\.weight is 2\.0 now and was 1\.0"):
        train(settings(world, tmp_path, (first, replace(second, weight=2.0))), Silent())
    with pytest.raises(IdentityMismatch, match=r"caches\.0\.identity"):
        train(settings(world, tmp_path, (replace(second, weight=3.0), replace(first, weight=1.0))), Silent())


def test_a_cache_of_another_tokenizer_is_refused_by_name(world, tmp_path):
    teacher = tiny_llava(tmp_path / "other", seed=3, words=330)
    strange = fake_capture(tmp_path / "strange", teacher, tmp_path / "images", rows=6)
    sources = (
        Source(cache=str(world.cache)),
        Source(cache=str(strange), image_root=str(tmp_path / "images")),
    )
    with pytest.raises(IdentityMismatch, match=rf"does not fit the cache {strange}: tokenizer"):
        train(settings(world, tmp_path / "run", sources), Silent())
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_recipe_lists_the_caches_of_a_stage(tmp_path):
    file = tmp_path / "mixed.yaml"
    file.write_text(
        "stages:\n  - base: dft\n    image_root: pictures\n    caches:\n      - a\n"
        "      - {cache: b, image_root: other}\n"
    )
    recipe = open_recipe(str(file))
    assert recipe.stages[0].mixture == Mixture(
        sources=(Source(cache="a"), Source(cache="b", image_root="other"))
    )
    assert recipe.image_roots == {"dft": "pictures"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caches: a", "must be a list of caches"),
        ("caches: []", "must be a list of caches"),
        ("caches: [{cache: a, weight: 1}, b]", "either all caches have a weight or none"),
        ("caches: [{cache: a, weight: 0}]", "weight must"),
        ("caches: [{cache: a, share: 1}]", r"unknown keys \['share'\]"),
        ("caches: [a, a]", "named once"),
        ("caches: [3]", "a path or a mapping"),
        ("cache: a\n    caches: [b]", "either cache or caches"),
    ],
)
def test_what_is_no_mixture_is_refused(tmp_path, text, message):
    file = tmp_path / "mixed.yaml"
    file.write_text(f"stages:\n  - base: dft\n    {text}\n")
    with pytest.raises(WrongUsage, match=message):
        open_recipe(str(file))
