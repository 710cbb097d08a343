"""Fills pages of the site from the settings: options of commands, keys of dataclasses. A hook of mkdocs.

`<!-- options: COMMAND -->` becomes a table of the command's options, `<!-- keys: MODULE.CLASS -->` one of the
class's fields: each with its default and its meaning, as `--help` and the recipes know them.
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

_MARK = re.compile(r"^<!-- (options|keys): ([\w.-]+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its tables."""
    return _MARK.sub(lambda mark: {"options": options, "keys": keys}[mark[1]](mark[2]), markdown)


def options(command: str) -> str:
    """The options of a command as a table per panel."""
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
    from cli import app

    panels: dict[str, list[tuple[str, str, str]]] = {}
    for option in get_command(app).commands[command].params:  # type: ignore[attr-defined]
        name = ", ".join(f"`{one}`" for one in (*option.opts, *option.secondary_opts))
        if option.param_type_name == "argument":
            name = f"`{option.name.upper()}`"
        given = "required" if option.required else _text(option.default)
        panels.setdefault(option.rich_help_panel or "", []).append((name, given, option.help or ""))
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


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    return "" if value is None or value is False or value == "" else f"`{value}`"


def _table(first: str, rows: Iterable[tuple[str, str, str]]) -> str:
    lines = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows)
    return "\n".join(
        [f"| {first} | default | meaning |", "|---|---|---|", *(f"| {line} |" for line in lines)]
    )
