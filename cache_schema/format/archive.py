"""The targets of a shard as one file: a stored zip of a zarr hierarchy, whose groups can be read alone."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping
from typing import NamedTuple

_LOCAL = struct.Struct("<4s5H3I2H")
"""A zip entry's local header: signature, version, flags, method, time, date, crc, two sizes, two lengths."""

_LISTED = 46
"""Bytes of an entry in the directory, beside its name."""

METADATA = "zarr.json"


class Place(NamedTuple):
    """Where a group's entries are in a zip: its bytes from `start` to `end`. listed: their bytes in the zip's
    directory."""

    start: int
    end: int
    listed: int


def pack(files: Mapping[str, bytes]) -> tuple[bytes, dict[str, Place]]:
    """One zip of a hierarchy (path inside it -> bytes), and where in it each group is.

    Equal files give equal bytes. Nothing is compressed again; metadata lose their indentation.
    """
    sink, places = io.BytesIO(), dict[str, Place]()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for path, data in sorted(files.items()):
            start, (group, inside, _) = sink.tell(), path.partition("/")
            entry = zipfile.ZipInfo(path)
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # the same on every system
            archive.writestr(entry, _compact(data) if path.endswith(METADATA) else data)
            if inside:
                before = places.get(group, Place(start, start, 0))
                listed = before.listed + _LISTED + len(path)
                places[group] = Place(before.start, sink.tell(), listed)
    return sink.getvalue(), places


def unpack(data: bytes) -> dict[str, memoryview]:
    """The entries at the beginning of `data`, path -> bytes: of a whole archive, or of one group.

    Sizes are those of the local headers, each checked against what is there; nothing is copied. ValueError
    when an entry is cut off, compressed, encrypted, or of unknown size.
    """
    entries: dict[str, memoryview] = {}
    view, at = memoryview(data), 0
    while data[at : at + 4] == b"PK\x03\x04":
        if len(data) < at + _LOCAL.size:
            raise ValueError("an entry of the zip is cut off")
        _, _, flags, method, _, _, _, stored, size, name, extra = _LOCAL.unpack_from(data, at)
        start = at + _LOCAL.size + name + extra
        if flags & ~0x800 or method or stored != size:
            raise ValueError("an entry of the zip is not stored plainly")
        if start + size > len(data):
            raise ValueError(
                f"an entry of the zip claims {size:,} bytes, {max(len(data) - start, 0):,} are there"
            )
        path = data[at + _LOCAL.size : start - extra].decode()
        if path in entries:
            raise ValueError(f"{path} is in the zip twice")
        entries[path] = view[start : start + size]
        at = start + size
    return entries


def disagreement(data: bytes) -> str | None:
    """What a reader of a whole archive would see differently by its directory than by its entries."""
    entries = unpack(data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            listed = archive.infolist()
            same = [info.filename for info in listed] == list(entries) and all(
                (info.compress_type, info.file_size) == (zipfile.ZIP_STORED, len(entries[info.filename]))
                and archive.read(info) == entries[info.filename]
                for info in listed
            )
    except (zipfile.BadZipFile, RuntimeError, OSError) as error:
        return f"its zip directory cannot be read ({error})"
    return None if same else "its zip directory and its entries disagree"


def _compact(document: bytes) -> bytes:
    return json.dumps(json.loads(document), separators=(",", ":")).encode()
