"""Pixel inputs as the processor itself makes them: crops, grids, sizes and masks, sample by sample."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor, from_numpy

from models.inputs import join
from models.pixels import PixelTable

_TEXT = ("input_ids", "attention_mask", "labels")


class PixelInputs:
    """A model's image inputs, made by its processor; may be called from any thread.

    The whole processor is called, not only its image processor: some families tile an image only through the
    processor (InternVL), or only when a sample has no other image (LLaVA-OneVision). Where models.pixels has
    a table for the processor, it is used instead; or, where `as_bytes` asks for it, not yet: pixel_values are
    then bytes, a quarter as large, and `table` (C, 256) has their values, for `models.pixels.look_up`.
    """

    def __init__(self, processor: Any, *, as_bytes: bool = False) -> None:
        self._processor = processor
        self._threads = threading.local()  # tokenizers are not thread-safe
        self._table = PixelTable.of(processor)
        self.table: Tensor | None = None
        if as_bytes and self._table is not None:
            self.table = from_numpy(self._table.values)

    def __call__(self, samples: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        """Inputs of a batch from the images of each sample, as models.inputs.join joins them; empty without
        images."""
        if self._table is not None and (flat := [image for images in samples for image in images]):
            if self.table is not None:
                return {"pixel_values": from_numpy(self._table.resized(flat))}
            return {"pixel_values": from_numpy(self._table(flat))}
        made = [self._of_sample(images) for images in samples if images]
        names = {name: None for inputs in made for name in inputs}
        return {name: join([inputs[name] for inputs in made if name in inputs]) for name in names}

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
