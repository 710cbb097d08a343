"""What a row carries beside text: images by path or as bytes, and media that no teacher here takes."""

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
"""Where text says that a video or a sound stands."""

_OTHER_KEY = re.compile(r"(video|audio|speech|sound)s?(_(path|file|url|bytes))?s?", re.IGNORECASE)
_OTHER_IMAGE_KEY = re.compile(
    r"(image|img|picture|photo)s?_(path|file|url|list|bytes|base64)s?|imgs?|pictures?|photos?", re.IGNORECASE
)
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_PATH_KEYS = ("path", "url", "file", "base64")
_LEAST_BASE64 = 64  # characters: the smallest PNG takes more
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
    """Whether a cell holds nothing: null, NaN, blank text, or a list or struct of such alone."""
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
    """The rejection of a row for what is neither text nor image. kind: begins with its kind of media."""
    detail = f"{found}; the capture takes images and text alone"
    return RowRejected("video", detail) if kind.lower().startswith("video") else RowRejected("audio", detail)


def listed_images(holder: Mapping[str, Any], where: str, embedded: MutableMapping[str, bytes]) -> list[str]:
    """The image paths under `image` or `images` of a row or a turn; those it carries itself join `embedded`.

    RowRejected `image_conflict` where both name something and not the same, `image_key` where images
    stand under another key alone.
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
    """A path from the forms in which rows name an image; one that the row carries itself joins `embedded`.

    Those are bytes, what Arrow tables of `datasets` hold (`bytes`, perhaps with a `path`), `data:` URLs, and
    base64 that holds an image. RowRejected `broken_row` for anything else.
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
        raise RowRejected("broken_row", f"{where} names an image by text that is not Unicode: {_told(item)}")
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
    """Base64 as it is found: wrapped in lines, URL-safe, without its padding. ValueError when it is none."""
    bare = "".join(text.split()).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    if not bare:
        raise ValueError("it is empty")
    return base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)


def _image_in_base64(text: str) -> bytes | None:
    """The image that bare base64 holds; None for text that is none, as every path is."""
    if len(text) < _LEAST_BASE64:
        return None
    try:
        if not is_image(_decoded("".join(text[:128].split())[:64])):
            return None
        return _decoded(text)
    except (binascii.Error, ValueError):
        return None


def is_image(content: bytes) -> bool:
    """Whether bytes begin as those of a raster image do."""
    return content.startswith(_SIGNATURES) or content[4:12] in (b"ftypavif", b"ftypheic", b"ftypmif1")


def _embed(content: bytes, embedded: MutableMapping[str, bytes]) -> str:
    digest = hashlib.sha256(content).hexdigest()
    path = f"embedded/{digest[:2]}/{digest}"
    embedded[path] = content
    return path


def parsed(value: Any) -> Any:
    """Turns or parts that a column holds as JSON text, or as a struct of equally long lists, as a list."""
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
