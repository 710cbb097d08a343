"""kdcache's commands as a user gives them, in this process, so that the tower's type is known to them."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import cli
from cache_schema.errors import KdcacheError, StoppedEarly
from views.terminal import notes


def kdcache(*arguments: str | Path) -> Any:
    """The JSON object that `kdcache ARGUMENTS --json` prints.

    KdcacheError on any other exit code than 0, StoppedEarly on 3.
    """
    words = [str(argument) for argument in arguments]
    notes.print("$ kdcache " + " ".join(words), markup=False, soft_wrap=True, style="dim")
    printed = io.StringIO()
    given, sys.argv = sys.argv, ["kdcache", *words, "--json"]
    code: Any = 0
    try:
        with redirect_stdout(printed):
            cli.main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = given
    if code == 3:
        raise StoppedEarly("run the same command again to continue")
    if code not in (0, None):
        raise KdcacheError(f"kdcache {words[0]} ended with exit code {code}; its error is above")
    return json.loads(printed.getvalue())
