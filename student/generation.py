"""What ends an answer, and what is never generated: the same for new students, evaluation and export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import GenerationConfig

from cache_schema.format.cache import Cache
from cache_schema.format.records import IGNORE_INDEX
from models.tokens import image_token_id_of, pad_token_id_of

_ANSWER = "kdcache-answer"
_LAST = 3
"""The end token is among so many last tokens of an answer: templates may write a line end after it."""

_EXPECTED = (
    *("eos_token_id", "pad_token_id", "bos_token_id", "transformers_version", "_from_model_config"),
    *("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "max_length", "max_new_tokens"),
    *("use_cache", "output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate"),
)
"""Settings of a generation config that greedy answers replace without a word."""


def settle_generation(model: Any, processor: Any, ends: Iterable[int] = ()) -> None:
    """Makes the model's generation config stop where answers end, and never emit padding columns.

    ends: the ids that end answers in the training labels, in addition to those that the config, the
    tokenizer and the chat template name.
    """
    config = model.generation_config
    config.eos_token_id = _one_or_list(end_ids(model, processor) | {*ends})
    config.pad_token_id = pad_token_id_of(processor.tokenizer)
    columns = len(model.get_output_embeddings().weight)
    never = {token for token in config.suppress_tokens or () if token < columns}
    config.suppress_tokens = sorted({*never, *padding_ids(model, processor)}) or None


@torch.no_grad()
def drop_padding(model: Any, processor: Any) -> None:
    """Removes the columns of the head after the last token, and makes those between tokens the mean of the
    others, which is never the most likely one: engines other than transformers need not read
    `suppress_tokens`."""
    tokens = sorted(processor.tokenizer.get_vocab().values())
    columns = 1 + max(tokens[-1], image_token_id_of(model.config))
    if columns < len(model.get_output_embeddings().weight):
        model.resize_token_embeddings(columns)
    if holes := padding_ids(model, processor):
        head = model.get_output_embeddings()
        head.weight[holes] = head.weight[tokens].float().mean(0).to(head.weight.dtype)
        if head.bias is not None:
            head.bias[holes] = head.bias[tokens].float().mean().to(head.bias.dtype)


def decode_greedily(model: Any, processor: Any, max_new_tokens: int) -> list[str]:
    """Makes the model answer greedily, with the ends of `settle_generation` and nothing else of its own
    generation config; returns the settings of that config which are so left out."""
    own, padding = model.generation_config.to_diff_dict(), padding_ids(model, processor)
    if set(own.get("suppress_tokens") or ()) <= set(padding):
        own.pop("suppress_tokens", None)
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=_one_or_list(end_ids(model, processor)),
        pad_token_id=pad_token_id_of(processor.tokenizer),
        suppress_tokens=padding or None,
    )
    return [f"{name} {value}" for name, value in own.items() if name not in _EXPECTED]


def sample_answers(model: Any, temperature: float, top_p: float) -> None:
    """Makes a model that answers greedily draw its tokens instead, from torch's random state."""
    config = model.generation_config
    config.do_sample, config.temperature, config.top_p, config.top_k = True, temperature, top_p, 0


def end_ids(model: Any, processor: Any) -> set[int]:
    """The ids at which an answer ends, as generation config, tokenizer and chat template name them."""
    own = model.generation_config.eos_token_id
    found = {*(own if isinstance(own, list | tuple) else [own]), processor.tokenizer.eos_token_id}
    return {int(each) for each in found if each is not None} | _template_ends(processor)


def padding_ids(model: Any, processor: Any) -> list[int]:
    """The columns of the output head that are no token of the tokenizer."""
    tokens = set(processor.tokenizer.get_vocab().values())
    return [column for column in range(len(model.get_output_embeddings().weight)) if column not in tokens]


def answer_ends(cache: Cache, tokenizer: Any) -> set[int]:
    """The special tokens that end at least half of the answers in a cache's first shard."""
    special = _special_ids(tokenizer)
    ends: Counter[int] = Counter()
    answers = 0
    block = cache.read_shard(cache.shards[0], parts=())
    for place in range(len(block)):
        labels = block.sample(place).labels
        supervised = np.append(labels != IGNORE_INDEX, False)
        for last in np.flatnonzero(supervised[:-1] & ~supervised[1:]):
            answers += 1
            tail = [int(each) for each in labels[max(0, last - _LAST + 1) : last + 1]]
            ends.update([each for each in tail if each in special][-1:])
    return {token for token, count in ends.items() if 2 * count >= answers}


def _template_ends(processor: Any) -> set[int]:
    """The special token that the chat template writes right after an answer."""
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "kdcache-question"), ("assistant", _ANSWER))
    ]
    try:
        text = processor.apply_chat_template(messages, tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError):
        return set()
    after = text.rpartition(_ANSWER)[2].lstrip()
    ids = processor.tokenizer(after, add_special_tokens=False)["input_ids"][:1] if _ANSWER in text else []
    return {*ids} & _special_ids(processor.tokenizer)


def _special_ids(tokenizer: Any) -> set[int]:
    added = {place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | {*tokenizer.all_special_ids}


def _one_or_list(ids: set[int]) -> int | list[int] | None:
    return sorted(ids) if len(ids) > 1 else next(iter(ids), None)
