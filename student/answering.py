"""Greedy answers of a model to questions, in batches."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaProcessor

from cache_schema.datasets.conversations import Conversation
from cache_schema.datasets.image_roots import ImageRoot, open_root, require_root, unpack_embedded
from cache_schema.datasets.images import open_image
from cache_schema.datasets.rows import open_dataset
from cache_schema.errors import KdcacheError, RowRejected
from cache_schema.progress import Progress
from models.device import choose_device
from models.folder import load_model, load_processor
from models.tokens import adds_special_tokens
from student.generation import decode_greedily

_AHEAD = 64
"""Rows whose images are asked of the root before they are needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question as a prompt: its row, images by path, the text that the chat template makes."""

    row: int
    images: tuple[str, ...]
    prompt: str


def rows_to_ask(
    data: Path, root: ImageRoot, limit: int | None, seed: int, progress: Progress
) -> Iterator[tuple[int, Conversation | RowRejected]]:
    """The rows of a dataset by their number, or why one cannot be asked: what is wrong with it or its images.
    limit: only so many, drawn by the seed. Of a pair the chosen answer alone. An image of several rows is
    opened once; those of the next rows are fetched meanwhile. KdcacheError when the image root does not
    exist."""
    dataset = open_dataset(data, progress)
    if dataset.first_images.any():
        require_root(root)
    rows = list(range(0, len(dataset), 1 + dataset.pairs))
    if limit is not None and limit < len(rows):
        drawn = np.random.default_rng(seed).permutation(len(rows))[:limit]
        rows = [rows[place] for place in sorted(drawn)]
    readable: dict[str, RowRejected | None] = {}
    for row, conversation in _fetched_ahead(rows, dataset, root):
        try:
            if isinstance(conversation, RowRejected):
                raise conversation
            unpack_embedded(root, conversation.embedded)
            for path in conversation.images:
                if path not in readable:
                    readable[path] = _fault(root, path)
                if (fault := readable[path]) is not None:
                    raise fault
        except RowRejected as error:
            yield row, error
        else:
            yield row, conversation


def _fetched_ahead(
    rows: Sequence[int], dataset: Any, root: ImageRoot
) -> Iterator[tuple[int, Conversation | RowRejected]]:
    """The rows in order, the images of the next `_AHEAD` asked of the root already."""
    coming: deque[tuple[int, Conversation | RowRejected]] = deque()
    asked: set[str] = set()
    for row in rows:
        found: Conversation | RowRejected
        try:
            found = conversation = dataset[row]
        except RowRejected as error:
            found = error
        else:
            own = conversation.embedded
            fresh = [path for path in conversation.images if path not in asked and path not in own]
            root.prefetch((path, None) for path in fresh)
            asked.update(fresh)
        coming.append((row, found))
        if len(coming) > _AHEAD:
            yield coming.popleft()
    yield from coming


def _fault(root: ImageRoot, path: str) -> RowRejected | None:
    try:
        open_image(root, path)
    except RowRejected as error:
        return error
    return None


def question_after(messages: list[dict[str, Any]], conversation: Conversation, processor: Any) -> Question:
    """The question that `messages`, the beginning of a conversation or of what was said instead, end with."""
    return Question(
        row=conversation.row,
        images=conversation.images[: images_shown(messages)],
        prompt=processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
    )


def images_shown(messages: Sequence[Mapping[str, Any]]) -> int:
    """The image parts of messages."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def load_for_answers(folder: Path, device: str) -> tuple[Any, Any]:
    """(model, processor) of a folder on a device. KdcacheError where there is no chat template."""
    chosen = torch.device(choose_device(device))
    processor = load_processor(folder)
    # On a CPU float32 is fastest, whatever dtype the weights are saved in.
    model = load_model(folder, torch.float32 if chosen.type == "cpu" else "auto").to(chosen).eval()
    if processor.chat_template is None:
        raise KdcacheError(f"{folder} has no chat template; see `new-student --like`")
    return model, processor


class Answerer:
    """Greedy answers in batches; a prompt's prefix, up to its last image, is computed once for all questions
    of a batch that share it."""

    def __init__(self, model: Any, processor: Any, max_new_tokens: int, batch_size: int) -> None:
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.tokenizer = processor.tokenizer
        self.tokenizer.padding_side = "left"
        self.set_aside = decode_greedily(model, processor, max_new_tokens)
        # Other families compute positions from grids, which a cached prefix would split.
        self.shares = isinstance(processor, LlavaProcessor)

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], image_root: ImageRoot) -> Iterator[dict[int, str]]:
        """The answers in batches, each by its place among the questions, those of similar length together."""
        self.image_root = open_root(image_root)
        longest: dict[tuple[str, ...], int] = {}
        for question in questions:
            longest[question.images] = max(longest.get(question.images, 0), len(question.prompt))
        order = sorted(
            range(len(questions)),
            key=lambda i: (
                len(questions[i].images),
                longest[questions[i].images],
                questions[i].images,
                len(questions[i].prompt),
                i,
            ),
        )
        start = 0
        while start < len(order):
            batch = order[start : start + self.batch_size]
            if not questions[batch[0]].images:  # those without an image come first, in batches of their own
                batch = [i for i in batch if not questions[i].images]
            yield dict(zip(batch, self._batch([questions[i] for i in batch]), strict=True))
            start += len(batch)

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
        self.image_root.prefetch((path, None) for path in paths)
        return [open_image(self.image_root, path).image for path in paths]
