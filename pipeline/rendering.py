"""Rendering a chat template as transformers does, within bounds of work and output.

Templates come with downloaded models. Loops and macro calls are counted. The size of a value is bounded
before it is made: of lists as they are written, of filters, operators and methods by what they make of their
arguments. The count is the same on every machine, so a row is refused by all or none.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, nodes
from jinja2.compiler import CodeGenerator
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST_STEPS = 200_000
"""The largest number of loop iterations and macro calls in one rendering."""

MOST_CHARACTERS = 1 << 22
"""The largest number of characters of a rendering, and of any value in it."""

_MOST_SECONDS = 10.0  # against slow filters, which are not counted
_LONGEST_INTEGER = 4096  # bits
_MOST_WORK = 1 << 30  # characters of template text that its steps may write
_ENTRY = 16  # an entry of a list counts as so many characters
_FIELD = re.compile(r"%[^a-zA-Z%]*|\{[^{}]*")
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # not characters of any text: start and end of a marked range


class TooMuch(jinja2.TemplateError):
    """A rendering exceeds its bounds."""


def render(text: str, variables: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """The output of the template `text`, and the spans inside its `{% generation %}` marks.

    jinja2.TemplateSyntaxError for invalid syntax; other exceptions of a template pass through; TooMuch
    (a jinja2.TemplateError) over the bounds.
    """
    template = _compiled(text)
    _ENVIRONMENT.begin(len(text))
    pieces, length = [], 0
    try:
        for piece in template.generate(**variables):
            length += len(piece)
            if length > MOST_CHARACTERS:
                raise TooMuch(f"it writes over {MOST_CHARACTERS} characters")
            pieces.append(piece)
    except RecursionError as error:
        raise TooMuch("it calls itself endlessly") from error
    return _without_marks("".join(pieces))


def names_and_filters(text: str) -> tuple[set[str], set[str]]:
    """The names that a template reads, and the filters that it uses."""
    tree = _ENVIRONMENT.parse(text)
    filters = {node.name for node in tree.find_all(nodes.Filter)}
    return {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}, filters


def holds_marks(text: str) -> bool:
    """Whether text has the characters that delimit marked ranges."""
    return _OPEN in text or _CLOSE in text


def _without_marks(written: str) -> tuple[str, list[tuple[int, int]]]:
    first, *rest = written.split(_OPEN)
    pieces, length = [first], len(first)
    spans = []
    for stretch in rest:
        inside, closed, after = stretch.partition(_CLOSE)
        if not closed:
            raise jinja2.TemplateError("its generation marks are nested")
        spans.append((length, length + len(inside)))
        pieces += [inside, after]
        length += len(inside) + len(after)
    return "".join(pieces), spans


@lru_cache(maxsize=32)
def _compiled(text: str) -> jinja2.Template:
    try:
        return _ENVIRONMENT.from_string(text)
    except RecursionError as error:
        raise jinja2.TemplateSyntaxError("it is nested too deeply", 1) from error


class _Generation(ext.Extension):
    """`{% generation %}`: its content is the assistant's text."""

    tags = {"generation"}  # noqa: RUF012 - as the class above declares it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Macro) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


