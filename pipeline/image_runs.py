"""Texts with an image as a run of one token: the run is tokenised as one token, whose fields are repeated."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerFast

_SHORTEST = 16  # tokens of a run; tokenising fewer costs less than repeating
_AS_IS = ("add_special_tokens", "return_offsets_mapping", "return_token_type_ids", "return_attention_mask")
_OFF = ("padding", "is_split_into_words")  # options that are known while they are off
_PER_TOKEN = {"input_ids", "attention_mask", "token_type_ids", "offset_mapping"}


def with_short_runs(processor: Any, image_token_id: int) -> Any:
    """A copy of a processor that tokenises runs of the image token quickly, with the same result; the
    processor itself where its tokenizer might not give the same."""
    tokenizer = _RunTokenizer.of(processor.tokenizer, image_token_id)
    if tokenizer is None:
        return processor
    faster = copy.copy(processor)
    faster.tokenizer = tokenizer
    return faster


class _RunTokenizer:
    """A fast tokenizer, called with one text. Offsets are an array (T, 2).

    The image token is an added one, which cuts the text before anything else looks at it, so the parts
    around a run are tokenised the same however long the run is.
    """

    def __init__(self, tokenizer: Any, token_id: int) -> None:
        self._tokenizer = tokenizer
        self._id = token_id
        self._token: str = tokenizer.added_tokens_decoder[token_id].content
        self._runs = re.compile(f"(?:{re.escape(self._token)}){{{_SHORTEST},}}")

    @classmethod
    def of(cls, tokenizer: Any, token_id: int) -> _RunTokenizer | None:
        """None where runs cannot be shortened: another kind of tokenizer, no added token, one that takes part
        of the text beside it or of another added token, or another result in a trial."""
        added = tokenizer.added_tokens_decoder
        token = added.get(token_id)
        if type(tokenizer)._encode_plus is not PreTrainedTokenizerFast._encode_plus or token is None:
            return None
        if token.lstrip or token.rstrip or token.single_word or token.normalized:
            return None
        if sum(token.content in other.content for other in added.values()) > 1:
            return None
        made, run = cls(tokenizer, token_id), token.content * _SHORTEST
        trials = [(f"{run}It is\n {run} so {run}{run} .", special) for special in (True, False)]
        return made if all(made._agrees(*trial) for trial in trials) else None

    def __call__(self, text: Any, **options: Any) -> Any:
        made = None
        plain = all(name in _AS_IS or (name in _OFF and not value) for name, value in options.items())
        if plain and isinstance(text, list) and len(text) == 1:
            made = self._shortened(text[0], options)
        return self._tokenizer(text, **options) if made is None else made

    def _shortened(self, text: str, options: dict[str, Any]) -> BatchEncoding | None:
        """None for a text without a run, or where a run is not one token for one."""
        width = len(self._token)
        runs = np.array([run.span() for run in self._runs.finditer(text)]).reshape(-1, 2)
        if not len(runs):
            return None
        lengths = (runs[:, 1] - runs[:, 0]) // width
        made = self._tokenizer(
            [self._runs.sub(self._token, text)], **options | {"return_offsets_mapping": True}
        )
        if not made.keys() <= _PER_TOKEN:
            return None
        lost = np.concatenate([[0], np.cumsum((lengths - 1) * width)])
        starts = runs[:, 0] - lost[:-1]  # in the short text
        ids, offsets = np.array(made["input_ids"][0]), np.array(made["offset_mapping"][0]).reshape(-1, 2)
        places = np.flatnonzero((ids == self._id) & np.isin(offsets[:, 0], starts))
        if not np.array_equal(offsets[places], np.stack([starts, starts + width], axis=1)):
            return None
        counts = np.ones(len(ids), dtype=np.int64)
        counts[places] = lengths
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        before = lost[np.searchsorted(starts + width, offsets[:, 0], side="right")]
        placed = np.repeat(offsets + before[:, None], counts, axis=0) + width * within[:, None]
        found = {"offset_mapping": [placed]} if options.get("return_offsets_mapping") else {}
        for name in made.keys() - {"offset_mapping"}:
            found[name] = [np.repeat(made[name][0], counts).tolist()]
        return BatchEncoding(found)

    def _agrees(self, text: str, special: bool) -> bool:
        options = {"add_special_tokens": special, "return_offsets_mapping": True}
        ours, theirs = self._shortened(text, options), self._tokenizer([text], **options)
        return (
            ours is not None
            and ours.keys() == theirs.keys()
            and all(np.array_equal(ours[name][0], theirs[name][0]) for name in theirs)
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_tokenizer":  # while it is being copied
            raise AttributeError(name)
        return getattr(self._tokenizer, name)
