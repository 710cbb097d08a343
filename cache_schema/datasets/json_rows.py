"""Rows in a JSON array, alone or in an object, or in JSON lines: found by an index of byte offsets."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.datasets.conversations import first_image_key
from cache_schema.datasets.text_copy import utf8_text
from cache_schema.errors import KdcacheError, RowRejected
from cache_schema.progress import Progress

_STEP = 1 << 24
_BLANKS = b" \t\r\n"
_WRAPPERS = ("data", "rows", "train", "test", "validation", "samples", "examples", "items", "annotations")
_LONGEST_LINE = (
    1 << 26
)  # bytes of a first line that is parsed to distinguish a row from a wrapper of all rows


class JsonSource:
    """Rows as byte ranges `spans` (rows, 2) of a memory-mapped file."""

    def __init__(self, name: str, content: mmap.mmap, spans: NDArray[np.int64]) -> None:
        self._name = name
        self._bytes = content
        self._spans = spans

    def read(self, row: int) -> Any:
        start, end = self._spans[row]
        try:
            return json.loads(self._bytes[start:end])
        except (ValueError, RecursionError) as error:
            raise RowRejected("broken_json", f"row {row} of {self._name}: {error}") from error


def index_json(path: Path, progress: Progress) -> tuple[JsonSource, list[NDArray[np.int64]]]:
    """The rows of a file and their image keys, in blocks; no block where the file holds no row.

    A row in an array that cannot be parsed, or an array that does not end, makes the whole file invalid:
    KdcacheError. A malformed line affects its row only.
    """
    spans: list[NDArray[np.int64]] = [np.empty((0, 2), dtype=np.int64)]
    keys: list[NDArray[np.int64]] = []
    with utf8_text(path) as text, text.open("rb") as file:
        if not text.stat().st_size:
            raise KdcacheError(f"data file {path} holds no rows; give a file with at least one row")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for block in _blocks(_found_rows(path, content)):
        spans.append(block[:, :2])
        keys.append(block[:, 2])
        progress.update(int(block[-1, 1]))
        content.madvise(mmap.MADV_DONTNEED)  # indexed pages need not stay resident
    return JsonSource(path.name, content, np.concatenate(spans)), keys


def _found_rows(path: Path, content: mmap.mmap) -> Iterator[tuple[int, int, int]]:
    first = _skip(content, 3 if content[:3] == b"\xef\xbb\xbf" else 0, _BLANKS)
    if content[first : first + 1] == b"[":
        return _array_rows(path, content, first + 1, closing="")
    wrapped = _wrapped_array(content, first)
    if wrapped is not None and not _begins_with_a_row(content, first):
        return _array_rows(path, content, wrapped, closing="}")
    return _line_rows(path, content, first)


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


def _wrapped_array(content: mmap.mmap, at: int) -> int | None:
    """The start of the rows in an object that opens at `at` and has them under a key, else None."""
    decoder = json.JSONDecoder()
    text = content[at : at + (1 << 20)].decode("latin-1")
    here = 1
    while text[:1] == "{":
        try:
            key, here = decoder.raw_decode(text, len(text) - len(text[here:].lstrip(" \t\r\n,")))
            here = len(text) - len(text[here:].lstrip(" \t\r\n"))
            if text[here : here + 1] != ":":
                return None
            here = len(text) - len(text[here + 1 :].lstrip())
            if key in _WRAPPERS and text[here : here + 1] == "[":
                return at + here + 1 if text[here + 1 :].lstrip()[:1] in ("{", "") else None
            _, here = decoder.raw_decode(text, here)
        except (ValueError, RecursionError):
            return None
    return None


def _begins_with_a_row(content: mmap.mmap, at: int) -> bool:
    """Whether the first line is a whole row, as in JSON lines."""
    newline = content.find(b"\n", at, at + _LONGEST_LINE)
    if newline < 0 and len(content) - at > _LONGEST_LINE:
        return False
    try:
        row = json.loads(content[at : newline if newline >= 0 else len(content)])
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and not row.keys().isdisjoint(("conversations", "messages", "chosen"))


def _line_rows(path: Path, content: mmap.mmap, at: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, image key) of every line that is not blank, malformed ones included."""
    parsed, broken = 0, 0
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
            yield at, end, first_image_key(raw)
        at = end + 1
    if broken and not parsed:
        raise KdcacheError(
            f"data file {path} is neither a JSON array nor JSON lines: none of its lines is an object; "
            f"give one row per line, or all rows in one array, alone or under one of {', '.join(_WRAPPERS)}"
        )


def _array_rows(path: Path, content: mmap.mmap, at: int, *, closing: str) -> Iterator[tuple[int, int, int]]:
    """(start, end, image key) of every element of the JSON array that opens before byte `at`.

    closing: `}` where the array is the value of an object, which may hold other values after it, else ``.
    The bytes are scanned as Latin-1, where one character is one byte: JSON's structure is ASCII, so the
    offsets are correct, and the file is never decoded as a whole.
    """
    decoder = json.JSONDecoder()
    row, step = 0, _STEP
    window_start, window = at, ""
    while True:
        at = _skip(content, at, _BLANKS + b",")
        if content[at : at + 1] == b"]":
            _refuse_rest(path, content, _skip(content, at + 1, _BLANKS), closing)
            return
        if at >= len(content):
            raise KdcacheError(
                f"data file {path} is truncated after row {row}: its array does not end; fetch it again"
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
                    "or give the rows as JSON lines, where a malformed row goes to quarantine"
                ) from error
            step = _STEP if window_start < at else 2 * step  # the window may have cut the row
            window_start, window = at, content[at : at + step].decode("latin-1")
            continue
        yield at, window_start + used, first_image_key(raw)
        at, row = window_start + used, row + 1


def _refuse_rest(path: Path, content: mmap.mmap, rest: int, closing: str) -> None:
    """KdcacheError where other content, or another array of rows, follows the array."""
    if closing:
        try:
            others = json.loads(b'{"":0' + content[rest:])
        except (ValueError, RecursionError):
            others = None
        if isinstance(others, dict):
            more = [key for key in _WRAPPERS if isinstance(others.get(key), list)]
            if not more:
                return
            raise KdcacheError(f"data file {path} holds rows under {more[0]} too; give one array per file")
    if closing or rest < len(content):
        raise KdcacheError(
            f"data file {path} continues after its array ends, at byte {rest}: rows there would be "
            "lost; put all rows into one array"
        )
