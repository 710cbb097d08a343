"""Teachers in 8 and 4 bits, run by test_pipeline_torchvision.py where bitsandbytes imports."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from cache_schema import TargetSpec, open_cache
from cache_schema.progress import Silent
from pipeline.capture import BuildConfig, build
from tests.tiny_models import tiny_dataset, tiny_llava


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_targets_are_those_of_the_quantised_model(tmp_path: Path, quantization: str) -> None:
    """Its own logits. One sample a batch: which columns 8 bits leave alone depends on the whole batch."""
    teacher = tiny_llava(tmp_path / "teacher", hidden=64, vision_hidden=64)
    data = tiny_dataset(tmp_path / "data", rows=6)
    config = BuildConfig(
        teacher=teacher,
        data=data.data,
        image_root=data.image_root,
        out=str(tmp_path / "cache"),
        spec=TargetSpec(top_k=8, precision="full"),
        quantization=quantization,
        device="cpu",
        batch_tokens=1,
    )
    assert build(config, Silent()).captured == 6
    cache = open_cache(config.out)
    assert cache.manifest.fingerprint.capture["dtype"] == f"{quantization} float32"
    bits = {"8bit": "load_in_8bit", "4bit": "load_in_4bit"}[quantization]
    model = AutoModelForImageTextToText.from_pretrained(
        teacher, quantization_config=BitsAndBytesConfig(**{bits: True}), device_map="cpu", dtype="auto"
    ).eval()
    processor = AutoProcessor.from_pretrained(teacher)
    rows = json.loads(data.data.read_text())
    for sample in (cache[i] for i in range(len(cache))):
        inputs = {"input_ids": torch.tensor(sample.input_ids)[None].long()}
        if sample.images:
            image = Image.open(data.image_root / rows[sample.row]["image"])
            inputs["pixel_values"] = processor.image_processor(
                images=[image], return_tensors="pt"
            ).pixel_values
        with torch.inference_mode():
            logits = model(**inputs).logits[0, :, : len(processor.tokenizer)].double()
        at = torch.tensor(sample.response_positions).long()
        following = logits.log_softmax(1)[at, sample.labels[sample.response_positions + 1]]
        np.testing.assert_allclose(sample.response.label_logprob, following, rtol=1e-5, atol=1e-5)
