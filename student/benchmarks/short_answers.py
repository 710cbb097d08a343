"""Benchmarks with short answers in JSON lines: VQAv2, VizWiz, TextVQA, GQA."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache_schema.errors import KdcacheError, shown
from cache_schema.output import write_text
from student.benchmarks.questions import Benchmark, Item, load_json, load_lines, value_of
from student.benchmarks.rules import gqa_words, m4c_words, textvqa_score, vqa_score

_WHOLE_VQAV2 = "llava_vqav2_mscoco_test2015.jsonl"


def read_lines(file: Path) -> list[Item]:
    """Questions as JSON lines with `question_id`, `image`, `text`."""
    return [
        Item(
            question_id=value_of(file, line, "question_id"),
            text=str(value_of(file, line, "text")),
            prompt=str(line["text"]),
            image=str(value_of(file, line, "image")),
            told=line,
        )
        for line in load_lines(file)
    ]


def mean_score(scores: Sequence[float]) -> dict[str, Any]:
    """The mean of scores from 0 to 1, and in percent as `value`."""
    mean = sum(scores) / len(scores)
    return {"questions": len(scores), "accuracy": mean, "value": 100 * mean}


def _score_vqa(
    items: Sequence[Item], answers: Sequence[str], annotations: Path | None
) -> dict[str, Any] | None:
    """The VQA evaluation of answers as they are uploaded; annotations of VQAv2 (by question) or VizWiz."""
    if annotations is None:
        return None
    document = load_json(annotations)
    listed = document.get("annotations") if isinstance(document, dict) else document
    if not isinstance(listed, list):
        raise KdcacheError(f"{annotations} has no list of annotations; give VQA's or VizWiz's file")
    known: dict[Any, list[str]] = {}
    for entry in listed:
        given = value_of(annotations, entry, "answers")
        known[value_of(annotations, entry, "question_id", "image")] = [str(each["answer"]) for each in given]
    keys = [item.question_id if item.question_id in known else item.image for item in items]
    return mean_score(
        [
            vqa_score(m4c_words(answer), _known(known, key, annotations))
            for key, answer in zip(keys, answers, strict=True)
        ]
    )


def _known(known: dict[Any, Any], key: Any, annotations: Path) -> Any:
    """The annotation of a question. KdcacheError where there is none."""
    if key not in known:
        raise KdcacheError(f"{annotations} has nothing of question {shown(str(key))}; is it of this split?")
    return known[key]


def _upload_vqav2(
    items: Sequence[Item], answers: Sequence[str], file: Path, annotations: Path | None, out: Path
) -> Path:
    """Answers to every question of the test split, empty where it was not asked, as the server wants."""
    said = {item.question_id: m4c_words(answer) for item, answer in zip(items, answers, strict=True)}
    whole = file.with_name(_WHOLE_VQAV2)
    asked = [line["question_id"] for line in load_lines(whole)] if whole.is_file() else list(said)
    return _written(out, [{"question_id": each, "answer": said.get(each, "")} for each in asked])


def _upload_vizwiz(
    items: Sequence[Item], answers: Sequence[str], file: Path, annotations: Path | None, out: Path
) -> Path:
    pairs = zip(items, answers, strict=True)
    return _written(out, [{"image": item.image, "answer": m4c_words(answer)} for item, answer in pairs])


def _written(out: Path, document: Any) -> Path:
    path = out.with_name(f"{out.name}.json")
    write_text(path, json.dumps(document))
    return path


def _score_textvqa(
    items: Sequence[Item], answers: Sequence[str], annotations: Path | None
) -> dict[str, Any] | None:
    if annotations is None:
        return None
    known = {
        (entry["image_id"], entry["question"].lower()): [str(each) for each in entry["answers"]]
        for entry in value_of(annotations, load_json(annotations), "data")
    }
    return mean_score(
        [
            textvqa_score(
                answer, _known(known, (item.question_id, _textvqa_question(item.text)), annotations)
            )
            for item, answer in zip(items, answers, strict=True)
        ]
    )


def _textvqa_question(prompt: str) -> str:
    """The question within a prompt of any form that LLaVA's question files have, in lower case."""
    lines = prompt.split("\n")
    older = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
    if prompt.startswith("OCR tokens: ") and older is not None:
        question = older[1]
    elif len(lines) == 3 and "Reference OCR token: " in prompt:
        question = lines[1 if prompt.startswith("Reference OCR token:") else 0]
    elif len(lines) == 2:
        question = lines[0]
    else:
        raise KdcacheError(f"{shown(prompt)} is no prompt of LLaVA's TextVQA files; give the published file")
    return question.lower()


def _score_gqa(
    items: Sequence[Item], answers: Sequence[str], annotations: Path | None
) -> dict[str, Any] | None:
    if annotations is None:
        return None
    known = load_json(annotations)
    return mean_score(
        [
            float(gqa_words(answer) == _known(known, str(item.question_id), annotations)["answer"])
            for item, answer in zip(items, answers, strict=True)
        ]
    )


def _upload_gqa(
    items: Sequence[Item], answers: Sequence[str], file: Path, annotations: Path | None, out: Path
) -> Path:
    """What GQA's `eval.py` reads as testdev_balanced_predictions.json."""
    pairs = zip(items, answers, strict=True)
    return _written(
        out, [{"questionId": item.question_id, "prediction": gqa_words(said)} for item, said in pairs]
    )


VQAV2 = Benchmark(
    name="vqav2",
    title="VQAv2",
    folder="vqav2",
    questions=("llava_vqav2_mscoco_test-dev2015.jsonl",),
    images="test2015",
    annotations="",
    read=read_lines,
    score=_score_vqa,
    upload=_upload_vqav2,
)
GQA = Benchmark(
    name="gqa",
    title="GQA",
    folder="gqa",
    questions=("llava_gqa_testdev_balanced.jsonl",),
    images="data/images",
    annotations="data/testdev_balanced_questions.json",
    read=read_lines,
    score=_score_gqa,
    upload=_upload_gqa,
)
VIZWIZ = Benchmark(
    name="vizwiz",
    title="VizWiz",
    folder="vizwiz",
    questions=("llava_test.jsonl",),
    images="test",
    annotations="",
    read=read_lines,
    score=_score_vqa,
    upload=_upload_vizwiz,
)
TEXTVQA = Benchmark(
    name="textvqa",
    title="TextVQA",
    folder="textvqa",
    questions=("llava_textvqa_val_v051_ocr.jsonl",),
    images="train_images",
    annotations="TextVQA_0.5.1_val.json",
    read=read_lines,
    score=_score_textvqa,
)
