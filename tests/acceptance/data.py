"""The data of the acceptance run: easy-VQA's images and questions, and prose of the Python manual."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks._teachers import english
from demo.easy_vqa import write_dataset

LONGEST = 700  # characters of an answer out of the manual


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Files of rows, and how many rows each of the caches is made of.

    captions: an image and what it shows. conversations: images with their questions, rows of text alone,
    and one row whose image is missing. held_out: images and texts of which nothing is in the others.
    questions: one question a row about held-out images.
    """

    image_root: Path
    captions: Path
    conversations: Path
    held_out: Path
    questions: Path
    rows: dict[str, int]


def write_data(
    out: Path, *, images: int, conversations: int, texts: int, held_out_images: int, held_out_texts: int
) -> Data:
    """Writes the rows and copies the images; the same arguments give the same bytes.

    images: each has a caption; the first `conversations` of them also a conversation.
    """
    vqa = write_dataset(
        out,
        train_images=images,
        test_images=held_out_images,
        held_out_images=held_out_images,
        max_yesno_per_image=1,
    )
    prose = _manual_rows()
    random.Random(0).shuffle(prose)
    training, held_out = prose[:texts], prose[texts : texts + held_out_texts]
    rows = json.loads(vqa.conversations.read_text(encoding="utf-8"))[:conversations]
    missing = {**rows[0], "id": "missing-image", "image": "train/missing.png"}
    counts = {
        "captions": images,
        "conversations": _write(vqa.conversations, [*rows, *training, missing]),
        "held-out": _write(vqa.held_out, [*json.loads(vqa.held_out.read_text(encoding="utf-8")), *held_out]),
    }
    return Data(
        image_root=vqa.image_root,
        captions=vqa.captions,
        conversations=vqa.conversations,
        held_out=vqa.held_out,
        questions=vqa.test,
        rows=counts,
    )


def _manual_rows() -> list[dict[str, Any]]:
    """A question and a paragraph or two of the manual that ships with Python, for each topic with prose."""
    rows = []
    for name in sorted(topics):
        answer = ""
        for paragraph in english(topics[name]).split("\n\n"):
            if len(answer) + len(paragraph) <= LONGEST:
                answer = f"{answer}\n\n{paragraph}".strip()
        if answer:
            question = f"What does the Python manual say about {name.replace('-', ' ')}?"
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            rows.append({"id": f"manual-{name}", "conversations": turns})
    return rows


def _write(file: Path, rows: list[dict[str, Any]]) -> int:
    """Writes the rows in a drawn order and returns how many they are."""
    random.Random(0).shuffle(rows)
    file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return len(rows)
