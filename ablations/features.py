"""Images encoded once: the frozen tower's features take the place of pixels, and of the tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from cache_schema.format.records import ImageRecord
from demo.vision_tower import FEATURE_LAYER, normalized
from student.collate import Collator


class GivenFeatures(nn.Module):
    """A tower that is given the features themselves as `pixel_values` (B, P, D), at every layer."""

    def forward(self, pixel_values: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(
            last_hidden_state=pixel_values, hidden_states=(pixel_values,) * -FEATURE_LAYER
        )


@torch.no_grad()
def encode(tower: SiglipVisionModel, images: Tensor, *, batch: int = 64) -> Tensor:
    """The features (N, P, D) float32, at the projector's layer, of images (N, 3, H, W) uint8."""
    parts = []
    for start in range(0, len(images), batch):
        pixels = normalized(images[start : start + batch]).to(tower.device)
        parts.append(tower(pixels, output_hidden_states=True).hidden_states[FEATURE_LAYER].cpu())
    return torch.cat(parts)


class _NoPixels:
    table = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureCollator(Collator):
    """A collator that gives the features (N, P, D) of images for their pixels; `places` finds an image by its
    path."""

    pixels: Any = _NoPixels()  # noqa: RUF009 - nothing changes it
    features: Tensor
    places: Mapping[str, int]

    def images(self, samples: Sequence[Sequence[ImageRecord]], *more: object) -> dict[str, Tensor]:
        """`pixel_values` (images, P, D) of the images of each sample."""
        shown = [self.places[image.path] for images in samples for image in images]
        return {"pixel_values": self.features[shown]}
