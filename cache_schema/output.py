"""Places that commands write to: refused before the work, and files written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from cache_schema.errors import KdcacheError


def require_folder(out: Path, *, new: bool) -> None:
    """KdcacheError unless `out` is, or can become, a folder to write to. new: it must not hold anything."""
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise KdcacheError(f"{out}: {place} is not a folder that can be written to; choose another --out")
    if new and out.exists() and any(out.iterdir()):
        raise KdcacheError(f"{out} is not empty; choose another --out or remove it")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
