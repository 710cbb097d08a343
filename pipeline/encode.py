"""One call of a processor, and the places of images and answers in its token ids."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cache_schema.errors import KdcacheError, RowRejected, first_line
from models.tokens import adds_special_tokens
from pipeline.templates import Rendered

Span = tuple[int, int]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The output of a processor for a conversation.

    ids (T,) int32. images: for each image a mask (T,) of the tokens that replaced its mark; marks: the
    template's text there. answers: for each span of the text its token range, empty where no token touches
    it; further: the same for the spans that were asked for. rest: every other model input but the attention
    mask, with a batch dimension of 1.
    """

    ids: NDArray[np.int32]
    images: list[Mask]
    marks: list[str]
    answers: list[Span]
    rest: dict[str, Tensor]
    further: Sequence[Span] = ()


def encode(
    processor: Any, rendered: Rendered, images: Sequence[Image.Image], further: Sequence[Span] = ()
) -> Encoded:
    """Runs a processor on one rendered conversation. RowRejected (`processor`) when it refuses.

    A processor that takes a `suffix` belongs to a prefix language model (PaliGemma), which attends to its
    prompt in both directions: the text from the first answer on becomes the suffix.
    """
    if _takes_suffix(type(processor)):  # type: ignore[arg-type]
        if further:
            raise KdcacheError("private spans are not found in the inputs of a prefix language model")
        return _encode_prefix_model(processor, rendered, images)
    found = _call(processor, images, text=[rendered.text])
    offsets, replacements = found.offsets, found.replacements

    def tokens_of(span: Span) -> Span:
        start, end = span
        gained = sum(
            (r["new_span"][1] - r["new_span"][0]) - (r["span"][1] - r["span"][0])
            for r in replacements
            if r["span"][1] <= start
        )
        return _touching(offsets, (start + gained, end + gained))

    placed = [_inside(offsets, replacement["new_span"]) for replacement in replacements]
    marks = [_cut(rendered.text, replacement["span"]) for replacement in replacements]
    return Encoded(
        ids=found.ids,
        images=placed,
        marks=marks,
        answers=[tokens_of(span) for span in rendered.spans],
        rest=found.rest,
        further=[tokens_of(span) for span in further],
    )


@cache
def _takes_suffix(processor: type) -> bool:
    """By its signature, or in transformers 5.16 by its declared text arguments."""
    if "suffix" in inspect.signature(processor.__call__).parameters:
        return True
    declared = getattr(processor, "valid_processor_kwargs", None)
    text = None if declared is None else get_type_hints(declared).get("text_kwargs")
    return "suffix" in getattr(text, "__annotations__", {})


def _encode_prefix_model(processor: Any, rendered: Rendered, images: Sequence[Image.Image]) -> Encoded:
    """The prompt as prefix, the rest as suffix, to which the processor adds an end token: the last
    answer's own."""
    if not rendered.spans:
        raise RowRejected("no_supervised_tokens", "the template leaves no token of an answer as a label")
    begin = rendered.spans[0][0]
    found = _call(processor, images, text=[rendered.text[:begin]], suffix=[rendered.text[begin:]])
    suffix = found.rest["token_type_ids"][0].numpy() == 1
    # Offsets restart in the suffix; tokens of the prefix are excluded.
    offsets = np.where(suffix[:, None], found.offsets, -1)
    answers = [_touching(offsets, (start - begin, end - begin)) for start, end in rendered.spans]
    answers[-1] = (answers[-1][0], len(found.ids))
    placed = [
        _inside(np.where(suffix[:, None], -1, found.offsets), replacement["new_span"])
        for replacement in found.replacements
    ]
    marks = [_cut(rendered.text, replacement["span"]) for replacement in found.replacements]
    return Encoded(ids=found.ids, images=placed, marks=marks, answers=answers, rest=found.rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    """ids (T,), character offsets (T, 2) of the text after the images' expansion, what was expanded."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    replacements: list[dict[str, Any]]
    rest: dict[str, Tensor]


def _call(processor: Any, images: Sequence[Image.Image], **texts: list[str]) -> _Output:
    try:
        output = dict(
            processor(
                images=[list(images)] if images else None,
                add_special_tokens=adds_special_tokens(processor.tokenizer, texts["text"][0]),
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                images_kwargs={
                    "return_tensors": "pt"
                },  # what is of the text comes as lists, read faster below
                **texts,
            )
        )
    except Exception as error:
        # Whatever it raises on one strange row (a lone surrogate, an image 1 pixel wide) is that row's fault;
        # where every row fails, the build stops before it begins.
        raise RowRejected("processor", f"the processor refuses the row: {first_line(error)}") from error
    replacements = output.pop("text_replacement_offsets", None)  # of no use without images
    offsets = np.asarray(output.pop("offset_mapping")[0], dtype=np.int64).reshape(-1, 2)
    ids = np.asarray(output.pop("input_ids")[0], dtype=np.int32)
    for name in ("attention_mask", "labels"):
        output.pop(name, None)
    rest = {name: torch.as_tensor(np.asarray(value)) for name, value in output.items()}
    return _Output(ids=ids, offsets=offsets, replacements=replacements[0] if images else [], rest=rest)


def _cut(text: str, span: Span) -> str:
    return text[span[0] : span[1]]


def _inside(offsets: NDArray[np.int64], span: Span) -> Mask:
    """Tokens (T,) that are entirely within a character span; those of width 0 are nowhere."""
    inside: Mask = (offsets[:, 0] >= span[0]) & (offsets[:, 1] <= span[1]) & (offsets[:, 0] < offsets[:, 1])
    return inside


def _touching(offsets: NDArray[np.int64], span: Span) -> Span:
    """The range from the first to the last token that overlaps a character span, (0, 0) when none does."""
    touched = np.flatnonzero((offsets[:, 0] < span[1]) & (offsets[:, 1] > span[0]))
    return (int(touched[0]), int(touched[-1]) + 1) if len(touched) else (0, 0)
