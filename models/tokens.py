"""Token ids as teacher and student must agree on them."""

from __future__ import annotations

from typing import Any

from cache_schema.errors import KdcacheError
from cache_schema.format.identity import tokenizer_digest

_SPECIAL_ROLES = ("eos", "bos", "pad", "unk")


def digest_of_tokenizer(tokenizer: Any) -> str:
    """The digest of its vocabulary and special tokens that a cache holds and a student must have too."""
    special = {role: getattr(tokenizer, f"{role}_token", None) for role in _SPECIAL_ROLES}
    return tokenizer_digest(tokenizer.get_vocab(), special)


def pad_token_id_of(tokenizer: Any) -> int:
    """The padding id, or the end-of-sequence id, or 0: padded positions are masked, so any id serves."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return 0


def image_token_id_of(config: Any) -> int:
    """The id that the model replaces by image features. KdcacheError when the config names none."""
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise KdcacheError(
        f"the config of {config.model_type} names no image token; give a vision-language model"
    )


def adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer is to add special tokens to `text`, by the rule of apply_chat_template: a text
    that begins with the beginning-of-sequence token must not get it twice."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
