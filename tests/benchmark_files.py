"""Small files in the published forms of the ten benchmarks, laid out as LLaVA's `eval` folder."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.tiny_models import write_png

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def lines(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def document(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def picture(path: Path, seed: int) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_png(path, seed=seed).read_bytes()


def make_eval(folder: Path) -> Path:
    """All ten benchmarks with two to six questions each."""
    vqav2(folder / "vqav2")
    gqa(folder / "gqa")
    vizwiz(folder / "vizwiz")
    sqa(folder / "scienceqa")
    textvqa(folder / "textvqa")
    mme(folder / "MME")
    mmb(folder / "mmbench", "mmbench_dev_20230712.tsv")
    mmb(folder / "mmbench_cn", "mmbench_dev_cn_20231003.tsv")
    pope(folder / "pope")
    mmmu(folder / "MMMU")
    return folder


def vqav2(folder: Path) -> None:
    asked = [
        {
            "question_id": 10 + i,
            "image": f"{i % 2}.png",
            "text": f"Is it red {i}?\n{SHORT}",
            "category": "default",
        }
        for i in range(4)
    ]
    lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", asked)
    lines(folder / "llava_vqav2_mscoco_test2015.jsonl", [*asked, {**asked[0], "question_id": 99}])
    for i in range(2):
        picture(folder / "test2015" / f"{i}.png", i)


def gqa(folder: Path) -> None:
    asked = [
        {"question_id": f"20{i}", "image": "g.png", "text": f"Which one {i}?\n{SHORT}"} for i in range(3)
    ]
    lines(folder / "llava_gqa_testdev_balanced.jsonl", asked)
    document(
        folder / "data/testdev_balanced_questions.json",
        {"200": {"answer": "red"}, "201": {"answer": "left"}, "202": {"answer": "t-shirt"}},
    )
    picture(folder / "data/images/g.png", 3)


def vizwiz(folder: Path) -> None:
    names = [f"VizWiz_test_{i}.png" for i in range(2)]
    lines(
        folder / "llava_test.jsonl",
        [
            {
                "question_id": name,
                "image": name,
                "text": f"What is this?\nWhen in doubt say Unanswerable.\n{SHORT}",
            }
            for name in names
        ],
    )
    for number, name in enumerate(names):
        picture(folder / "test" / name, 10 + number)


def sqa(folder: Path) -> None:
    def row(number: str, image: str | None, question: str) -> dict[str, Any]:
        mark = "<image>\n" if image else ""
        turns = [{"from": "human", "value": f"{mark}{question}"}, {"from": "gpt", "value": "LECTURE"}]
        return {"id": number, "conversations": turns, **({"image": image} if image else {})}

    asked = [
        row("1", "1/image.png", "Context: N/A\nWhich?\nA. one\nB. two"),
        row("2", None, "Which?\nA. one\nB. two\nC. three"),
        row("3", "3/image.png", "Where?\nA. here\nB. there"),
    ]
    document(folder / "llava_test_CQM-A.json", asked)
    problems = {
        "1": (["one", "two"], 1),
        "2": (["one", "two", "three"], 2),
        "3": (["here", "there"], 0),
        "4": (["x", "y"], 0),
    }
    document(
        folder / "problems.json",
        {key: {"choices": choices, "answer": answer} for key, (choices, answer) in problems.items()},
    )
    document(folder / "pid_splits.json", {"test": ["1", "2", "3", "4"], "train": ["9"]})
    for number in (1, 3):
        picture(folder / f"images/test/{number}/image.png", 20 + number)


def textvqa(folder: Path) -> None:
    asked = [
        ("t1", "What is written?\nReference OCR token: STOP, GO"),
        ("t1", "Which BRAND?\nReference OCR token: "),
        ("t2", "What time is it?"),
    ]
    lines(
        folder / "llava_textvqa_val_v051_ocr.jsonl",
        [{"question_id": name, "image": f"{name}.png", "text": f"{text}\n{SHORT}"} for name, text in asked],
    )
    answers = {
        "What is written?": ["stop"] * 8 + ["go"] * 2,
        "Which brand?": ["nokia"] * 10,
        "What time is it?": ["10:30"] * 10,
    }
    document(
        folder / "TextVQA_0.5.1_val.json",
        {
            "data": [
                {"image_id": name, "question": question, "answers": answers[question]}
                for (name, _), question in zip(asked, answers, strict=True)
            ]
        },
    )
    for number, name in enumerate(("t1", "t2")):
        picture(folder / "train_images" / f"{name}.png", 30 + number)


PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme(folder: Path) -> None:
    asked = []
    for number, category in enumerate((*PERCEPTION, *COGNITION)):
        # in half of the categories images and answers lie in folders of their own, some with two blanks
        deep, blanks = number % 2 == 0, "  " if number % 3 == 0 else " "
        release = folder / "MME_Benchmark_release_version" / category
        image = f"{category}/images/7.png" if deep else f"{category}/7.png"
        text = release / "questions_answers_YN/7.txt" if deep else release / "7.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        questions = [f"Is it {word}?" for word in ("there", "gone")]
        text.write_text(
            "".join(
                f"{question}{blanks}Please answer yes or no.\t{truth}\n"
                for question, truth in zip(questions, ("Yes", "No"), strict=True)
            )
        )
        picture(folder / "MME_Benchmark_release_version" / image, 40 + number)
        asked += [
            {
                "question_id": f"{category}/7.png",
                "image": image,
                "text": f"{question}\n{SHORT}",
                "category": category,
            }
            for question in questions
        ]
    lines(folder / "llava_mme.jsonl", asked)


def mmb(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = base64.b64encode(picture(folder / "made.png", 60)).decode()
    other = base64.b64encode(picture(folder / "made.png", 61)).decode()
    (folder / "made.png").unlink()
    table = [
        "index|question|hint|A|B|C|D|answer|category|image|source|l2-category|comment|split",
        f"241|What is it?|nan|cat|dog|||A|animals|{content}|s|l|c|dev",
        f'252|How "many"?|Look well.|one|two|three|None|B|counting|{other}|s|l|c|dev',
        f"1000241|What is it?|nan|dog|cat|||B|animals|{content}|s|l|c|dev",
        '1000252|How "many"?|Look well.|two|three|one|None|A|counting|252|s|l|c|dev',
    ]
    rows = [line.split("|") for line in table]
    quoted = [
        [f'"{cell.replace(chr(34), chr(34) * 2)}"' if '"' in cell else cell for cell in row] for row in rows
    ]
    (folder / name).write_text("\n".join("\t".join(row) for row in quoted) + "\n")


def pope(folder: Path) -> None:
    asked = []
    for category, labels in (
        ("adversarial", ("yes", "no")),
        ("popular", ("no", "no")),
        ("random", ("yes", "yes")),
    ):
        own = [
            {"question_id": i, "image": "p.png", "text": f"Is there a {category} dog {i}?", "label": label}
            for i, label in enumerate(labels)
        ]
        lines(folder / "coco" / f"coco_pope_{category}.json", own)
        for entry in own:
            told = {
                "question_id": len(asked),
                "image": "p.png",
                "text": f"{entry['text']}\n{SHORT}",
                "category": category,
            }
            asked.append(told)
    lines(folder / "llava_pope_test.jsonl", asked)
    picture(folder / "val2014/p.png", 70)


def mmmu(folder: Path) -> None:
    options = {"A": "red", "B": "blue house", "C": "42"}
    choice = {"question_type": "multiple-choice", "all_choices": list(options), "index2ans": options}
    image = {"image": "m.png"}
    document(
        folder / "anns_for_eval.json",
        [
            {
                "id": "validation_Art_1",
                "prompt": f"Which?\n\n(A) red\n(B) blue house\n(C) 42\n\n{LETTER}",
                **choice,
                **image,
            },
            {"id": "validation_Art_2", "prompt": f"Which of the two?\n{LETTER}", **choice},
            {
                "id": "validation_Art_Theory_1",
                "prompt": f"How many?\n\n{SHORT}",
                "question_type": "short-answer",
                **image,
            },
            {"id": "validation_Art_Theory_2", "prompt": f"Which?\n\n{LETTER}", **choice, **image},
        ],
    )
    document(
        folder / "eval/answer_dict_val.json",
        {
            "validation_Art_1": {"question_type": "multiple-choice", "ground_truth": "B"},
            "validation_Art_2": {"question_type": "multiple-choice", "ground_truth": "A"},
            "validation_Art_Theory_1": {"question_type": "short-answer", "ground_truth": ["6", "six"]},
            "validation_Art_Theory_2": {"question_type": "multiple-choice", "ground_truth": "C"},
        },
    )
    picture(folder / "all_images/m.png", 80)
