"""The parts of a vision-language model, by the names of its parameters."""

from __future__ import annotations

import re
from typing import Literal

Part = Literal["projector", "language_model", "vision_tower"]

NESTED_TOWERS = ("siglip_vision_model", "clip_vision_model")
"""Model types of towers whose weights vLLM and older transformers expect below `vision_model.`."""

_VISION = ("vision_tower", "vision_model", "visual", "vision_encoder")
_PROJECTOR = (
    "multi_modal_projector",
    "connector",
    "merger",
    "image_newline",
    "aligner",
    "modality_projection",
)


def part_of(name: str) -> Part:
    """The part that a parameter belongs to, by its name: vision tower, projector or language model."""
    words = name.split(".")
    if any(word in _PROJECTOR for word in words):
        return "projector"
    if any(word in _VISION for word in words):
        return "vision_tower"
    return "language_model"


def nested_tower_name(name: str) -> str:
    """The name of a tensor of a nested tower with the `vision_model.` that transformers 5 leaves out."""
    return re.sub(r"^((?:model\.)?vision_tower)\.(?!vision_model\.)", r"\1.vision_model.", name)
