"""JSON documents that carry their own digest, so that a single flipped bit is detected."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec

from cache_schema.errors import CacheDamaged, first_line

_KEY = b'"digest": "'
_BLANK = b"0" * 64


def seal(document: dict[str, Any]) -> bytes:
    """The bytes of `document` as JSON (UTF-8) with a last key `digest`.

    The digest is the SHA-256, in hex, of these very bytes with its own 64 characters replaced by "0", so
    a reader in any language checks it without knowing how the JSON was formatted.
    """
    assert "digest" not in document
    text = json.dumps(document | {"digest": _BLANK.decode()}, ensure_ascii=False, allow_nan=False, indent=1)
    blank = text.encode()
    head, _, tail = blank.rpartition(_BLANK)
    return head + hashlib.sha256(blank).hexdigest().encode() + tail


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """The document sealed in `data`, without its `digest`. CacheDamaged when any byte differs."""
    at = data.rfind(_KEY) + len(_KEY)
    digest = data[at : at + 64]
    if at < len(_KEY) or len(digest) < 64:
        raise CacheDamaged(f"{where}: it has no digest; the file is truncated or altered")
    if hashlib.sha256(data[:at] + _BLANK + data[at + 64 :]).hexdigest().encode() != digest:
        raise CacheDamaged(f"{where}: its bytes do not match its digest; the file is truncated or altered")
    try:
        document = msgspec.json.decode(data)  # strict: no NaN, no lone surrogates
        del document["digest"]
    except (msgspec.DecodeError, RecursionError, TypeError, LookupError) as error:
        raise CacheDamaged(f"{where}: not a sealed JSON object ({first_line(error)})") from error
    assert isinstance(document, dict)
    return document
