"""Rows of a chosen and a rejected answer (preferences), each as two ordinary rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from cache_schema.datasets.media import is_absent, parsed
from cache_schema.errors import RowRejected, shown

Half = Literal["chosen", "rejected"]
HALVES: tuple[Half, Half] = ("chosen", "rejected")
"""The samples of a pair, in the order of their row numbers 2 n and 2 n + 1."""

_TURNS = ("conversations", "messages")
_PROMPTS = ("prompt", "question", *_TURNS)
_ANSWERING = ("gpt", "assistant")
_LONGEST_ID = 90  # characters: with what follows, ids are not shortened again


def is_pair(raw: Any) -> bool:
    """Whether a raw row holds an answer under both of HALVES."""
    return isinstance(raw, dict) and all(
        isinstance(raw.get(half), str | list | dict) and not is_absent(raw[half]) for half in HALVES
    )


def label_of_half(raw: Any, row: int, half: Half) -> str:
    """The id of a half: that of the row, or its number if it has none, and which half it is."""
    label = raw.get("id") if isinstance(raw, dict) else None
    return f"{shown(str(row if is_absent(label) else label), _LONGEST_ID)}/{half}"


def partner_of(sample_id: str) -> str | None:
    """The id of the rejected half where `sample_id` is that of a chosen one."""
    stem, _, half = sample_id.rpartition("/")
    return f"{stem}/{HALVES[1]}" if half == HALVES[0] else None


def half_of(raw: Any, row: int, half: Half) -> dict[str, Any]:
    """The row with one of its answers, as a row of `conversations`; row: where it stands in its file.

    An answer is text or turns. Turns that begin with an answer follow the prompt: `prompt` or `question`,
    text or turns, or the `conversations` or `messages` up to the last question, with a `system` text before
    them. Others are the whole conversation, and a prompt beside them is not read. Answers before the turn
    in which the halves differ get weight 0. RowRejected where `row` is no pair or has no prompt.
    """
    if not is_pair(raw):
        raise RowRejected("no_pair", f"row {row} has not an answer under both `chosen` and `rejected`")
    conversations = [_conversation(raw, each, row) for each in HALVES]
    turns = conversations[HALVES.index(half)]
    shorter = min(map(len, conversations)) - 1  # the last turn is always an answer to learn
    same = next((i for i in range(shorter) if conversations[0][i] != conversations[1][i]), shorter)
    before = [{**turn, "weight": 0} if _answers(turn) else turn for turn in turns[:same]]
    rest = {key: value for key, value in raw.items() if key not in (*HALVES, *_PROMPTS, "system")}
    return {**rest, "id": label_of_half(raw, row, half), "conversations": [*before, *turns[same:]]}


def _conversation(raw: Mapping[str, Any], half: Half, row: int) -> list[Any]:
    """All turns of a half."""
    turns = _turns_of(raw[half], "assistant")
    if not turns:
        raise RowRejected("broken_row", f"row {row} has no turns under `{half}`")
    if not _answers(turns[0]):
        return turns
    found = next((raw[key] for key in _PROMPTS if not is_absent(raw.get(key))), None)
    prompt = [] if found is None else _turns_of(found, "user")
    while prompt and _answers(prompt[-1]):
        prompt.pop()
    if not prompt:
        raise RowRejected("no_turns", f"row {row} has no question in {', '.join(_PROMPTS)} before `{half}`")
    system = [] if is_absent(raw.get("system")) else _turns_of(raw["system"], "system")
    return [*system, *prompt, *turns]


def _turns_of(value: Any, role: str) -> list[Any]:
    """The turns of a list, of JSON text, of one turn or of an object with turns; other text: one turn."""
    if isinstance(value, dict):
        value = next((value[key] for key in _TURNS if value.get(key)), [value])
    found = parsed(value)
    if isinstance(found, list) and found and all(isinstance(turn, dict) and _role(turn) for turn in found):
        return list(found)
    return [{"from": role, "value": value}] if isinstance(value, str) else []


def _role(turn: Mapping[str, Any]) -> Any:
    return turn.get("from") or turn.get("role")


def _answers(turn: Mapping[str, Any]) -> bool:
    name = _role(turn)
    return isinstance(name, str) and name.strip().lower() in _ANSWERING
