"""Scores of free answers by published rules: exact match, VQA accuracy, yes/no accuracy and F1, majority."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cache_schema.errors import RowRejected
from student.benchmarks.rules import gqa_words, pope_scores, textvqa_score


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


def score(answered: Sequence[Answered]) -> dict[str, Any]:
    """Scores over all questions and by kind; `rules` names the published rule of each.

    exact_match: share of predictions that are one of the references, both as GQA's evaluation gets them.
    majority: the score of always giving the kind's most frequent reference. yes_no: over questions whose
    first reference is yes or no, by POPE's rule, with `yes` as the positive class. vqa_soft: over questions
    with several references, by TextVQA's rule. Parts without a question are omitted.
    """
    kinds = sorted({each.kind for each in answered})
    result: dict[str, Any] = _exact(answered)
    result["rules"] = {"exact_match": "GQA"}
    if len(kinds) > 1:
        result["by_kind"] = {kind: _exact([each for each in answered if each.kind == kind]) for kind in kinds}
    binary = [each for each in answered if _plain(each.references[0]) in ("yes", "no")]
    if binary:
        result["yes_no"] = pope_scores(
            [_plain(each.references[0]) for each in binary], [each.prediction for each in binary]
        )
        result["rules"]["yes_no"] = "POPE"
    several = [each for each in answered if len(each.references) > 1]
    if several:
        soft = [textvqa_score(each.prediction, each.references) for each in several]
        result["vqa_soft"] = {"questions": len(soft), "accuracy": sum(soft) / len(soft)}
        result["rules"]["vqa_soft"] = "TextVQA"
    return result


def _exact(answered: Sequence[Answered]) -> dict[str, Any]:
    count = len(answered)
    if not count:
        return {"questions": 0}
    right = sum(_plain(each.prediction) in {_plain(text) for text in each.references} for each in answered)
    frequent, times = Counter(_plain(each.references[0]) for each in answered).most_common(1)[0]
    return {
        "questions": count,
        "exact_match": right / count,
        "majority": {"answer": frequent, "exact_match": times / count},
    }


def _plain(text: str) -> str:
    return gqa_words(text.strip())
