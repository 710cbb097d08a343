"""The options of a command, made from the fields of settings classes: name, type, default, help and panel."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from cache_schema.errors import WrongUsage
from cache_schema.settings import Only, Setting, Written, number_and_words, resolved, settings_of

_WORD = re.compile(r"[A-Za-z0-9_.-]+")
_AS_TYPED = (int, float, str, bool, Path)

UsageError: Any = typer.BadParameter.__mro__[2]
"""The base of all of typer's own errors."""


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as typer takes it: a parameter whose type is a settings class becomes an option per field.

    A parameter `Annotated[dict[str, Any], CLASS]` receives the values of those fields of the class that the
    command's own parameters do not name; these take the help of the field of their name. Lists and mappings
    are given as text with commas, lists of names also by repeating the option; text that cannot be read is a
    usage error.
    """
    hints = get_type_hints(command, include_extras=True)
    own = inspect.signature(command).parameters
    owners = {name: _settings_class(hints[name]) for name in own}
    offered = {leaf.name: leaf for owner in owners.values() if owner for leaf in _leaves(owner)}
    parameters = [_option(leaf) for name, leaf in offered.items() if name not in own]
    for name, parameter in own.items():
        if owners[name] is None:
            notes = [_documented(offered[name])] if name in offered else []
            hint = Annotated[hints[name], *notes] if notes else hints[name]
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**values: Any) -> None:
        settings = {name: value for name, value in values.items() if name not in own}
        arguments = {name: values[name] for name in own if name in values}
        for name, owner in owners.items():
            if owner is not None:
                made = _values(owner, settings)
                arguments[name] = owner(**made) if resolved(hints[name])[0] is owner else made
        command(**arguments)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def read_options(name: str, arguments: Sequence[str], *settings: Any) -> Any:
    """What a command with parameters of these types would receive as the first of them. WrongUsage, with the
    command's name, where it would end so."""
    received: list[Any] = []
    kinds = {f"settings_{number}": kind for number, kind in enumerate(settings)}

    def command(**values: Any) -> None:
        received.extend(values.values())

    command.__annotations__ = kinds
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(one, inspect.Parameter.KEYWORD_ONLY, annotation=kinds[one]) for one in kinds]
    )
    line = typer.Typer(add_completion=False)
    line.command(add_help_option=False)(with_options(command))
    try:
        typer.main.get_command(line).main(list(arguments), standalone_mode=False)
    except UsageError as error:
        raise WrongUsage(f"{name}: {error.format_message()}") from error
    except WrongUsage as error:
        raise WrongUsage(f"{name}: {error}") from error
    return received[0]


