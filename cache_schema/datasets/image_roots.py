"""Where images come from: a folder or an fsspec URL. No path of a row leads out of it."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import stat
import threading
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from cache_schema.errors import KdcacheError, RowRejected, WrongUsage, first_line, shown
from cache_schema.file_cache import FileCache, FileCacheConfig
from cache_schema.patience import is_final, patiently

LARGEST_FILE = 256 << 20
"""Bytes of an image file; a larger one is not read."""

FETCHES = 32
"""Requests to a remote image root at once."""

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:/|.*(://|::)", re.IGNORECASE | re.DOTALL)
_MOST_KNOWN = 1 << 17  # digests of remote files that are remembered, where no cache has recorded them
_MOST_DECODINGS = 4  # of percent signs in a path


class ImageRoot(Protocol):
    """What image paths start from. Any thread may use it.

    read: (path from the root, bytes); sha256: the expected digest where it is known, which finds a copy on
    the local disk: the caller compares it. RowRejected as `open_image` says; KdcacheError when a remote root
    does not answer. prefetch: files that will be read soon; returns at once. store: writes a file unless it
    exists; OSError.
    """

    name: str

    def read(self, path: str, sha256: str | None = None) -> tuple[str, bytes]: ...

    def prefetch(self, wanted: Iterable[tuple[str, str | None]]) -> None: ...

    def store(self, path: str, content: bytes) -> None: ...


def open_root(
    place: ImageRoot | Path | str | None,
    files: FileCacheConfig | None = None,
    *,
    patience: float | None = None,
) -> ImageRoot:
    """The image root at a folder or an fsspec URL; None: one without any image.

    files: where remote images are kept on the local disk; None: nowhere. patience: seconds for which a
    remote image is tried again, as `patiently` takes them. KdcacheError when the URL's protocol is unknown or
    needs a package, WrongUsage when a password is in it.
    """
    if place is None:
        return NoRoot()
    if not isinstance(place, str | Path):
        return place
    text = os.fspath(place).removeprefix("file://").removeprefix("local://")
    if "://" not in text:
        return FolderRoot(Path(text))
    return RemoteRoot(text, None if files is None else files.open(), patience)


def require_root(root: ImageRoot) -> None:
    """KdcacheError when the root is a folder that does not exist."""
    if isinstance(root, FolderRoot) and not root.folder.is_dir():
        raise KdcacheError(
            f"image root {root.name} is not a folder; give the folder that image paths are relative to"
        )


def unpack_embedded(root: ImageRoot | Path | str, embedded: Mapping[str, bytes]) -> None:
    """Writes images that a row itself carries to their paths under `root`, unless they exist.

    Their names are digests of their content, so any number of processes may do so at once. KdcacheError when
    the root cannot be written.
    """
    if not embedded:
        return
    opened = open_root(root)
    try:
        for path, content in embedded.items():
            opened.store(path, content)
    except OSError as error:
        raise KdcacheError(
            f"the images that rows carry are unpacked to {opened.name}/embedded, which cannot be written "
            f"({error.strerror or error}); make it writable or give another --image-root"
        ) from error


class NoRoot:
    """No image root was given: what is not in the cache itself is missing."""

    name = "no image root"

    def read(self, path: str, sha256: str | None = None) -> tuple[str, bytes]:
        raise RowRejected("missing_image", f"{shown(path, 120)} is needed, but no --image-root was given")

    def prefetch(self, wanted: Iterable[tuple[str, str | None]]) -> None:
        pass

    def store(self, path: str, content: bytes) -> None:
        raise OSError("there is none")


class FolderRoot:
    """A folder. A path from elsewhere that leads into it is accepted, links that stay inside are followed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = str(folder)

    @cached_property
    def _resolved(self) -> Path:
        return self.folder.resolve()

    def read(self, path: str, sha256: str | None = None) -> tuple[str, bytes]:
        told = shown(path, 120)
        if "://" in path or "\0" in path:
            raise RowRejected("outside_root", f"{told} is not a path under the image root")
        base = self._resolved
        try:
            file = (base / path).resolve()
            inside = file.is_relative_to(base)
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, too long or not Unicode
            raise RowRejected("unreadable_image", f"{told}: {first_line(error)}") from error
        if not inside:
            raise RowRejected("outside_root", f"{told} is outside the image root {self.folder}")
        plain = not Path(path).is_absolute() and ".." not in Path(path).parts
        try:
            return (path if plain else file.relative_to(base).as_posix()), _read_file(file, told)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise RowRejected("missing_image", f"{told} is not a file under {self.folder}") from error
        except OSError as error:
            raise RowRejected("unreadable_image", f"{told}: {error.strerror or error}") from error

    def prefetch(self, wanted: Iterable[tuple[str, str | None]]) -> None:
        pass

    def store(self, path: str, content: bytes) -> None:
        file = self.folder / path
        temporary = file.with_name(f".{file.name}-{uuid.uuid4().hex[:8]}")
        if file.exists():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


