"""`convert`: TinyLLaVA checkpoints, whole and split, become the very model they hold."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipImageProcessorPil,
)

from cache_schema.errors import KdcacheError
from cache_schema.progress import Silent
from models.folder import load_processor
from pipeline.capture import BuildConfig, build
from pipeline.convert import convert
from pipeline.transformers_engine import load_engine
from tests.tiny_models import tiny_dataset, tiny_llava, write_png


def tinyllava_state(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensors under TinyLLaVA Factory's names (a tied head has none, as it saves them)."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            if not model.config.tie_word_embeddings:
                state["language_model.lm_head.weight"] = tensor
            continue
        name = name.removeprefix("model.")
        for new, old in (
            ("vision_tower.", "vision_tower._vision_tower.vision_model."),
            ("multi_modal_projector.linear_1.", "connector._connector.0."),
            ("multi_modal_projector.linear_2.", "connector._connector.2."),
            ("language_model.", "language_model.model."),
        ):
            if name.startswith(new):
                state[old + name.removeprefix(new)] = tensor
    return state


def checkpoint(folder: Path, teacher: Path, *, form: str, image_free: bool = False) -> Path:
    """A TinyLLaVA checkpoint of `teacher`: `whole`, `bin`, `split`, or `split-config`."""
    model = AutoModelForImageTextToText.from_pretrained(teacher)
    state = tinyllava_state(model)
    folder.mkdir()
    config = json.loads((teacher / "config.json").read_text())
    strategy = {"default": "patch", "full": "cls_patch"}[config["vision_feature_select_strategy"]]
    settings = {
        "model_type": "tinyllava",
        "connector_type": "mlp2x_gelu",
        "image_aspect_ratio": "square",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": strategy,
        "text_config": config["text_config"],
        "vision_config": config["vision_config"] | {"model_name_or_path": "somewhere/siglip"},
    }
    if form == "whole":
        save_file(state, folder / "model.safetensors")
    elif form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        for part, prefix in (
            ("language_model", "language_model."),
            ("vision_tower", "vision_tower._vision_tower."),
            ("connector", "connector."),
        ):
            (folder / part).mkdir()
            own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            torch.save(own, folder / part / "pytorch_model.bin")
        if form == "split-config":
            for part, key in (("language_model", "text_config"), ("vision_tower", "vision_config")):
                (folder / part / "config.json").write_text(json.dumps(settings.pop(key)))
    (folder / "config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(teacher / name, folder / name)
    return folder


def logits(folder: Path, image: Path, template_of: Path) -> np.ndarray:
    processor = AutoProcessor.from_pretrained(template_of)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    inputs = processor(text=["USER: <image>\nHm?"], images=[Image.open(image)], return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits.float().numpy()


@pytest.mark.parametrize(
    ("form", "tied", "strategy"),
    [
        ("whole", True, "default"),
        ("bin", False, "full"),
        ("split", True, "full"),
        ("split", False, "default"),
        ("split-config", True, "default"),
    ],
)
def test_the_converted_model_is_the_same_model(tmp_path: Path, form: str, tied: bool, strategy: str) -> None:
    teacher = tiny_llava(tmp_path / "llava", tie_word_embeddings=tied, select_strategy=strategy)
    source = checkpoint(tmp_path / "tinyllava", teacher, form=form)
    report = convert(source, tmp_path / "out", Silent())
    image = write_png(tmp_path / "x.png", seed=3, size=(50, 30))
    np.testing.assert_array_equal(logits(teacher, image, teacher), logits(tmp_path / "out", image, teacher))
    tokens = 16 - (strategy == "default")
    assert report["image_tokens"] == tokens
    assert report["image_token_id"] == 2
    assert report["dtype"] == "float32"

    processor = load_processor(tmp_path / "out")
    inputs = processor(text=["<image>"], images=[Image.open(image)], return_tensors="pt")
    assert int((inputs["input_ids"] == 2).sum()) == tokens
    pixels = SiglipImageProcessorPil(size={"height": 32, "width": 32})(Image.open(image), return_tensors="pt")
    np.testing.assert_allclose(inputs["pixel_values"], pixels["pixel_values"], atol=1e-6)
    chat = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}]
    )
    assert chat.endswith("USER: <image>\nQ ASSISTANT:")
    # names that vLLM asks for
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert all("vision_tower.vision_model." in name for name in names if "vision_tower" in name)
    load_engine(tmp_path / "out", vocab_size=340, pad_token_id=0, device="cpu")


@pytest.mark.parametrize("language", ["qwen2", "phi", "stablelm", "llama"])
def test_language_models_of_tinyllava_in_shards_and_bf16(tmp_path: Path, language: str) -> None:
    """TinyLLaVA's Phi has a head with a bias, its StableLM norms with one: every tensor finds its place."""
    plain = tiny_llava(tmp_path / "llava")
    settings = json.loads((plain / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = {name: settings["text_config"][name] for name in kept}
    text |= {"model_type": language, "num_key_value_heads": 2}
    text |= {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
    settings |= {"text_config": text | {"tie_word_embeddings": False}, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(**settings)).to(torch.bfloat16)
    with torch.no_grad():  # biases begin as zeros
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(plain)
    source = checkpoint(tmp_path / "tinyllava", plain, form="whole")
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    for number in range(3):
        part = {name: state[name].bfloat16() for name in sorted(state)[number::3]}
        save_file(part, source / f"model-{number + 1:05d}-of-00003.safetensors")
    assert convert(source, tmp_path / "out", Silent())["dtype"] == "bfloat16"
    image = write_png(tmp_path / "x.png", seed=3, size=(50, 30))
    np.testing.assert_array_equal(logits(plain, image, plain), logits(tmp_path / "out", image, plain))

    data = tiny_dataset(tmp_path / "data", rows=4)
    config = BuildConfig(
        teacher=tmp_path / "out", data=data.data, image_root=data.image_root, out=str(tmp_path / "cache")
    )
    assert build(config, Silent()).captured == 4


@pytest.mark.parametrize(("rows", "image_id"), [(352, 339), (339, 339)])
def test_a_tokenizer_without_an_image_token_gains_one(tmp_path: Path, rows: int, image_id: int) -> None:
    teacher = tiny_llava(tmp_path / "llava", vocab=max(rows, 340))
    source = checkpoint(tmp_path / "tinyllava", teacher, form="whole")
    words = json.loads((source / "tokenizer.json").read_text())
    words["added_tokens"] = [token for token in words["added_tokens"] if token["content"] != "<image>"]
    last = max(words["model"]["vocab"], key=words["model"]["vocab"].get)
    words["model"]["vocab"][last] = words["model"]["vocab"].pop("<image>")
    (source / "tokenizer.json").write_text(json.dumps(words))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings.pop("extra_special_tokens")
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    if rows < 340:
        config = json.loads((source / "config.json").read_text())
        config["text_config"]["vocab_size"] = rows
        (source / "config.json").write_text(json.dumps(config))
        state = load_file(source / "model.safetensors")
        name = "language_model.model.embed_tokens.weight"
        state[name] = state[name][:rows].clone()
        save_file(state, source / "model.safetensors")
    report = convert(source, tmp_path / "out", Silent())
    assert report["image_token_id"] == image_id
    processor = load_processor(tmp_path / "out")
    assert len(processor.tokenizer) == 340
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape[0] == max(rows, 340)
    assert model.config.image_token_id == image_id


def test_what_cannot_be_converted_is_said(tmp_path: Path) -> None:
    teacher = tiny_llava(tmp_path / "llava")
    source = checkpoint(tmp_path / "tinyllava", teacher, form="split")
    config = json.loads((source / "config.json").read_text())

    def refused(message: str, **change: Any) -> None:
        (source / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(KdcacheError, match=message) as caught:
            convert(source, tmp_path / "out", Silent())
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    refused("resampler", connector_type="resampler")
    refused("dinov2", vision_config={"model_type": "dinov2"})
    refused("does not describe its vision_tower", vision_config=None)
    refused("anyres", image_aspect_ratio="anyres")
    connector = torch.load(source / "connector" / "pytorch_model.bin", weights_only=True)
    torch.save(
        {name: t for name, t in connector.items() if ".2." not in name},
        source / "connector" / "pytorch_model.bin",
    )
    refused("missing .*linear_2")
    (source / "connector" / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    refused("cannot be read")
    (source / "connector" / "pytorch_model.bin").unlink()
    refused("incomplete")
    (source / "adapter_config.json").write_text("{}")
    refused("adapter")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(KdcacheError, match=r"no config\.json"):
        convert(tmp_path / "full", tmp_path / "out", Silent())
    (source / "adapter_config.json").unlink()
    with pytest.raises(KdcacheError, match="not empty"):
        convert(source, tmp_path / "full", Silent())
    assert list((tmp_path / "full").iterdir()) == [tmp_path / "full" / "file"]