def words(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def by_stage(option: str, values: list[str], stages: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """The value for every stage of a run, and those of single stages given as STAGE=VALUE.

    A value with = in it that names no stage is a path if there is one, as in folders `date=2026-01-01`.
    BadParameter for a stage that the run does not have.
    """
    single: dict[str, str] = {}
    every: list[str] = []
    for value in values:
        name, mark, rest = value.partition("=")
        if mark and name in single:
            raise typer.BadParameter(f"given twice for stage {name}", param_hint=option)
        if mark and name in stages:
            single[name] = rest
        elif mark and _WORD.fullmatch(name) and not Path(value).exists():
            raise typer.BadParameter(
                f"{value!r} names no stage of this run ({', '.join(stages)}) and no path", param_hint=option
            )
        else:
            every.append(value)
    if len(every) > 1:
        raise typer.BadParameter(f"given {len(every)} times without a stage's name", param_hint=option)
    if every and single and len(stages) == 1:
        raise typer.BadParameter("a single stage takes one value, without its name", param_hint=option)
    return (every[0] if every else None), single


def _settings_class(hint: Any) -> Any:
    kind, _, notes = resolved(hint)
    return next((one for one in (kind, *notes) if isinstance(one, type) and is_dataclass(one)), None)


def _leaves(owner: Any, only: Only | None = None) -> Iterator[Setting]:
    """The fields that become options, those of nested classes in place of the nested class."""
    for setting in settings_of(owner).values():
        if setting.nested:
            nested = next((note for note in setting.notes if isinstance(note, Only)), only)
            yield from _leaves(setting.kind, nested)
        elif setting.help.option != "" and (only is None or setting.name in only.names):
            default = setting.default if only is None else only.defaults.get(setting.name, setting.default)
            yield replace(setting, default=default)


def _values(owner: Any, given: Mapping[str, Any], only: Only | None = None) -> dict[str, Any]:
    """The arguments of a settings class, from the values of the options."""
    made: dict[str, Any] = {}
    for name, setting in settings_of(owner).items():
        if setting.nested:
            nested = next((note for note in setting.notes if isinstance(note, Only)), only)
            made[name] = setting.kind(**_values(setting.kind, given, nested))
        elif name in given and (only is None or name in only.names):
            made[name] = _from_text(setting, given[name])
    return made


def _name(setting: Setting) -> str:
    return "--" + (setting.help.option or setting.name).replace("_", "-")


def _documented(setting: Setting, *names: str, metavar: str | None = None) -> Any:
    note = setting.help
    return typer.Option(*names, help=escape(note.text), rich_help_panel=note.panel or None, metavar=metavar)


def _option(setting: Setting) -> inspect.Parameter:
    name, kind, default, metavar = _name(setting), setting.kind, setting.default, None
    if (written := _written(setting)) is not None:
        kind, metavar, default = str, written.form, written.write(default)
    elif kind is bool and setting.optional:
        name = f"{name}/--no-{name[2:]}"
    elif kind == tuple[str, ...]:
        kind, default = list[str], list(default)
    elif kind not in _AS_TYPED:
        kind, metavar = str, _metavar(kind)
        default = _as_text(default) if default not in (None, MISSING) else default
    hint: Any = kind | None if setting.optional else kind
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[hint, _documented(setting, name, metavar=metavar)],
    )


def _written(setting: Setting) -> Written | None:
    return next((note for note in setting.notes if isinstance(note, Written)), None)


def _metavar(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is Mapping:
        return "NUMBER,NAME=NUMBER,..."
    if is_dataclass(kind):
        return "NAME"
    part = resolved(arguments[0])[0]
    return "NAME,..." if get_origin(part) is Literal else "NUMBER,..."


def _as_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(dict.fromkeys(f"{number:g}" for number in value.values()))
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in value)
    return str(value)


def _from_text(setting: Setting, value: Any) -> Any:
    kind, origin = setting.kind, get_origin(setting.kind)
    if (written := _written(setting)) is not None:
        try:
            return written.read(value)
        except ValueError:
            problem = f"{value!r} is not {written.form}"
            raise typer.BadParameter(problem, param_hint=_name(setting)) from None
    if kind == tuple[str, ...]:
        return tuple(word for text in value for word in words(text))
    if origin is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == value), value)
    if value is None or origin is None:
        return value
    if origin is Mapping:
        return _by_name(setting, value)
    return tuple(_part(setting, get_args(kind)[0], value, word) for word in words(value))


def _part(setting: Setting, hint: Any, text: str, word: str) -> Any:
    """One word of a list as a value."""
    kind = resolved(hint)[0]
    names: tuple[str, ...] = ()
    if get_origin(kind) in (Union, UnionType):
        number, names = number_and_words(kind)
        kind = resolved(number)[0]
    if get_origin(kind) is Literal or word in names:
        return word
    try:
        return kind(word)
    except ValueError:
        numbers = "whole numbers" if kind is int else "numbers"
        problem = f"{text!r} is not a comma-separated list of {numbers}"
        raise typer.BadParameter(problem, param_hint=_name(setting)) from None


def _by_name(setting: Setting, text: str) -> dict[str, Any]:
    """A number for every name, NAME=NUMBER for one of them."""
    names, hint = get_args(setting.kind)
    known = get_args(names)
    found: dict[str, float] = {}
    for word in sorted(words(text), key=lambda word: "=" in word):
        name, _, number = word.rpartition("=")
        value = _part(setting, hint, text, number)
        if name not in known if found else name:
            break
        found |= {name: value} if name else dict.fromkeys(known, value)
    else:
        if found:
            return found
    wanted = f"a number for all targets, then NAME=NUMBER for some of {', '.join(known)}"
    raise typer.BadParameter(f"{text!r} is not {wanted}", param_hint=_name(setting))
