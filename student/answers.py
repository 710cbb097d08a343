"""Scores of free answers: exact match, VQA-soft accuracy, yes/no accuracy and F1, against the majority."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cache_schema.errors import RowRejected

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"zero": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_POINT_OUTSIDE_NUMBER = re.compile(r"\.(?!\d)")
_MARKS = re.compile(r"[;/\[\]\"{}()=+\\_<>@`?!:,]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A question with its reference answers (at least one) and the model's answer."""

    kind: str
    references: tuple[str, ...]
    prediction: str


def references_of(value: Any, questions: int) -> list[tuple[str, ...]]:
    """The references of each of `questions` questions, from a row's `answers`.

    value: the references of the only question, or a list of them per question. References are a string or a
    number, or a list of strings, numbers and VQA's mappings with `answer`. RowRejected for anything else.
    """
    listed = value if isinstance(value, list | tuple) else [value]
    if questions == 1 and not any(isinstance(each, list | tuple) for each in listed):
        listed = [value]
    if len(listed) != questions:
        raise _rejected(f"are {len(listed)} for {questions} questions")
    return [_references(each) for each in listed]


def _references(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        return (_reference(value),)
    if not value:
        raise _rejected("are an empty list")
    named = [each["answer"] if isinstance(each, dict) and "answer" in each else each for each in value]
    return tuple(map(_reference, named))


def _reference(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(int(value)) if value == int(value) else str(value)
    kind = "null" if value is None else type(value).__name__
    raise _rejected(f"hold {kind}: give strings or numbers, or a list of them")


def _rejected(what: str) -> RowRejected:
    return RowRejected("annotations", f"its `answers` {what}")


def plain(text: str) -> str:
    """Lower case, single spaces, no final full stop: the form compared by exact match."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def vqa_words(text: str) -> str:
    """The text as the VQA evaluation compares it (Antol et al. 2015): without punctuation and articles,
    number words as digits. Its list of contractions is not applied."""
    text = _COMMA_IN_NUMBER.sub("", " ".join(text.lower().split()))
    text = _POINT_OUTSIDE_NUMBER.sub("", _MARKS.sub(" ", text))
    return " ".join(_DIGITS.get(word, word) for word in text.split() if word not in _ARTICLES)


def vqa_soft(prediction: str, references: Sequence[str]) -> float:
    """VQA accuracy: the mean over leaving out one reference of min(1, matches among the others / 3)."""
    said = vqa_words(prediction)
    same = [vqa_words(reference) == said for reference in references]
    return sum(min(1.0, (sum(same) - left_out) / 3.0) for left_out in same) / len(same)


def score(answered: Sequence[Answered]) -> dict[str, Any]:
    """Scores over all questions and by kind.

    exact_match: share of predictions that are one of the references. majority: the score of always
    giving the kind's most frequent reference. yes_no: over questions whose first reference is yes or no, with
    `yes` as the positive class; a prediction counts by its first word, and one that is neither is wrong.
    vqa_soft: over questions with several references. Parts without a question are omitted.
    """
    kinds = sorted({each.kind for each in answered})
    result: dict[str, Any] = _exact(answered)
    if len(kinds) > 1:
        result["by_kind"] = {kind: _exact([each for each in answered if each.kind == kind]) for kind in kinds}
    binary = [each for each in answered if plain(each.references[0]) in ("yes", "no")]
    if binary:
        result["yes_no"] = _yes_no(binary)
    several = [each for each in answered if len(each.references) > 1]
    if several:
        soft = [vqa_soft(each.prediction, each.references) for each in several]
        result["vqa_soft"] = {"questions": len(soft), "accuracy": sum(soft) / len(soft)}
    return result


def _exact(answered: Sequence[Answered]) -> dict[str, Any]:
    count = len(answered)
    if not count:
        return {"questions": 0}
    right = sum(plain(each.prediction) in {plain(text) for text in each.references} for each in answered)
    frequent, times = Counter(plain(each.references[0]) for each in answered).most_common(1)[0]
    return {
        "questions": count,
        "exact_match": right / count,
        "majority": {"answer": frequent, "exact_match": times / count},
    }


def _yes_no(answered: Sequence[Answered]) -> dict[str, Any]:
    truths = [plain(each.references[0]) == "yes" for each in answered]
    words = [(re.findall(r"[a-z]+", each.prediction.lower()) or [""])[0] for each in answered]
    right = sum(word == ("yes" if truth else "no") for word, truth in zip(words, truths, strict=True))
    hits = sum(word == "yes" and truth for word, truth in zip(words, truths, strict=True))
    said = sum(word == "yes" for word in words)
    precision = hits / said if said else 0.0
    recall = hits / sum(truths) if any(truths) else 0.0
    return {
        "questions": len(answered),
        "accuracy": right / len(answered),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_share": said / len(answered),
    }
