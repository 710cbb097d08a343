"""One raw row, LLaVA `conversations` or Hugging Face `messages`, as a chat that templates can render."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cache_schema.datasets.media import (
    OTHER_MARKS,
    is_absent,
    listed_images,
    other_media,
    parsed,
    path_of,
    refuse_other_media,
)
from cache_schema.datasets.preferences import HALVES, half_of, is_pair
from cache_schema.errors import RowRejected, shown

IMAGE_MARK = "<image>"
"""Marks the place of an image in the text of a row."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TOOL_ROLES = frozenset({"tool", "function", "function_call", "function_response", "observation", "ipython"})
_TOOL_KEYS = ("tool_calls", "function_call", "tools", "functions")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_WEIGHT_KEYS = ("weight", "train", "loss")
_OWN_KEYS = frozenset({"id", "conversations", "messages", "image", "images"})
_PART_PATHS = ("image", "path", "url", "image_url", "base64")
_NAMED_IMAGE = re.compile(r"<img>([^<>\n]+)</img>")  # as Qwen-VL's data writes them
_NUMBERED_MARK = re.compile(r"<\|?image_?\d+\|?>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A row as a chat: what the templates render.

    messages: dictionaries `{"role": system|user|assistant, "content": [{"type": "image"} | {"type":
    "text", "text": ...}, ...]}`: an optional system message, then user and assistant alternating, ending with
    an answer; every content has at least one part. images: paths, one per image part, in order.
    embedded: files that the row itself carries, by their path under `embedded/`. extra: other keys.
    supervised: for each answer whether it is a label; empty: all are.
    """

    row: int
    sample_id: str
    messages: list[dict[str, Any]]
    images: tuple[str, ...] = ()
    embedded: Mapping[str, bytes] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    supervised: tuple[bool, ...] = ()

    @property
    def answers(self) -> list[str]:
        """The texts of the assistant's turns."""
        return [text_of(message) for message in self.messages if message["role"] == "assistant"]


def text_of(message: Mapping[str, Any]) -> str:
    """The text parts of a message, joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def label_of(raw: Any, row: int) -> str:
    """The row's `id` as printable text, or its row number if it has none."""
    label = raw.get("id") if isinstance(raw, dict) else None
    return str(row) if is_absent(label) else shown(writable(str(label)))


def writable(text: str) -> str:
    """`text` with `?` in place of lone surrogates, which JSON allows and UTF-8 does not."""
    return text.encode("utf-8", "replace").decode("utf-8")


def conversation_of(raw: Any, row: int) -> Conversation:
    """A raw row of either form as a Conversation. RowRejected with a reason when it is malformed.

    Assistant turns before the first question are skipped, and so is a final question without an answer.
    Images without an `<image>` mark or image part are placed before the first question. Rows with video,
    audio, tools or reasoning are rejected: the teacher would not see them. Line ends become `\\n`.
    """
    try:
        return _conversation_of(raw, row)
    except RecursionError as error:
        raise RowRejected("broken_row", f"row {row} is nested too deeply") from error


def first_image_key(raw: Any) -> int:
    """A hash of the first image's path, of a pair that of either half; 0 for malformed rows and rows without
    images."""
    images: tuple[str, ...] = ()
    for half in HALVES if is_pair(raw) else (None,):
        with contextlib.suppress(RowRejected, RecursionError):
            images = images or conversation_of(raw if half is None else half_of(raw, 0, half), 0).images
    if not images:
        return 0
    name = images[0].encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


def _conversation_of(raw: Any, row: int) -> Conversation:
    if not isinstance(raw, dict):
        raise RowRejected("broken_row", f"row {row} is {type(raw).__name__}, not an object")
    turns = next((found for key in ("conversations", "messages") if (found := parsed(raw.get(key)))), None)
    if not isinstance(turns, list) or not turns:
        raise RowRejected("no_turns", f"row {row} has no turns in `conversations` or `messages`")
    _refuse_what_is_not_taken(raw, f"row {row}")
    messages: list[dict[str, Any]] = []
    placed: list[str | int | None] = []
    supervised: list[bool] = []
    embedded: dict[str, bytes] = {}
    for turn in turns:
        role, parts, weight = _read_turn(turn, f"row {row}", embedded)
        if role == "assistant" and all(message["role"] == "system" for message in messages):
            continue
        if messages and role in ("system", messages[-1]["role"]):
            raise RowRejected(
                "turn_order", f"row {row} has a {role} turn after one of the {messages[-1]['role']}"
            )
        placed.extend(part["image"] for part in parts if part["type"] == "image")
        content = [{"type": "image"} if part["type"] == "image" else part for part in parts]
        messages.append({"role": role, "content": content or [{"type": "text", "text": ""}]})
        supervised += [weight] if role == "assistant" else []
    if messages and messages[-1]["role"] == "user":
        unanswered = messages.pop()
        if any(part["type"] == "image" for part in unanswered["content"]):
            raise RowRejected("no_turns", f"row {row} ends with an image that is not followed by an answer")
    if not messages or messages[-1]["role"] != "assistant":
        raise RowRejected("no_turns", f"row {row} has no question with an answer")
    return Conversation(
        row=row,
        sample_id=label_of(raw, row),
        images=_place_images(placed, listed_images(raw, f"row {row}", embedded), messages, row),
        embedded=embedded,
        messages=messages,
        extra={key: value for key, value in raw.items() if key not in _OWN_KEYS},
        supervised=() if all(supervised) else tuple(supervised),
    )


def _refuse_what_is_not_taken(holder: Mapping[str, Any], where: str) -> None:
    """RowRejected where a row or a turn has content that a chat cannot represent."""
    refuse_other_media(holder, where)
    for key in holder:
        if key in _TOOL_KEYS and not is_absent(holder[key]):
            raise RowRejected("tools", f"{where} carries `{key}`, which is not captured")
        if key in _REASONING_KEYS and not is_absent(holder[key]):
            raise RowRejected("reasoning", f"{where} carries `{key}`, which is not captured")


def _read_turn(turn: Any, where: str, embedded: dict[str, bytes]) -> tuple[str, list[dict[str, Any]], bool]:
    """(role, content parts, whether it is supervised) of a turn.

    An image part holds under `image` its own path, the index of the listed image that it shows, or None.
    """
    if not isinstance(turn, dict):
        raise RowRejected("broken_row", f"{where} has a turn that is {type(turn).__name__}, not an object")
    name = _either(turn, "from", "role", where)
    told = name.strip().lower() if isinstance(name, str) else None
    if told in _TOOL_ROLES:
        raise RowRejected("tools", f"{where} has a turn of {name!r}, which is not captured")
    role = None if told is None else _ROLES.get(told)
    if role is None:
        raise RowRejected(
            "unknown_role",
            f"{where} has a turn of {shown(repr(name), 60)}, not human/gpt or user/assistant",
        )
    _refuse_what_is_not_taken(turn, where)
    content = _either(turn, "value", "content", where)
    if isinstance(content, str):
        parts = _split_marks(content, role, where, embedded)
    elif isinstance(content, list):
        parts = [made for part in content for made in _read_part(part, role, where, embedded)]
    else:
        raise RowRejected("broken_row", f"{where} has a turn whose text is {type(content).__name__}")
    own = listed_images(turn, where, embedded)
    free = [part for part in parts if part["type"] == "image" and part["image"] is None]
    if own and not free:
        parts[:0] = [{"type": "image", "image": path} for path in own]
    elif own and len(free) != len(own):
        raise RowRejected("image_count", f"{where} has a turn with {len(own)} images and {len(free)} marks")
    elif own:
        for part, path in zip(free, own, strict=True):
            part["image"] = path
    return role, parts, _is_supervised(turn, where)


def _either(turn: Mapping[str, Any], first: str, second: str, where: str) -> Any:
    """A turn's value under one of two keys; RowRejected `broken_row` where both are set and differ."""
    found = [turn[key] for key in (first, second) if turn.get(key) is not None]
    if len(found) == 2 and found[0] != found[1]:
        raise RowRejected("broken_row", f"{where} has a turn whose `{first}` and `{second}` differ")
    return found[0] if found else None


def _is_supervised(turn: Mapping[str, Any], where: str) -> bool:
    """Whether a turn is supervised; not with `weight: 0`, `train: false` or `loss: false`."""
    weights = [turn[key] for key in _WEIGHT_KEYS if turn.get(key) is not None and turn[key] == turn[key]]
    for weight in weights:
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            raise RowRejected(
                "turn_weight", f"{where} has a turn of weight {shown(repr(weight), 60)}, not 0 or 1"
            )
    return all(weights)


def _read_part(part: Any, role: str, where: str, embedded: dict[str, bytes]) -> list[dict[str, Any]]:
    """The parts of one entry of a turn's content."""
    if isinstance(part, str):
        return _split_marks(part, role, where, embedded)
    kind = part.get("type") if isinstance(part, dict) else None
    named = [part[key] for key in _PART_PATHS if not is_absent(part.get(key))] if kind else []
    if kind == "text" and isinstance(part.get("text"), str) and not named:
        return _split_marks(part["text"], role, where, embedded)
    if kind in ("image", "image_url"):
        return [
            {
                "type": "image",
                "image": path_of(named[0], where, embedded) if named else _index_of(part, where),
            }
        ]
    if isinstance(kind, str) and re.match(r"(input_)?(video|audio|speech|sound)", kind):
        raise other_media(
            kind.removeprefix("input_"), f"{where} has a content part of type {shown(kind, 40)}"
        )
    if kind in ("tool_use", "tool_result", "tool_call"):
        raise RowRejected("tools", f"{where} has a content part of type {kind}, which is not captured")
    if kind in ("thinking", "reasoning"):
        raise RowRejected("reasoning", f"{where} has a content part of type {kind}, which is not captured")
    raise RowRejected("broken_row", f"{where} has a content part of type {shown(repr(kind), 60)}")


def _index_of(part: Mapping[str, Any], where: str) -> int | None:
    """Which of the row's images an image part shows, by its `index`; None if not given."""
    index = part.get("index")
    if is_absent(index):
        return None
    if not isinstance(index, int | float) or index != index // 1 or index < 0:
        raise RowRejected("broken_row", f"{where} has an image part of index {shown(repr(index), 60)}")
    return int(index)


def _split_marks(text: str, role: str, where: str, embedded: dict[str, bytes]) -> list[dict[str, Any]]:
    """Text split at its image marks; line breaks next to a mark belong to the mark."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if role != "assistant":
        found = OTHER_MARKS.search(text)
        if found is not None:
            raise other_media(found[1], f"{where} has the mark {found[0]} in its text")
        numbered = _NUMBERED_MARK.search(text)
        if numbered is not None:
            raise RowRejected(
                "image_mark", f"{where} marks an image by {numbered[0]}; write {IMAGE_MARK} there"
            )
        named = _NAMED_IMAGE.split(text)
    else:
        named = [text]
    parts: list[dict[str, Any]] = []
    for number, stretch in enumerate(named):
        if number % 2:
            parts.append({"type": "image", "image": path_of(stretch.strip(), where, embedded)})
            continue
        pieces = stretch.split(IMAGE_MARK)
        for index, piece in enumerate(pieces):
            if index > 0:
                parts.append({"type": "image", "image": None})
            if index > 0 or number > 0:
                piece = piece[piece.rfind("\n", 0, len(piece) - len(piece.lstrip(" \t\n"))) + 1 :]
            if index < len(pieces) - 1 or number < len(named) - 1:
                end = piece.find("\n", len(piece.rstrip(" \t\n")))
                piece = piece if end < 0 else piece[:end]
            if piece:
                parts.append({"type": "text", "text": piece})
    return parts


def _place_images(
    placed: list[str | int | None], listed: list[str], messages: list[dict[str, Any]], row: int
) -> tuple[str, ...]:
    """The path of every image part in order; parts are added to `messages` for images without a place.

    placed: for each image part its own path, or which of `listed` it shows, by index or by turn.
    """
    if not placed and listed:
        first = next(message for message in messages if message["role"] == "user")
        first["content"][:0] = [{"type": "image"} for _ in listed]
        return tuple(listed)
    indices = {index for index in placed if isinstance(index, int)}
    if indices and None not in placed and indices == set(range(len(listed))):
        return tuple(
            listed[place] if isinstance(place, int) else place for place in placed if place is not None
        )
    named = [path for path in placed if isinstance(path, str)]
    if len(named) == len(placed) and listed in ([], named):
        return tuple(named)
    if indices or placed.count(None) != len(listed):
        raise RowRejected(
            "image_count", f"row {row} places {len(placed)} images in its text but names {len(listed)}"
        )
    rest = iter(listed)
    return tuple(next(rest) if path is None else str(path) for path in placed)