class _Counted(CodeGenerator):
    """Counts every loop iteration and macro call, and bounds lists, mappings and the operands of `~`."""

    def visit_For(self, node: nodes.For, frame: Any) -> None:
        node.body.insert(0, nodes.ExprStmt(_step(node.lineno)))
        if node.test is not None:
            node.test = nodes.And(_step(node.lineno), node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Macro(self, node: nodes.Macro, frame: Any) -> None:
        node.body.insert(0, nodes.ExprStmt(_step(node.lineno)))
        super().visit_Macro(node, frame)

    def visit_CallBlock(self, node: nodes.CallBlock, frame: Any) -> None:
        node.body.insert(0, nodes.ExprStmt(_step(node.lineno)))
        super().visit_CallBlock(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self._bounded(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self._bounded(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        if node.ctx == "load":
            self._bounded(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _bounded(self, visit: Callable[..., None], node: nodes.Expr, frame: Any) -> None:
        self.write("environment.bounded(")
        visit(node, frame)
        self.write(")")


def _step(line: int) -> nodes.Expr:
    # Written as it is: a nodes.Call would go through the sandbox's `call`, at ten times the time.
    return nodes.EnvironmentAttribute("step()", lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Counted
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # would compute products of constants without bounds
            finalize=self.written,
            extensions=[_Generation, ext.loopcontrols],
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _bounded_filter(name, made) for name, made in self.filters.items()}
        self.globals |= {"raise_exception": _raise, "namespace": _Namespace}
        del self.globals["lipsum"]
        self._work = threading.local()

    def begin(self, length: int) -> None:
        """A new rendering of a template of this length in this thread."""
        self._work.steps, self._work.end = 0, time.monotonic() + _MOST_SECONDS
        self._work.most = min(MOST_STEPS, _MOST_WORK // max(length, 1))
        self._work.written = 0

    def step(self) -> bool:
        """Counts; TooMuch over the bounds."""
        self._work.steps += 1
        if self._work.steps > self._work.most:
            raise TooMuch(f"its loops and macros take over {self._work.most} steps")
        if time.monotonic() > self._work.end:
            raise TooMuch(f"it takes over {_MOST_SECONDS:g} seconds")
        return True

    def written(self, value: Any) -> Any:
        """What an expression writes, into the output or into a macro's."""
        self._work.written += _size(value)
        _refuse_over(self._work.written // 4)
        return value

    def bounded(self, value: Any) -> Any:
        """A list or mapping as it is written, or what a filter or a call has made."""
        _size(value)
        return value

    def joined(self, parts: tuple[Any, ...]) -> str:
        """`~`"""
        _size(parts)
        return "".join(map(str, parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The operators that can make large values of small ones."""
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | bytes | list | tuple) and isinstance(other, int):
                    _refuse_over(_size(one) * other)
        if operator == "%" and isinstance(left, str | bytes):
            _refuse_format(left, (right,))
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _refuse_over(left.bit_length() * right, _LONGEST_INTEGER)
        made = super().call_binop(context, operator, left, right)
        if isinstance(made, int):
            _refuse_over(made.bit_length(), _LONGEST_INTEGER)
        return self.bounded(made)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call whose result is bounded, as far as text and lists make it."""
        args = tuple(map(_taken, args))
        _refuse_numbers((*args, *kwargs.values()))
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # the sandbox wraps `format`
        if isinstance(owner, str | bytes):
            _refuse_growth(__obj.__name__, (owner, *args), kwargs)
        return __self.bounded(super().call(__context, __obj, *args, **kwargs))


class _Namespace(Namespace):
    """A namespace without names that start with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        names = dict(*args[1:], **kwargs)
        for name in names:
            _refuse_private(name)
        Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the name {name!r} starts with an underscore")


def _refuse_over(size: int, bound: int = MOST_CHARACTERS) -> None:
    if size > bound:
        raise TooMuch(f"it makes a text, a list or a number of size {size}, more than {bound}")


def _size(value: Any) -> int:
    """The characters and entries of a value, those of its parts included. TooMuch over the bound."""
    if isinstance(value, str):  # most are
        _refuse_over(len(value))
        return len(value)
    size, left = 0, [value]
    while left:
        part = left.pop()
        if isinstance(part, str | bytes):
            size += len(part)
        elif isinstance(part, Mapping):
            size += 1 + 2 * _ENTRY * len(part)
            _refuse_over(size)
            left += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple | set | frozenset):
            size += 1 + _ENTRY * len(part)
            _refuse_over(size)
            left += part
        elif isinstance(part, Namespace):
            left.append(part._Namespace__attrs)
            size += _ENTRY
        _refuse_over(size)
    return size


def _taken(value: Any) -> Any:
    """What an iterator gives, as a list of bounded size; any other value as it is."""
    if not isinstance(value, Iterator):
        return value
    taken, size = [], 0
    for part in value:
        size += _ENTRY + _size(part)
        _refuse_over(size)
        taken.append(part)
    return taken


def _refuse_numbers(values: Iterable[Any]) -> None:
    """TooMuch for numbers that would be lengths of gigabytes, and for what is too large to work with."""
    for value in values:
        if isinstance(value, int):
            _refuse_over(value)
        else:
            _size(value)


def _refuse_growth(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """TooMuch where a filter, or a method of texts, of this name makes much more than it is given.

    args: the text first. Every argument is of bounded size.
    """
    text, *rest = args
    others = [*rest, *kwargs.values()]
    longest = max([_size(other) for other in others], default=0)
    number = max([abs(other) for other in others if isinstance(other, int)], default=0)
    if name in ("format", "format_map"):
        _refuse_format(text, others)
    elif name == "join":
        parts = (*args, *kwargs.values())
        _refuse_over(max(_size(part) for part in parts) * (1 + min(_size(part) for part in parts)))
    elif name == "indent":
        _refuse_over(_size(text) + str(text).count("\n") * max(number, longest, 4))
    elif name in ("replace", "translate", "wordwrap", "expandtabs"):
        old = str(rest[0]) if name == "replace" and rest else ""
        places = str(text).count(old) if old else 1 + _size(text)
        _refuse_over(_size(text) + places * max(longest, number if name == "expandtabs" else 0))
    elif name == "sum" and any(isinstance(other, list | tuple) for other in others):
        _refuse_over(_size(text) * len(text) // 64)
    elif name == "tojson" and number > 64:
        _refuse_over(number * MOST_CHARACTERS)


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    context = int(hasattr(function, "jinja_pass_arg"))

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        own, given = args[:context], list(args[context:])
        given[:1] = map(_taken, given[:1])
        _refuse_numbers((*given, *kwargs.values()))
        if given:
            _refuse_growth(name, given, kwargs)
        made = function(*own, *given, **kwargs)
        _size(made)
        return made

    return checked


def _refuse_format(form: Any, values: Sequence[Any]) -> None:
    """TooMuch where the fields of a format, each as wide as the widest, make too much."""
    text = form.decode("latin-1") if isinstance(form, bytes) else str(form)
    widths = [int(width[:9]) for field in _FIELD.findall(text) for width in re.findall(r"\d+", field)]
    widths += [abs(part) for value in values for part in _numbers(value)] if set("*{") & {*text} else []
    widths += [_size(value) for value in values]
    fields = max(text.count("%"), text.count("{"))
    _refuse_over(len(text) + fields * max(widths, default=0))


def _numbers(value: Any) -> list[int]:
    parts = list(value.values()) if isinstance(value, Mapping) else value
    return [part for part in (parts if isinstance(parts, list | tuple) else [value]) if isinstance(part, int)]


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML's escapes, as chat templates expect."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


_ENVIRONMENT = _Environment()
