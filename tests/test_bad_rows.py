"""One bad row never ends a build: it goes to quarantine with its reason, and the rest is as without it."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from cache_schema import Cache, KdcacheError, TargetSpec, open_cache
from cache_schema.operations.verify import verify
from cache_schema.progress import Silent
from pipeline import transformers_engine
from pipeline.capture import BuildConfig, build
from pipeline.transformers_engine import TransformersEngine
from tests.tiny_models import tiny_llava, write_png

SPEC = TargetSpec(targets=("response", "visual", "relation", "prompt"), precision="full", top_k=4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("teacher"))


def row(question: str, answer: str = "Red.", image: str | None = "0.png") -> dict[str, Any]:
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": said} | ({} if image is None else {"image": image})


def config_of(teacher: Path, folder: Path, rows: list[dict[str, Any]], **rest: Any) -> BuildConfig:
    (folder / "data.json").write_text(json.dumps(rows))
    for number in range(3):
        write_png(folder / "images" / f"{number}.png", seed=number)
    options = {"spec": SPEC, "shard_size": 16, "device": "cpu", "max_bad": None} | rest
    return BuildConfig(
        teacher=teacher,
        data=folder / "data.json",
        image_root=folder / "images",
        out=str(folder / "cache"),
        **options,
    )


def sound(cache: Cache) -> dict[int, Any]:
    assert not verify(cache.url).problems
    return {sample.row: sample for sample in (cache[i] for i in range(len(cache)))}


GOOD = [
    row("<image>\nWhat?"),
    row("<image>\nWhat colour is the shape?", "It is blue.", "1.png"),
    row("<image>\nAnd this?", "A circle.", "0.png"),
    row("No image?", "None.", None),
    row("<image>\nIs it big?", "Yes, it is.", "1.png"),
]
BAD = [
    row("Z <image>\nWhat?"),
    row("<image>\nZ?"),
    row("<image>\nWhat?", "Z", "1.png"),
    row("Z?", "No.", None),
    row("Z <image>", "No.", "2.png"),
]


@pytest.fixture(scope="module")
def teacher_with_a_hole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose embedding of Z is no number."""
    folder = tiny_llava(tmp_path_factory.mktemp("hole"), tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (name,) = (key for key in weights if key.endswith("embed_tokens.weight"))
    weights[name][tokenizer("Z", add_special_tokens=False)["input_ids"]] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("relation", ["factor", "exact"])
@pytest.mark.parametrize("first", [BAD, GOOD])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_without_finite_hidden_states(
    teacher_with_a_hole: Path,
    tmp_path: Path,
    relation: str,
    first: list[Any],
    attention: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those are in packs with sound ones, to which eager attention spreads what is no number."""
    packed, plain = [], TransformersEngine.packed_hidden_states

    def with_attention(self: TransformersEngine, packs: Any) -> Any:
        packed.extend(pack for pack in packs if len(pack.samples) > 2)
        return plain(self, packs)

    monkeypatch.setattr(TransformersEngine, "packed_hidden_states", with_attention)
    load = transformers_engine.load_model
    monkeypatch.setattr(
        transformers_engine, "load_model", lambda *a, **b: load(*a, attn_implementation=attention, **b)
    )
    spec = replace(SPEC, relation=relation)
    rows = [*BAD, *GOOD] if first is BAD else [*GOOD, *BAD]
    config = config_of(teacher_with_a_hole, tmp_path, rows, spec=spec)
    assert build(config, Silent()).quarantined == {"not_finite": len(BAD)}
    found = sound(open_cache(config.out))
    assert sorted(found) == [number for number, each in enumerate(rows) if each in GOOD]
    assert packed
    (tmp_path / "clean").mkdir()
    clean = config_of(teacher_with_a_hole, tmp_path / "clean", GOOD, spec=spec)
    build(clean, Silent())
    for wanted in sound(open_cache(clean.out)).values():
        sample = found[rows.index(GOOD[wanted.row])]
        np.testing.assert_array_equal(sample.input_ids, wanted.input_ids)
        for kind in ("response", "visual", "prompt"):
            ours, theirs = getattr(sample, kind), getattr(wanted, kind)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
        for ours, theirs in zip(sample.relations, wanted.relations, strict=True):
            np.testing.assert_allclose(ours.norm, theirs.norm, rtol=1e-5)


def test_a_teacher_of_no_finite_number_is_told_at_once(teacher: Path, tmp_path: Path) -> None:
    folder = tiny_llava(tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v * torch.nan for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        KdcacheError, match=r"not finite numbers, on all of 5 samples tried; try another --dtype"
    ):
        build(config_of(folder, tmp_path, GOOD), Silent())
    assert not (tmp_path / "cache").exists()


Fails = Callable[[Any], Exception | None]


def failing(monkeypatch: pytest.MonkeyPatch, fault: Fails) -> None:
    """The engine fails with what `fault` gives for one of its samples."""
    single, packed = TransformersEngine.hidden_states, TransformersEngine.packed_hidden_states

    def hidden_states(self: TransformersEngine, samples: Any) -> Any:
        for sample in samples:
            if (error := fault(sample)) is not None:
                raise error
        return single(self, samples)

    def packed_hidden_states(self: TransformersEngine, packs: Any) -> Any:
        for pack in packs:
            for sample in pack.samples:
                if (error := fault(sample)) is not None:
                    raise error
        return packed(self, packs)

    monkeypatch.setattr(TransformersEngine, "hidden_states", hidden_states)
    monkeypatch.setattr(TransformersEngine, "packed_hidden_states", packed_hidden_states)


@pytest.mark.parametrize(
    "error", [ValueError, RuntimeError, IndexError, AssertionError, torch.linalg.LinAlgError]
)
def test_a_sample_on_which_the_teacher_fails(
    teacher: Path, tmp_path: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*GOOD, *GOOD]
    failing(monkeypatch, lambda sample: error("tokens: 17\x1b[31m") if sample.row in (0, 7) else None)
    config = config_of(teacher, tmp_path, rows)
    assert build(config, Silent()).quarantined == {"forward": 2}
    cache = open_cache(config.out)
    assert sorted(sound(cache)) == [1, 2, 3, 4, 5, 6, 8, 9]
    details = [one.detail for one in cache.quarantined()]
    assert details == ["the teacher fails on the sample: tokens: 17\\x1b[31m"] * 2


def test_a_teacher_that_fails_from_now_on_stops_the_build(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()

    def fault(sample: Any) -> Exception | None:
        seen.add(sample.row)
        return RuntimeError("gone") if len(seen) > 3 else None

    failing(monkeypatch, fault)
    with pytest.raises(KdcacheError, match="fails on every sample now: gone"):
        build(config_of(teacher, tmp_path, GOOD, batch_tokens=1), Silent())


def test_a_fault_of_the_device_stops_the_build(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = RuntimeError("CUDA error: device-side assert triggered")
    failing(monkeypatch, lambda sample: fault if sample.row == 4 else None)
    with pytest.raises(KdcacheError, match="device-side assert"):
        build(config_of(teacher, tmp_path, GOOD), Silent())


def test_images_that_are_no_image_files(teacher: Path, tmp_path: Path) -> None:
    names = ["pipe", "noise.jpg", "half.avif", "..", "/dev/zero", "huge.png", "0.png"]
    rows = [*GOOD, *(row("<image>\nWhat?", image=name) for name in names)]
    config = config_of(teacher, tmp_path, rows)
    root = tmp_path / "images"
    os.mkfifo(root / "pipe")
    (root / "noise.jpg").write_bytes(np.random.default_rng(0).bytes(5000))
    avif = b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1A" + np.random.default_rng(1).bytes(600)
    (root / "half.avif").write_bytes(avif)
    with (root / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    quarantined = build(config, Silent()).quarantined
    expected = {"unreadable_image": 2, "broken_image": 2, "outside_root": 2}
    assert quarantined == expected
    assert len(sound(open_cache(config.out))) == len(GOOD) + 1
