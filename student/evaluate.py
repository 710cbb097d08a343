"""Evaluation: free greedy answers to a file of questions, and the distance to the teacher on a cache."""

from __future__ import annotations

import inspect
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaProcessor

from cache_schema.datasets.conversations import Conversation
from cache_schema.datasets.images import open_image, unpack_embedded
from cache_schema.datasets.rows import open_dataset
from cache_schema.errors import KdcacheError, RowRejected
from cache_schema.format.cache import open_cache
from cache_schema.output import require_file, write_text
from cache_schema.progress import Progress, task
from models.device import choose_device
from models.folder import load_model, load_processor
from models.tokens import adds_special_tokens
from student.answers import Answered, references_of, score
from student.generation import decode_greedily
from student.heldout import held_out, measure_cache
from student.losses import LossWeights
from student.model import DistilledStudent
from student.settings import EvaluateConfig

_SHOWN = 20
"""Rows that were not asked, of which the result gives the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question as a prompt: row, images by path, the text that the chat template makes, references."""

    row: int
    kind: str
    images: tuple[str, ...]
    prompt: str
    references: tuple[str, ...]


def evaluate(config: EvaluateConfig, progress: Progress) -> dict[str, Any]:
    """Scores (`student.answers.score`), rows that could not be used (`skipped`), seconds; `teacher`: the
    means of `measure_cache` when a cache is given. The same on every run with the same device and batch."""
    started = time.perf_counter()
    if config.predictions is not None:
        require_file(config.predictions)
    device = torch.device(choose_device(config.device))
    processor = load_processor(config.model)
    # On a CPU float32 is fastest, whatever dtype the weights are saved in.
    model = load_model(config.model, torch.float32 if device.type == "cpu" else "auto").to(device).eval()
    if processor.chat_template is None:
        raise KdcacheError(f"{config.model} has no chat template; see `new-student --like`")
    questions, skipped = _questions(config, processor, progress)
    if not questions:
        raise KdcacheError(f"no row of {config.data} can be used: {_summary(skipped)}")
    answerer = _Answerer(model, processor, config)
    if answerer.set_aside:
        progress.message(
            f"answers are greedy, without {', '.join(answerer.set_aside)} of the model's generation config"
        )
    answers = answerer.answer(questions, progress)
    answered = [
        Answered(kind=question.kind, references=question.references, prediction=answer)
        for question, answer in zip(questions, answers, strict=True)
    ]
    if config.predictions is not None:
        _write_predictions(config.predictions, questions, answers)
    result = {**score(answered), "skipped": dict(Counter(error.reason for _, error in skipped))}
    result["skipped_rows"] = [{"row": row, "reason": str(error)} for row, error in skipped[:_SHOWN]]
    result["model"] = str(config.model)
    if answerer.set_aside:
        result["set_aside"] = answerer.set_aside
    if config.cache is not None:
        result["teacher"] = _distance(config, config.cache, model, processor, device, progress)
    result["seconds"] = round(time.perf_counter() - started, 2)
    if skipped:
        progress.message(f"{len(skipped)} rows were not asked: {_summary(skipped)}")
    return result


def _summary(skipped: Sequence[tuple[int, RowRejected]]) -> str:
    counts = Counter(error.reason for _, error in skipped)
    row, first = skipped[0] if skipped else (0, "there is none")
    return f"{', '.join(f'{reason} {count}' for reason, count in counts.items())}; first, row {row}: {first}"


def _questions(
    config: EvaluateConfig, processor: Any, progress: Progress
) -> tuple[list[Question], list[tuple[int, RowRejected]]]:
    """The questions, and the rows that give none with the reason of each."""
    dataset = open_dataset(config.data, progress)
    rows = list(range(len(dataset)))
    if config.limit is not None and config.limit < len(dataset):
        rows = sorted(np.random.default_rng(config.seed).permutation(len(dataset))[: config.limit].tolist())
    questions: list[Question] = []
    skipped: list[tuple[int, RowRejected]] = []
    readable: dict[str, RowRejected | None] = {}
    for row in rows:
        try:
            conversation = dataset[row]
            unpack_embedded(config.image_root, conversation.embedded)
            for path in conversation.images:
                if path not in readable:
                    readable[path] = _fault(config.image_root, path)
                if (fault := readable[path]) is not None:
                    raise fault
            questions += _asked(conversation, processor)
        except RowRejected as error:
            skipped.append((row, error))
    return questions, skipped


def _fault(root: Path, path: str) -> RowRejected | None:
    try:
        open_image(root, path)
    except RowRejected as error:
        return error
    return None


def _asked(conversation: Conversation, processor: Any) -> Iterator[Question]:
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
        shown = sum(part["type"] == "image" for message in messages[:place] for part in message["content"])
        yield Question(
            row=conversation.row,
            kind=str(kinds[number]),
            images=conversation.images[:shown],
            prompt=processor.apply_chat_template(
                messages[:place], add_generation_prompt=True, tokenize=False
            ),
            references=references[number],
        )


