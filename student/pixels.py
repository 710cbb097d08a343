"""Pixel inputs as the processor itself makes them: crops, grids, sizes and masks, sample by sample."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, equal, from_numpy

from models.inputs import join

_TEXT = ("input_ids", "attention_mask", "labels")
_PROBES = ((23, 31), (64, 48))


class PixelInputs:
    """What a model is given of images, by its processor; may be called from any thread.

    The whole processor is asked, not its image processor: some families cut an image only when the
    processor says so (InternVL), or only when a sample has no other image (LLaVA-OneVision). Where the
    processor leaves images to its image processor and that one maps every byte on its own (Llava on pillow),
    bytes are looked up in a table: the same bits in two thirds of the time.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._threads = threading.local()  # a tokenizer is not to be shared between threads
        self._table: NDArray[np.float32] | None = None
        if _maps_bytes(processor):
            table = _table_of(processor.image_processor)
            if all(self._same(table, size) for size in _PROBES):
                self._table = table

    def __call__(self, samples: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        """Inputs of a batch from the images of each sample; empty without images.

        Joined along the first dimension; where others differ (patches or images a sample), padded with
        zeros at the end, as the processors themselves do.
        """
        if self._table is not None and (flat := [image for images in samples for image in images]):
            return {"pixel_values": self._look_up(self._table, flat)}
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

    def _look_up(self, table: NDArray[np.float32], images: Sequence[Any]) -> Tensor:
        """pixel_values (images, C, H, W): bytes of the right size, then the table."""
        resized = self._resized(images)
        pixels = np.empty((len(resized), *resized[0].shape), np.float32)
        for number, image in enumerate(resized):
            for channel, levels in enumerate(image):
                np.take(table[channel], levels, out=pixels[number, channel], mode="clip")
        return from_numpy(pixels)

    def _resized(self, images: Sequence[Any]) -> Sequence[NDArray[np.uint8]]:
        """Bytes (C, H, W) of each image in the model's size, all of one shape."""
        processor = self._processor.image_processor
        named = {name for name, value in dict(processor.size).items() if value}
        if processor.do_resize and not processor.do_center_crop and named == {"height", "width"}:
            size = (processor.size["width"], processor.size["height"])
            made = [np.asarray(image.resize(size, resample=processor.resample)) for image in images]
            return [np.moveaxis(image, -1, 0) for image in made]
        bytes_only = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
        resized: Sequence[NDArray[np.uint8]] = processor(images=list(images), **bytes_only)["pixel_values"]
        return resized

    def _same(self, table: NDArray[np.float32], size: tuple[int, int]) -> bool:
        """Whether the table gives the bits of the whole processor for an image of `size`."""
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        whole = self._of_sample([image])
        return set(whole) == {"pixel_values"} and equal(whole["pixel_values"], self._look_up(table, [image]))


def _maps_bytes(processor: Any) -> bool:
    """Whether pixel inputs are, by the code that makes them, resized bytes through a map a channel."""
    images = processor.image_processor
    own = ("_preprocess", "rescale", "normalize")
    pillow = all(
        getattr(getattr(images, name, None), "__qualname__", "") == f"PilBackend.{name}" for name in own
    )
    return (
        type(processor).__name__ == "LlavaProcessor"
        and pillow
        and bool(images.do_rescale and images.do_normalize)
        and not getattr(images, "do_pad", None)  # it would fill up after the map
    )


def _table_of(image_processor: Any) -> NDArray[np.float32]:
    """(C, 256) float32: what becomes of every byte, by the image processor's own arithmetic."""
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (len(image_processor.image_mean), 1, 256))
    scaled = image_processor.rescale(levels, image_processor.rescale_factor)
    made = image_processor.normalize(scaled, image_processor.image_mean, image_processor.image_std)
    return np.ascontiguousarray(made[:, 0], dtype=np.float32)
