"""Captions, turns and packed questions as token ids and labels, as the teacher's training reads them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from demo.language_model import IGNORE, padded
from demo.tokenizer import END, IMAGE
from demo.vision_tower import VISUAL_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sequence (T,). Part 0 is seen by everything after it, a later part only by itself."""

    ids: list[int]
    labels: list[int]
    parts: list[int]
    positions: list[int]


def attention_of(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Mask (B, 1, T, T), true where attention may go, and position ids (B, T) of right-padded rows."""
    parts = padded([row.parts for row in rows], -1)
    seen = (parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])
    return (seen & torch.ones_like(seen).tril())[:, None], padded([row.positions for row in rows], 0)


class Texts:
    """Captions and turns as token ids and labels, the image token repeated for every visual token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, visual_tokens: int = VISUAL_TOKENS) -> None:
        self.vocabulary = len(tokenizer)
        self._visual_tokens = visual_tokens
        self._tokenizer = tokenizer
        self._image_id = int(tokenizer.convert_tokens_to_ids(IMAGE))
        self._cache: dict[str, list[int]] = {}

    def caption(self, caption: str) -> Row:
        """`<image>{caption}` and a line end; the caption and the line end are supervised."""
        return self._joined([(self._encode(IMAGE), self._encode(f"{caption}\n"))])

    def conversation(self, turns: Sequence[tuple[str, str]]) -> Row:
        """The turns as the chat template writes them; answers and their ends are supervised."""
        pieces = []
        for number, (question, answer) in enumerate(turns):
            image = f"{IMAGE}\n" if number == 0 else ""
            pieces.append(
                (self._encode(f"USER: {image}{question} ASSISTANT:"), self._encode(f" {answer}{END}"))
            )
        return self._joined(pieces)

    def questions(self, turns: Sequence[tuple[str, str]]) -> Row:
        """Many single-turn conversations about one image, which they share; none sees another."""
        shared = self._joined([(self._encode(f"USER: {IMAGE}\n"), [])])
        row = Row(
            ids=[*shared.ids], labels=[*shared.labels], parts=[*shared.parts], positions=[*shared.positions]
        )
        for number, (question, answer) in enumerate(turns, start=1):
            part = self._joined([(self._encode(f"{question} ASSISTANT:"), self._encode(f" {answer}{END}"))])
            row.ids.extend(part.ids)
            row.labels.extend(part.labels)
            row.parts.extend([number] * len(part.ids))
            row.positions.extend(len(shared.ids) + position for position in part.positions)
        return row

    def _encode(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._cache[text]

    def _joined(self, pieces: Sequence[tuple[list[int], list[int]]]) -> Row:
        ids: list[int] = []
        labels: list[int] = []
        for prompt, answer in pieces:
            for token in prompt:
                ids += [token] * (self._visual_tokens if token == self._image_id else 1)
            ids += answer
            labels += [IGNORE] * (len(ids) - len(labels) - len(answer)) + answer
        return Row(ids=ids, labels=labels, parts=[0] * len(ids), positions=list(range(len(ids))))
