"""Packs: several conversations about one image in one sequence give the hidden states of each alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schema import KdcacheError, TargetSpec, open_cache
from cache_schema.datasets.conversations import conversation_of
from cache_schema.progress import Silent
from models.folder import load_processor
from models.pixels import _TableProcessor, with_table
from models.tokens import image_token_id_of
from pipeline.capture import BuildConfig, build
from pipeline.packing import Pack, batches, make_pack, pack_samples
from pipeline.prefix import packing_is_exact, prefix_keys
from pipeline.samples import PreparedSample, SamplePreparer
from pipeline.templates import load_template
from pipeline.transformers_engine import TransformersEngine, load_engine
from tests.tiny_families import make, names
from tests.tiny_models import tiny_dataset, tiny_llava, write_png


def a_sample(ids: list[int], row: int = 0) -> PreparedSample:
    return PreparedSample(
        row=row,
        sample_id="",
        input_ids=np.array(ids, dtype=np.int32),
        label_spans=np.zeros((0, 2), dtype=np.int32),
        images=(),
        token_inputs={},
        pixel_inputs={},
        answers_kept=0,
    )


def test_a_pack_sees_its_prefix_and_itself() -> None:
    pack = make_pack([a_sample([1, 2, 3, 4]), a_sample([1, 2, 5]), a_sample([1, 2, 6, 7])])
    assert pack.prefix == 2
    assert len(pack) == 7
    assert pack.join([sample.input_ids for sample in pack.samples]).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert pack.join([np.arange(len(s)) for s in pack.samples]).tolist() == [0, 1, 2, 3, 2, 2, 3]
    # columns: 1 2 | 3 4 | 5 | 6 7 | padding
    assert pack.visible(8).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]
    parts = pack.split(torch.arange(8)[:, None])
    assert [part[:, 0].tolist() for part in parts] == [[0, 1, 2, 3], [0, 1, 4], [0, 1, 5, 6]]


def test_equal_samples_and_single_ones_are_packs_too() -> None:
    twins = make_pack([a_sample([1, 2]), a_sample([1, 2])])
    assert (twins.prefix, len(twins)) == (2, 2)
    assert [part[:, 0].tolist() for part in twins.split(torch.arange(2)[:, None])] == [[0, 1], [0, 1]]
    single = make_pack([a_sample([1, 2, 3])])
    assert len(single) == 3
    assert single.visible(3).tolist() == np.tri(3, dtype=bool).tolist()


def test_packs_stay_within_their_limits() -> None:
    samples = [replace(a_sample([1] * 10 + [row] * 8), row=row - 2) for row in range(2, 9)]
    singles = [Pack(samples=(sample,)) for sample in samples]

    def grouped(keys: list[str | None], limit: int) -> list[list[int]]:
        packs = pack_samples(singles, keys, limit)
        assert all(pack == make_pack(pack.samples) for pack in packs)
        return [[sample.row for sample in pack.samples] for pack in packs]

    keys = ["a"] * 6 + [None]
    assert grouped(keys, limit=1000) == [[0, 1], [2, 3], [4, 5], [6]], "30 tokens are 3 prefixes"
    assert grouped(keys, limit=20) == [[i] for i in range(7)]
    assert grouped([None] * 7, limit=1000) == [[i] for i in range(7)]


def test_batches_hold_packs_of_one_kind_within_the_budget() -> None:
    packs = [Pack(samples=(a_sample([1] * length),)) for length in (5, 9, 3, 9, 30)]
    packs.append(make_pack([a_sample([1, 1, 2]), a_sample([1, 1, 3])]))
    assert batches(packs, 18) == [[5], [4], [1, 3], [0, 2]]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: make(name, tmp_path_factory.mktemp(name)) for name in names(torchvision=False)}
    return made | {"llava": tiny_llava(tmp_path_factory.mktemp("llava"))}


def prepared(
    teacher: Path, root: Path, *, as_bytes: bool = False
) -> tuple[TransformersEngine, list[PreparedSample]]:
    """The engine, and three samples about one image (multi-turn among them), whose pixels may be bytes."""
    write_png(root / "x.png", seed=0, size=(60, 36))
    processor = load_processor(teacher)
    engine = load_engine(teacher, vocab_size=len(processor.tokenizer), pad_token_id=1, device="cpu")
    preparer = SamplePreparer(
        with_table(processor, as_bytes=True) if as_bytes else processor,
        load_template(processor, None if processor.chat_template else "plain"),
        image_token_id=image_token_id_of(engine.model.config),
        image_root=root,
        max_length=2048,
    )
    talks = (["Is it red?", "No."], ["Is it red?", "Yes, it is.", "Sure?", "Yes."], ["What?", "A circle."])
    rows: list[dict[str, Any]] = [
        {
            "image": "x.png",
            "conversations": [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(talk)],
        }
        for talk in talks
    ]
    return engine, [preparer.prepare(conversation_of(row, n)) for n, row in enumerate(rows)]


def test_pixels_as_bytes_are_not_mixed_with_others(
    teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, plain = prepared(teachers["llava"], tmp_path)
    _, narrow = prepared(teachers["llava"], tmp_path, as_bytes=True)
    assert narrow[0].pixel_inputs["pixel_values"].dtype == torch.uint8
    (theirs,), (ours,) = engine.hidden_states(plain[:1]), engine.hidden_states(narrow[:1])
    assert torch.equal(ours, theirs)
    for mixed in ([narrow[0], plain[1]], [plain[0], narrow[1]]):
        with pytest.raises(KdcacheError, match="a batch must not mix"):
            engine.hidden_states(mixed)
    # An image processor that has a table, and does not use it for an image.
    monkeypatch.setattr(
        _TableProcessor, "__call__", lambda self, images, **options: self._image_processor(images, **options)
    )
    _, again = prepared(teachers["llava"], tmp_path, as_bytes=True)
    assert again[0].pixel_table is None
    assert torch.equal(engine.hidden_states(again[:1])[0], theirs)


PACKED = ("llava", "llava_next", "idefics3")


# PaliGemmaProcessor turns tensors into arrays in a way that NumPy 2 frowns upon.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", [*names(torchvision=False), "llava"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_states_are_those_of_separate_forwards(
    teachers: dict[str, Path], tmp_path: Path, name: str, attention: str
) -> None:
    engine, samples = prepared(teachers[name], tmp_path)
    engine.model.set_attn_implementation(attention)
    assert packing_is_exact(engine, samples[0]) is (name in PACKED)
    if name not in PACKED:
        return
    pack = make_pack(samples)
    assert pack.prefix > samples[0].images[0].positions[-1]
    lonely = replace(samples[2], input_ids=np.append(samples[2].input_ids, 5).astype(np.int32))
    packed = engine.packed_hidden_states([pack, make_pack([lonely])])
    for hidden, sample in zip([*packed[0], *packed[1]], [*samples, lonely], strict=True):
        (alone,) = engine.hidden_states([sample])
        assert hidden.shape == alone.shape
        np.testing.assert_allclose(hidden, alone, atol=1e-5 * float(alone.abs().max()))


def test_a_build_with_packs_equals_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_dataset(tmp_path / "data", rows=12, images=3)
    config = BuildConfig(
        teacher=tiny_llava(tmp_path / "teacher"),
        data=data.data,
        image_root=data.image_root,
        out=str(tmp_path / "packed"),
        spec=TargetSpec(precision="full", top_k=8),
        device="cpu",
    )
    calls = []
    packed = TransformersEngine.packed_hidden_states
    monkeypatch.setattr(
        TransformersEngine,
        "packed_hidden_states",
        lambda self, packs: calls.append([len(pack.samples) for pack in packs]) or packed(self, packs),
    )
    build(config, Silent())
    assert max(max(sizes) for sizes in calls[1:]) > 1
    monkeypatch.setattr("pipeline.teachers.packing_is_exact", lambda engine, sample: False)
    calls.clear()
    build(replace(config, out=str(tmp_path / "single")), Silent())
    assert not calls
    first, second = open_cache(tmp_path / "packed"), open_cache(tmp_path / "single")
    assert first.manifest.identity == second.manifest.identity
    for left, right in zip((first[i] for i in range(12)), (second[i] for i in range(12)), strict=True):
        assert left.row == right.row
        for kind in ("response", "visual"):
            one, other = getattr(left, kind), getattr(right, kind)
            if one is not None:
                np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
                np.testing.assert_allclose(one.logsumexp, other.logsumexp, rtol=1e-5)
        for one, other in zip(left.relations, right.relations, strict=True):
            np.testing.assert_allclose(one.norm, other.norm, rtol=1e-5)


def test_the_last_image_key_decides_what_may_be_packed(teachers: dict[str, Path], tmp_path: Path) -> None:
    _, samples = prepared(teachers["llava"], tmp_path)
    assert len({prefix_keys(sample, "t")[-1] for sample in samples}) == 1
