"""Files of remote caches and image roots kept on a local disk, within a bound."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cache_schema.errors import KdcacheError
from cache_schema.settings import Help, check, positive

_SCANS = 16
"""The folder is looked through again whenever a sixteenth of its bound has been put into it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCacheConfig:
    """Where files from elsewhere are kept, and how much of them."""

    file_cache: Annotated[
        Path | None,
        Help("Local folder for files of remote caches and image roots. Default: ~/.cache/kdcache.", "Remote"),
    ] = None
    file_cache_gib: Annotated[float, positive, Help("Largest size of that folder in GiB.", "Remote")] = 32.0

    def __post_init__(self) -> None:
        check(self)

    def open(self) -> FileCache:
        """The folder, created; one object for all of a process. KdcacheError when that is not possible."""
        folder = self.file_cache
        if folder is None:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdcache"
        try:
            opened = _of_process(folder, int(self.file_cache_gib * 2**30))
            folder.mkdir(parents=True, exist_ok=True)
            return opened
        except OSError as error:
            raise KdcacheError(
                f"{folder}, where files from elsewhere are kept, cannot be made ({error.strerror or error}); "
                "give another --file-cache"
            ) from error


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class FileCache:
    """A folder of files named by their SHA-256; the least recently used are removed first.

    Any number of threads and processes may share one. Contents are not checked here: the reader compares
    every file with its digest, and calls `forget` on a mismatch. One process keeps the folder within
    `limit_bytes`; each of several may exceed it by a sixteenth meanwhile. A file that the disk has no room
    for is not kept.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._free = 0  # bytes that may be put before the folder is looked through again

    def get(self, digests: Iterable[str]) -> dict[str, bytes]:
        """The files that are present, by digest."""
        found = {}
        for digest in digests:
            with contextlib.suppress(OSError):
                found[digest] = (self.folder / digest).read_bytes()
                os.utime(self.folder / digest)
        return found

    def put(self, files: Mapping[str, bytes]) -> None:
        """Store files by digest and remove others where needed."""
        for digest, data in files.items():
            part = self.folder / f".{digest}.{uuid.uuid4().hex[:8]}"
            with contextlib.suppress(OSError):  # a full disk
                try:
                    part.write_bytes(data)
                    os.replace(part, self.folder / digest)
                finally:
                    part.unlink(missing_ok=True)
        with self._lock:
            self._free -= sum(map(len, files.values()))
            if self._free < 0:
                self._free = min(self._sweep(), self.limit_bytes // _SCANS)

    def forget(self, digest: str) -> None:
        """Remove a file."""
        (self.folder / digest).unlink(missing_ok=True)

    def _sweep(self) -> int:
        """Removes files until the rest is within the bound; the bytes that are left of it."""
        kept = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process swept it
                kept.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in kept)
        room = self.limit_bytes - (self.limit_bytes // _SCANS if total > self.limit_bytes else 0)
        for _, size, path in sorted(kept):
            if total <= room:
                break
            path.unlink(missing_ok=True)
            total -= size
        return max(0, self.limit_bytes - total)


@functools.cache
def _of_process(folder: Path, limit_bytes: int) -> FileCache:
    """One for all caches and image roots of a process, which keeps the bound for all of them together."""
    return FileCache(folder, limit_bytes)
