"""The condition of `select --where`: a small language of comparisons, read with `ast` and never executed.

`tokens < 512 and confidence > 0.5`, `image == "coco/1.jpg" or "cat" in id`, `not (row in [1, 2, 3])`,
`100 <= tokens < 200`, `advantage >= quantile(0.5)`, `rows:FILE` and `ids:FILE` (one row number or id per
line).
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.errors import KdcacheError, WrongUsage

Mask = NDArray[np.bool_]
Columns = Mapping[str, Any]
"""Columns of equal length: an array of numbers, a list of str, or a list of tuples of str; and the quantiles
that a condition names, one number each."""

NUMBERS = {
    "row": "the dataset row number",
    "tokens": "length of the sample, images included",
    "images": "number of images",
    "response_tokens": "number of response positions",
    "confidence": "mean probability of the teacher's most likely token over the response positions",
    "disagreement": "share of response positions whose label is not the teacher's most likely token",
    "perplexity": "of the teacher on the labels, exp of the mean negative log-likelihood",
    "reference": "log-likelihood of the labels under the model of `kdcache score`, nats per token",
    "advantage": "the teacher's log-likelihood of the labels less that of the reference, nats per token",
}
TEXTS = {"id": "the dataset's label of the sample", "image": "path of any of its images"}
FIELDS = NUMBERS | TEXTS
FROM_TARGETS = frozenset({"confidence", "disagreement", "perplexity", "advantage"})
FROM_REFERENCE = frozenset({"reference", "advantage"})

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True, slots=True)
class Condition:
    """A parsed condition. fields: the columns it reads. quantiles: those of all samples that it names: under
    which key of the columns, of which field, and the share of samples below it."""

    text: str
    fields: frozenset[str]
    _mask: Callable[[Columns], Mask]
    quantiles: Mapping[str, tuple[str, float]] = field(default_factory=dict)

    def mask(self, columns: Columns) -> Mask:
        """True where the samples of `columns` (at least `fields` and `quantiles`) meet the condition."""
        return self._mask(columns)

    def quantiles_of(self, columns: Columns) -> dict[str, float]:
        """The quantiles over all samples, whose columns these are. KdcacheError where no sample has the
        field."""
        found = {}
        for key, (name, share) in self.quantiles.items():
            values = columns[name][~np.isnan(columns[name].astype(np.float64))]
            if not len(values):
                raise KdcacheError(f"--where {self.text!r}: no sample has the field {name}")
            found[key] = float(np.quantile(values, share))
        return found


def parse(text: str) -> Condition:
    """The condition in `text`. WrongUsage with the invalid part; KdcacheError for an unreadable file."""
    kind, _, path = text.strip().partition(":")
    if kind in ("rows", "ids") and path:
        return _listed(text, kind, Path(path.strip()))
    compiler = _Compiler(text.strip())
    try:
        mask = compiler.boolean(ast.parse(compiler.text, mode="eval").body)
    except WrongUsage:
        raise
    except (SyntaxError, RecursionError, ValueError) as error:  # ValueError: a null byte
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise WrongUsage(f"--where {text!r} is not a condition: {reason}; fields: {_known()}") from None
    return Condition(text, frozenset(compiler.fields), mask, compiler.quantiles)


def _listed(text: str, kind: str, path: Path) -> Condition:
    """Rows or ids from a file, one per line; blank lines are ignored."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise KdcacheError(f"--where {text}: cannot read {path}: {error}") from None
    if kind == "ids":
        wanted = set(lines)
        return Condition(
            text,
            frozenset({"id"}),
            lambda columns: np.array([i in wanted for i in columns["id"]], dtype=bool),
        )
    try:
        numbers = np.array([int(line) for line in lines], dtype=np.int64)
    except ValueError:
        raise KdcacheError(
            f"--where {text}: {path} must hold one row number per line; ids:{path} reads ids"
        ) from None
    return Condition(text, frozenset({"row"}), lambda columns: np.isin(columns["row"], numbers))