class _Answerer:
    """Greedy answers in batches; a prompt's prefix, up to its last image, is computed once for all questions
    of a batch that share it."""

    def __init__(self, model: Any, processor: Any, config: EvaluateConfig) -> None:
        self.model, self.processor, self.config = model, processor, config
        self.tokenizer = processor.tokenizer
        self.tokenizer.padding_side = "left"
        self.set_aside = decode_greedily(model, processor, config.max_new_tokens)
        # Other families compute positions from grids, which a cached prefix would split.
        self.shares = isinstance(processor, LlavaProcessor)

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], progress: Progress) -> list[str]:
        """One answer per question, in order."""
        answers = [""] * len(questions)
        order = sorted(
            range(len(questions)), key=lambda i: (questions[i].images, len(questions[i].prompt), i)
        )
        with task(progress, "answering", len(questions)):
            start = 0
            while start < len(order):
                batch = order[start : start + self.config.batch_size]
                pictured = [i for i in batch if questions[i].images]
                if len(pictured) < len(batch):  # those without an image come first, in batches of their own
                    batch = [i for i in batch if not questions[i].images]
                for i, text in zip(batch, self._batch([questions[i] for i in batch]), strict=True):
                    answers[i] = text
                start += len(batch)
                progress.update(start)
        return answers

    def _batch(self, questions: list[Question]) -> list[str]:
        with_images = bool(questions[0].images)
        inputs = self._shared_inputs(questions) if self.shares and with_images else self._inputs(questions)
        written = self.model.generate(**inputs)
        answers = written[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def _inputs(self, questions: list[Question]) -> dict[str, Any]:
        """The processor's inputs of whole prompts."""
        made = self.processor(
            text=[question.prompt for question in questions],
            images=[self._images(question.images) for question in questions] if questions[0].images else None,
            add_special_tokens=adds_special_tokens(self.tokenizer, questions[0].prompt),
            padding=True,
            return_tensors="pt",
        )
        return dict(made.to(self.model.device, self.model.dtype))

    def _shared_inputs(self, questions: list[Question]) -> dict[str, Any]:
        """Whole prompts, and the key-value cache of their prefixes."""
        paths = sorted({path for question in questions for path in question.images})
        pixels = self.processor.image_processor(images=self._images(paths), return_tensors="pt")[
            "pixel_values"
        ]
        pixels = pixels.to(self.model.device, self.model.dtype)
        beginnings: dict[tuple[tuple[int, ...], tuple[str, ...]], int] = {}
        endings, groups = [], []
        for question, ids in zip(questions, self._token_ids(questions, pixels), strict=True):
            image_token = self.processor.image_token_id
            cut = len(ids) - ids[::-1].index(image_token)
            if cut == len(ids):  # nothing left: generate needs at least one token
                return self._inputs(questions)
            groups.append(beginnings.setdefault((tuple(ids[:cut]), question.images), len(beginnings)))
            endings.append(ids[cut:])
        first = self._padded([list(ids) for ids, _ in beginnings])
        shown = [paths.index(path) for _, images in beginnings for path in images]
        # the name of the key-value cache from transformers 5.24 on, and before
        takes_cache = "cache" in inspect.signature(type(self.model).forward).parameters
        name = "cache" if takes_cache else "past_key_values"
        past = self.model(**first, pixel_values=pixels[shown], use_cache=True, logits_to_keep=1)[name]
        chosen = torch.tensor(groups, device=self.model.device)
        past.batch_select_indices(chosen)
        rest = self._padded(endings)
        joined = {key: torch.cat([first[key][chosen], rest[key]], dim=1) for key in first}
        return {**joined, name: past}

    def _token_ids(self, questions: list[Question], pixels: torch.Tensor) -> list[list[int]]:
        """The token ids of each prompt with its images expanded."""
        token = self.processor.image_token
        expanded = self.processor.replace_image_token({"pixel_values": pixels}, 0)
        texts = [question.prompt.replace(token, expanded) for question in questions]
        special = adds_special_tokens(self.tokenizer, texts[0])
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=special)["input_ids"]
        for question in questions:
            if question.prompt.count(token) != len(question.images):
                raise KdcacheError(
                    f"row {question.row} has {len(question.images)} images, its prompt "
                    f"{question.prompt.count(token)} image tokens; check the row and the chat template"
                )
        return ids

    def _padded(self, ids: list[list[int]]) -> dict[str, torch.Tensor]:
        made = self.tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt")
        return {name: made[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def _images(self, paths: Sequence[str]) -> list[Any]:
        return [open_image(self.config.image_root, path).image for path in paths]


def _distance(
    config: EvaluateConfig, url: str, model: Any, processor: Any, device: torch.device, progress: Progress
) -> dict[str, float]:
    """The distance of the model to the cache's teacher."""
    cache = open_cache(url)
    measured = held_out(cache, model, processor, config.image_root, adopt_template=True)
    training = cache.manifest.fingerprint.training
    student = DistilledStudent(model, LossWeights(), vocab_size=training["vocab_size"]).eval()
    probe = processor.tokenizer.encode("What is in the image?")
    student.check_head(torch.tensor([probe], device=device))
    return measure_cache(
        student,
        cache,
        measured.collator,
        device=device,
        micro_batch=8,
        samples=config.limit,
        progress=progress,
    )


def _write_predictions(path: Path, questions: Sequence[Question], answers: Sequence[str]) -> None:
    lines = []
    for question, answer in zip(questions, answers, strict=True):
        line = {"row": question.row, "kind": question.kind, "references": list(question.references)}
        lines.append(json.dumps({**line, "prediction": answer}, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
