"""Published scoring rules on single answers: from the text of an answer to what is compared with references.

Each rule gives what its published script gives for every string, oddities included. Answers come as LLaVA's
scripts write them: without blanks around them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# ---- VQA, TextVQA ----

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32
"""Only so many periods are removed: the scripts pass the value of `re.UNICODE` as the count of `re.sub`."""

_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've "
    "might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've "
    "shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll "
    "someone's something'd something'd've something'll that's there'd there'd've there're there's they'd "
    "they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't "
    "would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've "
)
_RESTORED = {
    form[:place] + form[place + 1 :]: form
    for form in _CONTRACTIONS.split()
    for place, character in enumerate(form)
    if character == "'"
} | {"somebody'd": "somebodyd"}
"""Each contraction without one of its apostrophes; the last entry stands so in the scripts."""


def m4c_words(text: str) -> str:
    """The text as TextVQA's evaluation compares it and as LLaVA uploads answers (M4C's answer processor)."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_words(text)


def vqa_words(text: str) -> str:
    """The text as the VQA evaluation compares it, where its references are not all the same.

    A mark is deleted if it stands beside a blank anywhere in the text, or if a comma stands between digits;
    else it becomes a blank. Then full stops that no digit follows, number words, articles, apostrophes.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    thousands = re.search(r"\d,\d", text) is not None
    kept = text
    for mark in _MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if beside or thousands else " ")
    kept = _PERIOD.sub("", kept, count=_PERIODS)
    words = [_DIGITS.get(word, word) for word in kept.lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def textvqa_score(answer: str, references: Sequence[str]) -> float:
    """TextVQA's accuracy of one answer: the mean, over leaving out one reference, of min(1, matches / 3)."""
    return _leave_one_out(m4c_words(answer), [m4c_words(each) for each in references])


def vqa_score(answer: str, references: Sequence[str]) -> float:
    """The VQA evaluation's accuracy (VQAv2, VizWiz): the same mean, on `vqa_words`; where all references are
    the same text, answer and references are compared as they are."""
    cleaned = [each.replace("\n", " ").replace("\t", " ").strip() for each in references]
    said = answer.replace("\n", " ").replace("\t", " ").strip()
    if len(set(cleaned)) > 1:
        cleaned, said = [vqa_words(each) for each in cleaned], vqa_words(said)
    return _leave_one_out(said, cleaned)


def _leave_one_out(said: str, references: Sequence[str]) -> float:
    same = [each == said for each in references]
    return sum(min(1.0, (sum(same) - left_out) / 3.0) for left_out in same) / len(same)


# ---- GQA, POPE, MME ----


def gqa_words(text: str) -> str:
    """The text as LLaVA hands it to GQA's evaluation, which compares it with the answer as it is."""
    return text.rstrip(".").lower()


def pope_answer(text: str) -> str:
    """yes or no: no where the first sentence, without commas, has the word No, no or not; else yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_scores(truths: Sequence[str], predictions: Sequence[str]) -> dict[str, Any]:
    """POPE's accuracy, precision, recall and F1 of `yes`, and the share of `yes` among the predictions.

    truths: yes or no for each prediction; at least one. Ratios without a denominator are 0.
    """
    said = [pope_answer(each) == "yes" for each in predictions]
    true = [each == "yes" for each in truths]
    hits = sum(one and other for one, other in zip(said, true, strict=True))
    precision = hits / sum(said) if any(said) else 0.0
    recall = hits / sum(true) if any(true) else 0.0
    return {
        "questions": len(true),
        "accuracy": sum(one == other for one, other in zip(said, true, strict=True)) / len(true),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_share": sum(said) / len(true),
    }


def mme_answer(text: str) -> str:
    """yes, no or other: which of them is within the first four characters, in lower case."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


# ---- letters: ScienceQA, MMBench, MMMU ----


def sqa_letter(text: str, choices: int) -> str | None:
    """The option that ScienceQA's evaluation reads: a letter A to E, "X. ...", or exactly one "The answer is
    X" with a character after it; None for anything else and for letters beyond the choices."""
    if text in tuple("ABCDE") or (text[:1] in tuple("ABCDE") and text[1:3] == ". "):
        letter = text[0]
    else:
        found = re.findall(r"The answer is ([A-Z]).", text)
        letter = found[0] if len(found) == 1 else ""
    return letter if letter in tuple("ABCDE"[:choices]) else None


def mmb_letter(text: str, options: Mapping[str, str]) -> str | None:
    """The option that MMBench's evaluation reads before it asks a language model (`can_infer` of VLMEvalKit):
    the only option letter among the words; else the only option whose text is in the answer."""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    said = text.lower()
    letters = [letter for letter in options if letter in words]
    named = [letter for letter, option in options.items() if option.lower() in said]
    if len(letters) == 1:
        return letters[0]
    refused = not letters and "Z" in words  # Z stands for no answer there
    return named[0] if len(named) == 1 and not refused else None


def mmmu_letter(text: str, options: Mapping[str, str]) -> str | None:
    """The option that MMMU's evaluation reads: the last "(X)"; else the last X between blanks; else, in
    answers of more than five words, the last option whose text is in the answer. None: it draws one."""
    for mark in ",.!?;:'":
        text = text.strip(mark)
    padded = f" {text} "
    lower = padded.lower()
    ways: list[Callable[[str], int]] = [
        lambda letter: padded.rfind(f"({letter})"),
        lambda letter: padded.rfind(f" {letter} "),
    ]
    if len(padded.split()) > 5:
        ways.append(lambda letter: lower.rfind(options[letter].lower()))
    for place in ways:
        places = {letter: at for letter in options if (at := place(letter)) >= 0}
        if places:
            return max(places, key=lambda letter: places[letter])
    return None


# ---- open answers of MMMU ----

_BEFORE_KEY = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBER_FORMS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_open_right(text: str, references: Sequence[str]) -> bool:
    """Whether MMMU's evaluation takes an open answer as right: one of its numbers is a reference's, rounded
    to two decimals, or a reference's text is in it."""
    wanted = [value for each in references for value in _mmmu_values(each)]
    texts = [value for value in wanted if isinstance(value, str)]
    return any(
        any(each in said for each in texts) if isinstance(said, str) else said in wanted
        for said in _mmmu_said(text)
    )


def _mmmu_said(text: str) -> list[str | float]:
    """What an open answer says: the ends of its lines after words such as `is`, and the numbers in them."""
    whole = text.strip().strip(".").lower()
    lines = whole.split("\n")
    keys = []
    for number, line in enumerate(lines):
        before = _BEFORE_KEY if number < len(lines) - 1 else (*_BEFORE_KEY, "=")
        ends = [line.split(word)[-1].strip() for word in before if word in line]
        shortest = ""
        for end in ends:
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in tuple(":,.!?;'"):
            keys.append(shortest)
    keys = keys or [whole]
    found = [number for key in keys for form in _NUMBER_FORMS for number in re.findall(form, key)]
    return [value for each in (*keys, *found) for value in _mmmu_values(each)]


def _mmmu_values(text: str) -> list[str | float]:
    """A number rounded to two decimals, or the text in lower case; one character with a blank beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
