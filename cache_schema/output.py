"""Places that commands write to: tried before the work, and files written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache_schema.errors import KdcacheError


def require_folder(out: Path, *, new: bool) -> None:
    """KdcacheError unless `out` is, or can become, a folder to write to: the nearest folder that exists is
    tried. new: it must not hold anything."""
    with writing(out):
        for place in (out.absolute(), *out.absolute().parents):
            with suppress(FileNotFoundError, NotADirectoryError):
                place.stat()
                break
        if not place.is_dir():
            raise KdcacheError(f"{out}: {place} is not a folder that can be written to; choose another --out")
        if new and place == out.absolute() and any(out.iterdir()):
            raise KdcacheError(f"{out} is not empty; choose another --out or remove it")
        os.rmdir(tempfile.mkdtemp(prefix=".kdcache-", dir=place))


def require_file(file: Path) -> None:
    """KdcacheError unless `file` can be written, as far as can be known before."""
    with writing(file):
        require_folder(file.parent, new=False)
        if file.is_dir():
            raise KdcacheError(f"cannot write {file}: it is a folder; give a file that can be written")


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """What the system refuses while `place` is written, as one line. KdcacheError in place of OSError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise KdcacheError(
            f"{place} cannot be written: {reason}; free space, or give a place that can be written"
        ) from error


@contextmanager
def writing_folder(out: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `out` and what was in it at the end. On any error it is
    removed and `out` is as it was; KdcacheError in place of OSError."""
    out = Path(os.path.abspath(out))
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(out):
            temporary.mkdir(parents=True)
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            if out.exists():
                out.rename(old)
            temporary.rename(out)
            sync(out.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all. KdcacheError when the disk refuses."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
