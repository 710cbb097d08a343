"""What long work tells on stderr, on a terminal and in the log of a cluster."""

import io

import pytest
import typer
from rich.console import Console

from cache_schema.progress import task
from views import outcome, terminal
from views.terminal import Bar


def told(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool, seconds: float) -> str:
    """What a task of 100 tells that began at 40, now stands at 60, `seconds` after its beginning."""
    console = Console(file=io.StringIO(), width=160, force_terminal=is_terminal, highlight=False)
    asked: list[None] = []

    def clock() -> float:
        asked.append(None)
        return 0.0 if len(asked) == 1 else seconds

    monkeypatch.setattr(terminal, "notes", console)
    monkeypatch.setattr(terminal.time, "monotonic", clock)
    bar = Bar()
    bar.begin("capturing", 100)
    bar.update(40)
    bar.update(60, tokens="9/s")
    bar.end()
    return console.file.getvalue()


def test_a_log_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = told(monkeypatch, is_terminal=False, seconds=61.0).splitlines()
    assert lines[:2] == ["capturing ...", "capturing: 40 of 100"]
    assert lines[-1].startswith("capturing: ")
    assert len(lines) == 3, "the second update came in the same minute"


def test_no_line_before_a_minute_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(told(monkeypatch, is_terminal=False, seconds=59.0).splitlines()) == 2


def test_a_terminal_tells_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 in 30 seconds, what was done before not counted: 40 more take a minute."""
    shown = told(monkeypatch, is_terminal=True, seconds=30.0)
    assert "60/100" in shown
    assert "0:01:00 left" in shown
    assert "tokens 9/s" in shown


def test_a_task_that_fails_ends_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "notes", Console(file=io.StringIO(), force_terminal=True))
    bar = Bar()
    with pytest.raises(RuntimeError), task(bar, "capturing", 2):
        raise RuntimeError
    assert bar._bar is None, "the bar no longer draws"
    assert terminal.notes.file.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"


def test_no_text_moves_the_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control characters are told as text, whatever a library, a cache or a benchmark's file says."""
    file = io.StringIO()
    for name in ("notes", "results"):
        monkeypatch.setattr(terminal, name, Console(file=file, width=200, highlight=False))
    bar = Bar()
    bar.begin("reading \x1b[2J", 2)
    bar.update(1, name="\x1b]0;x\x07")
    bar.message("two\nlines \x9b31m")
    bar.end()
    terminal.print_summary("\x1b[1m", {"\x1b[2m": {"\x1b[3m": "\x1b[4m"}, "list": ["\x1b[5m"]})
    terminal.print_problems([{"file": "\x1b[6m", "what": "w", "remedy": "\u202e"}])
    told = file.getvalue()
    assert {c for c in told if not c.isprintable()} == {"\n"}
    for sequence in ("\\x1b[2J", "\\x1b]0;x\\x07", "two\nlines \\x9b31m", "\\x1b[1m", "\\u202e"):
        assert sequence in told


def test_an_internal_error_is_one_printable_line(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise ZeroDivisionError("a\n\x1b[31m" + "b" * 5000)

    assert outcome.run(app, []) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: an internal error of kdcache (ZeroDivisionError: a \\x1b[31mb")
    assert told[:-1].isprintable()
    assert len(told) < 600
