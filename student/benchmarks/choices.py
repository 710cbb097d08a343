"""Benchmarks of questions with options: ScienceQA, MMBench in English and Chinese, MMMU."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cache_schema.errors import KdcacheError, shown
from cache_schema.output import write_text
from student.benchmarks.questions import (
    Benchmark,
    Item,
    load_json,
    load_table,
    value_of,
    write_xlsx,
)
from student.benchmarks.rules import mmb_letter, mmmu_letter, mmmu_open_right, sqa_letter

_LETTER = "Answer with the option's letter from the given choices directly."
_LETTER_CN = "请直接回答选项字母。"
_LONG = 1024
"""The longest answer in tokens of LLaVA's scripts for these benchmarks."""


def _share(right: Sequence[bool]) -> float | None:
    return sum(right) / len(right) if right else None


# ---- ScienceQA ----


def _read_sqa(file: Path) -> list[Item]:
    """Rows with `id`, `conversations` and, where there is one, `image`."""
    items = []
    for row in load_json(file):
        turns = value_of(file, row, "conversations")
        text = f"{str(turns[0]['value']).replace('<image>', '').strip()}\n{_LETTER}"
        image = row.get("image")
        prompt = text if image is None else f"<image>\n{text}"
        items.append(Item(question_id=str(value_of(file, row, "id")), text=text, prompt=prompt, image=image))
    return items


def _score_sqa(
    items: Sequence[Item], answers: Sequence[str], annotations: Path | None
) -> dict[str, Any] | None:
    """Accuracy over the problems of the test split (unasked ones are wrong). value: over those with an image,
    the paper's column."""
    if annotations is None:
        return None
    folder = annotations if annotations.is_dir() else annotations.parent
    problems = load_json(folder / "problems.json")
    said = {item.question_id: (answer, item.image) for item, answer in zip(items, answers, strict=True)}
    every, pictured = [], []
    for number in value_of(folder, load_json(folder / "pid_splits.json"), "test"):
        problem = value_of(folder / "problems.json", problems, number)
        answer, image = said.get(number, ("", None))
        right = sqa_letter(answer, len(problem["choices"])) == "ABCDE"[problem["answer"]]
        every.append(right)
        pictured += [right] if image is not None else []
    share = _share(pictured)
    return {
        "questions": len(items),
        "accuracy": _share(every),
        "image_questions": len(pictured),
        "image_accuracy": share,
        "value": None if share is None else 100 * share,
    }


# ---- MMBench ----

