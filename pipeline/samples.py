"""From a dataset row to a teacher's inputs: token ids, supervised spans, images and their positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.datasets.conversations import Conversation
from cache_schema.datasets.image_roots import ImageRoot, open_root, unpack_embedded
from cache_schema.datasets.images import OpenedImage, open_image
from cache_schema.errors import KdcacheError, RowRejected
from cache_schema.format.records import ImageRecord, labels_of, positions_by_kind
from cache_schema.format.spec import Kind
from models.pixels import table_of
from pipeline.encode import Encoded, encode
from pipeline.image_runs import with_short_runs
from pipeline.private_spans import PrivateSpans, Veil
from pipeline.settings import OverLong
from pipeline.templates import ChatTemplate, Rendered


@dataclass(frozen=True, slots=True, kw_only=True)
class Expansion:
    """The tokens start..end (half-open) that took the place of an image's `mark` in the template's text."""

    start: int
    end: int
    mark: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSample:
    """A row as prepared by the processor.

    input_ids (T,) int32 with every image expanded; label_spans (S, 2) int32, half-open and ascending.
    token_inputs: further inputs of shape (T,) (token types). pixel_inputs: everything else the processor
    made (pixels, grids, sizes), with the leading dimensions that the model expects. pixel_table: (C, 256),
    the values of pixel_values that are bytes, for `models.pixels.look_up`; None where they are values.
    answers_kept: how many of the conversation's answers are in it; answers_cut: how many were removed from
    its end. expansions: one per image. veil: over its private tokens. seconds: time spent on reading and
    preparing it.
    """

    row: int
    sample_id: str
    input_ids: NDArray[np.int32]
    label_spans: NDArray[np.int32]
    images: tuple[ImageRecord, ...]
    token_inputs: Mapping[str, NDArray[np.generic]]
    pixel_inputs: Mapping[str, Tensor]
    answers_kept: int
    answers_cut: int = 0
    expansions: tuple[Expansion, ...] = ()
    veil: Veil | None = None
    pixel_table: Tensor | None = None
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def positions(self) -> dict[Kind, NDArray[np.int32]]:
        """Its positions by kind."""
        labels = labels_of(self.input_ids, self.label_spans)
        return positions_by_kind(labels, (image.positions for image in self.images))

    @property
    def pixel_bytes(self) -> int:
        """Bytes that the pixel inputs are, or become by their table: the same on every engine."""
        sizes = {name: value.nbytes for name, value in self.pixel_inputs.items()}
        if self.pixel_table is not None and "pixel_values" in sizes:
            sizes["pixel_values"] *= self.pixel_table.itemsize
        return sum(sizes.values())


class SamplePreparer:
    """Renders, tokenises and checks conversations for one teacher.

    processor: a transformers processor with a fast tokenizer. image_token_id: the id that the model
    replaces by an image's features. max_length: tokens after image expansion.
    """

    def __init__(
        self,
        processor: Any,
        template: ChatTemplate,
        *,
        image_token_id: int,
        image_root: ImageRoot | Path | str,
        max_length: int,
        embed_images: bool = False,
        over_long: OverLong = "quarantine",
        private: PrivateSpans | None = None,
    ) -> None:
        if not processor.tokenizer.is_fast:
            raise KdcacheError(
                "the teacher's tokenizer is a slow one, which gives no character offsets; "
                "save the teacher with a fast tokenizer (tokenizer.json)"
            )
        self._tokenizer = processor.tokenizer
        self._tokenizer.model_max_length = 1 << 60  # max_length decides; the tokenizer's own only warns
        self._processor = with_short_runs(processor, image_token_id)
        self._template = template
        self._image_token_id = image_token_id
        self._image_root = open_root(image_root)
        self._max_length = max_length
        self._embed_images = embed_images
        self._over_long = over_long
        self._private = private

    def prepare(self, conversation: Conversation) -> PreparedSample:
        """The sample of a conversation. RowRejected with its reason when it cannot be captured.

        A sample over max_length is rejected, or under `cut` ends with the last answer that fits.
        """
        unpack_embedded(self._image_root, conversation.embedded)
        images = [open_image(self._image_root, path) for path in conversation.images]
        sample = self._prepare(conversation, images)
        if len(sample) <= self._max_length:
            return sample
        answers = int(np.searchsorted(sample.label_spans[:, 1], self._max_length, side="right"))
        while self._over_long == "cut" and answers > 0:
            shorter = first_answers(conversation, answers)
            cut = self._prepare(shorter, images[: len(shorter.images)])
            if len(cut) <= self._max_length:
                return replace(cut, answers_cut=len(conversation.answers) - answers)
            answers -= 1
        raise RowRejected("over_long", f"{len(sample)} tokens with its images, more than {self._max_length}")

    def _prepare(self, conversation: Conversation, images: list[OpenedImage]) -> PreparedSample:
        rendered = self._template.render(conversation.messages, conversation.supervised)
        private = [] if self._private is None else self._private.found(conversation, rendered.text)
        encoded = encode(self._processor, rendered, [image.image for image in images], private)
        positions = self._image_positions(encoded, len(images))
        spans = self._label_spans(conversation, rendered, encoded)
        length = len(encoded.ids)
        by_token = {name: value for name, value in encoded.rest.items() if value.shape == (1, length)}
        pixels = encoded.rest.get("pixel_values")
        return PreparedSample(
            row=conversation.row,
            sample_id=conversation.sample_id,
            input_ids=encoded.ids,
            label_spans=spans,
            images=tuple(
                ImageRecord(
                    path=image.path,
                    sha256=image.sha256,
                    width=image.width,
                    height=image.height,
                    positions=place,
                    content=image.content if self._embed_images else None,
                )
                for image, place in zip(images, positions, strict=True)
            ),
            token_inputs={name: value[0].numpy() for name, value in by_token.items()},
            pixel_inputs={name: value for name, value in encoded.rest.items() if name not in by_token},
            answers_kept=len(conversation.answers),
            pixel_table=None
            if pixels is not None and pixels.is_floating_point()
            else table_of(self._processor),
            expansions=_expansions(encoded),
            veil=None
            if self._private is None
            else Veil.of(self._private, conversation.row, encoded.ids, encoded.further),
        )

    def _image_positions(self, encoded: Encoded, images: int) -> list[NDArray[np.int32]]:
        """Placeholder positions of every image, by what the processor put in each image's place."""
        placeholder = encoded.ids == self._image_token_id
        positions = [np.flatnonzero(mask & placeholder).astype(np.int32) for mask in encoded.images]
        counts = [len(place) for place in positions]
        if len(counts) != images or 0 in counts or sum(counts) != int(placeholder.sum()):
            raise RowRejected(
                "image_tokens",
                f"{images} images, but the processor placed {counts} tokens for them and the ids hold "
                f"{int(placeholder.sum())} image tokens",
            )
        return positions

    def _label_spans(
        self, conversation: Conversation, rendered: Rendered, encoded: Encoded
    ) -> NDArray[np.int32]:
        """Token ranges (S, 2) of the answers, each checked to decode to what the template wrote."""
        spans, written = [], []
        for (start, end), (first, last) in zip(rendered.spans, encoded.answers, strict=True):
            if first == last:
                continue
            expected = rendered.text[start:end]
            self._check_span(self._decode(encoded.ids[first:last]), expected)
            spans.append((first, last))
            written.append(expected)
        learned = conversation.supervised or (True,) * len(conversation.answers)
        wanted = [answer for answer, learn in zip(conversation.answers, learned, strict=True) if learn]
        missing = _first_missing(wanted, written)
        if missing is not None:
            raise RowRejected("span_mismatch", f"the answer {missing[:60]!r} is not in the supervised text")
        found = np.array(spans, dtype=np.int32).reshape(-1, 2)
        if not (found[:, 1] > 1).any():  # nothing before the very first token predicts it
            raise RowRejected("no_supervised_tokens", "the template leaves no token of an answer as a label")
        return found

    def _check_span(self, decoded: str, expected: str) -> None:
        """RowRejected unless both are the same text, up to what the tokenizer cannot represent."""
        if self._bare(decoded) == self._bare(expected):
            return
        ids = self._tokenizer(expected, add_special_tokens=False)["input_ids"]
        if self._bare(decoded) != self._bare(self._decode(ids)):
            raise RowRejected(
                "span_mismatch",
                f"supervised tokens decode to {decoded[:60]!r}, the template wrote {expected[:60]!r}",
            )

    def _decode(self, ids: Any) -> str:
        text: str = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def _bare(self, text: str) -> str:
        """Without whitespace, which tokenizers add and drop, and the end token, which some processors add."""
        return "".join(text.split()).removesuffix(self._tokenizer.eos_token or "\0")


