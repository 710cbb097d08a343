"""Where the visual tokens of an image lie on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, isqrt, sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Fit = Literal["stretch", "centre", "pad"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """rows x columns cells, filled in token order. on_image: whether cell (i, j) covers that part of the
    picture; otherwise the grid only arranges the tokens for the eye."""

    rows: int
    columns: int
    on_image: bool


def grid_of(count: int, thw: NDArray[np.generic] | None = None, merge: int = 1) -> Grid:
    """The grid of an image of `count` visual tokens: from the model's own (time, height, width) where it has
    one (in patches, `merge` of them a side become a token), else the square when `count` is one."""
    if thw is not None:
        frames, height, width = (int(n) for n in thw)
        if frames == 1 and (height // merge) * (width // merge) == count:
            return Grid(rows=height // merge, columns=width // merge, on_image=True)
    side = isqrt(count)
    if count and side * side == count:
        return Grid(rows=side, columns=side, on_image=True)
    columns = max(ceil(sqrt(count)), 1)
    return Grid(rows=ceil(count / columns), columns=columns, on_image=False)


class ImageSettings:
    """What of the image processor's settings decides which part of a picture the grid covers."""

    def __init__(self, assets: Mapping[str, bytes]) -> None:
        self._settings: dict[str, Any] = {}
        for name in ("processor_config.json", "preprocessor_config.json"):
            if name in assets:
                document = json.loads(assets[name])
                self._settings |= document.get("image_processor") or document

    @property
    def merge(self) -> int:
        """Patches a side that become one token (Qwen2-VL's family)."""
        return int(self._settings.get("merge_size") or 1)

    @property
    def fit(self) -> Fit:
        """How a picture is made to fit the model's square."""
        if self._settings.get("do_pad") and not self._settings.get("image_grid_pinpoints"):
            return "pad"
        size = self._settings.get("size") or {}
        return "centre" if self._settings.get("do_center_crop") and "shortest_edge" in size else "stretch"

    def as_seen(self, image: Image.Image) -> Image.Image:
        """The part of the picture that the model sees, in the picture's own proportions."""
        side = min(image.size)
        if self.fit == "centre":
            return ImageOps.fit(image, (side, side))
        if self.fit == "pad":
            return ImageOps.pad(image, (max(image.size), max(image.size)), color=(127, 127, 127))
        return image
