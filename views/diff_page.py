"""The difference of two caches in the terminal"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cache_schema.errors import printable
from views.figures import count
from views.terminal import results

VALUE = 48
"""The number of characters of a value that are shown."""


def print_difference(document: Mapping[str, Any], a: str, b: str, console: Console = results) -> None:
    """Prints what `cache_schema.operations.diff.DiffReport.to_json` holds of the caches `a` and `b`."""
    same = document["same"]
    heading = Text("the same" if same else "not the same", "bold green" if same else "bold red")
    heading.append(f"   a = {printable(a)}   b = {printable(b)}", "not bold default")
    console.print(heading, soft_wrap=True)
    lines = [_identity(document), _samples(document), _targets(document)]
    for good, text in lines:
        console.print(
            Text("✓ " if good else "✗ ", "green" if good else "red").append(printable(text), "default")
        )
    if document["identity"] or document["engines"]:
        console.print(_differences(document))
    if document["kl"]:
        console.print(_kinds(document))
    if document["hidden"]:
        console.print(_hidden(document))
    if document["relation"]:
        found = document["relation"]
        console.print(
            f"relation of {count(found['images'])} images: 1 - cos mean {1 - found['mean_cosine']:.2e}, "
            f"largest {1 - found['least_cosine']:.2e} in row {found['worst_row']}"
        )


def _identity(document: Mapping[str, Any]) -> tuple[bool, str]:
    good = document["same_identity"]
    allowed = [entry["key"] for entry in document["identity"] if entry["blocks"] == "allowed"]
    text = "identity: the same" if good else "identity: another teacher, dataset or target spec"
    return good, text + (f", but for {', '.join(allowed)}, as allowed" if allowed else "")


def _samples(document: Mapping[str, Any]) -> tuple[bool, str]:
    told = [f"{count(document['samples'])} in both"]
    for name, text in (
        ("only_in_a", "only in a"),
        ("only_in_b", "only in b"),
        ("other_inputs", "with other tokens, labels or images"),
    ):
        rows = document[name]
        if rows["count"]:
            first = ", ".join(map(str, rows["first"])) + (
                ", ..." if rows["count"] > len(rows["first"]) else ""
            )
            told.append(f"{count(rows['count'])} {text} (rows {first})")
    return document["same_samples"], "samples: " + "; ".join(told)


def _targets(document: Mapping[str, Any]) -> tuple[bool, str]:
    good = document["targets_agree"]
    said = "agree" if good else "do not agree"
    bounds = f"mean KL at most {document['kl_bound']:g} nats per position"
    if document["relation"]:
        bounds += f", mean 1 - cos at most {document['relation_bound']:g}"
    if document["hidden"]:
        bounds += f", mean |a-b|/|a| of hidden states at most {document['hidden_bound']:g}"
    if not document["kl"] and not document["relation"] and not document["hidden"]:
        return good, "targets: nothing to compare"
    return good, f"targets: {said} ({bounds})"


def _differences(document: Mapping[str, Any]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("what differs", "a", "b", ""):
        table.add_column(name, overflow="fold")
    for entry in document["identity"]:
        meaning = {"nothing": "recorded only", "allowed": "allowed"}.get(entry["blocks"], "")
        table.add_row(_value(entry["key"]), _value(entry["a"]), _value(entry["b"]), Text(meaning, "dim"))
    for name, left, right in _engines(document["engines"]):
        table.add_row(_value(name), _value(left), _value(right), Text("recorded only", "dim"))
    return table


def _engines(engines: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The differences between the engines of a and b; with one engine on each side, fact by fact."""
    if not engines:
        return []
    if len(engines["a"]) == len(engines["b"]) == 1:
        a, b = engines["a"][0], engines["b"][0]
        names = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
        return [(f"engine: {name}", a.get(name, "-"), b.get(name, "-")) for name in names]
    left, right = ("; ".join(" ".join(engine.values()) for engine in engines[side]) for side in "ab")
    return [("engines", left, right)]


def _value(value: Any) -> Text:
    text = printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return Text(text if len(text) <= VALUE else text[: VALUE - 1] + "…")


def _kinds(document: Mapping[str, Any]) -> Table:
    return _distances("KL(a||b)", document["kl"], {"same 1st": "top1_agreement"})


def _hidden(document: Mapping[str, Any]) -> Table:
    return _distances("hidden |a-b|/|a|", document["hidden"], {})


def _distances(heading: str, kinds: Mapping[str, Any], shares: Mapping[str, str]) -> Table:
    """A distance per position, one line a kind; shares: further columns, heading -> name."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for name in (heading, "positions", "mean", "99%", "max", *shares, "worst row"):
        table.add_column(name, justify="left" if name == heading else "right", no_wrap=True)
    for kind, found in kinds.items():
        table.add_row(
            kind,
            count(found["positions"]),
            *[f"{found[name]:.1e}" for name in ("mean", "p99", "max")],
            *[f"{found[name]:.2%}" for name in shares.values()],
            f"{found['worst_row']} ({found['worst_row_mean']:.1e})",
        )
    return table