def _expansions(encoded: Encoded) -> tuple[Expansion, ...]:
    found = []
    for mask, mark in zip(encoded.images, encoded.marks, strict=True):
        places = np.flatnonzero(mask)
        found.append(Expansion(start=int(places[0]), end=int(places[-1]) + 1, mark=mark))
    return tuple(found)


def first_answers(conversation: Conversation, answers: int) -> Conversation:
    """The conversation up to its `answers`-th answer (from 1), with the images before it."""
    seen = 0
    end = len(conversation.messages)
    for index, message in enumerate(conversation.messages):
        seen += message["role"] == "assistant"
        if seen == answers:
            end = index + 1
            break
    messages = conversation.messages[:end]
    images = sum(part["type"] == "image" for message in messages for part in message["content"])
    return Conversation(
        row=conversation.row,
        sample_id=conversation.sample_id,
        messages=messages,
        images=conversation.images[:images],
        extra=conversation.extra,
        supervised=conversation.supervised[:answers],
    )


def _first_missing(answers: list[str], written: list[str]) -> str | None:
    """The first answer that does not appear in the written spans, in order; None when all do."""
    text = "\0".join("".join(span.split()) for span in written)
    at = 0
    for answer in answers:
        wanted = "".join(answer.split())
        found = text.find(wanted, at)
        if found < 0:
            return answer
        at = found + len(wanted)
    return None
