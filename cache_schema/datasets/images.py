"""Opening an image: teacher and student must decode the same file to the same pixels."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cache_schema.errors import KdcacheError, RowRejected, first_line, shown

LARGEST_FILE = 256 << 20
"""Bytes of an image file; a larger one is not read."""

LARGEST_IMAGE = 1 << 27
"""Pixels of an image; a larger one is not decoded."""

_RUN_PROGRAMS = ("EPS", "WMF")  # pillow decodes these by running other programs

# Warnings of pillow about an image are of no use in a terminal; too many pixels are reported below.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedImage:
    """A decoded image: `image` in mode RGB, EXIF rotation applied, width x height pixels.

    path: from the image root. sha256: hex digest of the file's bytes.
    """

    path: str
    image: Image.Image
    sha256: str
    width: int
    height: int


def open_image(root: Path | str, path: str) -> OpenedImage:
    """Reads `path` under `root` and decodes it to RGB; a path from elsewhere that leads into `root` is
    accepted.

    The first frame of an animation, palettes and CMYK converted, alpha dropped as in LLaVA's
    `convert("RGB")`, 16-bit and floating-point grayscale scaled to 8 bits. RowRejected with the reason
    `outside_root` (absolute, a URL, or outside the root, through symbolic links too), `missing_image`,
    `unreadable_image` (no regular file, or over LARGEST_FILE) or `broken_image` (no image, truncated, over
    LARGEST_IMAGE, or its decoder fails in any other way).
    """
    told = shown(path, 120)
    relative, content = _read_inside(Path(root), path)
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
    except Exception as error:  # decoders raise arbitrary exceptions
        raise RowRejected("broken_image", f"{told}: {first_line(error)}") from error
    return OpenedImage(
        path=relative,
        image=image,
        sha256=hashlib.sha256(content).hexdigest(),
        width=image.width,
        height=image.height,
    )


def unpack_embedded(root: Path | str, embedded: Mapping[str, bytes]) -> None:
    """Writes images that a row itself carries to their paths under `root`, unless they exist.

    Their names are digests of their content, so any number of processes may do so at once. KdcacheError when
    the folder cannot be written.
    """
    for relative_path, content in embedded.items():
        path = Path(root) / relative_path
        temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
        try:
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(content)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise KdcacheError(
                f"the images that rows carry are unpacked to {root}/embedded, which cannot be written "
                f"({error.strerror or error}); make it writable or give another --image-root"
            ) from error


def _read_inside(root: Path, name: str) -> tuple[str, bytes]:
    """(path from `root`, bytes) of a regular file that must lie inside `root`."""
    told = shown(name, 120)
    if "://" in name or "\0" in name:
        raise RowRejected("outside_root", f"{told} is not a path under the image root")
    base = root.resolve()
    try:
        path = (base / name).resolve()
        inside = path.is_relative_to(base)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long or not Unicode
        raise RowRejected("unreadable_image", f"{told}: {first_line(error)}") from error
    if not inside:
        raise RowRejected("outside_root", f"{told} is outside the image root {root}")
    plain = not Path(name).is_absolute() and ".." not in Path(name).parts
    try:
        return (name if plain else path.relative_to(base).as_posix()), _read_file(path, told)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise RowRejected("missing_image", f"{told} is not a file under {root}") from error
    except OSError as error:
        raise RowRejected("unreadable_image", f"{told}: {error.strerror or error}") from error


def _read_file(path: Path, told: str) -> bytes:
    """The bytes of a regular file within the size bound. Pipes and devices, which may never end, are
    refused."""
    if path.is_dir():
        raise IsADirectoryError
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise RowRejected("unreadable_image", f"{told} is a pipe, a socket or a device, not a file")
        content = file.read(LARGEST_FILE + 1) if state.st_size <= LARGEST_FILE else None
    if content is None or len(content) > LARGEST_FILE:
        raise RowRejected(
            "unreadable_image",
            f"{told} is larger than {LARGEST_FILE >> 20} MiB, the largest size that is read",
        )
    return content


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
