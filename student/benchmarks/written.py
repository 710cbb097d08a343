"""Answers on disk while a benchmark is asked: what is written stays, whatever ends the run."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cache_schema.errors import KdcacheError
from cache_schema.output import write_text, writing


class WrittenAnswers:
    """The answers of one benchmark, in files of their own by run and process under `FOLDER/NAME.parts`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._parts = folder / f"{name}.parts"
        self._name = name

    def agree(self, identity: Mapping[str, Any], first: bool) -> None:
        """KdcacheError where the answers are of another identity. first: this process writes it down."""
        file = self._parts / "run.json"
        if not file.is_file():
            if first:
                write_text(file, json.dumps(identity))
            return
        try:
            before = {**json.loads(file.read_text(encoding="utf-8"))}
        except (OSError, ValueError, TypeError) as error:
            raise KdcacheError(f"{file} is damaged; remove {self._parts} to ask again") from error
        changed = sorted(key for key in {*before, *identity} if before.get(key) != identity.get(key))
        if changed:
            raise KdcacheError(
                f"{self._parts} has answers with other {', '.join(changed)}; choose another --out, or "
                "remove it to ask again"
            )

    def read(self) -> dict[int, str]:
        """Every answer by the row of its question, without lines that a stopped machine left damaged."""
        answers: dict[int, str] = {}
        for part in sorted(self._parts.glob("*.jsonl")):
            for line in part.read_bytes().split(b"\n")[:-1]:
                with suppress(ValueError):
                    match json.loads(line):
                        case [int(row), str(text)]:
                            answers[row] = text
        return answers

    @contextmanager
    def part(self) -> Iterator[Callable[[Mapping[int, str]], None]]:
        """A function that adds answers to a new file and hands them to the system."""
        path = self._parts / f"{uuid.uuid4().hex}.jsonl"
        with writing(path):
            file = path.open("ab")
        with file:

            def add(answers: Mapping[int, str]) -> None:
                lines = (json.dumps([row, text]) + "\n" for row, text in answers.items())
                with writing(path):
                    file.write("".join(lines).encode())
                    file.flush()

            yield add
