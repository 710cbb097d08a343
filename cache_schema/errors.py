"""What can go wrong, as one clear line each: what, where, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

REMEDY = "run `kdcache verify --repair` on the cache, then the same `kdcache build` again"

_LONGEST_LINE = 1500
_UNSAFE = {
    "trust_remote_code": "it needs code of its own, which is never run; take a model of transformers itself",
    "weights_only": "its pickled weights hold more than tensors and are not loaded; get it as safetensors",
}
_LONGEST_DETAIL = 240


def printable(text: str, keep: str = "\n") -> str:
    """`text` with control characters and lone surrogates escaped, but those of `keep`, so that no text can
    move the cursor of a terminal or change its colors."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def shown(text: str, limit: int = 200) -> str:
    """`text` made `printable`, line ends too, and shortened in its middle to about `limit` characters."""
    if len(text) > limit:
        text = f"{text[: 2 * limit // 3]}…{text[-(limit // 3) :]}"
    escaped = printable(text, keep="")
    return escaped if len(escaped) <= 2 * limit else shown(escaped, 2 * limit)


class KdcacheError(Exception):
    """An error for the user. Its text is one line: what, where and the remedy.

    Control characters in it are escaped, and it is shortened in its middle above 1,500 characters.
    """

    def __init__(self, text: str = "") -> None:
        super().__init__(shown(text, _LONGEST_LINE))


class WrongUsage(KdcacheError, ValueError):
    """Settings that are out of range, or do not go together (exit code 2)."""


class CacheDamaged(KdcacheError):
    """A file of a cache is missing, truncated or altered."""


class IdentityMismatch(KdcacheError):
    """Two things that must be the same (teacher, data, tokenizer, ...) are not."""


class RowRejected(KdcacheError):
    """A dataset row that cannot be captured; it goes to quarantine with this reason.

    reason: a short code for counting (`missing_image`, `broken_image`, `no_turns`, ...).
    detail: one sentence for a person, made safe by `shown`.
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = shown(detail, _LONGEST_DETAIL)
        super().__init__(f"{reason}: {self.detail}")


class StoppedEarly(KdcacheError):
    """Stopped on request with everything saved; the text says how to go on (exit code 3)."""


def first_line(error: BaseException) -> str:
    """A library's error as one line of at most 200 characters.

    Advice to run code of a checkpoint, or to load its pickles, is not passed on.
    """
    for word, ours in _UNSAFE.items():
        if word in str(error):
            return ours
    lines = str(error).strip().splitlines()
    return shown(lines[0]) if lines else type(error).__name__


UNDECODABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)
"""What the decoding of bytes that are not as the format says may raise."""


@contextmanager
def decoding(where: str) -> Iterator[None]:
    """CacheDamaged for what a file of a cache with sound digests holds that is not as the format says."""
    try:
        yield
    except UNDECODABLE as error:
        raise CacheDamaged(f"{where}: cannot be decoded ({first_line(error)}); {REMEDY}") from error
