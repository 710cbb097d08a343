"""Teacher folders as they come: half downloaded, mixed up, or of a kind that cannot be captured from."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cache_schema import KdcacheError, TargetSpec
from cache_schema.progress import Silent
from pipeline import teachers
from pipeline.capture import BuildConfig, build
from pipeline.job import open_job
from pipeline.transformers_engine import TransformersEngine
from tests.tiny_families import SIGLIP, make, text_config, tokenizer_with
from tests.tiny_models import tiny_dataset, tiny_llava

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 999\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("teacher"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_dataset(folder, rows=4)
    return folder


def edit(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(document))


def cut(path: Path, kept: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])


def lose_a_shard(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(weights)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    save_file({name: weights[name] for name in names[:5]}, folder / "a.safetensors", {"format": "pt"})
    places = {name: part for part, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def lose_the_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "lm_head" not in name}
    assert len(kept) == len(weights) - 1
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def pickle_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model": Path("x"), "layers": Silent()}, folder / "pytorch_model.bin")


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights as a pointer": (
        lambda f: (f / "model.safetensors").write_text(POINTER),
        r"model\.safetensors is a git-lfs pointer.*git lfs pull",
    ),
    "tokenizer as a pointer": (
        lambda f: (f / "tokenizer.json").write_text(POINTER),
        r"tokenizer\.json is a git-lfs pointer",
    ),
    "half the weights": (
        lambda f: cut(f / "model.safetensors", 0.5),
        r"model\.safetensors has \d+ of \d+ bytes: it is cut off or damaged; fetch it again",
    ),
    "a byte too many": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes() + b"x"),
        r"model\.safetensors has \d+ of \d+ bytes",
    ),
    "no header": (lambda f: cut(f / "model.safetensors", 0.001), r"cut off or damaged: it has no header"),
    "a missing shard": (lose_a_shard, r"lacks 1 of 2 weights files of model\.safetensors\.index\.json \(b\."),
    "no head": (lose_the_head, r"have no output head \(lm_head\.weight\): it was lost on the way"),
    "a list as config": (
        lambda f: (f / "config.json").write_text("[1]"),
        r"config\.json holds a list, not an object",
    ),
    "no JSON as config": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "bytes as config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\0"), r"is not valid JSON"),
    "an unknown model": (
        lambda f: edit(f / "config.json", model_type="wonder_vl"),
        r"no usable (config\.json|processor) in ",
    ),
    "code of its own": (
        lambda f: edit(f / "config.json", model_type="wonder_vl", auto_map={"AutoConfig": "a.B"}),
        r"no usable (config\.json|processor) in ",
    ),
    "no patch size": (
        lambda f: edit(f / "processor_config.json", patch_size=None),
        r"names no patch_size; write the vision tower's \(8\) into processor_config\.json",
    ),
    "another patch size": (
        lambda f: edit(f / "processor_config.json", patch_size=16),
        r"makes 4 tokens of an image, the model 16 features",
    ),
    "another selection": (
        lambda f: edit(f / "processor_config.json", vision_feature_select_strategy="default"),
        r"makes 15 tokens of an image, the model 16 features",
    ),
    "no image processor": (
        lambda f: edit(f / "processor_config.json", image_processor={"image_processor_type": "No"}),
        r"no usable processor in ",
    ),
    "pickled weights": (pickle_the_weights, r"cannot load the teacher in .*safetensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_told_in_one_line_before_anything_is_captured(
    whole: Path, data: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, told = FAULTS[fault]
    folder = tmp_path / "teacher"
    shutil.copytree(whole, folder)
    damage(folder)
    ran = []
    monkeypatch.setattr(TransformersEngine, "hidden_states", lambda *_: ran.append(1))
    with pytest.raises(KdcacheError, match=told) as caught:
        build(config_of(folder, data, tmp_path), Silent())
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800
    assert not any(word in str(caught.value) for word in ("trust_remote_code", "weights_only"))
    assert not ran
    assert not (tmp_path / "cache").exists()


def config_of(teacher: Path, data: Path, tmp_path: Path) -> BuildConfig:
    return BuildConfig(
        teacher=teacher,
        data=data / "data.json",
        image_root=data / "images",
        out=str(tmp_path / "cache"),
        spec=TargetSpec(targets=("response",), top_k=4),
        device="cpu",
    )


def test_a_teacher_that_attends_to_images_across(data: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(image_token="<|image|>", bos_token="<|begin_of_text|>")
    text = text_config("mllama_text_model", tokenizer, bos_token_id=1, cross_attention_layers=[1])
    vision = {name: value for name, value in SIGLIP.items() if name != "image_size"}
    transformers.MllamaConfig(
        vision_config={**vision, "image_size": 28}, text_config=text, image_token_index=2
    ).save_pretrained(tmp_path / "mllama")
    transformers.MllamaProcessor(
        image_processor=transformers.MllamaImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
    ).save_pretrained(tmp_path / "mllama")
    with pytest.raises(KdcacheError, match=r"the mllama in .*/mllama reads images by cross-attention"):
        build(config_of(tmp_path / "mllama", data, tmp_path), Silent())


def test_a_processor_that_counts_otherwise_than_the_model_is_named(
    whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it cannot be foretold: the model says so on the first samples."""

    def refuses(*_: Any) -> Any:
        raise ValueError("Image features and image tokens do not match, tokens: 17, features: 512")

    monkeypatch.setattr(TransformersEngine, "hidden_states", refuses)
    with pytest.raises(KdcacheError, match="count image tokens differently: take both from one checkpoint"):
        build(config_of(whole, data, tmp_path), Silent())
    assert teachers._TRIES > 1


FAMILIES = {
    "paligemma": ("image_processor", {"image_seq_length": 9}),
    "gemma3": ("", {"image_seq_length": 9}),
    "llava_next": ("", {"patch_size": 4}),
    "idefics3": ("", {"image_seq_len": 9}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processor_of_any_family_is_compared_with_the_model_before_weights_are_read(
    data: Path, tmp_path: Path, family: str
) -> None:
    part, changes = FAMILIES[family]
    folder = make(family, tmp_path / family)
    config = replace(config_of(folder, data, tmp_path), template="plain")
    open_job(config, Silent())
    file = folder / "processor_config.json"
    document = json.loads(file.read_text())
    (document[part] if part else document).update(changes)
    file.write_text(json.dumps(document))
    with pytest.raises(KdcacheError, match=r"makes \d+ tokens of an image, the model \d+ features \(96x96\)"):
        open_job(config, Silent())


def test_lost_tensors_are_told_before_weights_are_read(whole: Path, data: Path, tmp_path: Path) -> None:
    for lost, told in (("lm_head", "no output head"), ("down_proj", "lack 2 tensors of the teacher")):
        folder = tmp_path / lost
        shutil.copytree(whole, folder)
        weights = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in weights.items() if lost not in name}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(KdcacheError, match=told):
            open_job(config_of(folder, data, tmp_path), Silent())
