"""Copies of data files that are compressed or not UTF-8, as plain UTF-8."""

from __future__ import annotations

import errno
import gzip
import json
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cache_schema.errors import KdcacheError

_STEP = 1 << 20
_BOMB = 1 << 30  # bytes above which a file that grows by more than _GROWTH times is not text
_GROWTH = 400
_PACKED = {
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"BZh": "packed by bzip2",
    b"\xfd7zXZ\0": "packed by xz",
    b"\x04\x22\x4d\x18": "packed by lz4",
    b"PK\x03\x04": "a ZIP archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"SQLite format 3\0": "an SQLite database",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
}


@contextmanager
def utf8_text(path: Path) -> Iterator[Path]:
    """`path`, or a temporary copy of it where it is compressed by gzip, or UTF-16 or UTF-32 text.

    KdcacheError where it is damaged, or of an unsupported kind.
    """
    head = _head(path)
    for start, name in _PACKED.items():
        if head.startswith(start):
            raise KdcacheError(f"data file {path} is {name}; unpack it, and give JSON, JSON lines or Parquet")
    with (
        tempfile.NamedTemporaryFile(suffix=".json") as plain,
        tempfile.NamedTemporaryFile(suffix=".json") as text,
    ):
        try:
            source = path
            if head.startswith(b"\x1f\x8b"):
                _unpack(path, plain)
                source = Path(plain.name)
                head = _head(source)
            encoding = json.detect_encoding(head)
            if not encoding.startswith("utf-8"):
                _to_utf8(source, encoding, text)
                source = Path(text.name)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise KdcacheError(
                f"data file {path} is a damaged gzip file ({error}); fetch it again"
            ) from error
        except UnicodeDecodeError as error:
            raise KdcacheError(
                f"data file {path} is not valid {encoding} text ({error.reason}); fetch it again, or save "
                "it as UTF-8"
            ) from error
        except OSError as error:
            raise no_room(error, path) from error
        yield source


def no_room(error: OSError, path: Path) -> OSError | KdcacheError:
    """`error`, or an error for a full disk of temporary files."""
    if error.errno != errno.ENOSPC:
        return error
    return KdcacheError(
        f"{tempfile.gettempdir()} has no space for a copy of {path}, which gives access to its rows in any "
        "order; set TMPDIR to a folder on a larger disk"
    )


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _unpack(path: Path, to: IO[bytes]) -> None:
    packed, written = path.stat().st_size, 0
    with gzip.open(path, "rb") as file:
        while piece := file.read(_STEP):
            written += to.write(piece)
            if written > max(_BOMB, _GROWTH * packed):
                raise KdcacheError(
                    f"data file {path} grows more than {_GROWTH} times when unpacked: it is not text"
                )
    to.flush()


def _to_utf8(path: Path, encoding: str, to: IO[bytes]) -> None:
    # A lone surrogate invalidates only its row, as where JSON escapes it.
    lenient: Any = {"errors": "surrogatepass"}
    with path.open(encoding=encoding, newline="", **lenient) as file:
        while piece := file.read(_STEP):
            to.write(piece.removeprefix("\ufeff").encode("utf-8", **lenient))
    to.flush()