class _Compiler:
    """Turns a syntax tree into a function of columns; anything outside the language is refused."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.fields: set[str] = set()
        self.quantiles: dict[str, tuple[str, float]] = {}

    def refuse(self, node: ast.AST, why: str) -> WrongUsage:
        part = ast.get_source_segment(self.text, node) if hasattr(node, "lineno") else None
        where = f" at {part!r}" if part and part != self.text else ""
        return WrongUsage(f"--where {self.text!r}{where}: {why}; fields: {_known()}")

    def boolean(self, node: ast.expr) -> Callable[[Columns], Mask]:
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [self.boolean(value) for value in values]
                join = np.logical_and if isinstance(op, ast.And) else np.logical_or
                return lambda columns: join.reduce([part(columns) for part in parts])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                inner = self.boolean(operand)
                return lambda columns: ~inner(columns)
            case ast.Compare(left=left, ops=ops, comparators=rights):
                sides = [left, *rights]
                links = [self.comparison(a, op, b) for a, op, b in zip(sides, ops, rights, strict=False)]
                return lambda columns: np.logical_and.reduce([link(columns) for link in links])
        raise self.refuse(node, "expected a comparison such as tokens < 512")

    def comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Callable[[Columns], Mask]:
        if isinstance(op, (ast.In, ast.NotIn)):
            inside = self.membership(left, right)
            return inside if isinstance(op, ast.In) else lambda columns: ~inside(columns)
        if type(op) not in _COMPARE:
            raise self.refuse(right, "`is` is not supported, use ==")
        compare = _COMPARE[type(op)]
        if isinstance(left, ast.Name) and isinstance(right, ast.Name):
            a, b = self.field(left), self.field(right)
            if a in TEXTS or b in TEXTS:
                raise self.refuse(right, "only numbers can be compared with each other")
            return lambda columns: compare(columns[a], columns[b])
        if isinstance(left, ast.Name):
            name, other = self.field(left), right
        elif isinstance(right, ast.Name):
            name, other = self.field(right), left
            swapped = compare
            compare = lambda x, y: swapped(y, x)  # noqa: E731
        else:
            raise self.refuse(left, "one side must be a field")
        if isinstance(other, ast.Call):
            key = self.quantile(other, name)
            return lambda columns: compare(columns[name], columns[key])
        value = self.constant(other)
        self.check_kind(left, name, value)
        if name in NUMBERS:
            return lambda columns: compare(columns[name], value)
        if not isinstance(op, (ast.Eq, ast.NotEq)):
            raise self.refuse(left, f"{name} is text: use ==, != or `in`")
        if isinstance(op, ast.NotEq):
            return lambda columns: ~_any_text(columns[name], lambda text: text == value)
        return lambda columns: _any_text(columns[name], lambda text: text == value)

    def membership(self, left: ast.expr, right: ast.expr) -> Callable[[Columns], Mask]:
        if isinstance(left, ast.Name) and isinstance(right, (ast.List, ast.Tuple, ast.Set)):
            name, values = self.field(left), [self.constant(item) for item in right.elts]
            for value in values:
                self.check_kind(left, name, value)
            if name in NUMBERS:
                return lambda columns: np.isin(columns[name], values)
            return lambda columns: _any_text(columns[name], lambda text: text in values)
        if isinstance(right, ast.Name) and isinstance(left, ast.Constant) and isinstance(left.value, str):
            name, part = self.field(right), left.value
            if name in NUMBERS:
                raise self.refuse(right, f"{name} is a number and contains no text")
            return lambda columns: _any_text(columns[name], lambda text: part in text)
        raise self.refuse(left, "`in` needs a field and a list, or a text and a field")

    def field(self, node: ast.Name) -> str:
        if node.id not in FIELDS:
            raise self.refuse(node, f"no field {node.id!r}")
        self.fields.add(node.id)
        return node.id

    def quantile(self, node: ast.Call, name: str) -> str:
        """The key of the quantile of a field that `quantile(SHARE)` names."""
        match node:
            case ast.Call(func=ast.Name(id="quantile"), args=[share], keywords=[]) if name in NUMBERS:
                value = self.constant(share)
                if not isinstance(value, str) and 0 <= value <= 1:
                    key = f"quantile({value}) of {name}"
                    self.quantiles[key] = (name, float(value))
                    return key
        raise self.refuse(
            node, "expected a number or, beside a number field, quantile(SHARE) with SHARE from 0 to 1"
        )

    def constant(self, node: ast.expr) -> int | float | str:
        match node:
            case ast.Constant(value=int() | float() | str() as value) if not isinstance(value, bool):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() as inner):
                value = self.constant(inner)
                if not isinstance(value, str):
                    return -value
        raise self.refuse(node, "expected a number or a text in quotes")

    def check_kind(self, node: ast.expr, name: str, value: int | float | str) -> None:
        if (name in NUMBERS) == isinstance(value, str):
            wanted = "number" if name in NUMBERS else "text in quotes"
            raise self.refuse(node, f"{name} is compared with a {wanted}, not {value!r}")


def _any_text(values: Sequence[str | tuple[str, ...]], meets: Callable[[str], bool]) -> Mask:
    """Per sample: whether its text, or any of its texts, meets the test."""
    return np.array(
        [meets(value) if isinstance(value, str) else any(map(meets, value)) for value in values], dtype=bool
    )


def _known() -> str:
    return ", ".join(FIELDS)
