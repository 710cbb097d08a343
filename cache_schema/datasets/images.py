"""Opening an image: teacher and student must decode the same file to the same pixels."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cache_schema.datasets.image_roots import ImageRoot, open_root
from cache_schema.errors import RowRejected, StoppedEarly, first_line, shown

LARGEST_IMAGE = 1 << 27
"""Pixels of an image; a larger one is not decoded."""

_RUN_PROGRAMS = ("EPS", "WMF")  # pillow decodes these by running other programs

# Warnings of pillow about an image are of no use in a terminal; too many pixels are reported below.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedImage:
    """A decoded image: `image` in mode RGB, EXIF rotation applied, width x height pixels.

    path: from the image root. content: the file's bytes; sha256: their hex digest.
    """

    path: str
    image: Image.Image
    content: bytes
    sha256: str
    width: int
    height: int


def open_image(
    root: ImageRoot | Path | str | None, path: str, sha256: str | None = None, content: bytes | None = None
) -> OpenedImage:
    """Reads `path` under `root` and decodes it to RGB; sha256: the expected digest, as in `ImageRoot.read`.
    content: its bytes where they are at hand: nothing is read then.

    RowRejected with the reason `outside_root` (absolute, a URL, or outside the root, through symbolic links
    too), `missing_image`, `unreadable_image` (no regular file, or over LARGEST_FILE), or as `decode_image`.
    KdcacheError when a remote root does not answer.
    """
    if content is not None:
        return decode_image(path, content)
    return decode_image(*open_root(root).read(path, sha256))


def decode_image(path: str, content: bytes) -> OpenedImage:
    """The image in the bytes of a file, in RGB.

    The first frame of an animation, palettes and CMYK converted, alpha dropped as in LLaVA's
    `convert("RGB")`, 16-bit and floating-point grayscale scaled to 8 bits. RowRejected `broken_image` (no
    image, truncated, over LARGEST_IMAGE, or its decoder fails in any other way).
    """
    told = shown(path, 120)
    try:
        with Image.open(io.BytesIO(content)) as opened:
            if opened.width * opened.height > LARGEST_IMAGE:
                raise ValueError(f"{opened.width} x {opened.height} pixels, more than {LARGEST_IMAGE}")
            if opened.format in _RUN_PROGRAMS:
                raise ValueError(f"{opened.format} is a program, not pixels")
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)  # the other way it copies every image
            image = _to_rgb(opened)
    except UnidentifiedImageError as error:  # its text contains a memory address
        raise RowRejected("broken_image", f"{told} is not an image of a known format") from error
    except StoppedEarly:  # a signal that arrived here is no fault of the image
        raise
    except Exception as error:  # decoders raise arbitrary exceptions
        raise RowRejected("broken_image", f"{told}: {first_line(error)}") from error
    return OpenedImage(
        path=path,
        image=image,
        content=content,
        sha256=hashlib.sha256(content).hexdigest(),
        width=image.width,
        height=image.height,
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Mode RGB without pillow's clipping of high bit depths (`I;16`, `I`, `F` would saturate at 255)."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.float64) / 257.0)
    if image.mode in ("I", "F"):
        levels = np.asarray(image).astype(np.float64)
        if not np.isfinite(levels).all():
            raise ValueError("pixels that are not finite")
        highest = levels.max(initial=0.0)
        if image.mode == "I" and highest > 255.0:  # 16-bit PNGs open as 32-bit integers
            levels = levels / (257.0 if highest <= 65535.0 else highest / 255.0)
        elif image.mode == "F" and highest <= 1.0:
            levels = levels * 255.0
        return _grey(levels)
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _grey(levels: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Image.Image:
    """An RGB image from gray `levels` (height, width) in 0..255."""
    rounded = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return Image.fromarray(rounded).convert("RGB")
