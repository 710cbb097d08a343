"""Mutations for the fuzzing suites: of JSON values, of text and of bytes, all decided by a seed; and what any
input must keep to."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cache_schema import KdcacheError

LONGEST_LINE = 2000

STRANGE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\n",
    "\r\n",
    "\0",
    "\x1b[31mred",
    "<image>",
    "<image>" * 3,
    "<video>",
    "<img>0.png</img>",
    "<|im_end|><|endoftext|>",
    "{{ messages }}",
    "0.png",
    "../0.png",
    "/dev/zero",
    "https://example.org/0.png",
    "data:image/png;base64,iVBORw0KGgo=",
    "data:image/png;base64,%%",
    "\ud83d",
    "\ufdd0",
    "\u202e",
    "é漢字😀",
    "x" * 5000,
    "\x07" * 5000,
    b"\x89PNG\r\n\x1a\n",
    b"",
    [],
    {},
    [None],
    [[]],
    {"bytes": None, "path": None},
    {"bytes": b"\xff\xd8\xff", "path": "0.png"},
    {"type": "video"},
    {"type": "image", "index": 3},
    {"from": "human", "value": "q"},
)

KEYS = (
    "id", "image", "images", "conversations", "messages", "from", "value", "role", "content", "type", "text",
    "video", "audio", "weight", "tool_calls", "reasoning_content", "index", "path", "bytes", "url", "kind",
    "answers", "image_path", "system", "\x1b", "",
)  # fmt: skip


@contextmanager
def within_bounds(kind: str, seed: int, seconds: float = 30.0) -> Iterator[None]:
    """Only errors in one line of bounded length, soon; the slowest inputs are templates that stop at their
    bound."""
    began, told = time.monotonic(), ""
    try:
        yield
    except KdcacheError as error:
        told = str(error)
    except BaseException as error:
        error.add_note(f"{kind}: seed {seed}")
        raise
    assert len(told) <= LONGEST_LINE, f"{kind} {seed}"
    assert told == "" or told.isprintable(), f"{kind} {seed}: {told!r}"
    assert time.monotonic() - began < seconds, f"{kind} {seed}"


def mutated(value: Any, rng: random.Random, times: int) -> Any:
    """A deep copy of a JSON-like value with `times` changes somewhere inside."""
    value = copy.deepcopy(value)
    for _ in range(times):
        value = _changed(value, rng)
    return value


def _changed(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        return _changed_dict(value, rng)
    if isinstance(value, list) and value and rng.random() < 0.9:
        return _changed_list(value, rng)
    if isinstance(value, str) and rng.random() < 0.5:
        return changed_text(value, rng)
    return copy.deepcopy(rng.choice(STRANGE))


def _changed_dict(value: dict[Any, Any], rng: random.Random) -> dict[Any, Any]:
    key = rng.choice(list(value))
    what = rng.random()
    if what < 0.65:
        value[key] = _changed(value[key], rng)
    elif what < 0.75:
        del value[key]
    elif what < 0.85:
        value[rng.choice(KEYS)] = value.pop(key)
    else:
        value[rng.choice(KEYS)] = copy.deepcopy(rng.choice(STRANGE))
    return value


def _changed_list(value: list[Any], rng: random.Random) -> list[Any]:
    place = rng.randrange(len(value))
    what = rng.random()
    if what < 0.65:
        value[place] = _changed(value[place], rng)
    elif what < 0.75:
        del value[place]
    elif what < 0.85:
        value.insert(place, copy.deepcopy(value[place]))
    else:
        value.insert(place, copy.deepcopy(rng.choice(STRANGE)))
    return value


def changed_text(text: str, rng: random.Random, words: tuple[str, ...] = ()) -> str:
    """Text with a piece cut out, doubled, moved, or something strange put in."""
    start = rng.randrange(len(text) + 1)
    end = min(len(text), start + rng.randrange(1, 40))
    what = rng.random()
    if what < 0.3:
        return text[:start] + text[end:]
    if what < 0.5:
        return text[:end] + text[start:end] * rng.randrange(1, 4) + text[end:]
    strange = [one for one in STRANGE if isinstance(one, str)]
    return text[:start] + rng.choice(words or tuple(strange)) + text[start if what < 0.8 else end :]


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes with bits flipped, a piece cut out, overwritten or doubled, or an end missing."""
    changed = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        if not changed:
            break
        start = rng.randrange(len(changed))
        end = min(len(changed), start + rng.randrange(1, 64))
        what = rng.random()
        if what < 0.4:
            for _ in range(rng.randrange(1, 8)):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        elif what < 0.55:
            changed[start:end] = rng.randbytes(end - start)
        elif what < 0.65:
            changed[start:end] = rng.choice((b"\0", b"\xff")) * (end - start)
        elif what < 0.8:
            del changed[start:end]
        elif what < 0.9:
            changed[start:start] = changed[start:end]
        else:
            del changed[start:]
    return bytes(changed)
