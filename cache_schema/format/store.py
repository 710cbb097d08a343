"""Storage of a cache: a directory, or any fsspec URL. Writes are whole files; a file never changes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import threading
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fsspec

from cache_schema.errors import CacheDamaged, KdcacheError, WrongUsage, first_line
from cache_schema.output import sync
from cache_schema.patience import patiently

RANGE_BYTES = 8 << 20
"""Objects above this size are read as several ranges at once."""

DOCUMENT_BYTES = 1 << 29
"""More than any document of a cache has: a manifest of 100 million rows. Other files have declared sizes."""

WORKERS = 8
"""Files of a directory read or synced at once."""

_CREATION = threading.Lock()


class Range(NamedTuple):
    """The bytes of a file from `start` to `end`. whole: all that the file should hold, so that a longer one
    shows where that costs nothing."""

    path: str
    start: int
    end: int
    whole: bool = True


class Listed(NamedTuple):
    """A file in a listing: its size, and the MD5 of its bytes in hex where the store tells it."""

    bytes: int
    md5: str | None = None


class Store(Protocol):
    """The storage operations that a cache needs. Paths are relative, with forward slashes.

    `list` gives path -> bytes of every file below a folder, `listed` all that this one listing tells. `put`
    and `put_folder` return when the bytes are durable; a reader never sees a partial file. `create` is
    exclusive: False, and nothing changed, when the path exists. OSError when the storage fails
    (FileNotFoundError for a missing file). `read` is for documents, whose size nothing declares.
    """

    url: str

    def read(self, path: str) -> bytes: ...

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]: ...

    def exists(self, path: str) -> bool: ...

    def list(self, folder: str = "") -> dict[str, int]: ...

    def listed(self, folder: str = "") -> dict[str, Listed]: ...

    def modified(self, path: str) -> float: ...

    def put(self, path: str, data: bytes) -> None: ...

    def put_folder(self, folder: str, files: Mapping[str, bytes]) -> None: ...

    def create(self, path: str, data: bytes) -> bool: ...

    def move(self, path: str, target: str) -> None: ...

    def remove(self, paths: Sequence[str]) -> None: ...


def open_store(url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Store:
    """The store at a path or fsspec URL (`s3://bucket/cache`, `memory://cache`, `file:///...`)."""
    text = os.fspath(url)
    text = text.removeprefix("file://").removeprefix("local://")
    if "://" not in text:
        return LocalStore(Path(text))
    return ObjectStore(text, dict(storage_options or {}))


def document(store: Store, path: str, size: int) -> Range:
    """All of a document that has `size` bytes. CacheDamaged where that is too large for one."""
    if size > DOCUMENT_BYTES:
        raise CacheDamaged(
            f"{store.url}/{path}: {size:,} bytes, where no document of a cache has over {DOCUMENT_BYTES:,}"
        )
    return Range(path, 0, size)


def refuse_inside(out: str | os.PathLike[str], sources: Sequence[Store]) -> None:
    """WrongUsage when `out` lies inside one of the caches that it is made of."""
    place = open_store(out)
    for source in sources:
        if isinstance(place, LocalStore) and isinstance(source, LocalStore):
            inside = source.root.resolve() in place.root.resolve().parents
        else:
            inside = place.url.startswith(f"{source.url}/")
        if inside:
            raise WrongUsage(f"{out} lies inside the cache {source.url}; give another --out")


class LocalStore:
    """A directory. Write, fsync, rename, fsync the directory; `create` by a hard link."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def read(self, path: str) -> bytes:
        return self._read(path, 0, None)

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(self._read_range, ranges))

    def _read_range(self, wanted: Range) -> bytes:
        return self._read(wanted.path, wanted.start, wanted.end + wanted.whole)

    def _read(self, path: str, start: int, end: int | None) -> bytes:
        """Bytes of a regular file, no more than it holds; end None: of a document, all. CacheDamaged for a
        pipe or a device, which may never end, and for a document that is too large for one."""
        with open(os.open(self.root / path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise CacheDamaged(f"{self.url}/{path}: a pipe, a socket or a device, not a file")
            if end is None:
                end = document(self, path, state.st_size).end
            file.seek(start)
            return file.read(max(0, min(end, state.st_size) - start))

    def exists(self, path: str) -> bool:
        return (self.root / path).exists()

    def list(self, folder: str = "") -> dict[str, int]:
        found = {}
        for parent, _, names in os.walk(self.root / folder):
            for name in names:
                path = Path(parent) / name
                with contextlib.suppress(FileNotFoundError):  # another process may be renaming it
                    found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return dict(sorted(found.items()))

    def listed(self, folder: str = "") -> dict[str, Listed]:
        return {path: Listed(size) for path, size in self.list(folder).items()}

    def modified(self, path: str) -> float:
        return (self.root / path).stat().st_mtime

    def put(self, path: str, data: bytes) -> None:
        part = self._part(path)
        try:
            _write(part, data)
            sync(part)
            os.rename(part, self.root / path)
        finally:
            part.unlink(missing_ok=True)
        sync(part.parent)

    def put_folder(self, folder: str, files: Mapping[str, bytes]) -> None:
        part = self._part(folder)
        try:
            for name, data in files.items():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                _write(part / name, data)
            folders = [Path(parent) for parent, _, _ in os.walk(part, topdown=False)]
            with ThreadPoolExecutor(WORKERS) as pool:  # fsyncs at once share one journal commit
                list(pool.map(sync, [part / name for name in files]))
                list(pool.map(sync, folders))
            os.rename(part, self.root / folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        sync(part.parent)

    def create(self, path: str, data: bytes) -> bool:
        part = self._part(path)
        try:
            _write(part, data)
            sync(part)
            os.link(part, self.root / path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise
            return self._create_without_links(path, data)
        finally:
            part.unlink(missing_ok=True)
        sync(part.parent)
        return True

    def move(self, path: str, target: str) -> None:
        (self.root / target).parent.mkdir(parents=True, exist_ok=True)
        os.rename(self.root / path, self.root / target)
        sync((self.root / target).parent)
        sync((self.root / path).parent)

    def remove(self, paths: Sequence[str]) -> None:
        for path in paths:
            (self.root / path).unlink(missing_ok=True)
            for parent in Path(path).parents[:-2]:  # the folders of a shard, never samples/, targets/, ...
                with contextlib.suppress(OSError):
                    (self.root / parent).rmdir()

    def _part(self, path: str) -> Path:
        final = self.root / path
        if not final.parent.exists():
            final.parent.mkdir(parents=True, exist_ok=True)
            sync(final.parent.parent)
        return final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.part"

    def _create_without_links(self, path: str, data: bytes) -> bool:
        # A file system without hard links: exclusive, but a crash may leave a torn file, which its own
        # digest gives away.
        try:
            _write(self.root / path, data)
        except FileExistsError:
            return False
        sync(self.root / path)
        sync((self.root / path).parent)
        return True


class ObjectStore:
    """An object store or other fsspec file system: no rename, so only `create` decides.

    `create` relies on the conditional put of the file system (`mode="create"` of fsspec: If-None-Match
    on S3). Whether a store supports it cannot be known beforehand: `CacheWriter.open` tries it.
    """

    def __init__(self, url: str, storage_options: dict[str, Any]) -> None:
        self.url = url.rstrip("/")
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url, **storage_options)
        except (ValueError, ImportError) as error:
            raise KdcacheError(f"{url}: {first_line(error)}; give a folder or an fsspec URL") from error
        self._root = root.rstrip("/")
        self._answered = False

    def read(self, path: str) -> bytes:
        data = self._call("cat_file", self._at(path))
        assert isinstance(data, bytes)
        return data

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        split = [
            (number, start, min(start + RANGE_BYTES, wanted.end))
            for number, wanted in enumerate(ranges)
            for start in range(wanted.start, max(wanted.end, wanted.start + 1), RANGE_BYTES)
        ]
        pieces = self._call(
            "cat_ranges",
            [self._at(ranges[number].path) for number, _, _ in split],
            [start for _, start, _ in split],
            [end for _, _, end in split],
            on_error="raise",
        )
        joined: list[list[bytes]] = [[] for _ in ranges]
        for (number, _, _), piece in zip(split, pieces, strict=True):
            joined[number].append(piece)
        return [parts[0] if len(parts) == 1 else b"".join(parts) for parts in joined]

    def exists(self, path: str) -> bool:
        self._fs.invalidate_cache()
        return bool(self._call("exists", self._at(path)))

    def list(self, folder: str = "") -> dict[str, int]:
        return {path: file.bytes for path, file in self.listed(folder).items()}

    def listed(self, folder: str = "") -> dict[str, Listed]:
        self._fs.invalidate_cache()
        top = self._at(folder) if folder else self._root
        # A folder whose first file another process writes meanwhile is listed as an entry of itself by s3fs.
        return {
            name[len(self._root) + 1 :]: Listed(int(info["size"]), _md5_of(info))
            for name, info in sorted(self._call("find", top, detail=True).items())
            if name.startswith(f"{top}/")
        }

    def modified(self, path: str) -> float:
        return float(self._call("modified", self._at(path)).timestamp())

    def put(self, path: str, data: bytes) -> None:
        self._call("pipe_file", self._at(path), data)

    def put_folder(self, folder: str, files: Mapping[str, bytes]) -> None:
        self._call("pipe", {self._at(f"{folder}/{name}"): data for name, data in files.items()})

    def create(self, path: str, data: bytes) -> bool:
        # The lock is for memory://, whose test and set are two steps; it is of one process, as they are.
        with _CREATION:
            try:
                self._call("pipe_file", self._at(path), data, mode="create")
            except FileExistsError:
                return False
        return True

    def move(self, path: str, target: str) -> None:
        self.put(target, self.read(path))
        self._call("rm_file", self._at(path))

    def remove(self, paths: Sequence[str]) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                self._call("rm_file", self._at(path))

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """A method of the file system, which is asked again while it fails, once it has ever answered; any
        error of its driver becomes an OSError."""
        try:
            answer = patiently(
                lambda: getattr(self._fs, method)(*arguments, **options), None if self._answered else 0.0
            )
            self._answered = True
            return answer
        except (FileNotFoundError, FileExistsError):
            self._answered = True
            raise
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"


def _md5_of(info: Mapping[str, Any]) -> str | None:
    """The MD5 of an object that was put at once, which is its ETag at S3; other ETags have another form."""
    tag = str(info.get("ETag", "")).strip('"')
    return tag if re.fullmatch("[0-9a-f]{32}", tag) else None


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
