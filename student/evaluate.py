"""Evaluation: free greedy answers to a file of questions, and the distance to the teacher on a cache."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cache_schema.datasets.conversations import Conversation
from cache_schema.datasets.image_roots import ImageRoot, open_root
from cache_schema.errors import KdcacheError, RowRejected
from cache_schema.format.cache import open_cache
from cache_schema.output import require_file, write_text
from cache_schema.progress import Progress, task
from student.answering import Answerer, Question, load_for_answers, question_after, rows_to_ask
from student.answers import Answered, references_of, score
from student.benchmarks.run import evaluate_benchmarks
from student.heldout import held_out, measure_samples
from student.losses import LossWeights
from student.model import DistilledStudent
from student.settings import LONGEST_ANSWER, EvaluateConfig

_SHOWN = 20
"""Rows that were not asked, of which the result gives the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """A question with its kind and its references."""

    question: Question
    kind: str
    references: tuple[str, ...]


def evaluate(config: EvaluateConfig, progress: Progress) -> dict[str, Any]:
    """With benchmarks: `evaluate_benchmarks`. Else scores (`student.answers.score`), rows that could not be
    used (`skipped`), seconds; `teacher`: the means of `measure_samples` when a cache is given. The same on
    every run with the same device and batch."""
    if config.benchmarks:
        return evaluate_benchmarks(config, progress)
    started = time.perf_counter()
    assert config.image_root is not None
    if config.predictions is not None:
        require_file(config.predictions)
    root = open_root(config.image_root, config.files)
    model, processor = load_for_answers(config.model, config.device)
    asked, skipped = _questions(config, root, processor, progress)
    if not asked:
        raise KdcacheError(f"no row of {config.data} can be used: {_summary(skipped)}")
    answerer = Answerer(model, processor, config.max_new_tokens or LONGEST_ANSWER, config.batch_size)
    if answerer.set_aside:
        progress.message(
            f"answers are greedy, without {', '.join(answerer.set_aside)} of the model's generation config"
        )
    answers = [""] * len(asked)
    done = 0
    with task(progress, "answering", len(asked)):
        for batch in answerer.answer([each.question for each in asked], root):
            for place, text in batch.items():
                answers[place] = text
            done += len(batch)
            progress.update(done)
    answered = [
        Answered(kind=each.kind, references=each.references, prediction=answer)
        for each, answer in zip(asked, answers, strict=True)
    ]
    if config.predictions is not None:
        _write_predictions(config.predictions, asked, answers)
    result = {**score(answered), "skipped": dict(Counter(error.reason for _, error in skipped))}
    result["skipped_rows"] = [{"row": row, "reason": str(error)} for row, error in skipped[:_SHOWN]]
    result["model"] = str(config.model)
    if answerer.set_aside:
        result["set_aside"] = answerer.set_aside
    if config.cache is not None:
        result["teacher"] = _distance(config, config.cache, root, model, processor, progress)
    result["seconds"] = round(time.perf_counter() - started, 2)
    if skipped:
        progress.message(f"{len(skipped)} rows were not asked: {_summary(skipped)}")
    return result


def _summary(skipped: Sequence[tuple[int, RowRejected]]) -> str:
    counts = Counter(error.reason for _, error in skipped)
    row, first = skipped[0] if skipped else (0, "there is none")
    return f"{', '.join(f'{reason} {count}' for reason, count in counts.items())}; first, row {row}: {first}"


def _questions(
    config: EvaluateConfig, root: ImageRoot, processor: Any, progress: Progress
) -> tuple[list[Rated], list[tuple[int, RowRejected]]]:
    """The questions, and the rows that give none with the reason of each."""
    questions: list[Rated] = []
    skipped: list[tuple[int, RowRejected]] = []
    for row, found in rows_to_ask(config.data, root, config.limit, config.seed, progress):
        try:
            if isinstance(found, RowRejected):
                raise found
            questions += _asked(found, processor)
        except RowRejected as error:
            skipped.append((row, error))
    return questions, skipped


def _asked(conversation: Conversation, processor: Any) -> Iterator[Rated]:
    messages, answers = conversation.messages, conversation.answers
    kinds = conversation.extra.get("kind", "all")
    references: list[tuple[str, ...]] = [(answer,) for answer in answers]
    if "answers" in conversation.extra:
        references = references_of(conversation.extra["answers"], len(answers))
    kinds = [str(kinds)] * len(answers) if not isinstance(kinds, list) else kinds
    if len(kinds) != len(answers):
        raise RowRejected("annotations", f"{len(kinds)} kinds for {len(answers)} answers")
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    for number, place in enumerate(places):
        question = question_after(messages[:place], conversation, processor)
        yield Rated(question=question, kind=str(kinds[number]), references=references[number])


def _distance(
    config: EvaluateConfig, url: str, root: ImageRoot, model: Any, processor: Any, progress: Progress
) -> dict[str, float]:
    """The distance of the model to the cache's teacher."""
    cache = open_cache(url, files=config.files)
    measured = held_out(cache, model, processor, root, adopt_template=True)
    training = cache.manifest.fingerprint.training
    student = DistilledStudent(model, LossWeights(), vocab_size=training["vocab_size"]).eval()
    probe = processor.tokenizer.encode("What is in the image?")
    student.check_head(torch.tensor([probe], device=model.device))
    among = measured.samples(config.limit)
    return measure_samples(student, *among, measured.collator, device=model.device, progress=progress)


def _write_predictions(path: Path, asked: Sequence[Rated], answers: Sequence[str]) -> None:
    lines = []
    for each, answer in zip(asked, answers, strict=True):
        line = {"row": each.question.row, "kind": each.kind, "references": list(each.references)}
        lines.append(json.dumps({**line, "prediction": answer}, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
