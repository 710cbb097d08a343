"""Settings as dataclasses: the meaning of a field, its allowed values, and its option."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from numbers import Integral, Real
from os import PathLike
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cache_schema.errors import WrongUsage


@dataclass(frozen=True, slots=True)
class Help:
    """The meaning of a field, as `Annotated[int, Help("...")]`.

    panel: the group of options it is listed in. option: the option's name where it is not the field's own;
    empty for a field that no option sets.
    """

    text: str
    panel: str = ""
    option: str | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """The group of options for a field whose `Help` is that of a shared type, such as `Device`."""

    name: str


@dataclass(frozen=True, slots=True)
class Range:
    """Finite numbers from low to high; `ends`: [ or ( for included or excluded ends."""

    low: float
    high: float
    ends: str
    words: str

    def fault(self, value: float) -> str | None:
        """The violated condition of a value, as the end of a sentence."""
        if not math.isfinite(value):
            return "be a finite number"
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        return None if above and below else self.words


def at_least(low: int) -> Range:
    """Numbers from `low` on."""
    return Range(low, math.inf, "[)", f"be at least {low}")


def within(low: float, high: float, ends: str = "[]") -> Range:
    """Numbers between `low` and `high`."""
    return Range(low, high, ends, f"lie in {ends[0]}{low:g}, {high:g}{ends[1]}")


positive = Range(0.0, math.inf, "()", "be positive")

Device = Annotated[str, Help("auto, cpu, cuda, cuda:1, mps, ...")]
DatasetImageRoot = Annotated[
    str, Help("Folder or fsspec URL that the image paths of the dataset start from.")
]


@dataclass(frozen=True, slots=True)
class Written:
    """How a field's value is written as text: `read` raises ValueError for what it cannot read.

    form: what is to be written, as a help text shows it.
    """

    read: Callable[[str], Any]
    write: Callable[[Any], str]
    form: str


@dataclass(frozen=True, slots=True)
class Later:
    """Marks a field that came after documents of its class were written: see `document_of`."""


class Only:
    """Of a nested settings class, the fields that are options of the outer command, with other defaults."""

    def __init__(self, *names: str, **defaults: Any) -> None:
        self.names = {*names, *defaults}
        self.defaults = defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A field of a settings class. kind: its type without None and annotations; default: MISSING for none."""

    name: str
    kind: Any
    optional: bool
    notes: tuple[Any, ...]
    default: Any

    @property
    def help(self) -> Help:
        """The field's documentation."""
        found = next(note for note in self.notes if isinstance(note, Help))
        panel = next((note.name for note in self.notes if isinstance(note, Panel)), found.panel)
        return replace(found, panel=panel)

    @property
    def nested(self) -> bool:
        """Whether it is given by the fields of its class."""
        return is_dataclass(self.kind) and not any(isinstance(note, Help) for note in self.notes)


@cache
def _hints(owner: type) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


def settings_of(owner: type) -> dict[str, Setting]:
    """The fields of a settings class by name."""
    found = {}
    for field in fields(owner):
        kind, optional, notes = resolved(_hints(owner)[field.name])
        default = field.default if field.default_factory is MISSING else field.default_factory()
        found[field.name] = Setting(
            name=field.name, kind=kind, optional=optional, notes=notes, default=default
        )
    return found


def document_of(settings: Any) -> dict[str, Any]:
    """`asdict`, nested settings too, without the fields marked `Later` that have their defaults: so documents
    from before these fields, and the digests of them, stay as they are."""
    document = asdict(settings)
    for name, setting in settings_of(type(settings)).items():
        value = getattr(settings, name)
        if any(isinstance(note, Later) for note in setting.notes) and value == setting.default:
            del document[name]
        elif is_dataclass(value):
            document[name] = document_of(value)
    return document


def resolved(hint: Any) -> tuple[Any, bool, tuple[Any, ...]]:
    """(type, whether None is allowed, annotations) of a type hint; the outermost annotation comes first."""
    if get_origin(hint) is Annotated:
        inner, *own = get_args(hint)
        kind, optional, deeper = resolved(inner)
        return kind, optional, (*own, *deeper)
    if get_origin(hint) in (Union, UnionType) and type(None) in get_args(hint):
        rest = [part for part in get_args(hint) if part is not type(None)]
        kind, _, notes = resolved(Union[tuple(rest)])  # noqa: UP007  (of a list)
        return kind, True, notes
    return hint, False, ()


def number_and_words(kind: Any) -> tuple[Any, tuple[str, ...]]:
    """The parts of a type such as `float | Literal["exact"]`."""
    words = tuple(word for part in get_args(kind) if get_origin(part) is Literal for word in get_args(part))
    (number,) = (part for part in get_args(kind) if get_origin(part) is not Literal)
    return number, words


def check(settings: Any, more: Mapping[str, object] | None = None, *, where: str = "") -> None:
    """WrongUsage that names every field outside of its allowed values; called from `__post_init__`.

    more: further faults: a sentence and whether it applies. where: a prefix of the message.
    """
    found = [
        fault
        for name, hint in _hints(settings.__class__).items()
        for fault in _faults(name, hint, getattr(settings, name))
    ]
    found += [fault for fault, applies in (more or {}).items() if applies]
    if faults := dict.fromkeys(found):
        raise WrongUsage(where + "; ".join(faults))


def _faults(name: str, hint: Any, value: Any, number: str = "one") -> Iterator[str]:
    kind, optional, notes = resolved(hint)
    origin = get_origin(kind)
    if value is None and optional:
        return
    if origin is tuple:
        for part in value:
            yield from _faults(name, get_args(kind)[0], part, "some")
    elif origin is Mapping:
        for key, part in value.items():
            yield from _faults(name, get_args(kind)[0], key)
            yield from _faults(f"{name} of {key}", get_args(kind)[1], part)
    elif origin in (Union, UnionType):
        by_key = next((part for part in get_args(kind) if get_origin(part) is Mapping), None)
        if by_key is not None:
            part = by_key if isinstance(value, Mapping) else get_args(kind)[0]
            yield from _faults(name, part, value)
            return
        part, words = number_and_words(kind)
        if value not in words:
            yield from _faults(name, part, value)
    elif origin is Literal:
        if value not in get_args(kind):
            yield f"{name} must be {number} of {', '.join(map(str, get_args(kind)))}, not {value!r}"
    elif kind in (bool, str):
        if not isinstance(value, bool if kind is bool else (str, PathLike)):  # a path is text
            yield f"{name} must be {'true or false' if kind is bool else 'a text'}, not {value!r}"
    elif kind in (int, float):
        wanted = Integral if kind is int else Real
        if isinstance(value, bool) or not isinstance(value, wanted):
            yield f"{name} must be a {'whole ' if kind is int else ''}number, not {value!r}"
        else:
            faults = [note.fault(float(value)) for note in notes if isinstance(note, Range)]
            yield from (f"{name} must {fault}, not {value}" for fault in faults if fault)
