"""What can go wrong, as one clear line each: what, where, what to do."""

from __future__ import annotations


class KdcacheError(Exception):
    """An error meant for the user: its text is one line that names what, where and the remedy."""


class WrongUsage(KdcacheError, ValueError):
    """Settings that are out of range, or do not go together (exit code 2)."""


class CacheDamaged(KdcacheError):
    """A file of a cache is missing, truncated or altered."""


class IdentityMismatch(KdcacheError):
    """Two things that must be the same (teacher, data, tokenizer, ...) are not."""


class RowRejected(KdcacheError):
    """A dataset row that cannot be captured; it goes to quarantine with this reason.

    reason: a short code for counting (`missing_image`, `broken_image`, `no_turns`, ...).
    detail: the sentence for a reader.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class StoppedEarly(KdcacheError):
    """Stopped on request with everything saved; the text says how to go on (exit code 3)."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, as one line of at most 200 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
