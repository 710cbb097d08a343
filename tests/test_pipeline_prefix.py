"""Shared prefixes: the probe, the keys, and that sharing changes nothing."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cache_schema import TargetSpec, open_cache
from cache_schema.format.records import ImageRecord
from cache_schema.progress import Silent
from models.head import Head
from pipeline import teachers
from pipeline.capture import BuildConfig, build
from pipeline.prefix import prefix_is_independent, prefix_keys
from pipeline.samples import PreparedSample
from pipeline.targets import TargetMaker
from tests.tiny_models import tiny_dataset, tiny_llava


def a_sample(ids: list[int], *, sha: str = "aa", images: int = 1) -> PreparedSample:
    places = [np.arange(2 + 4 * n, 5 + 4 * n, dtype=np.int32) for n in range(images)]
    return PreparedSample(
        row=0,
        sample_id="",
        input_ids=np.array(ids, dtype=np.int32),
        label_spans=np.array([[len(ids) - 1, len(ids)]], dtype=np.int32),
        images=tuple(
            ImageRecord(path="x", sha256=sha, width=9, height=9, positions=place) for place in places
        ),
        token_inputs={"token_type_ids": np.zeros(len(ids), dtype=np.int64)},
        pixel_inputs={},
        answers_kept=1,
    )


IDS = [7, 8, 2, 2, 2, 9, 10, 11]


class Teacher:
    """Hidden states that see the past, and `leak` of one later position."""

    def __init__(self, leak: int | None) -> None:
        self.leak = leak
        self.head = Head(weight=torch.zeros(1, 1), vocab_size=1)
        self.description: dict[str, str] = {}

    def hidden_states(self, samples: Sequence[PreparedSample]) -> list[Tensor]:
        found = []
        for sample in samples:
            assert len(sample.token_inputs["token_type_ids"]) == len(sample)
            ids = torch.from_numpy(sample.input_ids).float()
            hidden = ids.cumsum(0)
            if self.leak is not None and self.leak < len(ids):
                hidden = hidden + ids[self.leak]
            found.append(hidden[:, None])
        return found

    def logits(self, samples: Sequence[PreparedSample]) -> list[Tensor]:
        raise AssertionError("not needed")


@pytest.mark.parametrize(
    ("leak", "independent"), [(None, True), (0, True), (5, False), (6, False), (7, False)]
)
def test_the_probe_finds_any_position_that_looks_back(leak: int | None, independent: bool) -> None:
    assert prefix_is_independent(Teacher(leak), a_sample(IDS)) is independent


@pytest.mark.parametrize("by", ["change", "length"])
def test_the_probe_changes_and_cuts(by: str) -> None:
    class Subtle(Teacher):
        def hidden_states(self, samples: Sequence[PreparedSample]) -> list[Tensor]:
            (sample,) = samples
            ids = sample.input_ids
            leak = len(ids) if by == "length" else float((ids[5:] != np.array(IDS[5:])[: len(ids[5:])]).any())
            return [super().hidden_states(samples)[0] + leak]

    assert not prefix_is_independent(Subtle(None), a_sample(IDS))


def test_a_key_holds_all_that_decides_the_image_and_nothing_after_it() -> None:
    base = a_sample(IDS)
    (key,) = prefix_keys(base, "teacher")
    assert prefix_keys(a_sample([*IDS[:5], 100, 101, 102, 103]), "teacher") == [key]
    others = [
        prefix_keys(base, "another teacher"),
        prefix_keys(a_sample([6, *IDS[1:]]), "teacher"),
        prefix_keys(a_sample(IDS, sha="bb"), "teacher"),
        prefix_keys(replace(base, images=(replace(base.images[0], width=10),)), "teacher"),
    ]
    two = [7, 8, 2, 2, 2, 5, 2, 2, 2, 4]
    first, second = prefix_keys(a_sample(two, images=2), "teacher")
    assert len({key, first, second, *(keys[0] for keys in others)}) == 7
    moved = prefix_keys(a_sample([7, 8, 2, 2, 2, 6, 2, 2, 2, 4], images=2), "teacher")
    assert moved[0] == first
    assert moved[1] != second


def test_sharing_changes_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_llava(tmp_path / "teacher")
    data = tiny_dataset(tmp_path / "data", rows=10, images=3)
    config = BuildConfig(
        teacher=teacher,
        data=data.data,
        image_root=data.image_root,
        out=str(tmp_path / "shared"),
        spec=TargetSpec(precision="full", top_k=8),
        device="cpu",
    )
    made = []
    batch = TargetMaker.batch
    monkeypatch.setattr(
        TargetMaker,
        "batch",
        lambda self, states, asked: made.extend(map(len, asked.images)) or batch(self, states, asked),
    )
    build(config, Silent())
    assert len(made) == 3, "computed once an image, not only stored once"
    monkeypatch.setattr(teachers, "prefix_is_independent", lambda engine, sample: False)
    build(replace(config, out=str(tmp_path / "single")), Silent())
    shared, single = open_cache(tmp_path / "shared"), open_cache(tmp_path / "single")
    assert shared.manifest.fingerprint.capture["sharing"] is True
    assert single.manifest.fingerprint.capture["sharing"] is False
    counts = [cache.commits[0].counts for cache in (shared, single)]
    assert counts[0]["relations"] == 3 < counts[1]["relations"] == counts[0]["images"]
    for left, right in zip((shared[i] for i in range(10)), (single[i] for i in range(10)), strict=True):
        assert left.row == right.row
        np.testing.assert_array_equal(left.visual_positions, right.visual_positions)
        for kind in ("response", "visual"):
            one, other = getattr(left, kind), getattr(right, kind)
            if one is not None:
                np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        for one, other in zip(left.relations, right.relations, strict=True):
            np.testing.assert_allclose(one.norm, other.norm, rtol=1e-5)
