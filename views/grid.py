"""The layout of visual tokens over their image"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isqrt, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Tokens = NDArray[np.int64]

Box = tuple[float, float, float, float]
"""left, top, right, bottom in fractions of the image; below 0 and above 1 outside of it."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
GROUND = (127, 127, 127)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """One grid of an image's tokens.

    tokens (rows, columns) int64: which of its P tokens each cell is. box: the part of the image that the grid
    covers, None where it only arranges the tokens for display. row_ends (rows,) or (0,): the tokens that end
    a row and show no patch (LLaVA-NeXT's newlines).
    """

    name: str
    tokens: Tokens
    box: Box | None
    row_ends: Tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """Every token of an image exactly once: in a layer, at the end of its rows, or `apart` (class tokens).

    frame: the part of the image to show, in fractions. note: why there is no grid over the image, or None.
    """

    layers: tuple[Layer, ...]
    frame: Box = WHOLE
    apart: tuple[int, ...] = ()
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The input of a layout: the image's size in pixels, its `count` of tokens, how many images its sample
    has, and `runs`: the length of every contiguous run of its tokens, with the text before each."""

    width: int
    height: int
    count: int
    images: int = 1
    runs: Sequence[tuple[int, str]] = ()


class ImageSettings:
    """The settings, among a cache's assets, that decide the layout."""

    def __init__(self, assets: Mapping[str, bytes]) -> None:
        documents = {
            name: json.loads(assets[name]) if name in assets else {}
            for name in ("preprocessor_config.json", "processor_config.json", "config.json")
        }
        self.config: dict[str, Any] = documents["config.json"]
        self.processor: dict[str, Any] = documents["processor_config.json"]
        self.pixels: dict[str, Any] = dict(documents["preprocessor_config.json"])
        self.pixels |= self.processor.get("image_processor") or {}

    @property
    def kind(self) -> str:
        """The image processor's class without its "Fast" suffix."""
        named = str(
            self.pixels.get("image_processor_type") or self.pixels.get("feature_extractor_type") or ""
        )
        return re.sub(r"(Fast|Pil)$", "", named.replace("FeatureExtractor", "ImageProcessor"))

    def get(self, name: str, default: Any = None) -> Any:
        """A setting of the processor or of its image processor."""
        value = self.processor.get(name, self.pixels.get(name))
        return default if value is None else value

    @property
    def sides(self) -> tuple[int, int] | None:
        """(height, width) in pixels of the vision tower's input, None where it is not fixed."""
        size = self.pixels.get("size") or {}
        crop = self.pixels.get("crop_size") if self.pixels.get("do_center_crop") else None
        for found in (crop, size):
            found = {"height": found, "width": found} if isinstance(found, int) else (found or {})
            if found.get("height") and found.get("width"):
                return int(found["height"]), int(found["width"])
        side = size.get("shortest_edge") if isinstance(size, dict) else None
        return (int(side), int(side)) if side else None


def layout_of(shape: Shape, settings: ImageSettings) -> Layout:
    """The layout of an image. Where its processor is unknown here, or its layout would not have `count`
    tokens, the tokens are in a plain grid with box None, and the note says why."""
    known = _WAYS.get(settings.kind)
    if known is None:
        named = settings.kind or "the teacher's image processor"
        return unlaid(shape.count, f"The token layout of {named} is unknown here")
    found = known(shape, settings)
    if found is None or _places(found) != list(range(shape.count)):
        return unlaid(
            shape.count,
            f"{settings.kind} with the settings in the cache does not make {shape.count} tokens of "
            f"{shape.width} x {shape.height} pixels",
        )
    return found


def unlaid(count: int, why: str) -> Layout:
    """Tokens in order, not over the image."""
    columns = max(ceil(sqrt(count)), 1)
    cells = np.full(ceil(count / columns) * columns, -1, dtype=np.int64)
    cells[:count] = np.arange(count)
    layer = Layer(
        name="tokens in order", tokens=cells.reshape(-1, columns), box=None, row_ends=np.zeros(0, np.int64)
    )
    return Layout(layers=(layer,), note=f"{why}: tokens are shown in order, not over the image.")


def framed(image: Image.Image, frame: Box) -> Image.Image:
    """The part of the image within the frame, gray outside the image."""
    box = tuple(round(part * side) for part, side in zip(frame, (image.width, image.height) * 2, strict=True))
    if box == (0, 0, image.width, image.height):
        return image
    shown = Image.new("RGB", (box[2] - box[0], box[3] - box[1]), GROUND)
    shown.paste(image.convert("RGB"), (-box[0], -box[1]))
    return shown


def _places(layout: Layout) -> list[int]:
    parts = [part.ravel() for layer in layout.layers for part in (layer.tokens, layer.row_ends)]
    return sorted([int(place) for part in parts for place in part if place >= 0] + list(layout.apart))


