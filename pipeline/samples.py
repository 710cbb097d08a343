"""From a dataset row to a teacher's inputs: token ids, supervised spans, images and where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.conversations import Conversation
from cache_schema.errors import KdcacheError, RowRejected
from cache_schema.images import OpenedImage, open_image
from cache_schema.records import ImageRecord
from pipeline.templates import ChatTemplate, Rendered

OverLong = Literal["quarantine", "cut"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSample:
    """A row as the processor made it.

    input_ids (T,) int32 with every image expanded; label_spans (S, 2) int32, half-open and ascending.
    token_inputs: further inputs of shape (T,) (token types). pixel_inputs: everything else the processor
    made (pixels, grids, sizes), with the leading dimensions that the model expects. answers_kept: how
    many of the conversation's answers are in it (fewer when it was cut).
    """

    row: int
    sample_id: str
    input_ids: NDArray[np.int32]
    label_spans: NDArray[np.int32]
    images: tuple[ImageRecord, ...]
    token_inputs: Mapping[str, NDArray[np.generic]]
    pixel_inputs: Mapping[str, Tensor]
    answers_kept: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def pixel_bytes(self) -> int:
        """Bytes that the pixel inputs hold in memory."""
        return sum(value.nbytes for value in self.pixel_inputs.values())


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
        image_root: Path,
        max_length: int,
        over_long: OverLong = "quarantine",
    ) -> None:
        if not processor.tokenizer.is_fast:
            raise KdcacheError(
                "the teacher's tokenizer is a slow one, which cannot tell where a token stands in the text; "
                "save the teacher with a fast tokenizer (tokenizer.json)"
            )
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._template = template
        self._image_token_id = image_token_id
        self._image_root = image_root
        self._max_length = max_length
        self._over_long = over_long

    def prepare(self, conversation: Conversation) -> PreparedSample:
        """The sample of a conversation. RowRejected with its reason when it cannot be captured.

        A sample over max_length is rejected, or under `cut` ends with the last answer that fits.
        """
        images = [open_image(self._image_root, path) for path in conversation.images]
        sample = self._prepare(conversation, images)
        if len(sample) <= self._max_length:
            return sample
        answers = int(np.searchsorted(sample.label_spans[:, 1], self._max_length, side="right"))
        while self._over_long == "cut" and answers > 0:
            shorter = first_answers(conversation, answers)
            cut = self._prepare(shorter, images[: len(shorter.images)])
            if len(cut) <= self._max_length:
                return cut
            answers -= 1
        raise RowRejected("over_long", f"{len(sample)} tokens with its images, more than {self._max_length}")

    def _prepare(self, conversation: Conversation, images: list[OpenedImage]) -> PreparedSample:
        rendered = self._template.render(conversation.messages)
        encoded, ids, offsets, replacements = self._encode(rendered.text, images)
        positions = self._image_positions(ids, offsets, replacements, len(images))
        spans = self._label_spans(conversation, rendered, ids, offsets, replacements)
        if len(spans) == 0:
            raise RowRejected(
                "no_supervised_tokens", "the template leaves no token of an answer to learn from"
            )
        token_inputs = {}
        pixel_inputs = {}
        for name, value in encoded.items():
            if value.shape == (1, len(ids)):
                token_inputs[name] = value[0].numpy()
            else:
                pixel_inputs[name] = value
        return PreparedSample(
            row=conversation.row,
            sample_id=conversation.sample_id,
            input_ids=ids,
            label_spans=spans,
            images=tuple(
                ImageRecord(
                    path=path,
                    sha256=image.sha256,
                    width=image.width,
                    height=image.height,
                    positions=place,
                )
                for path, image, place in zip(conversation.images, images, positions, strict=True)
            ),
            token_inputs=token_inputs,
            pixel_inputs=pixel_inputs,
            answers_kept=len(conversation.answers),
        )

    def _encode(
        self, text: str, images: list[OpenedImage]
    ) -> tuple[dict[str, Tensor], NDArray[np.int32], NDArray[np.int64], list[dict[str, Any]]]:
        """Remaining model inputs, ids (T,), character offsets (T, 2) in the expanded text, replacements."""
        bos = self._tokenizer.bos_token
        try:
            encoded = self._processor(
                text=[text],
                images=[[image.image for image in images]] if images else None,
                add_special_tokens=not (bos is not None and text.startswith(bos)),
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                return_tensors="pt",
            )
        except (ValueError, IndexError) as error:
            raise RowRejected("processor", f"the processor refuses the row: {error}") from error
        encoded = dict(encoded)
        replacements = encoded.pop("text_replacement_offsets", [])
        offsets = encoded.pop("offset_mapping")[0].numpy()
        ids = encoded.pop("input_ids")[0].numpy().astype(np.int32)
        encoded.pop("attention_mask")
        return encoded, ids, offsets, replacements[0] if replacements else []

    def _image_positions(
        self,
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64],
        replacements: list[dict[str, Any]],
        images: int,
    ) -> list[NDArray[np.int32]]:
        """Placeholder positions of every image, by what the processor put in each image's place."""
        placeholder = ids == self._image_token_id
        positions = []
        for replacement in replacements:
            start, end = replacement["new_span"]
            inside = (offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 0] < offsets[:, 1])
            positions.append(np.flatnonzero(inside & placeholder).astype(np.int32))
        counts = [len(place) for place in positions]
        if len(counts) != images or 0 in counts or sum(counts) != int(placeholder.sum()):
            raise RowRejected(
                "image_tokens",
                f"{images} images, but the processor placed {counts} tokens for them and the ids hold "
                f"{int(placeholder.sum())} image tokens",
            )
        return positions

    def _label_spans(
        self,
        conversation: Conversation,
        rendered: Rendered,
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64],
        replacements: list[dict[str, Any]],
    ) -> NDArray[np.int32]:
        """Token ranges (S, 2) of the answers, each checked to decode to what the template wrote."""
        spans = []
        written = []
        for start, end in rendered.spans:
            gained = sum(
                r["new_span"][1] - r["new_span"][0] - (r["span"][1] - r["span"][0])
                for r in replacements
                if r["span"][1] <= start
            )
            touched = np.flatnonzero((offsets[:, 0] < end + gained) & (offsets[:, 1] > start + gained))
            if len(touched) == 0:
                continue
            first, last = int(touched[0]), int(touched[-1]) + 1
            expected = rendered.text[start:end]
            decoded = self._tokenizer.decode(ids[first:last], clean_up_tokenization_spaces=False)
            if not _same_text(decoded, expected):
                again = self._tokenizer(expected, add_special_tokens=False)["input_ids"]
                if not _same_text(decoded, self._tokenizer.decode(again, clean_up_tokenization_spaces=False)):
                    raise RowRejected(
                        "span_mismatch",
                        f"supervised tokens decode to {decoded[:60]!r}, the template wrote {expected[:60]!r}",
                    )
            spans.append((first, last))
            written.append(expected)
        missing = _first_missing(conversation.answers, written)
        if missing is not None:
            raise RowRejected("span_mismatch", f"the answer {missing[:60]!r} is not in the supervised text")
        return np.array(spans, dtype=np.int32).reshape(-1, 2)


def first_answers(conversation: Conversation, answers: int) -> Conversation:
    """The conversation up to its `answers`-th answer (from 1), with the images that stand before it."""
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
    )


def _same_text(left: str, right: str) -> bool:
    """Equal but for blanks, which tokenizers add and drop at the edges."""
    return "".join(left.split()) == "".join(right.split())


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
