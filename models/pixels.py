"""Pixel values as an image processor makes them, by a lookup table where it maps each byte independently."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, equal, from_numpy
from torch.utils.dlpack import from_dlpack
from transformers import BatchFeature

from cache_schema.errors import KdcacheError

_PROBES = ((23, 31), (64, 48))
_METHODS = {
    "PilBackend": ("_preprocess", "rescale", "normalize"),
    "TorchvisionBackend": ("_preprocess", "rescale_and_normalize", "normalize"),
}


class PixelTable:
    """The pixels of a processor that leaves images to an image processor of resized bytes through one map per
    channel (Llava, on pillow or on torchvision): the same bits in a third of the time. May be called from any
    thread.
    """

    def __init__(self, image_processor: Any) -> None:
        self._processor = image_processor
        levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
        as_it_is = {"do_resize": False, "do_center_crop": False, "return_tensors": "np"}
        made = image_processor(images=[Image.fromarray(levels)], **as_it_is)["pixel_values"][0]
        self.values = np.ascontiguousarray(made.reshape(3, 256), dtype=np.float32)  # (C, 256)

    @classmethod
    def of(cls, processor: Any) -> PixelTable | None:
        """The table of a processor; None where it does more to images, or differs in a trial."""
        if not _maps_bytes(processor):
            return None
        table = cls(processor.image_processor)
        return table if all(table._agrees(processor, size) for size in _PROBES) else None

    def __call__(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """pixel_values (images, C, H, W) of images in RGB."""
        return look_up(from_numpy(self.resized(images)), from_numpy(self.values)).numpy()

    def resized(self, images: Sequence[Image.Image]) -> NDArray[np.uint8]:
        """Bytes (images, C, H, W) of images in RGB, in the model's size."""
        processor = self._processor
        named = {name for name, value in dict(processor.size).items() if value}
        if processor.do_resize and not processor.do_center_crop and named == {"height", "width"}:
            if _backend(processor) == "TorchvisionBackend":
                options = {"size": processor.size, "resample": processor.resample}
                return _joined([processor.resize(_planes(each), **options)[0].numpy() for each in images])
            size = (processor.size["width"], processor.size["height"])
            made = [image.resize(size, resample=processor.resample) for image in images]
            return _joined([_planes(image)[0].numpy() for image in made])
        bytes_only = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
        return np.asarray(processor(images=list(images), **bytes_only)["pixel_values"])

    def _agrees(self, processor: Any, size: tuple[int, int]) -> bool:
        """Whether the whole processor gives the same for an image of `size`, and nothing else."""
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        made = processor(text=[processor.image_token], images=[[image]], return_tensors="pt")
        others = {name for name, value in made.items() if value.shape != made["input_ids"].shape}
        return others == {"pixel_values"} and equal(made["pixel_values"], from_numpy(self([image])))


def _planes(image: Image.Image) -> Tensor:
    """Bytes (1, C, H, W) of an image in RGB. C is 4, where the last means nothing, if pillow has all pixels
    in one piece of memory: that is not copied. Else 3."""
    if hasattr(image, "__arrow_c_array__"):  # since pillow 11.2
        with suppress(ValueError):  # in several pieces
            memory: Tensor = from_dlpack(pa.array(image).flatten())
            return memory.view(1, image.height, image.width, 4).permute(0, 3, 1, 2)
    return from_numpy(np.array(image))[None].permute(0, 3, 1, 2)


def _joined(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """(images, 3, H, W) of the first three channels of images of one shape."""
    joined = np.empty((len(images), 3, *images[0].shape[1:]), np.uint8)
    for number, image in enumerate(images):
        joined[number] = image[:3]  # np.stack takes seven times as long for three channels of four
    return joined


def look_up(levels: Tensor, values: Tensor) -> Tensor:
    """pixel_values (N, C, H, W) of bytes of that shape: `PixelTable.__call__` on any device. values (C, 256):
    of the table. KdcacheError where levels are not bytes."""
    if levels.dtype != torch.uint8:
        raise KdcacheError(
            f"pixel_values are {levels.dtype} where the bytes of images are expected: a batch must not mix "
            "images that its processor gives as bytes with others"
        )
    if levels.device.type == "cpu":  # a fifth of the time there
        pixels = values.new_empty(levels.shape)
        for image, planes in zip(pixels, levels, strict=True):
            for row, plane, found in zip(values, planes, image, strict=True):
                torch.index_select(row, 0, plane.flatten().int(), out=found.view(-1))
        return pixels
    rows = torch.arange(0, values.numel(), values.shape[1], device=levels.device)
    return values.flatten()[levels.long() + rows[:, None, None]].contiguous()


def with_table(processor: Any, *, as_bytes: bool = False) -> Any:
    """The processor, or where PixelTable has its pixels a copy of it that takes them from there.

    as_bytes: its pixel_values are then bytes, a quarter as large; `table_of` has their values.
    """
    table = PixelTable.of(processor)
    if table is None:
        return processor
    faster = copy.copy(processor)
    faster.image_processor = _TableProcessor(processor.image_processor, table, as_bytes=as_bytes)
    return faster


def table_of(processor: Any) -> Tensor | None:
    """The table (C, 256) of a processor whose pixel_values are bytes, for `look_up`; else None."""
    images = getattr(processor, "image_processor", None)
    return images.table if isinstance(images, _TableProcessor) else None


class _TableProcessor:
    """An image processor whose pixels come from a table, unless other settings than its own are asked for.

    table: (C, 256) where pixel_values are bytes, that is of type uint8; else None.
    """

    def __init__(self, image_processor: Any, table: PixelTable, *, as_bytes: bool) -> None:
        self._image_processor = image_processor
        self._table = table
        self.table = from_numpy(table.values) if as_bytes else None

    def __call__(self, images: Any, **options: Any) -> Any:
        flat = [image for group in images for image in (group if isinstance(group, list) else [group])]
        plain = all(isinstance(image, Image.Image) and image.mode == "RGB" for image in flat)
        if plain and flat and set(options) <= {"return_tensors"} and options.get("return_tensors") == "pt":
            if self.table is None:
                return BatchFeature({"pixel_values": from_numpy(self._table(flat))})
            return BatchFeature({"pixel_values": from_numpy(self._table.resized(flat))})
        return self._image_processor(images, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_image_processor":  # while it is being copied
            raise AttributeError(name)
        return getattr(self._image_processor, name)


def _maps_bytes(processor: Any) -> bool:
    """Whether pixel inputs are, by the code that makes them, resized bytes through a map per channel."""
    images = processor.image_processor
    return (
        type(processor).__name__ == "LlavaProcessor"
        and _backend(images) is not None
        and bool(images.do_rescale and images.do_normalize)
        and not getattr(images, "do_pad", None)  # it would fill up after the map
    )


def _backend(images: Any) -> str | None:
    """The class of transformers whose methods an image processor uses; None where it has its own."""
    for backend, methods in _METHODS.items():
        own = {getattr(getattr(images, name, None), "__qualname__", "") for name in methods}
        if own == {f"{backend}.{name}" for name in methods}:
            return backend
    return None
