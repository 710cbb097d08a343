"""One raw row, LLaVA `conversations` or Hugging Face `messages`, as a chat that templates can render."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cache_schema.errors import RowRejected

IMAGE_MARK = "<image>"
"""Where an image stands in the text of a row."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_OWN_KEYS = frozenset({"id", "conversations", "messages", "image", "images"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A row as a chat: what the templates render.

    messages: dictionaries `{"role": system|user|assistant, "content": [{"type": "image"} | {"type":
    "text", "text": ...}, ...]}`: perhaps a system message, then user and assistant in turns, an answer
    last; no content is without parts. images: relative paths, one an image part and in their order.
    embedded: for paths under `embedded/`, the files that the row itself carries. extra: other keys.
    """

    row: int
    sample_id: str
    messages: list[dict[str, Any]]
    images: tuple[str, ...] = ()
    embedded: Mapping[str, bytes] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> list[str]:
        """The texts of the assistant's turns."""
        return [text_of(message) for message in self.messages if message["role"] == "assistant"]


def text_of(message: Mapping[str, Any]) -> str:
    """The text parts of a message, joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def label_of(raw: Any, row: int) -> str:
    """The row's `id` as text, or its number where it has none."""
    label = raw.get("id") if isinstance(raw, dict) else None
    return str(row) if label is None else writable(str(label))


def writable(text: str) -> str:
    """`text` with `?` for the lone surrogates that JSON may hold and no file format can."""
    return text.encode("utf-8", "replace").decode("utf-8")


def conversation_of(raw: Any, row: int) -> Conversation:
    """A raw row of either form as a Conversation. RowRejected with a reason when it is malformed.

    Model turns before the first question are skipped, and so is a last question without an answer.
    Images that no `<image>` mark or image part places stand before the first question.
    """
    if not isinstance(raw, dict):
        raise RowRejected("broken_row", f"row {row} is {type(raw).__name__}, not an object")
    turns = raw.get("conversations") or raw.get("messages")
    if not isinstance(turns, list) or not turns:
        raise RowRejected("no_turns", f"row {row} has no turns under `conversations` or `messages`")
    messages: list[dict[str, Any]] = []
    placed: list[str | None] = []
    embedded: dict[str, bytes] = {}
    for turn in turns:
        role, parts = _read_turn(turn, row, embedded)
        if role == "assistant" and all(message["role"] == "system" for message in messages):
            continue
        if messages and role in ("system", messages[-1]["role"]):
            raise RowRejected(
                "turn_order", f"row {row} has a {role} turn after one of the {messages[-1]['role']}"
            )
        placed.extend(part["image"] for part in parts if part["type"] == "image")
        content = [{"type": "image"} if part["type"] == "image" else part for part in parts]
        messages.append({"role": role, "content": content or [{"type": "text", "text": ""}]})
    if messages and messages[-1]["role"] == "user":
        unanswered = messages.pop()
        if any(part["type"] == "image" for part in unanswered["content"]):
            raise RowRejected("no_turns", f"row {row} ends with an image that no answer follows")
    if not messages or messages[-1]["role"] != "assistant":
        raise RowRejected("no_turns", f"row {row} has no question with an answer")
    return Conversation(
        row=row,
        sample_id=label_of(raw, row),
        images=_place_images(placed, _listed_images(raw, row, embedded), messages, row),
        embedded=embedded,
        messages=messages,
        extra={key: value for key, value in raw.items() if key not in _OWN_KEYS},
    )


def _listed_images(raw: Mapping[str, Any], row: int, embedded: dict[str, bytes]) -> list[str]:
    """The image paths that a row names beside its turns."""
    named = raw.get("images")
    if named is None:
        named = raw.get("image")
    if named is None or named == "":
        return []
    return [_image_path(item, row, embedded) for item in (named if isinstance(named, list) else [named])]


def _image_path(item: Any, row: int, embedded: dict[str, bytes]) -> str:
    """A path from the forms in which rows name an image; one that the row carries itself joins `embedded`.

    Those are what Arrow tables of `datasets` hold (`bytes`, perhaps with a `path`), and `data:` URLs.
    """
    if isinstance(item, dict):
        if isinstance(item.get("bytes"), bytes):
            return _embed(item["bytes"], embedded)
        item = item.get("path") or item.get("url")
    if isinstance(item, str) and item.startswith("data:"):
        try:
            return _embed(base64.b64decode(item.partition(";base64,")[2], validate=True), embedded)
        except (binascii.Error, ValueError) as error:
            raise RowRejected(
                "broken_row", f"row {row} has an image whose base64 is broken: {error}"
            ) from error
    if not isinstance(item, str) or not item:
        raise RowRejected("broken_row", f"row {row} names an image that is not a path: {item!r}")
    if writable(item) != item:
        raise RowRejected("broken_row", f"row {row} names an image by text that is not Unicode: {item!r}")
    return item.removeprefix("file://")


def _embed(content: bytes, embedded: dict[str, bytes]) -> str:
    digest = hashlib.sha256(content).hexdigest()
    path = f"embedded/{digest[:2]}/{digest}"
    embedded[path] = content
    return path


def _read_turn(turn: Any, row: int, embedded: dict[str, bytes]) -> tuple[str, list[dict[str, Any]]]:
    """(role, content parts) of a turn; an image part holds its own path under `image`, or None."""
    if not isinstance(turn, dict):
        raise RowRejected("broken_row", f"row {row} has a turn that is {type(turn).__name__}, not an object")
    name = turn.get("from", turn.get("role"))
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowRejected(
            "unknown_role", f"row {row} has a turn of {name!r}, not human/gpt or user/assistant"
        )
    content = turn.get("value", turn.get("content"))
    if isinstance(content, str):
        return role, _split_marks(content)
    if not isinstance(content, list):
        raise RowRejected("broken_row", f"row {row} has a turn whose text is {type(content).__name__}")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.extend(_split_marks(part["text"]))
        elif kind in ("image", "image_url"):
            named = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key)), None)
            path = None if named is None else _image_path(named, row, embedded)
            parts.append({"type": "image", "image": path})
        else:
            raise RowRejected("broken_row", f"row {row} has a content part of type {kind!r}")
    return role, parts


def _split_marks(text: str) -> list[dict[str, Any]]:
    """Text cut at its `<image>` marks; the line breaks next to a mark belong to the mark."""
    pieces = text.split(IMAGE_MARK)
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(pieces):
        if index > 0:
            parts.append({"type": "image", "image": None})
            piece = piece.lstrip("\n")
        if index < len(pieces) - 1:
            piece = piece.rstrip("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _place_images(
    placed: list[str | None], listed: list[str], messages: list[dict[str, Any]], row: int
) -> tuple[str, ...]:
    """The path of every image part in order; `messages` gains parts for images without a place.

    placed: the path that each image part carries itself, None where it is one of `listed`.
    """
    if not placed and listed:
        first = next(message for message in messages if message["role"] == "user")
        first["content"][:0] = [{"type": "image"} for _ in listed]
        return tuple(listed)
    named = [path for path in placed if path is not None]
    if len(named) == len(placed) and listed in ([], named):
        return tuple(named)
    if placed.count(None) != len(listed):
        raise RowRejected(
            "image_count", f"row {row} places {len(placed)} images in its text but names {len(listed)}"
        )
    rest = iter(listed)
    return tuple(next(rest) if path is None else path for path in placed)
