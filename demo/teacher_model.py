"""The demo teacher as a transformers model: SigLIP tower, two-layer projector, Qwen2 language model."""

import shutil
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
    SiglipVisionModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from demo.tokenizer import CHAT_TEMPLATE, IMAGE
from demo.vision_tower import FEATURE_LAYER, IMAGE_SIZE, PATCH_SIZE


def assemble(
    tower: SiglipVisionModel,
    language_model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
) -> LlavaForConditionalGeneration:
    """A LLaVA model around the two parts, its projector fresh; generation is greedy."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_hidden_act="gelu",
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="full",
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=16,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def make_processor(tokenizer: PreTrainedTokenizerBase, patch_size: int = PATCH_SIZE) -> LlavaProcessor:
    """The processor that feeds `assemble`'s model; images of another size are resized to a square."""
    return LlavaProcessor(
        SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def save_teacher(trained: Path, out: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes `out`: bfloat16 weights, configuration, processor. Files of an older teacher are replaced."""
    shutil.rmtree(out, ignore_errors=True)
    model = LlavaForConditionalGeneration.from_pretrained(trained, dtype=torch.bfloat16)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config._name_or_path = ""  # or the work folder's path would be shipped
    model.save_pretrained(out)
    make_processor(tokenizer, model.config.vision_config.patch_size).save_pretrained(out)
