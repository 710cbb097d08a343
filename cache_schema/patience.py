"""Asking a remote store again while it does not answer."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from cache_schema.errors import StoppedEarly

Answer = TypeVar("Answer")

PATIENCE = 60.0
"""Seconds for which a request that fails is repeated."""

_FIRST_WAIT, _LONGEST_WAIT = 0.25, 8.0  # seconds between two tries
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    ValueError,
    TypeError,
    NotImplementedError,
)
_FINAL_NUMBERS = (errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_FINAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "NoRegionError")


def patiently(ask: Callable[[], Answer], patience: float | None = None) -> Answer:
    """What `ask` returns, which is called again while it fails with an error that may pass, for `patience`
    seconds (None: PATIENCE) and never for less than once. The last error is raised.

    `ask` must be of a kind that may be repeated although it was done and its answer was lost.
    """
    wait, give_up = _FIRST_WAIT, time.monotonic() + (PATIENCE if patience is None else patience)
    while True:
        try:
            return ask()
        except StoppedEarly:
            raise
        except Exception as error:  # of the driver
            if is_final(error) or time.monotonic() + wait > give_up:
                raise
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT)


def is_final(error: Exception) -> bool:
    """Whether asking again is of no use: no permission, no such range, a request that is refused."""
    status = getattr(error, "status", None)  # of HTTP
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    by_name = type(error).__name__ in _FINAL_NAMES  # of botocore, which is not always installed
    return refused or by_name or isinstance(error, _FINAL) or getattr(error, "errno", None) in _FINAL_NUMBERS
