"""Sizes that a file declares, against the bytes at hand: checked before memory is taken."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence

MOST = 1 << 15
"""Bytes that one byte can stand for, with any codec of a cache: zstd repeats at most 128 KiB by 4 bytes, lz4
reaches 255, deflate 1,032."""


def plausible(declared: int, stored: int, what: str) -> int:
    """`declared`; ValueError unless it is a size that `stored` bytes can hold."""
    if isinstance(declared, bool) or not isinstance(declared, int) or not 0 <= declared <= MOST * stored:
        raise ValueError(f"{what} claims {declared:,} bytes, which {stored:,} bytes cannot hold")
    return declared


def array_bytes(shape: Sequence[int], itemsize: int, stored: int, what: str) -> int:
    """Bytes of an array; ValueError unless its shape is one that `stored` bytes can hold."""
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"{what} has no shape: {list(shape)}")
    return plausible(math.prod(shape) * itemsize, stored, f"{what} of shape {list(shape)}")


def check_blosc(compressed: bytes | memoryview, expected: int, what: str) -> None:
    """ValueError unless a blosc buffer declares exactly `expected` bytes, and itself as long as it is."""
    if len(compressed) < 16:
        raise ValueError(f"{what} is cut off")
    declared, _, stored = struct.unpack_from("<3I", compressed, 4)
    if (declared, stored) != (expected, len(compressed)):
        raise ValueError(
            f"{what} declares {declared:,} bytes in {stored:,}, not {expected:,} in the {len(compressed):,} "
            "that are there"
        )
    plausible(declared, stored, what)


def check_table(data: bytes) -> None:
    """ValueError unless all buffers of an Arrow IPC file lie within it and declare plausible sizes.

    pyarrow allocates what a compressed buffer declares, and takes lengths of columns as they are.
    """
    try:
        (footer,) = struct.unpack_from("<i", data, len(data) - 10)
        start = len(data) - 10 - footer
        if data[-6:] != b"ARROW1" or footer <= 0 or start < 8:
            raise ValueError("not a complete Arrow IPC file")
        root = _Table(data, start + _number(data, start, "I"))
        if any(True for _ in root.vector(2, 24)):
            raise ValueError("an Arrow table with dictionaries, which no cache has")
        for block in root.vector(3, 24):
            at, metadata, body = struct.unpack_from("<qi4xq", data, block)
            if min(at, metadata, body) < 0 or at + metadata + body > start:
                raise ValueError("a batch of an Arrow table lies outside of its file")
            _check_batch(data, at, at + metadata, body)
    except struct.error as error:
        raise ValueError(f"an Arrow table's metadata cannot be read ({error})") from error


def _check_batch(data: bytes, at: int, body: int, length: int) -> None:
    message = at + (8 if _number(data, at, "I") == 0xFFFFFFFF else 4)
    batch = _Table(data, message + _number(data, message, "I")).table(2)
    if batch is None:
        raise ValueError("an Arrow table with a batch of nothing")
    compressed, total = batch.place(3) is not None, 0
    for place in batch.vector(2, 16):
        start, size = struct.unpack_from("<qq", data, place)
        if min(start, size) < 0 or start + size > length:
            raise ValueError("a buffer of an Arrow table lies outside of its batch")
        if compressed and size:
            declared = _number(data, body + start, "q")
            total += size if declared == -1 else plausible(declared, size, "a buffer of an Arrow table")
        else:
            total += size
    lengths = [_number(data, node, "q") for node in batch.vector(1, 16)]
    if rows := batch.place(0):
        lengths.append(_number(data, rows, "q"))
    if any(not 0 <= count <= 8 * total for count in lengths):  # a value takes at least one bit of some buffer
        raise ValueError(f"an Arrow table claims {max(lengths):,} values, which {total:,} bytes cannot hold")


class _Table:
    """A table of a flatbuffer."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data = data
        self.at = at
        self.fields = at - _number(data, at, "i")

    def place(self, field: int) -> int | None:
        """Where a field is; None when it is not set."""
        slot = 4 + 2 * field
        if slot >= _number(self.data, self.fields, "H"):
            return None
        offset = _number(self.data, self.fields + slot, "H")
        return self.at + offset if offset else None

    def table(self, field: int) -> _Table | None:
        """The table that a field points at."""
        place = self.place(field)
        return None if place is None else _Table(self.data, place + _number(self.data, place, "I"))

    def vector(self, field: int, size: int) -> Iterator[int]:
        """Where the structs, each of `size` bytes, are of the vector that a field points at."""
        if (place := self.place(field)) is not None:
            place += _number(self.data, place, "I")
            count = _number(self.data, place, "I")
            if count * size > len(self.data):
                raise ValueError(f"an Arrow table claims {count:,} parts in {len(self.data):,} bytes")
            yield from range(place + 4, place + 4 + count * size, size)


def _number(data: bytes, at: int, kind: str) -> int:
    if at < 0:
        raise ValueError("an Arrow table's metadata point outside of it")
    (number,) = struct.unpack_from(f"<{kind}", data, at)
    return int(number)
