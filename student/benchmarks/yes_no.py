"""Benchmarks of questions with yes or no: POPE and MME."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache_schema.errors import KdcacheError, shown
from cache_schema.output import write_text
from student.benchmarks.questions import Benchmark, Item, load_lines, value_of
from student.benchmarks.rules import mme_answer, pope_scores
from student.benchmarks.short_answers import read_lines

_SHORT = "Answer the question using a single word or phrase."
_YES_NO = "Please answer yes or no."
_PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


# ---- POPE ----


def _read_pope(file: Path) -> list[Item]:
    """LLaVA's file, or POPE's own: a file or a folder of `coco_pope_*.json`, whose lines have labels."""
    items = []
    for path in sorted(file.glob("coco_pope_*.json")) if file.is_dir() else [file]:
        for item in read_lines(path):
            told = {"category": path.stem.removeprefix("coco_pope_"), **item.told}
            text = item.text if _SHORT in item.text else f"{item.text}\n{_SHORT}"
            items.append(replace(item, text=text, prompt=text, told=told))
    if not items:
        raise KdcacheError(f"{file} has no coco_pope_*.json; give POPE's folder or LLaVA's question file")
    return items


def _score_pope(
    items: Sequence[Item], answers: Sequence[str], annotations: Path | None
) -> dict[str, Any] | None:
    """Per category accuracy, precision, recall, F1 and share of yes, and their means. value: the mean F1."""
    said: dict[str, list[tuple[Item, str]]] = defaultdict(list)
    for item, answer in zip(items, answers, strict=True):
        said[str(item.told["category"])].append((item, answer))
    by_category: dict[str, Any] = {}
    for category, pairs in said.items():
        labels = [item.told.get("label") for item, _ in pairs]
        if None in labels:
            if annotations is None:
                return None
            file = annotations / f"coco_pope_{category}.json" if annotations.is_dir() else annotations
            labels = [value_of(file, line, "label") for line in load_lines(file)]
            if len(labels) != len(pairs):
                raise KdcacheError(
                    f"{file} has {len(labels)} labels for {len(pairs)} questions of {category}"
                )
        truths = ["no" if label == "no" else "yes" for label in labels]
        by_category[category] = pope_scores(truths, [answer for _, answer in pairs])
    names = ("accuracy", "precision", "recall", "f1", "yes_share")
    means = {name: sum(each[name] for each in by_category.values()) / len(by_category) for name in names}
    return {"questions": len(items), **means, "value": 100 * means["f1"], "by_category": by_category}


# ---- MME ----


def _mme_rows(
    items: Sequence[Item], answers: Sequence[str], annotations: Path
) -> dict[str, list[tuple[str, str, str, str]]]:
    """By category (file, question, truth, answer) of each question, as MME's tool reads them."""
    truths: dict[tuple[str, str], dict[str, str]] = {}
    rows: dict[str, list[tuple[str, str, str, str]]] = defaultdict(list)
    for item, answer in zip(items, answers, strict=True):
        category, name = (
            str(item.question_id).split("/")[0],
            str(item.question_id).split("/")[-1].split(".")[0],
        )
        file = f"{name}.txt"
        if (category, file) not in truths:
            truths[category, file] = _mme_truths(annotations / category, file)
        question = item.prompt.replace(_SHORT, "").strip() if _SHORT in item.prompt else item.prompt
        forms = [question]
        if _YES_NO not in question:  # the published questions have one or two blanks before it
            forms = [f"{question} {_YES_NO}", f"{question}  {_YES_NO}"]
        found = next((form for form in forms if form in truths[category, file]), None)
        if found is None:
            raise KdcacheError(f"{annotations / category} has no answer to {shown(forms[0])} in {file}")
        rows[category].append((file, found, truths[category, file][found], " ".join(answer.split())))
    return rows


def _mme_truths(folder: Path, file: str) -> dict[str, str]:
    inner = folder / "questions_answers_YN"
    path = (inner if inner.is_dir() else folder) / file
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise KdcacheError(f"{path} cannot be read; give MME's folder as --annotations") from error
    pairs = [line.strip().split("\t") for line in lines if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise KdcacheError(f"{path} is not of lines with a question and its answer; give MME's folder")
    return {pair[0]: pair[1] for pair in pairs}


def _score_mme(
    items: Sequence[Item], answers: Sequence[str], annotations: Path | None
) -> dict[str, Any] | None:
    """MME's tool: per category 100 x accuracy + 100 x the share of images whose two questions are both right.

    value: the sum over perception, 2,000 at most, divided by 20 as in the paper's tables; None where a
    category is missing. `other` counts answers that are neither yes nor no; they are wrong.
    """
    if annotations is None:
        return None
    scores: dict[str, float] = {}
    other = 0
    for category, rows in _mme_rows(items, answers, annotations).items():
        right = [mme_answer(answer) == truth.lower() for _, _, truth, answer in rows]
        other += sum(mme_answer(answer) == "other" for *_, answer in rows)
        halves = list(zip(rows[::2], rows[1::2], strict=False))
        if len(rows) % 2 or any(one[0] != two[0] for one, two in halves):
            raise KdcacheError(f"MME's questions of {category} are not two in a row per image; is it a part?")
        both = [one and two for one, two in zip(right[::2], right[1::2], strict=True)]
        scores[category] = 100 * sum(right) / len(right) + 100 * sum(both) / len(both)
    result: dict[str, Any] = {"questions": len(items), "other": other, "by_category": scores}
    for name, categories in (("perception", _PERCEPTION), ("cognition", _COGNITION)):
        if all(category in scores for category in categories):
            result[name] = sum(scores[category] for category in categories)
    perception = result.get("perception")
    return result | {"value": None if perception is None else perception / 20}


def _upload_mme(
    items: Sequence[Item], answers: Sequence[str], file: Path, annotations: Path | None, out: Path
) -> Path | None:
    """The folder that MME's `calculation.py` reads: a file per category."""
    if annotations is None:
        return None
    for category, rows in _mme_rows(items, answers, annotations).items():
        write_text(out / f"{category}.txt", "".join("\t".join(row) + "\n" for row in rows))
    return out


POPE = Benchmark(
    name="pope",
    title="POPE",
    folder="pope",
    questions=("llava_pope_test.jsonl", "coco"),
    images="val2014",
    annotations="coco",
    read=_read_pope,
    score=_score_pope,
)
MME = Benchmark(
    name="mme",
    title="MME",
    folder="MME",
    questions=("llava_mme.jsonl",),
    images="MME_Benchmark_release_version",
    annotations="MME_Benchmark_release_version",
    read=read_lines,
    score=_score_mme,
    upload=_upload_mme,
)