class RemoteRoot:
    """An fsspec URL. Files are fetched by threads of its own, and kept on the local disk within a bound.

    Paths are names below the URL: `..` and absolute paths are refused, also percent-encoded, and so are a
    scheme, a query and a backslash.
    """

    def __init__(self, url: str, files: FileCache | None, patience: float | None) -> None:
        if urlsplit(url).password is not None:
            raise WrongUsage(
                "an image root with a password in its URL would be recorded; give the password through the "
                "environment or the configuration of fsspec"
            )
        import fsspec

        self.name = url.rstrip("/")
        try:
            self._fs, base = fsspec.core.url_to_fs(self.name)
        except (ValueError, ImportError, OSError) as error:
            raise KdcacheError(f"{url}: {first_line(error)}; give a folder or an fsspec URL") from error
        self._base = base.rstrip("/")
        self._files = files
        self._patience = patience
        self._pool = ThreadPoolExecutor(FETCHES, thread_name_prefix="images")
        self._lock = threading.Lock()
        self._coming: dict[str, Future[bytes]] = {}
        self._known: dict[str, str] = {}  # digests by path

    def __deepcopy__(self, memo: Any) -> RemoteRoot:
        return self

    def read(self, path: str, sha256: str | None = None) -> tuple[str, bytes]:
        name = _name_below(path)
        return name, self._ask(name, sha256).result()

    def prefetch(self, wanted: Iterable[tuple[str, str | None]]) -> None:
        if self._files is None:
            return
        for path, sha256 in wanted:
            try:
                self._ask(_name_below(path), sha256)
            except RowRejected:
                continue  # `read` reports it

    def store(self, path: str, content: bytes) -> None:
        place = f"{self._base}/{path}"
        try:
            if not self._fs.exists(place):
                self._fs.pipe_file(place, content)
        except OSError:
            raise
        except Exception as error:  # of the driver
            raise OSError(first_line(error)) from error

    def _ask(self, name: str, sha256: str | None) -> Future[bytes]:
        with self._lock:
            future = self._coming.get(name)
            if future is None:
                future = self._coming[name] = self._pool.submit(self._get, name, sha256)
                future.add_done_callback(lambda _: self._coming.pop(name, None))
        return future

    def _get(self, name: str, sha256: str | None) -> bytes:
        digest = sha256 or self._known.get(name)
        if self._files is not None and digest is not None:
            for content in self._files.get([digest]).values():
                if hashlib.sha256(content).hexdigest() == digest:
                    return content
                self._files.forget(digest)
        content = self._fetch(name)
        if self._files is not None:
            digest = hashlib.sha256(content).hexdigest()
            self._files.put({digest: content})
            with self._lock:
                self._known[name] = digest
                if len(self._known) > _MOST_KNOWN:
                    del self._known[next(iter(self._known))]
        return content

    def _fetch(self, name: str) -> bytes:
        told = shown(name, 120)
        try:
            content: bytes = patiently(
                lambda: self._fs.cat_file(f"{self._base}/{name}", start=0, end=LARGEST_FILE + 1),
                self._patience,
            )
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise RowRejected("missing_image", f"{told} is not a file under {self.name}") from error
        except Exception as error:  # of the driver
            if is_final(error):
                raise RowRejected("unreadable_image", f"{told}: {first_line(error)}") from error
            raise KdcacheError(
                f"{self.name}/{told} cannot be read ({type(error).__name__}: {first_line(error)}); "
                "check the connection, then run again"
            ) from error
        _refuse_large(len(content), told)
        return content


def _name_below(path: str) -> str:
    """`path` without `.` and doubled slashes. RowRejected `outside_root` for all that may leave a URL."""
    text = path
    for _ in range(_MOST_DECODINGS):
        parts = text.split("/")
        if _SCHEME.match(text) or text.startswith("/") or ".." in parts or set(text) & set("\\?#\0"):
            raise RowRejected("outside_root", f"{shown(path, 120)} is not a plain path under the image root")
        text, coded = unquote(text), text
        if text == coded:
            return posixpath.normpath(path)
    raise RowRejected("outside_root", f"{shown(path, 120)} is percent-encoded several times")


def _read_file(path: Path, told: str) -> bytes:
    """The bytes of a regular file within the size bound. Pipes and devices, which may never end, are
    refused."""
    if path.is_dir():
        raise IsADirectoryError
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise RowRejected("unreadable_image", f"{told} is a pipe, a socket or a device, not a file")
        _refuse_large(state.st_size, told)
        content = file.read(state.st_size + 1)  # of memory for a larger file most would be given back
        if len(content) > state.st_size:  # it has grown
            content += file.read(LARGEST_FILE)
    _refuse_large(len(content), told)
    return content


def _refuse_large(size: int, told: str) -> None:
    if size > LARGEST_FILE:
        raise RowRejected(
            "unreadable_image",
            f"{told} is larger than {LARGEST_FILE >> 20} MiB, the largest size that is read",
        )
