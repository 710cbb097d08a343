"""Media in a row: images by path or as bytes, and media that are not supported."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any
from urllib.parse import unquote_to_bytes

from cache_schema.errors import RowRejected, shown

OTHER_MARKS = re.compile(r"<\|?(video|audio|speech|sound)(?:_pad|_bos|_start|_\d+)?\|?>", re.IGNORECASE)
"""Marks of a video or an audio in text."""

_OTHER_KEY = re.compile(r"(video|audio|speech|sound)s?(_(path|file|url|bytes))?s?", re.IGNORECASE)
_OTHER_IMAGE_KEY = re.compile(
    r"(image|img|picture|photo)s?_(path|file|url|list|bytes|base64)s?|imgs?|pictures?|photos?", re.IGNORECASE
)
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_PATH_KEYS = ("path", "url", "file", "base64")
_LEAST_BASE64 = 64  # characters: the smallest PNG is longer
_SIGNATURES = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"GIF87a",
    b"GIF89a",
    b"RIFF",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP  ",
)


def is_absent(value: Any) -> bool:
    """Whether a cell is empty: null, NaN, blank text, or a list or struct of only those."""
    if value is None or value is False or value != value:  # NaN differs from itself
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return all(is_absent(item) for item in value.values())
    return isinstance(value, list | tuple) and all(is_absent(item) for item in value)


def refuse_other_media(holder: Mapping[str, Any], where: str) -> None:
    """RowRejected `video` or `audio` where a row or a turn has a filled key for one."""
    for key, value in holder.items():
        if _OTHER_KEY.fullmatch(str(key)) and not is_absent(value):
            raise other_media(str(key), f"{where} carries {key} {_told(value)}")


def other_media(kind: str, found: str) -> RowRejected:
    """The rejection of a row for media other than images. kind: starts with the kind of media."""
    detail = f"{found}; only images and text are supported"
    return RowRejected("video", detail) if kind.lower().startswith("video") else RowRejected("audio", detail)


def listed_images(holder: Mapping[str, Any], where: str, embedded: MutableMapping[str, bytes]) -> list[str]:
    """The image paths under `image` or `images` of a row or a turn; embedded ones are added to `embedded`.

    RowRejected `image_conflict` where both are set and differ, `image_key` where images are only under
    another key.
    """
    named = [
        [path_of(item, where, embedded) for item in _items(parsed(holder.get(key)))]
        for key in ("image", "images")
    ]
    if all(named) and named[0] != named[1]:
        raise RowRejected("image_conflict", f"{where} names other images under `image` than under `images`")
    if not any(named):
        for key, value in holder.items():
            if _OTHER_IMAGE_KEY.fullmatch(str(key)) and not is_absent(value):
                raise RowRejected(
                    "image_key",
                    f"{where} names images under `{key}`; rename the column to `image` or `images`",
                )
    return named[0] or named[1]


def _items(value: Any) -> Iterator[Any]:
    for item in value if isinstance(value, list | tuple) else [value]:
        if not is_absent(item):
            yield item


def path_of(item: Any, where: str, embedded: MutableMapping[str, bytes]) -> str:
    """The path of an image, in any form that rows use; an embedded one is added to `embedded`.

    Forms: bytes, Arrow tables of `datasets` (`bytes`, optionally with a `path`), `data:` URLs, and base64 of
    an image. RowRejected `broken_row` for anything else.
    """
    if isinstance(item, Mapping):
        if not is_absent(item.get("bytes")):
            item = item["bytes"]
            if isinstance(item, str) and (content := _image_in_base64(item)) is not None:
                item = content
            if not isinstance(item, bytes | bytearray):
                raise RowRejected("broken_row", f"{where} has an image whose `bytes` are {_told(item)}")
        else:
            item = next(
                (item[key] for key in ("path", "url", "file", "base64") if not is_absent(item.get(key))), item
            )
    if isinstance(item, bytes | bytearray | memoryview):
        return _embed(bytes(item), embedded)
    if not isinstance(item, str) or not item.strip():
        raise RowRejected("broken_row", f"{where} names an image that is not a path: {_told(item)}")
    if item[:5].lower() == "data:":
        return _embed(_of_data_url(item, where), embedded)
    if (content := _image_in_base64(item)) is not None:
        return _embed(content, embedded)
    if not item.isascii() and any("\ud800" <= char <= "\udfff" for char in item):
        raise RowRejected(
            "broken_row", f"{where} names an image by text that is not valid Unicode: {_told(item)}"
        )
    return item.removeprefix("file://")


def _of_data_url(url: str, where: str) -> bytes:
    head = _DATA_URL.match(url)
    try:
        if head is not None:
            return _decoded(unquote_to_bytes(url[head.end() :]).decode("ascii"))
        if "," not in url:
            raise ValueError("it has no comma before its content")
        return unquote_to_bytes(url.partition(",")[2])
    except (binascii.Error, ValueError) as error:
        raise RowRejected("broken_row", f"{where} has an image whose base64 is broken: {error}") from error


def _decoded(text: str) -> bytes:
    """Decodes base64 in common forms: wrapped in lines, URL-safe, without padding. ValueError otherwise."""
    bare = "".join(text.split()).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    if not bare:
        raise ValueError("it is empty")
    return base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)


def _image_in_base64(text: str) -> bytes | None:
    """The image in bare base64; None for other text, such as every path."""
    if len(text) < _LEAST_BASE64:
        return None
    try:
        if not is_image(_decoded("".join(text[:128].split())[:64])):
            return None
        return _decoded(text)
    except (binascii.Error, ValueError):
        return None


def is_image(content: bytes) -> bool:
    """Whether bytes start like those of a raster image."""
    return content.startswith(_SIGNATURES) or content[4:12] in (b"ftypavif", b"ftypheic", b"ftypmif1")


def _embed(content: bytes, embedded: MutableMapping[str, bytes]) -> str:
    digest = hashlib.sha256(content).hexdigest()
    path = f"embedded/{digest[:2]}/{digest}"
    embedded[path] = content
    return path


def parsed(value: Any) -> Any:
    """Turns or parts as a list, from a list, JSON text, or a struct of equally long lists."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, Mapping) and value and all(isinstance(item, list) for item in value.values()):
        columns = list(value.values())
        if len({len(column) for column in columns}) == 1:
            return [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]
    return value


def _told(value: Any) -> str:
    return shown(repr(value[:400] if isinstance(value, str | bytes) else value), 80)
