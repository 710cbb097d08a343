"""Opening an image: teacher and student must decode the same file to the same pixels."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cache_schema.errors import KdcacheError, RowRejected

# What pillow raises on damaged files, beside OSError (which UnidentifiedImageError is).
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedImage:
    """A decoded image: `image` in mode RGB, EXIF rotation applied, width x height pixels.

    sha256: hex digest of the file's bytes.
    """

    image: Image.Image
    sha256: str
    width: int
    height: int


def open_image(root: Path | str, relative_path: str) -> OpenedImage:
    """Reads `relative_path` under `root` and decodes it to RGB.

    The first frame of an animation, palettes and CMYK converted, alpha dropped as in LLaVA's
    `convert("RGB")`, 16-bit and floating-point greys scaled to 8 bits. RowRejected with the reason
    `outside_root` (absolute, a URL, or climbing out, through symbolic links too), `missing_image`,
    `unreadable_image` or `broken_image` (no image, truncated, too many pixels).
    """
    content = _read_inside(Path(root), relative_path)
    try:
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()
            image = _to_rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError as error:  # whose text names an address in memory
        raise RowRejected("broken_image", f"{relative_path} is no image of a known format") from error
    except _DECODING_ERRORS as error:
        raise RowRejected("broken_image", f"{relative_path}: {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    return OpenedImage(image=image, sha256=digest, width=image.width, height=image.height)


def unpack_embedded(root: Path | str, embedded: Mapping[str, bytes]) -> None:
    """Writes images that a row carries itself to their paths under `root`, where those are not there yet.

    Their names are digests of their content, so that any number of processes may do so at once.
    KdcacheError when the folder refuses.
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


def _read_inside(root: Path, relative_path: str) -> bytes:
    """The bytes of a file that must lie inside `root`."""
    if "://" in relative_path or "\0" in relative_path:
        raise RowRejected("outside_root", f"{relative_path!r} is not a path under the image root")
    base = root.resolve()
    try:
        path = (base / relative_path).resolve()
        inside = path.is_relative_to(base)
    except (OSError, RuntimeError) as error:  # a loop of symbolic links, a name that is too long
        raise RowRejected("unreadable_image", f"{relative_path}: {error}") from error
    if not inside:
        raise RowRejected("outside_root", f"{relative_path} leads out of the image root {root}")
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise RowRejected("missing_image", f"{relative_path} is not a file under {root}") from error
    except OSError as error:
        raise RowRejected("unreadable_image", f"{relative_path}: {error.strerror or error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Mode RGB without pillow's clipping of deep greys (`I;16`, `I`, `F` would saturate at 255)."""
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
    """An RGB image from grey `levels` (height, width) in 0..255."""
    rounded = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return Image.fromarray(rounded).convert("RGB")
