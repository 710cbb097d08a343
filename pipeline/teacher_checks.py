"""What of a teacher's small files cannot be captured from, told before its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache_schema.errors import KdcacheError, first_line
from models.tokens import image_token_id_of
from pipeline.fingerprint import image_tokens

_FIXED_GRID = {"clip_vision_model": 1, "siglip_vision_model": 0}  # towers of one size -> class tokens


def require_capturable(config: Any, processor: Any, folder: Path) -> None:
    """KdcacheError unless images become visual tokens of the sequence, as many as the processor makes."""
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
    try:
        made = image_tokens(processor, image_token_id_of(config))
    except KdcacheError:
        raise
    except Exception as error:
        raise KdcacheError(
            f"the processor in {folder} fails on a blank image: {first_line(error)}; get its files "
            "(processor_config.json, preprocessor_config.json, tokenizer.json) from the teacher's checkpoint"
        ) from error
    wanted = _features_of_an_image(config)
    if made is not None and wanted is not None and made != wanted:
        raise KdcacheError(
            f"the processor in {folder} makes {made} tokens of an image, the model {wanted} features; take "
            "patch_size, image size and vision_feature_select_strategy of both from one checkpoint"
        )


def _features_of_an_image(config: Any) -> int | None:
    """How many features Llava makes of every image, where its tower is of one size; None for others."""
    vision: Any = getattr(config, "vision_config", None)
    if config.model_type not in ("llava", "vipllava") or vision.model_type not in _FIXED_GRID:
        return None
    patches: int = (vision.image_size // vision.patch_size) ** 2 + _FIXED_GRID[vision.model_type]
    return patches - (getattr(config, "vision_feature_select_strategy", "default") == "default")
