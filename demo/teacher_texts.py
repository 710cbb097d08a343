"""Captions and turns as token ids and labels, as the teacher's training reads them."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from demo.language_model import IGNORE
from demo.tokenizer import END, IMAGE
from demo.vision_tower import VISUAL_TOKENS


class Texts:
    """Captions and turns as token ids and labels, the image token repeated for every visual token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.vocabulary = len(tokenizer)
        self._tokenizer = tokenizer
        self._image_id = int(tokenizer.convert_tokens_to_ids(IMAGE))
        self._cache: dict[str, list[int]] = {}

    def caption(self, caption: str) -> tuple[list[int], list[int]]:
        """(ids, labels) of `<image>{caption}` and a line end; the caption and the line end supervised."""
        answer = self._encode(f"{caption}\n")
        return self._joined([(self._encode(IMAGE), answer)])

    def conversation(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """(ids, labels) of the turns as the chat template writes them; answers and their ends supervised."""
        pieces = []
        for number, (question, answer) in enumerate(turns):
            image = f"{IMAGE}\n" if number == 0 else ""
            pieces.append(
                (self._encode(f"USER: {image}{question} ASSISTANT:"), self._encode(f" {answer}{END}"))
            )
        return self._joined(pieces)

    def _encode(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._cache[text]

    def _joined(self, pieces: Sequence[tuple[list[int], list[int]]]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for prompt, answer in pieces:
            for token in prompt:
                ids += [token] * (VISUAL_TOKENS if token == self._image_id else 1)
            ids += answer
            labels += [IGNORE] * (len(ids) - len(labels) - len(answer)) + answer
        return ids, labels
