"""Files of a remote cache kept on a local disk, within a bound."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path


class FileCache:
    """A folder of files named by their SHA-256; the least recently used are removed first.

    Any number of processes may share one. Contents are not checked here: the reader compares every file with
    its digest, and calls `forget` on a mismatch. New files may exceed `limit_bytes` until the next `put`.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, digests: Iterable[str]) -> dict[str, bytes]:
        """The files that are present, by digest."""
        found = {}
        for digest in digests:
            with contextlib.suppress(FileNotFoundError):
                found[digest] = (self.folder / digest).read_bytes()
                os.utime(self.folder / digest)
        return found

    def put(self, files: Mapping[str, bytes]) -> None:
        """Store files by digest and evict others where needed."""
        for digest, data in files.items():
            part = self.folder / f".{digest}.{uuid.uuid4().hex[:8]}"
            part.write_bytes(data)
            os.replace(part, self.folder / digest)
        self._sweep()

    def forget(self, digest: str) -> None:
        """Remove a file."""
        (self.folder / digest).unlink(missing_ok=True)

    def _sweep(self) -> None:
        kept = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process swept it
                kept.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total <= self.limit_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
