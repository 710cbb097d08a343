"""Images in a terminal: two pixels per character, by the upper half block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.color import Color
from rich.style import Style
from rich.text import Text

Pixels = NDArray[np.uint8]

HEAT = np.array(  # viridis at five points: dark to bright, readable for color-blind people too
    [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=np.float64
)
SHADES = " .:-=+*#%@"


def heat(values: NDArray[np.floating]) -> Pixels:
    """(H, W, 3) colors of (H, W) values, scaled from the smallest to the largest."""
    low, high = float(values.min(initial=np.inf)), float(values.max(initial=-np.inf))
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    at = np.asarray(scaled, dtype=np.float64) * (len(HEAT) - 1)
    channels = [np.interp(at, np.arange(len(HEAT)), HEAT[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def fitted(image: Image.Image, columns: int, lines: int) -> Pixels:
    """The image, with its aspect ratio kept, in at most columns x lines characters, (2 * lines', columns',
    3)."""
    scale = min(columns / image.width, 2 * lines / image.height)
    width, height = max(round(image.width * scale), 1), max(round(image.height * scale / 2) * 2, 2)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), dtype=np.uint8)


def half_blocks(pixels: Pixels, *, colour: bool) -> Text:
    """(H, W, 3) pixels as H / 2 lines of W characters; without color, one shade of gray per character."""
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, pixels[-1:]])
    text = Text(no_wrap=True)
    if not colour:
        grey = pixels.reshape(len(pixels) // 2, 2, -1, 3).mean(axis=(1, 3)) / 256
        lines = ("".join(SHADES[int(g * len(SHADES))] for g in row) for row in grey)
        return text.append("\n".join(lines))
    for number, (upper, lower) in enumerate(zip(pixels[::2], pixels[1::2], strict=True)):
        if number:
            text.append("\n")
        for top, bottom in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", Style(color=Color.from_rgb(*top), bgcolor=Color.from_rgb(*bottom)))
    return text
