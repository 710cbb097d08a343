"""A file of rows: LLaVA JSON or JSON lines, `messages` rows in JSON lines or Parquet.

An index of byte offsets gives access to any row; rows are parsed when asked for and never kept, so a
million of them cost a few numpy arrays. A row that cannot be understood raises RowRejected when it is
read; only a file that cannot be read as a whole raises KdcacheError.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cache_schema.datasets.conversations import Conversation, conversation_of, label_of
from cache_schema.errors import KdcacheError, RowRejected
from cache_schema.progress import Progress, Silent, task

__all__ = ["Conversation", "Dataset", "open_dataset"]

_STEP = 1 << 24
_BATCH = 256  # rows of Parquet handled at once: they may carry images
_BLANKS = b" \t\r\n"


class Source(Protocol):
    """Where raw rows come from."""

    def read(self, row: int) -> Any:
        """The row as parsed JSON. RowRejected when it cannot be parsed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Random access to the rows of one file; safe to use from several threads.

    digest: sha256 of the file's bytes. first_images (rows,) int64: a hash of each row's first image path
    (0: no image, or a malformed row), which planning groups by.
    """

    path: Path
    digest: str
    first_images: NDArray[np.int64]
    source: Source

    def __len__(self) -> int:
        return len(self.first_images)

    def __getitem__(self, row: int) -> Conversation:
        """The row as a conversation. RowRejected when it is malformed; IndexError outside the file."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return conversation_of(self.source.read(row), row)

    def __iter__(self) -> Iterator[Conversation]:
        for row in range(len(self)):
            yield self[row]

    def label_of(self, row: int) -> str:
        """The row's `id`, or its number where it has none or cannot be read."""
        try:
            return label_of(self.source.read(row), row)
        except RowRejected:
            return str(row)


def open_dataset(path: Path | str, progress: Progress | None = None) -> Dataset:
    """Indexes a Parquet file (by its suffix), a JSON array, or else JSON lines.

    Every row is parsed once and dropped. KdcacheError when the file is missing, empty or broken.
    """
    path = Path(path)
    progress = progress or Silent()
    if not path.is_file():
        raise KdcacheError(f"data file {path} does not exist; give a JSON, JSONL or Parquet file of rows")
    size = path.stat().st_size
    keys: list[NDArray[np.int64]] = []
    source: Source
    with task(progress, "reading the rows", size):
        if path.suffix == ".parquet":
            source, keys = _index_parquet(path, progress)
        elif size > 0:
            source, keys = _index_json(path, progress)
    if not keys:
        raise KdcacheError(f"data file {path} holds no rows; give a file with at least one row")
    return Dataset(path=path, digest=_digest(path), first_images=np.concatenate(keys), source=source)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_image_key(raw: Any) -> int:
    """A hash of the first image's path, 0 for rows without one or that are malformed."""
    try:
        images = conversation_of(raw, 0).images
    except RowRejected:
        return 0
    if not images:
        return 0
    name = images[0].encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


# ---- JSON ----


class JsonSource:
    """Rows as byte ranges `spans` (rows, 2) of a mapped file."""

    def __init__(self, path: Path, spans: NDArray[np.int64]) -> None:
        self._name = path.name
        self._spans = spans
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, row: int) -> Any:
        start, end = self._spans[row]
        try:
            return json.loads(self._bytes[start:end])
        except (ValueError, RecursionError) as error:
            raise RowRejected("broken_json", f"row {row} of {self._name}: {error}") from error


def _index_json(path: Path, progress: Progress) -> tuple[JsonSource, list[NDArray[np.int64]]]:
    spans: list[NDArray[np.int64]] = [np.empty((0, 2), dtype=np.int64)]
    keys: list[NDArray[np.int64]] = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        first = _skip(content, 3 if content[:3] == b"\xef\xbb\xbf" else 0, _BLANKS)
        is_array = content[first : first + 1] == b"["
        rows = _array_rows(path, content, first + 1) if is_array else _line_rows(path, content)
        for block in _blocks(rows):
            spans.append(block[:, :2])
            keys.append(block[:, 2])
            progress.update(int(block[-1, 1]))
            content.madvise(mmap.MADV_DONTNEED)  # what is indexed need not stay resident
    return JsonSource(path, np.concatenate(spans)), keys


def _blocks(rows: Iterator[tuple[int, int, int]], size: int = 8192) -> Iterator[NDArray[np.int64]]:
    """(start, end, image key) triples packed into arrays (<= size, 3)."""
    block: list[tuple[int, int, int]] = []
    for row in rows:
        block.append(row)
        if len(block) == size:
            yield np.array(block, dtype=np.int64)
            block.clear()
    if block:
        yield np.array(block, dtype=np.int64)


def _skip(content: mmap.mmap, at: int, skipped: bytes) -> int:
    while at < len(content) and content[at] in skipped:
        at += 1
    return at


