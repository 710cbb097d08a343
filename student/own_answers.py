"""A model's own answers as rows of a dataset, for on-policy distillation."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from cache_schema.datasets.conversations import Conversation, text_of
from cache_schema.datasets.image_roots import ImageRoot, open_root
from cache_schema.errors import KdcacheError, RowRejected
from cache_schema.output import require_file, write_text
from cache_schema.progress import Progress, task
from student.answering import Answerer, images_shown, load_for_answers, question_after, rows_to_ask
from student.generation import sample_answers
from student.settings import AnswersConfig

Chat = list[dict[str, Any]]


@dataclass(slots=True)
class _Open:
    """A conversation and what has been said of it: its questions, and the model's own answers."""

    row: Conversation
    said: Chat
    rest: Chat


def write_answers(config: AnswersConfig, progress: Progress) -> dict[str, Any]:
    """Writes the rows of `data` with the model's answers in place of theirs, as `messages`, and returns
    counts.

    Every question is asked after the model's own earlier answers. A conversation ends before a question that
    got an empty answer; a row without any answer is left out and counted. Sampled answers are those of the
    seed, the batch size and the device; greedy ones do not depend on the seed.
    """
    started = time.perf_counter()
    require_file(config.out)
    if config.out.exists():
        raise KdcacheError(f"{config.out} exists; choose another --out or remove it")
    root = open_root(config.image_root, config.files)
    model, processor = load_for_answers(config.model, config.device)
    answerer = Answerer(model, processor, config.max_new_tokens, config.batch_size)
    if config.temperature:
        sample_answers(model, config.temperature, config.top_p)
    chats, skipped = _opened(config, root, progress)
    asked = cut = 0
    torch.manual_seed(config.seed)
    with task(progress, "answering", sum(len(_answers(chat.rest)) for chat in chats)):
        going = chats
        while going:
            questions = [question_after(chat.said, chat.row, processor) for chat in going]
            answers = [""] * len(going)
            for batch in answerer.answer(questions, root):
                for place, text in batch.items():
                    answers[place] = text
                asked += len(batch)
                progress.update(asked)
            cut += answers.count("")
            for chat, answer in zip(going, answers, strict=True):
                _go_on(chat, answer)
            going = [chat for chat in going if chat.rest]
    lines = [_line(chat) for chat in chats if _answers(chat.said)]
    write_text(config.out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return {
        "rows": len(lines),
        "answers": asked - cut,
        "cut_at_empty_answers": cut,
        "without_answers": len(chats) - len(lines),
        "skipped": dict(Counter(error.reason for error in skipped)),
        "out": str(config.out),
        "seconds": round(time.perf_counter() - started, 2),
    }


def _opened(
    config: AnswersConfig, root: ImageRoot, progress: Progress
) -> tuple[list[_Open], list[RowRejected]]:
    """The rows that can be asked, and why the others cannot."""
    chats, skipped = [], []
    for _, found in rows_to_ask(config.data, root, config.limit, config.seed, progress):
        if isinstance(found, RowRejected):
            skipped.append(found)
        else:
            chats.append(_Open(found, [], list(found.messages)))
    if not chats:
        raise KdcacheError(
            f"no row of {config.data} can be asked: {skipped[0] if skipped else 'it is empty'}"
        )
    for chat in chats:
        _to_next_question(chat)
    return chats, skipped


def _go_on(chat: _Open, answer: str) -> None:
    """Adds the answer, and what was said up to the next question; ends the conversation without one."""
    if not answer:
        while chat.said and chat.said[-1]["role"] != "assistant":
            chat.said.pop()
        chat.rest = []
        return
    chat.said.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    chat.rest = chat.rest[1:]
    _to_next_question(chat)


def _to_next_question(chat: _Open) -> None:
    while chat.rest and chat.rest[0]["role"] != "assistant":
        chat.said.append(chat.rest.pop(0))


def _answers(messages: Chat) -> list[str]:
    return [text_of(message) for message in messages if message["role"] == "assistant"]


def _line(chat: _Open) -> dict[str, Any]:
    """A row in the form of `messages`, with the images that are still shown in it."""
    images = chat.row.images[: images_shown(chat.said)]
    return {"id": chat.row.sample_id, "images": list(images), "messages": chat.said}