_ABSENT = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>"),
    *("N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}
"""What pandas reads as missing; LLaVA's script adds `nan` and `none` of any case."""

_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
_ROTATED = 1_000_000
"""Rows whose index differs by a multiple of it ask one question with its options in another order."""


def _present(value: str | None) -> bool:
    return value is not None and value not in _ABSENT and value.lower() not in ("nan", "none")


def _options(row: dict[str, str]) -> dict[str, str]:
    """The options up to the first that is missing."""
    found: dict[str, str] = {}
    for letter in "ABCD":
        if not _present(row.get(letter)):
            break
        found[letter] = row[letter]
    return found


def _read_mmb(file: Path, instruction: str) -> list[Item]:
    """A table with `index`, `question`, `hint`, A to D, and images in base64, or the index of a row that has
    the image."""
    rows = load_table(file)
    images = {value_of(file, row, "index"): value_of(file, row, "image") for row in rows}
    items = []
    for row in rows:
        options = _options(row)
        question = f"{row['hint']}\n{row['question']}" if _present(row.get("hint")) else row["question"]
        prompt = "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items())])
        encoded = images.get(row["image"], row["image"])
        try:
            content = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise KdcacheError(f"{file}, index {row['index']}: its image is no base64") from error
        items.append(
            Item(
                question_id=int(row["index"]),
                text=f"{prompt}\n{instruction}",
                prompt=prompt,
                image=f"embedded/{hashlib.sha256(content).hexdigest()}",
                content=content,
                told={**{name: text for name, text in row.items() if name != "image"}, "options": options},
            )
        )
    return items


def _score_mmb(
    items: Sequence[Item], answers: Sequence[str], annotations: Path | None
) -> dict[str, Any] | None:
    """Accuracy over rows, and over questions that are right in every order of their options, as the server
    counts them where the table has several (`value`). unread: answers that name no single option; the
    server asks a language model for them, here they are wrong."""
    if not all(_present(str(item.told.get("answer", ""))) for item in items):
        return None
    letters = [mmb_letter(said, item.told["options"]) for item, said in zip(items, answers, strict=True)]
    right = [letter == item.told["answer"] for item, letter in zip(items, letters, strict=True)]
    questions: dict[int, list[bool]] = defaultdict(list)
    categories: dict[str, list[bool]] = defaultdict(list)
    for item, each in zip(items, right, strict=True):
        questions[int(item.question_id) % _ROTATED].append(each)
    for item in items:
        if int(item.question_id) < _ROTATED and "category" in item.told:
            categories[item.told["category"]].append(all(questions[int(item.question_id)]))
    whole = _share([all(each) for each in questions.values()])
    assert whole is not None
    return {
        "questions": len(questions),
        "rows": len(items),
        "row_accuracy": _share(right),
        "accuracy": whole,
        "unread": letters.count(None),
        "value": 100 * whole,
        "by_category": {name: _share(each) for name, each in sorted(categories.items())},
    }


def _upload_mmb(
    items: Sequence[Item], answers: Sequence[str], file: Path, annotations: Path | None, out: Path
) -> Path:
    """The workbook for the server: the table without some columns, `prediction` as its seventh."""
    kept = [name for name in items[0].told if name not in (*_DROPPED, "options")]
    rows = [[*kept[:6], "prediction", *kept[6:]]]
    for item, answer in zip(items, answers, strict=True):
        cells = ["" if name in "ABCD" and not _present(item.told[name]) else item.told[name] for name in kept]
        rows.append([*cells[:6], answer, *cells[6:]])
    path = out.with_name(f"{out.name}.xlsx")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_xlsx(path, rows)
    return path


# ---- MMMU ----

_SEVERAL_IMAGES = "INVALID GENERATION FOR MULTIPLE IMAGE INPUTS"


def _drawn(item: Item) -> str:
    """The letter of a question whose answer names none: the scripts draw it; here its id decides."""
    letter: str = random.Random(str(item.question_id)).choice(item.told["all_choices"])
    return letter


def _read_mmmu(file: Path) -> list[Item]:
    """TinyLLaVA's rows: `id`, `prompt`, `question_type`, `all_choices`, `index2ans` and one `image`; those
    with several images have none and are not asked."""
    items = []
    for row in load_json(file):
        text = str(value_of(file, row, "prompt"))
        letters = value_of(file, row, "question_type") == "multiple-choice"
        if letters and not (row.get("all_choices") and row.get("index2ans")):
            raise KdcacheError(f"{file}: {shown(str(row['id']))} has no options; give the published file")
        item = Item(question_id=str(value_of(file, row, "id")), text=text, prompt=text, told=row)
        image = row.get("image")
        preset = None if image else _drawn(item) if letters else _SEVERAL_IMAGES
        items.append(
            Item(
                question_id=item.question_id,
                text=text,
                prompt=text,
                image=image or None,
                preset=preset,
                told=row,
            )
        )
    return items


def _mmmu_read(item: Item, answer: str) -> str:
    """What TinyLLaVA's script hands to the evaluation: a letter, or the whole open answer."""
    if item.told["question_type"] != "multiple-choice":
        return answer
    return mmmu_letter(answer, item.told["index2ans"]) or _drawn(item)


def _score_mmmu(
    items: Sequence[Item], answers: Sequence[str], annotations: Path | None
) -> dict[str, Any] | None:
    """Accuracy over all questions and by subject. drawn: answers that named no option; not_asked: questions
    with several images."""
    if annotations is None:
        return None
    known = load_json(annotations)
    subjects: dict[str, list[bool]] = defaultdict(list)
    drawn = 0
    for item, answer in zip(items, answers, strict=True):
        entry = value_of(annotations, known, str(item.question_id))
        truth = value_of(annotations, entry, "ground_truth")
        truths = [str(each) for each in truth] if isinstance(truth, list) else [str(truth)]
        if item.told["question_type"] == "multiple-choice":
            drawn += item.preset is None and mmmu_letter(answer, item.told["index2ans"]) is None
            right = _mmmu_read(item, answer) in truths
        else:
            right = mmmu_open_right(answer, truths)
        subjects["_".join(str(item.question_id).split("_")[1:-1])].append(right)
    every = _share([right for each in subjects.values() for right in each])
    assert every is not None
    return {
        "questions": len(items),
        "accuracy": every,
        "drawn": drawn,
        "not_asked": sum(item.preset is not None for item in items),
        "value": 100 * every,
        "by_category": {name: _share(each) for name, each in sorted(subjects.items())},
    }


def _upload_mmmu(
    items: Sequence[Item], answers: Sequence[str], file: Path, annotations: Path | None, out: Path
) -> Path:
    """What MMMU's `main_eval_only.py` reads: the read answer by question."""
    path = out.with_name(f"{out.name}.json")
    pairs = zip(items, answers, strict=True)
    write_text(path, json.dumps({str(item.question_id): _mmmu_read(item, answer) for item, answer in pairs}))
    return path


SQA = Benchmark(
    name="sqa",
    title="SciQA",
    folder="scienceqa",
    questions=("llava_test_CQM-A.json",),
    images="images/test",
    annotations="problems.json",
    read=_read_sqa,
    score=_score_sqa,
    max_new_tokens=_LONG,
)
MMB = Benchmark(
    name="mmb",
    title="MMB",
    folder="mmbench",
    questions=("mmbench_dev_20230712.tsv", "MMBench_DEV_EN_legacy.tsv"),
    images="",
    annotations="",
    read=partial(_read_mmb, instruction=_LETTER),
    score=_score_mmb,
    upload=_upload_mmb,
    max_new_tokens=_LONG,
)
MMB_CN = Benchmark(
    name="mmb-cn",
    title="MMB-CN",
    folder="mmbench_cn",
    questions=("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN_legacy.tsv"),
    images="",
    annotations="",
    read=partial(_read_mmb, instruction=_LETTER_CN),
    score=_score_mmb,
    upload=_upload_mmb,
    max_new_tokens=_LONG,
)
MMMU = Benchmark(
    name="mmmu",
    title="MMMU",
    folder="MMMU",
    questions=("anns_for_eval.json",),
    images="all_images",
    annotations="eval/answer_dict_val.json",
    read=_read_mmmu,
    score=_score_mmmu,
    upload=_upload_mmmu,
    max_new_tokens=_LONG,
)
