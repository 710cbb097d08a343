"""Fills pages of the site from the settings: options of commands, keys of dataclasses. A hook of mkdocs.

`<!-- commands: all -->` becomes a section per command, `<!-- options: COMMAND -->` a table of its options
per panel, `<!-- options: COMMAND, PANEL -->` that of one panel, `<!-- keys: MODULE.CLASS -->` a table of the
fields of a class: each with its default and its meaning, as in `--help`. `<!-- stages: built-in -->` is a
table of the built-in stages.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from typer.main import get_command

_MARK = re.compile(r"^<!-- (commands|options|keys|stages): ([\w., -]+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its tables."""
    tables = {"commands": sections, "options": options, "keys": keys, "stages": stages}
    return _MARK.sub(lambda mark: tables[mark[1]](mark[2]), markdown)


def _commands() -> dict[str, Any]:
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
    from cli import app

    return get_command(app).commands  # type: ignore[attr-defined, no-any-return]


def sections(_: str) -> str:
    """Every command with its help text and its options."""
    return "\n\n".join(
        f"## kdcache {name}\n\n{command.help}\n\n{options(name)}" for name, command in _commands().items()
    )


def options(which: str) -> str:
    """The options of a command as a table per panel; "COMMAND, PANEL": of that panel."""
    command, _, only = which.partition(", ")
    panels: dict[str, list[tuple[str, str, str]]] = {}
    for option in _commands()[command].params:
        name = ", ".join(f"`{one}`" for one in (*option.opts, *option.secondary_opts))
        if option.param_type_name == "argument":
            name = f"`{option.name.upper()}`"
        given = "required" if option.required else _text(option.default)
        panels.setdefault(option.rich_help_panel or "", []).append((name, given, option.help or ""))
    if only:
        return _table("option", panels[only])
    return "\n\n".join(
        (f"**{panel}**\n\n" if panel else "") + _table("option", rows)
        for panel, rows in sorted(panels.items(), key=lambda one: one[0] != "")
    )


def keys(path: str) -> str:
    """The fields of a settings class as a table."""
    from cache_schema.settings import settings_of

    module, _, name = path.rpartition(".")
    rows = []
    for field in settings_of(getattr(import_module(module), name)).values():
        given = "required" if field.default is MISSING else _text(field.default)
        rows.append((f"`{field.name}`", "" if is_dataclass(field.default) else given, field.help.text))
    return _table("key", rows)


def stages(_: str) -> str:
    """The built-in stages: trained parts, losses with weights other than 1, learning rate and batch."""
    from student.stages import STAGES

    rows = []
    for stage in STAGES.values():
        weights = {name: weight for name, weight in stage.losses.by_target.items() if weight}
        terms = ["CE", *(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())]
        trains, rate = ", ".join(stage.trainable).replace("_", " "), f"{stage.learning_rate:g}"
        rows.append((f"`{stage.name}`", trains, " + ".join(terms), rate, str(stage.global_batch)))
    return _rows(("stage", "trains", "losses", "peak learning rate", "global batch"), rows)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    return "" if value is None or value is False or value == "" else f"`{value}`"


def _table(first: str, rows: Iterable[tuple[str, ...]]) -> str:
    return _rows((first, "default", "meaning"), rows)


def _rows(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in (head, *rows))
    first, *rest = (f"| {line} |" for line in lines)
    return "\n".join([first, "|---" * len(head) + "|", *rest])
