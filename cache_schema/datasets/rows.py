"""A file of rows: LLaVA JSON or JSON lines, `messages` rows in JSON lines, Parquet or Arrow, or pairs.

An index gives access to any row. Rows are parsed on access and not kept, so a million rows cost a few numpy
arrays. A malformed row raises RowRejected when it is read; only a file that cannot be read as a whole raises
KdcacheError.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cache_schema.datasets.arrow_rows import index_tables, is_table, table_shards
from cache_schema.datasets.conversations import Conversation, conversation_of, label_of
from cache_schema.datasets.json_rows import index_json
from cache_schema.datasets.preferences import HALVES, half_of, is_pair, label_of_half
from cache_schema.errors import KdcacheError, RowRejected
from cache_schema.file_cache import sha256_of
from cache_schema.progress import Progress, Silent, task

__all__ = ["Conversation", "Dataset", "open_dataset"]

_LOOKED_AT = 64  # rows, to tell a file of pairs


class Source(Protocol):
    """A source of raw rows."""

    def read(self, row: int) -> Any:
        """The row as parsed JSON. RowRejected when it cannot be parsed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Random access to the rows of a file or folder; safe to use from several threads.

    digest: sha256 of the file's bytes, or over the digests of several. first_images (rows,) int64: a hash of
    each row's first image path (0: no image, or a malformed row). pairs: each row of the file is two here,
    the chosen answer and the rejected one, with `/chosen` and `/rejected` after its `id`.
    """

    path: Path
    digest: str
    first_images: NDArray[np.int64]
    source: Source
    pairs: bool = False

    def __len__(self) -> int:
        return len(self.first_images)

    def __getitem__(self, row: int) -> Conversation:
        """The row as a conversation. RowRejected when it is malformed; IndexError outside the file."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        if not self.pairs:
            return conversation_of(self.source.read(row), row)
        return conversation_of(half_of(self.source.read(row // 2), row // 2, HALVES[row % 2]), row)

    def __iter__(self) -> Iterator[Conversation]:
        for row in range(len(self)):
            yield self[row]

    def label_of(self, row: int) -> str:
        """The row's `id`, or its row number if it has none or cannot be read."""
        place = row // 2 if self.pairs else row
        try:
            raw = self.source.read(place)
        except RowRejected:
            raw = None
        return label_of_half(raw, place, HALVES[row % 2]) if self.pairs else label_of(raw, row)

    @property
    def groups(self) -> NDArray[np.int64]:
        """(rows,) int64, for the planner: rows of one number, but 0, stand together. Those of `first_images`,
        and one for each pair without an image."""
        if not self.pairs:
            return self.first_images
        alone = -1 - np.arange(len(self), dtype=np.int64) // 2
        return np.where(self.first_images == 0, alone, self.first_images)


def open_dataset(path: Path | str, progress: Progress | None = None) -> Dataset:
    """Indexes a Parquet or Arrow file, a folder of such, a JSON array (alone or under a key), or JSON lines.

    Text may be UTF-8, UTF-16 or UTF-32, and compressed by gzip. Every row is parsed once and discarded. It is
    of pairs when one of the first 64 rows is one.
    KdcacheError when the file is missing, empty, broken or of another kind.
    """
    path = Path(path)
    progress = progress or Silent()
    if not path.exists():
        raise KdcacheError(f"data file {path} does not exist; give a JSON, JSONL or Parquet file of rows")
    if not path.is_file() and not path.is_dir():
        raise KdcacheError(f"data file {path} is a pipe or a device; give a file that can be read twice")
    keys: list[NDArray[np.int64]] = []
    source: Source
    try:
        files = table_shards(path) if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
        with task(progress, "reading the rows", size):
            if path.is_dir() or is_table(path):
                source, keys = index_tables(files, progress)
            elif size > 0:
                source, keys = index_json(path, progress)
        digests = [sha256_of(file) for file in files]
    except OSError as error:
        raise KdcacheError(f"data file {path} cannot be read: {error.strerror or error}") from error
    if not sum(map(len, keys)):
        raise KdcacheError(f"data file {path} holds no rows; give a file with at least one row")
    digest = digests[0] if len(files) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    images = np.concatenate(keys)
    pairs = any(_is_pair(source, row) for row in range(min(len(images), _LOOKED_AT)))
    return Dataset(
        path=path,
        digest=digest,
        first_images=np.repeat(images, 2) if pairs else images,
        source=source,
        pairs=pairs,
    )


def _is_pair(source: Source, row: int) -> bool:
    try:
        return is_pair(source.read(row))
    except RowRejected:
        return False
