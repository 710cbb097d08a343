"""The image processor of the benchmarks: that which a user's environment would choose."""

from __future__ import annotations

from typing import Any

from transformers import SiglipImageProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils import is_torchvision_available

BACKEND = "torchvision" if is_torchvision_available() else "pillow"


def siglip_processor(side: int) -> Any:
    """SigLIP's for square images, on torchvision where it is installed, else on pillow."""
    kind = SiglipImageProcessor if BACKEND == "torchvision" else SiglipImageProcessorPil
    return kind(size={"height": side, "width": side})