def _line_rows(path: Path, content: mmap.mmap) -> Iterator[tuple[int, int, int]]:
    """(start, end, image key) of every line that is not blank; a broken line keeps its place."""
    at, parsed, broken = 0, 0, 0
    while at < len(content):
        newline = content.find(b"\n", at)
        end = len(content) if newline < 0 else newline
        line = content[at:end]
        if line.strip():
            try:
                raw = json.loads(line)
                parsed += isinstance(raw, dict)
            except (ValueError, RecursionError):
                raw = None
                broken += 1
            yield at, end, _first_image_key(raw)
        at = end + 1
    if broken and not parsed:
        raise KdcacheError(
            f"data file {path} is neither a JSON array nor JSON lines: none of its lines is an object; "
            "give one row a line, or all rows in one array"
        )


def _array_rows(path: Path, content: mmap.mmap, at: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, image key) of every element of the JSON array that opens before byte `at`.

    The bytes are scanned as Latin-1, where a character is a byte: JSON's structure is ASCII, so the ends
    are right, and the text of the whole file is never made.
    """
    decoder = json.JSONDecoder()
    row, step = 0, _STEP
    window_start, window = at, ""
    while True:
        at = _skip(content, at, _BLANKS + b",")
        if content[at : at + 1] == b"]":
            rest = _skip(content, at + 1, _BLANKS)
            if rest < len(content):
                raise KdcacheError(
                    f"data file {path} goes on after its array ends, at byte {rest}: rows there would be "
                    "lost; put all rows into one array"
                )
            return
        if at >= len(content):
            raise KdcacheError(
                f"data file {path} is cut off after row {row}: its array does not end; get it anew"
            )
        window_end = window_start + len(window)
        try:
            if at >= window_end:
                raise json.JSONDecodeError("no window yet", "", 0)
            raw, used = decoder.raw_decode(window, at - window_start)
        except (json.JSONDecodeError, RecursionError) as error:
            if window_end >= len(content):
                raise KdcacheError(
                    f"data file {path} is not valid JSON in row {row} at byte {at}: {error}; repair it, "
                    "or give the rows as JSON lines, where a broken one is set aside"
                ) from error
            step = _STEP if window_start < at else 2 * step  # the window may have cut the row
            window_start, window = at, content[at : at + step].decode("latin-1")
            continue
        yield at, window_start + used, _first_image_key(raw)
        at, row = window_start + used, row + 1


# ---- Parquet ----


class ParquetSource:
    """Rows of a Parquet file, copied to a temporary Arrow file whose record batches begin at `starts`.

    A plan reads rows in an order of its own, and Parquet gives no row without its whole row group. The
    copy is mapped, not read, and goes with the process.
    """

    def __init__(self, batches: pa.RecordBatchFileReader, starts: NDArray[np.int64]) -> None:
        self._batches = batches
        self._starts = starts
        self._lock = threading.Lock()

    def read(self, row: int) -> Any:
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        with self._lock:  # the reader keeps its place in the file
            rows = self._batches.get_batch(batch)
        return rows.slice(row - int(self._starts[batch]), 1).to_pylist()[0]


def _index_parquet(path: Path, progress: Progress) -> tuple[ParquetSource, list[NDArray[np.int64]]]:
    keys: list[NDArray[np.int64]] = []
    try:
        with pq.ParquetFile(path) as file, tempfile.NamedTemporaryFile(suffix=".arrow") as copy:
            total = max(file.metadata.num_rows, 1)
            schema = _without_dictionaries(file.schema_arrow)
            with pa.ipc.new_file(copy.name, schema) as writer:
                for batch in file.iter_batches(batch_size=_BATCH):
                    writer.write_batch(batch.cast(schema))
                    rows = batch.to_pylist()
                    keys.append(np.array([_first_image_key(raw) for raw in rows], dtype=np.int64))
                    done = sum(map(len, keys))
                    progress.update(path.stat().st_size * done // total)
            batches = pa.ipc.open_file(pa.memory_map(copy.name))
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise KdcacheError(
                f"{tempfile.gettempdir()} has no room for a copy of {path}, from which its rows are "
                "read in any order; set TMPDIR to a folder on a larger disk"
            ) from error
        raise KdcacheError(
            f"data file {path} is not a readable Parquet file: {error}; get it anew"
        ) from error
    starts = np.cumsum([0, *map(len, keys)], dtype=np.int64)
    return ParquetSource(batches, starts), keys


def _without_dictionaries(schema: pa.Schema) -> pa.Schema:
    """Values in place of codes, whose dictionary an Arrow file cannot change between its batches."""
    for number, field in enumerate(schema):
        if pa.types.is_dictionary(field.type):
            schema = schema.set(number, field.with_type(field.type.value_type))
    return schema
