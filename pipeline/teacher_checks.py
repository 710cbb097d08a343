"""Checks of a teacher's small files, before its weights are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cache_schema.errors import KdcacheError, first_line
from models.tokens import image_token_id_of

BOTH_DIRECTIONS = ("gemma3", "paligemma")
"""Models whose visual tokens attend to one another in both directions."""

_SIZES = ((96, 96), (160, 96))  # of blank images, width and height


def require_engine_for(config: Any, engine: str) -> None:
    """KdcacheError for a model of which vLLM gives other hidden states: its attention to images is causal on
    a CPU (0.32: Gemma 3, a mean KL of 0.05 nats at visual positions), and was not tried elsewhere."""
    if engine == "vllm" and config.model_type in BOTH_DIRECTIONS:
        raise KdcacheError(
            f"--engine vllm cannot run a {config.model_type}, whose visual tokens attend to one another in "
            "both directions; omit --engine vllm"
        )


def require_capturable(config: Any, processor: Any, folder: Path, outline: Callable[[], Any]) -> None:
    """KdcacheError unless images become visual tokens of the sequence, as many as the processor makes.

    outline: makes the model without its weights.
    """
    text = config.get_text_config()
    crossed = getattr(text, "cross_attention_layers", None) or getattr(config, "cross_layer_interval", None)
    if crossed or getattr(config, "is_encoder_decoder", False):
        raise KdcacheError(
            f"the {config.model_type} in {folder} reads images by cross-attention, so there are no visual "
            "tokens to capture; take a teacher whose images are tokens of the sequence (Llava, Qwen-VL, ...)"
        )
    patch = getattr(getattr(config, "vision_config", None), "patch_size", None)
    if hasattr(processor, "patch_size") and processor.patch_size is None:
        raise KdcacheError(
            f"the processor in {folder} names no patch_size; write the vision tower's ({patch}) into "
            "processor_config.json"
        )
    token = image_token_id_of(config)
    model = outline()
    for size in _SIZES:
        try:
            images = [[Image.new("RGB", size)]]
            inputs = processor(text=[processor.image_token], images=images, return_tensors="np")
        except Exception as error:
            raise KdcacheError(
                f"the processor in {folder} fails on a blank image: {first_line(error)}; get its files "
                "(processor_config.json, preprocessor_config.json, tokenizer.json) from the teacher's "
                "checkpoint"
            ) from error
        made, wanted = int((inputs["input_ids"] == token).sum()), _features(model, config, inputs)
        if wanted is not None and made != wanted:
            raise KdcacheError(
                f"the processor in {folder} makes {made} tokens of an image, the model {wanted} features "
                f"({size[0]}x{size[1]}); take patch_size, image size, merging of patches and "
                "vision_feature_select_strategy of both from one checkpoint"
            )


def _features(model: Any, config: Any, inputs: Mapping[str, Any]) -> int | None:
    """How many features a model on the meta device makes of the images of `inputs`; None if unknown."""
    vision = config.vision_config
    grids, tiles, merged = inputs.get("image_grid_thw"), inputs["pixel_values"], 0
    if grids is not None and (merged := getattr(vision, "spatial_merge_size", 0)):
        return int(grids.prod(-1).sum() // merged**2)
    if tiles.ndim == 5 and (merged := getattr(config, "scale_factor", 0)):
        return int(tiles.shape[1] * (vision.image_size // vision.patch_size) ** 2 // merged**2)
    known = inspect.signature(model.get_image_features).parameters
    tensors = {name: torch.as_tensor(value) for name, value in inputs.items() if name in known}
    pixels = {
        name: value.to("meta", model.dtype) if value.is_floating_point() else value
        for name, value in tensors.items()
    }
    try:
        made = model.get_image_features(**pixels).pooler_output
    except Exception:  # noqa: BLE001 - not every model runs without numbers; then the first samples tell
        return None
    return sum(int(feature.shape[:-1].numel()) for feature in made)
