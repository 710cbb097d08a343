"""kdcache's commands as a user gives them, in this process, so that the tower's type is known to them."""

from __future__ import annotations

import io
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import cli
from views.terminal import notes


class Failed(Exception):
    """A command ended with an exit code other than 0."""


class Commands:
    """Runs commands and keeps the seconds of each."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []

    def __call__(self, *arguments: str | Path) -> Any:
        """The JSON object that `kdcache ARGUMENTS --json` prints; Failed on any other exit code than 0."""
        words = [str(argument) for argument in arguments]
        notes.print("$ kdcache " + " ".join(words), markup=False, soft_wrap=True, style="dim")
        printed = io.StringIO()
        given, sys.argv = sys.argv, ["kdcache", *words, "--json"]
        began = time.perf_counter()
        code: Any = 0
        try:
            with redirect_stdout(printed):
                cli.main()
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.argv = given
        self.seconds.append((words[0], time.perf_counter() - began))
        if code not in (0, None):
            raise Failed(f"kdcache {words[0]} ended with exit code {code}")
        return json.loads(printed.getvalue())
