"""Rows in Parquet and Arrow files, or a folder of them, copied for random access."""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cache_schema.datasets.conversations import first_image_key
from cache_schema.datasets.text_copy import no_room
from cache_schema.errors import KdcacheError, RowRejected, first_line
from cache_schema.progress import Progress

PARQUET = (".parquet", ".pq")
ARROW = (".arrow", ".feather", ".ipc")

_BATCH = 256  # rows per batch: they may carry images
_SPLIT = re.compile(r"(train|test|valid|val|dev|eval)", re.IGNORECASE)


class ArrowSource:
    """Rows of tables copied to temporary Arrow files, whose record batches start at rows `starts`.

    A plan reads rows in another order, and Parquet decodes whole row groups only. The copies are
    memory-mapped and disappear with the process.
    """

    def __init__(self, files: Sequence[pa.RecordBatchFileReader], starts: NDArray[np.int64]) -> None:
        self._batches = [(file, number) for file in files for number in range(file.num_record_batches)]
        self._starts = starts
        self._lock = threading.Lock()

    def read(self, row: int) -> Any:
        found = int(np.searchsorted(self._starts, row, side="right")) - 1
        file, number = self._batches[found]
        with self._lock:  # the reader has a file position
            batch = file.get_batch(number)
        try:
            return batch.slice(row - int(self._starts[found]), 1).to_pylist()[0]
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise RowRejected("broken_row", f"row {row}: {first_line(error)}") from error


def is_table(path: Path) -> bool:
    """Whether a file is Parquet or Arrow, by its first bytes or its suffix."""
    with path.open("rb") as file:
        return file.read(6).startswith((b"PAR1", b"ARROW1")) or path.suffix.lower() in PARQUET + ARROW


def table_shards(folder: Path) -> list[Path]:
    """The Parquet or Arrow files of a folder by name. KdcacheError where there are none, or of two splits."""
    shards = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in PARQUET + ARROW and path.is_file() and not path.name.startswith((".", "_"))
    )
    if not shards:
        raise KdcacheError(
            f"data folder {folder} holds no Parquet or Arrow files; give the folder of the shards "
            "themselves, or one file of rows"
        )
    splits = {found[0].lower() for path in shards if (found := _SPLIT.match(path.name)) is not None}
    if len(splits) > 1:
        raise KdcacheError(
            f"data folder {folder} holds shards of {' and '.join(sorted(splits))}; give a folder of one"
        )
    return shards


def index_tables(paths: Sequence[Path], progress: Progress) -> tuple[ArrowSource, list[NDArray[np.int64]]]:
    """The rows of tables, and their image keys. KdcacheError where one of them cannot be read."""
    keys: list[NDArray[np.int64]] = []
    files = []
    done = 0
    for path in paths:
        try:
            with tempfile.NamedTemporaryFile(suffix=".arrow") as copy, _opened(path) as (stored, batches):
                schema = pa.schema([field.with_type(_plain(field.type)) for field in stored])
                with pa.ipc.new_file(copy.name, schema) as writer:
                    for batch in batches:
                        batch = batch.cast(schema)
                        writer.write_batch(batch)
                        keys.append(np.array([first_image_key(raw) for raw in _rows(batch)], dtype=np.int64))
                        progress.update(done)
                files.append(pa.ipc.open_file(pa.memory_map(copy.name)))
        except (pa.ArrowException, OSError, ValueError, TypeError, MemoryError) as error:
            if isinstance(error, OSError) and isinstance(told := no_room(error, path), KdcacheError):
                raise told from error
            kind = "Arrow" if path.suffix.lower() in ARROW else "Parquet"
            raise KdcacheError(
                f"data file {path} is not a readable {kind} file: {first_line(error)}; fetch it again"
            ) from error
        done += path.stat().st_size
    return ArrowSource(files, np.cumsum([0, *map(len, keys)], dtype=np.int64)), keys


@contextmanager
def _opened(path: Path) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """(schema, batches of a few rows) of a Parquet file, an Arrow file, or an Arrow stream."""
    with path.open("rb") as file:
        head = file.read(6)
    if head.startswith(b"PAR1") or path.suffix.lower() in PARQUET:
        with pq.ParquetFile(path) as parquet:
            # Each row group has its own dictionaries, which pyarrow does not join inside lists.
            groups = range(parquet.num_row_groups)
            batches = (parquet.iter_batches(batch_size=_BATCH, row_groups=[group]) for group in groups)
            yield parquet.schema_arrow, chain.from_iterable(batches)
        return
    with pa.memory_map(str(path)) as mapped:
        if head == b"ARROW1":
            file_reader = pa.ipc.open_file(mapped)
            numbers = range(file_reader.num_record_batches)
            yield file_reader.schema, _pieces(file_reader.get_batch(number) for number in numbers)
        else:
            stream = pa.ipc.open_stream(mapped)
            yield stream.schema, _pieces(stream)


def _pieces(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        batch.validate(full=True)  # offsets of a damaged file would lead out of its memory
        for start in range(0, batch.num_rows, _BATCH):
            yield batch.slice(start, _BATCH)


def _rows(batch: pa.RecordBatch) -> list[Any]:
    """The rows of a batch; None for one that Python cannot hold (text that is not UTF-8, a date far off)."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):
        return [_row(batch, number) for number in range(batch.num_rows)]


def _row(batch: pa.RecordBatch, number: int) -> Any:
    try:
        return batch.slice(number, 1).to_pylist()[0]
    except (ValueError, OverflowError, pa.ArrowException):
        return None


def _plain(kind: pa.DataType) -> pa.DataType:
    """The schema with plain values instead of dictionary codes: an Arrow file cannot change a dictionary
    between batches."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    return kind
