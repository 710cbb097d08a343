"""Token ids and special tokens, on which teacher and student must agree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cache_schema.errors import KdcacheError
from cache_schema.format.identity import digest_of, tokenizer_digest

_SPECIAL_ROLES = ("eos", "bos", "pad", "unk")


def digest_of_tokenizer(tokenizer: Any) -> str:
    """The digest of vocabulary and special tokens, which must be equal for cache and student."""
    special = {role: getattr(tokenizer, f"{role}_token", None) for role in _SPECIAL_ROLES}
    return tokenizer_digest(tokenizer.get_vocab(), special)


def tokenizer_parts(tokenizer: Any) -> dict[str, str]:
    """A digest of every part of a fast tokenizer that decides which ids a text becomes, and the way back.

    Of tokenizer.json, whatever version wrote it: `model` (all but the vocabulary, which
    digest_of_tokenizer has, yet with the scores of a unigram model), `merges`, `normalizer`,
    `pre_tokenizer`, `post_processor`, `decoder` and `added_tokens`. Truncation and padding are settings of
    a call. Empty for a tokenizer without such a file.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    document = json.loads(backend.to_str())
    model = dict(document["model"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.pop("merges", [])]
    if isinstance(model.get("vocab"), Mapping):
        del model["vocab"]
    names = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")
    parts = {"model": model, "merges": merges} | {name: document.get(name) for name in names}
    return {name: digest_of(_without_defaults(part)) for name, part in parts.items()}


def _without_defaults(value: Any) -> Any:
    """Without what is off or empty, which versions of tokenizers write or leave out."""
    if isinstance(value, dict):
        kept = {key: _without_defaults(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item not in (None, False, "", [], {})}
    return [_without_defaults(item) for item in value] if isinstance(value, list) else value


def pad_token_id_of(tokenizer: Any) -> int:
    """The padding id, or the end-of-sequence id, or 0: padded positions are masked, so any id serves."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return 0


def image_token_id_of(config: Any) -> int:
    """The id that the model replaces by image features. KdcacheError when the config has none."""
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise KdcacheError(f"the config of {config.model_type} has no image token; give a vision-language model")


def adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer is to add special tokens to `text`, by the rule of apply_chat_template: a text
    that begins with the beginning-of-sequence token must not get it twice."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
