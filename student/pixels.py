"""Pixel inputs as the processor itself makes them: crops, grids, sizes and masks, sample by sample."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor, cat
from torch.nn import functional

_TEXT = ("input_ids", "attention_mask", "labels")


class PixelInputs:
    """What a model is given of images, by its processor; may be called from any thread.

    The whole processor is asked, not its image processor: some families cut an image only when the
    processor says so (InternVL), or only when a sample has no other image (LLaVA-OneVision).
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._threads = threading.local()  # a tokenizer is not to be shared between threads

    def __call__(self, samples: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        """Inputs of a batch from the images of each sample; empty without images.

        Joined along the first dimension; where others differ (patches or images a sample), padded with
        zeros at the end, as the processors themselves do.
        """
        made = [self._of_sample(images) for images in samples if images]
        names = {name: None for inputs in made for name in inputs}
        return {name: _join([inputs[name] for inputs in made if name in inputs]) for name in names}

    def _of_sample(self, images: Sequence[Any]) -> dict[str, Tensor]:
        processor = getattr(self._threads, "processor", None)
        if processor is None:
            processor = self._threads.processor = copy.deepcopy(self._processor)
        text = processor.image_token * len(images)
        made = processor(text=[text], images=[list(images)], return_tensors="pt")
        shape = made["input_ids"].shape
        return {
            name: value
            for name, value in made.items()
            if isinstance(value, Tensor) and name not in _TEXT and value.shape != shape
        }


def _join(values: Sequence[Tensor]) -> Tensor:
    """Tensors joined along dimension 0, zero-padded to one shape in all others."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [wanted - size for size, wanted in zip(value.shape[1:], shape, strict=True)]
        padding = [part for amount in reversed(missing) for part in (0, amount)]
        padded.append(functional.pad(value, padding) if any(missing) else value)
    return cat(padded)
