"""How a command ends: one line on stderr and an exit code."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import typer

from cache_schema.errors import KdcacheError, StoppedEarly, WrongUsage, printable, shown
from views.options import UsageError


def run(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run a command. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 stopped early and resumable.

    With `--debug`, wherever it stands, errors keep their traceback.
    """
    words = [word for word in arguments if word != "--debug"]
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        return int(typer.main.get_command(app).main(words, prog_name="kdcache", standalone_mode=False) or 0)
    except Exception as error:
        if len(words) < len(arguments) and not isinstance(error, StoppedEarly):
            raise
        line, code = _outcome(error)
        if line:
            print(" ".join(line.split()), file=sys.stderr)
        return code


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise StoppedEarly(f"stopped by {signal.Signals(signum).name}; run the same command again to continue")


def _outcome(error: Exception) -> tuple[str, int]:
    """The error line and the exit code of an exception."""
    if isinstance(error, StoppedEarly):
        return f"stopped: {error}", 3
    if isinstance(error, UsageError):
        told = error.format_message()  # empty where the help was shown instead
        return f"error: {printable(told)}" if told else "", 2
    if isinstance(error, KdcacheError):
        return f"error: {error}", 2 if isinstance(error, WrongUsage) else 1
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"error: a path is too long: {shown(str(error.filename))}", 2
    name, told = type(error).__name__, shown(" ".join(str(error).split()))
    return f"error: an internal error of kdcache ({name}: {told}); --debug shows the traceback", 1
