"""Rendering a chat template as transformers does, within bounds of work and output.

Templates come with downloaded models. Loops and macro calls are counted, and growth is checked where a
template multiplies or joins; the count is the same on every machine, so a row is refused by all or none.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, nodes
from jinja2.compiler import CodeGenerator
from jinja2.filters import do_format
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST_STEPS = 200_000
"""The largest number of loop iterations and macro calls in one rendering."""

MOST_CHARACTERS = 1 << 22
"""The largest number of characters (or list entries) of a rendering."""

_MOST_SECONDS = 10.0  # against slow filters, which are not counted
_LONGEST_INTEGER = 4096  # bits
_WIDTH = re.compile(r"%[^a-zA-Z%]*?(\d{5,})")
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # not characters of any text: start and end of a marked range


class TooMuch(jinja2.TemplateError):
    """A rendering exceeds its bounds."""


def render(text: str, variables: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """The output of the template `text`, and the spans inside its `{% generation %}` marks.

    jinja2.TemplateSyntaxError for invalid syntax; other exceptions of a template pass through; TooMuch
    (a jinja2.TemplateError) over the bounds.
    """
    template = _compiled(text)
    _ENVIRONMENT.begin()
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
    """Counts every loop iteration and macro call, and checks the operands of `~`."""

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


def _step(line: int) -> nodes.Expr:
    return nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None, lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Counted
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # would compute products of constants without bounds
            extensions=[_Generation, ext.loopcontrols],
        )
        self.filters |= {"tojson": _tojson, "format": _format}
        for name in ("center", "indent", "batch"):
            self.filters[name] = _of_bounded_numbers(self.filters[name])
        self.globals |= {"raise_exception": _raise, "namespace": _Namespace}
        self._work = threading.local()

    def begin(self) -> None:
        """A new rendering in this thread."""
        self._work.steps, self._work.end = 0, time.monotonic() + _MOST_SECONDS

    def step(self) -> bool:
        """Counts; TooMuch over the bounds."""
        self._work.steps += 1
        if self._work.steps > MOST_STEPS:
            raise TooMuch(f"its loops and macros take over {MOST_STEPS} steps")
        if time.monotonic() > self._work.end:
            raise TooMuch(f"it takes over {_MOST_SECONDS:g} seconds")
        return True

    def joined(self, parts: tuple[Any, ...]) -> str:
        """`~`"""
        texts = [str(part) for part in parts]
        _refuse_over(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The operators that can make large values of small ones."""
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    _refuse_over(len(one) * other)
        if operator == "%" and isinstance(left, str):
            _refuse_wide(left)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _refuse_over(left.bit_length() * right, _LONGEST_INTEGER)
        made = super().call_binop(context, operator, left, right)
        if isinstance(made, int):
            _refuse_over(made.bit_length(), _LONGEST_INTEGER)
        elif isinstance(made, str | list | tuple):
            _refuse_over(len(made))
        return made

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call whose numbers are not lengths of gigabytes."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, int):
                _refuse_over(value)
        return super().call(__context, __obj, *args, **kwargs)


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


def _of_bounded_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int):
                _refuse_over(value)
        return function(*args, **kwargs)

    return checked


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    _refuse_wide(value)
    return do_format(value, *args, **kwargs)


def _refuse_wide(form: str) -> None:
    """TooMuch for an excessive width in a printf-style format."""
    for width in _WIDTH.findall(str(form)):
        _refuse_over(int(width) if len(width) < 9 else MOST_CHARACTERS + 1)


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