def _block(name: str, start: int, rows: int, columns: int, box: Box = WHOLE, *, ends: bool = False) -> Layer:
    """`rows` x `columns` tokens from `start` on in reading order; with `ends`, one more after every row."""
    cells = start + np.arange(rows * (columns + ends), dtype=np.int64).reshape(rows, columns + ends)
    return Layer(name=name, tokens=cells[:, :columns], box=box, row_ends=cells[:, columns:].ravel())


def _tiles(name: str, start: int, rows: int, columns: int, side: int) -> Layer:
    """rows x columns tiles of side x side tokens, one tile after the other, as one grid over the image."""
    cells = start + np.arange(rows * columns * side * side, dtype=np.int64)
    grid = cells.reshape(rows, columns, side, side).transpose(0, 2, 1, 3).reshape(rows * side, -1)
    return Layer(name=name, tokens=grid, box=WHOLE, row_ends=np.zeros(0, np.int64))


def _square_around(width: int, height: int) -> Box:
    """The square with the whole image in its center."""
    side = max(width, height)
    left, top = (side - width) / 2 / width, (side - height) / 2 / height
    return (-left, -top, 1 + left, 1 + top)


def _one_grid(shape: Shape, settings: ImageSettings) -> Layout | None:
    """One image of a fixed size: CLIP, SigLIP, ViT in Llava, PaliGemma and Gemma 3."""
    model = settings.config.get("model_type")
    if model not in ("llava", "vipllava", "paligemma", "gemma3") or settings.sides is None:
        return None
    height, width = settings.sides
    if model == "gemma3" and shape.count != settings.config.get("mm_tokens_per_image"):
        return None  # pan and scan: several crops
    classes = int(settings.get("num_additional_image_tokens", 0))
    apart = classes if settings.get("vision_feature_select_strategy") == "full" else 0
    rows = isqrt((shape.count - apart) * height // width)
    columns = rows * width // height
    if rows < 1 or rows * columns != shape.count - apart:
        return None
    frame = WHOLE
    size = settings.pixels.get("size") or {}
    if settings.kind == "LlavaImageProcessor" and settings.pixels.get("do_pad"):
        frame = _square_around(shape.width, shape.height)
    elif settings.pixels.get("do_center_crop") and (isinstance(size, int) or "shortest_edge" in size):
        frame = _centre(shape, size if isinstance(size, int) else size["shortest_edge"], height, width)
    layer = _block("the picture", apart, rows, columns, frame)
    return Layout(layers=(layer,), frame=frame, apart=tuple(range(apart)))


def _centre(shape: Shape, shortest: int, height: int, width: int) -> Box:
    """The part of the image that a center crop of height x width keeps after its shorter side was resized to
    `shortest`."""
    scale = shortest / min(shape.width, shape.height)
    across, down = width / (shape.width * scale) / 2, height / (shape.height * scale) / 2
    return (0.5 - across, 0.5 - down, 0.5 + across, 0.5 + down)


def _any_resolution(shape: Shape, settings: ImageSettings) -> Layout | None:
    """LLaVA-NeXT and LLaVA-OneVision: the whole image, then a finer grid without the padding's rows and
    columns, each row ended by a newline token."""
    sides, pinpoints = settings.sides, settings.pixels.get("image_grid_pinpoints")
    onevision = settings.kind == "LlavaOnevisionImageProcessor"
    if sides is None or not pinpoints:
        return None
    if onevision:
        base = (isqrt(int(settings.get("num_image_tokens", 0))),) * 2
    else:
        patch = int(settings.get("patch_size", 0))
        base = (sides[0] // patch, sides[1] // patch) if patch else (0, 0)
    if 0 in base:
        return None
    whole = _block("the whole picture", 0, *base)
    if onevision and shape.images > 1 and shape.count == base[0] * base[1] + 1:
        around = _square_around(shape.width, shape.height)  # many images: each padded, one newline at its end
        return Layout(
            layers=(_block("the picture", 0, *base, around),), frame=around, apart=(base[0] * base[1],)
        )
    best = best_resolution(shape.height, shape.width, pinpoints)
    rows, columns = base[0] * (best[0] // sides[0]), base[1] * (best[1] // sides[1])
    padding = _unpadding(shape.height, shape.width, rows, columns)
    box = _unpadded_box(shape, best, (rows, columns), padding)
    rows, columns = rows - 2 * padding[0], columns - 2 * padding[1]
    if onevision:
        most = int(str(settings.get("vision_aspect_ratio", "anyres_max_9")).rpartition("_")[2])
        ratio = math.sqrt(rows * columns / (most * base[0] ** 2))
        if ratio > 1.1:  # the model makes the grid smaller
            rows, columns = int(rows // ratio), int(columns // ratio)
    fine = _block("in detail", base[0] * base[1], rows, columns, box, ends=True)
    return Layout(layers=(whole, fine))


def best_resolution(height: int, width: int, pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The (height, width) that keeps most of the image's pixels, and of those the one with least padding."""

    def merit(point: Sequence[int]) -> tuple[int, int]:
        scale = min(point[1] / width, point[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - point[0] * point[1]

    best = max(pinpoints, key=merit)
    return int(best[0]), int(best[1])


def _unpadding(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    """The number of rows, and of columns, of tokens at each side that are padding only."""
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


def _unpadded_box(shape: Shape, best: Sequence[int], cells: tuple[int, int], padding: tuple[int, int]) -> Box:
    """The part of the image that the unpadded grid covers: the image keeps its aspect ratio, centered in the
    best resolution."""
    down, across = best[0] / shape.height, best[1] / shape.width
    if across < down:
        size = min(ceil(shape.height * across), best[0]), best[1]
    else:
        size = best[0], min(ceil(shape.width * down), best[1])
    edges: list[tuple[float, float]] = []
    for full, made, number, lost in zip(best, size, cells, padding, strict=True):
        before, step = (full - made) // 2, full / number
        edges.append(((lost * step - before) / made, ((number - lost) * step - before) / made))
    (top, bottom), (left, right) = edges
    return (left, top, right, bottom)


def _merged_patches(shape: Shape, settings: ImageSettings) -> Layout | None:
    """Qwen-VL: the image at about its own size, `merge_size` patches per side for each token."""
    factor = int(settings.get("patch_size", 0)) * int(settings.get("merge_size", 0))
    size = settings.pixels.get("size") or {}
    least = settings.pixels.get("min_pixels") or size.get("shortest_edge")
    most = settings.pixels.get("max_pixels") or size.get("longest_edge")
    if not factor or not least or not most:
        return None
    height, width = (max(round(side / factor), 0) * factor for side in (shape.height, shape.width))
    if height * width > most:
        scale = sqrt(shape.height * shape.width / most)
        height, width = (
            max(factor, math.floor(side / scale / factor) * factor) for side in (shape.height, shape.width)
        )
    elif height * width < least:
        scale = sqrt(least / (shape.height * shape.width))
        height, width = (ceil(side * scale / factor) * factor for side in (shape.height, shape.width))
    return Layout(layers=(_block("the picture", 0, height // factor, width // factor),))


def _named_tiles(shape: Shape, settings: ImageSettings) -> Layout | None:
    """Idefics3 and SmolVLM: the text before a tile gives its row and column; the whole image is last."""
    length = int(settings.get("image_seq_len", 0))
    side = isqrt(length)
    if not length or side * side != length or any(count != length for count, _ in shape.runs):
        return None
    named = [re.search(r"row_(\d+)_col_(\d+)", re.sub(r"\s", "", before)) for _, before in shape.runs]
    whole = _block("the whole picture", length * (len(named) - 1), side, side)
    places = [(int(found[1]), int(found[2])) for found in named if found]
    if not places:
        return Layout(layers=(whole,))
    rows, columns = places[-1]
    if places != [(i, j) for i in range(1, rows + 1) for j in range(1, columns + 1)] or named[-1]:
        return None
    return Layout(layers=(whole, _tiles("in detail", 0, rows, columns, side)))


def _canvas_tiles(shape: Shape, settings: ImageSettings) -> Layout | None:
    """InternVL: tiles in the arrangement nearest to the image's aspect ratio, then the whole image."""
    length, sides = int(settings.get("image_seq_length", 0)), settings.sides
    side = isqrt(length)
    if settings.config.get("model_type") != "internvl" or sides is None or not length or side**2 != length:
        return None
    if shape.count == length:
        return Layout(layers=(_block("the picture", 0, side, side),))
    least, most = int(settings.get("min_patches", 1)), int(settings.get("max_patches", 12))
    found, nearest = (1, 1), math.inf
    arrangements = [(w, h) for w in range(1, most + 1) for h in range(1, most + 1) if least <= w * h <= most]
    for columns, rows in sorted(arrangements, key=lambda pair: pair[0] * pair[1]):
        far = abs(shape.width / shape.height - columns / rows)
        large = shape.width * shape.height > 0.5 * sides[0] * sides[1] * columns * rows
        if far < nearest or (far == nearest and large):
            found, nearest = (columns, rows), far
    whole = _block("the whole picture", length * found[0] * found[1], side, side)
    return Layout(layers=(whole, _tiles("in detail", 0, found[1], found[0], side)))


_WAYS: dict[str, Callable[[Shape, ImageSettings], Layout | None]] = {
    "CLIPImageProcessor": _one_grid,
    "SiglipImageProcessor": _one_grid,
    "ViTImageProcessor": _one_grid,
    "BitImageProcessor": _one_grid,
    "LlavaImageProcessor": _one_grid,
    "Gemma3ImageProcessor": _one_grid,
    "LlavaNextImageProcessor": _any_resolution,
    "LlavaOnevisionImageProcessor": _any_resolution,
    "Qwen2VLImageProcessor": _merged_patches,
    "Idefics3ImageProcessor": _named_tiles,
    "SmolVLMImageProcessor": _named_tiles,
    "GotOcr2ImageProcessor": _canvas_tiles,
}
