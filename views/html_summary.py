"""The summary of a cache as HTML: cards, tables, and bar charts in SVG; reads without JavaScript."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from views.figures import PARTS, bin_label, count, duration, mass, progress_of, size, units_of, what_it_is

WIDTH, HEIGHT, MARGIN = 420, 150, 32
WIDEST = 105
LABELS = 9
FEW = 5
"""Up to this number, bars have their own labels and shares."""


def summary_html(summary: Mapping[str, Any]) -> str:
    """The part of the page above the samples, from `cache_schema.operations.summary.summarise`."""
    panels = [
        _panel(
            "Contents", _table((), [[escape(name), escape(value)] for name, value in what_it_is(summary)])
        ),
        _panel("Bytes on disk", _bytes(summary)),
        *(_positions(kind, found) for kind, found in summary["positions"].items() if found["positions"]),
        _relation(summary["relation"]),
        _odds(summary),
    ]
    progress = [] if summary["built"]["complete"] else progress_of(summary)
    return (
        f'<div class="facts">{"".join(_cards(summary))}</div>'
        f"{''.join(f'<p>{escape(line)}</p>' for line in progress)}"
        f'<section aria-label="Summary" class="panels">{"".join(panels)}</section>'
    )


def _cards(summary: Mapping[str, Any]) -> list[str]:
    built, counts, sizes = summary["built"], summary["counts"], summary["bytes"]
    positions = summary["positions"]
    cards = [
        ("built", "complete" if built["complete"] else f"{built['rows'] / built['of_rows']:.1%}"),
        ("samples", count(counts.get("samples", 0))),
        ("tokens", count(counts.get("tokens", 0))),
        ("images", count(counts.get("images", 0))),
        ("on disk", size(sizes["total"])),
        ("in quarantine", count(counts.get("quarantined", 0))),
    ]
    for kind, found in positions.items():
        if found["positions"]:
            cards.append((f"mass covered, {kind}", mass(found["mean_covered_mass"])))
        if found["labels"]:
            cards.append((f"label accuracy, {kind}", f"{found['label_accuracy']:.1%}"))
    return [f'<div class="fact"><b>{escape(value)}</b>{escape(name)}</div>' for name, value in cards]


def _bytes(summary: Mapping[str, Any]) -> str:
    counts, sizes = summary["counts"], summary["bytes"]
    rows = []
    for part in PARTS:
        held = sizes["by_part"].get(part, 0)
        if not held:
            continue
        number, unit = units_of(part, counts)
        each = f"{held / number:,.1f} B per {unit.removesuffix('s')}" if number else ""
        rows.append([part, size(held), f"{held / max(sizes['total'], 1):.1%}", each])
    sharing = summary["sharing"]
    note = ""
    if sharing["shared"]:
        note = (
            f'<p class="faint">{count(sharing["shared"])} of {count(sharing["images"])} images share '
            f"the targets of an equal prefix: about {size(sharing['bytes_saved'])} saved.</p>"
        )
    return _table(("part", "bytes", "share", ""), rows, numbers=(1, 2)) + note


def _positions(kind: str, found: Mapping[str, Any]) -> str:
    rows = [["mass within the entries", mass(found["mean_covered_mass"])]]
    if found["mean_entries"] is not None:
        rows.append(["entries of a position", f"{found['mean_entries']:.3g}"])
    if found["mean_entropy"] is not None:
        rows.append(["entropy", f"{found['mean_entropy']:.3f} nats"])
    if found["labels"]:
        rows.append(["accuracy on the labels", f"{found['label_accuracy']:.1%}"])
        rows.append(["perplexity on the labels", f"{found['perplexity']:.4g}"])
    body = _table((), rows, numbers=(1,)) + _bars(found["covered_mass"], f"Mass covered at {kind} positions")
    return _panel(f"{kind.capitalize()}: {count(found['positions'])} positions", body)


def _relation(relation: Mapping[str, Any] | None) -> str:
    if relation is None or not relation["relations"]:
        return ""
    rows = [
        ["mean rank", f"{relation['mean_rank']:.1f}"],
        ["residual 1 - cos, mean", f"{relation['mean_residual']:.2e}"],
        ["residual 1 - cos, largest", f"{relation['max_residual']:.2e}"],
    ]
    body = _table((), rows, numbers=(1,)) + _bars(relation["ranks"], "Rank of the relation factors")
    return _panel(f"Relation: {count(relation['relations'])} images", body)


def _odds(summary: Mapping[str, Any]) -> str:
    parts = []
    if summary["quarantine"]:
        rows = [[escape(reason), count(rows)] for reason, rows in summary["quarantine"].items()]
        parts.append(_table(("reason for quarantine", "rows"), rows, numbers=(1,)))
    slow = [
        [str(entry["shard"]), f"{entry['samples_per_second']:.3g}"]
        for entry in summary["slowest_shards"]
        if entry["samples_per_second"] is not None
    ]
    if slow:
        parts.append(_table(("slowest shard", "samples/s"), slow, numbers=(1,)))
    slowest = [[str(entry["row"]), duration(entry["seconds"])] for entry in summary["slowest_samples"]]
    if slowest:
        parts.append(_table(("slowest sample to prepare, row", "time"), slowest, numbers=(1,)))
    longest = [[str(entry["row"]), count(entry["tokens"])] for entry in summary["longest_samples"]]
    if longest:
        parts.append(_table(("longest sample, row", "tokens"), longest, numbers=(1,)))
    return _panel("Outliers", "".join(parts)) if parts else ""


def _panel(title: str, body: str) -> str:
    return f'<div class="panel"><h3>{escape(title)}</h3>{body}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of HTML cells; columns `numbers` are right-aligned."""

    def cell(tag: str, place: int, text: str) -> str:
        return f"<{tag}{' class=number' if place in numbers else ''}>{text}</{tag}>"

    lines = [[cell("th", i, escape(name)) for i, name in enumerate(head)]] if head else []
    lines += [[cell("td", i, text) for i, text in enumerate(row)] for row in rows]
    return "<table>" + "".join(f"<tr>{''.join(line)}</tr>" for line in lines) + "</table>"


def _bars(histogram: Mapping[str, Sequence[float]], title: str) -> str:
    """A bar chart of a histogram, from the first to the last bin that is not empty."""
    edges, counts = histogram["edges"], [int(n) for n in histogram["counts"]]
    filled = [place for place, number in enumerate(counts) if number]
    if not filled:
        return ""
    places = range(max(filled[0] - 1, 0), min(filled[-1] + 2, len(counts)))  # an empty bin at either side
    step, most = min(WIDTH / len(places), WIDEST), max(counts)
    every = -(-len(places) // LABELS)
    bars = []
    for n, place in enumerate(places):
        height = (HEIGHT - 2 * MARGIN) * counts[place] / most
        label = bin_label(edges, place)
        told = f"{label}: {counts[place] / sum(counts):.1%}"
        bars.append(
            f'<rect x="{n * step + 1:.1f}" y="{HEIGHT - MARGIN - height:.1f}" width="{max(step - 2, 1):.1f}" '
            f'height="{height:.1f}"><title>{escape(told)}</title></rect>'
        )
        if len(places) <= FEW:
            middle = f'x="{n * step + step / 2:.1f}" text-anchor="middle"'
            bars.append(f'<text {middle} y="{HEIGHT - 6}">{escape(label)}</text>')
            if counts[place]:
                share = f"{counts[place] / sum(counts):.1%}"
                bars.append(f'<text {middle} y="{HEIGHT - MARGIN - height - 3:.1f}">{share}</text>')
        elif n % every == 0:
            bars.append(f'<text x="{n * step + 1:.1f}" y="{HEIGHT - 6}">{edges[place]:g}</text>')
    base = HEIGHT - MARGIN
    told_most = "" if len(places) <= FEW else f", highest bar {most / sum(counts):.1%}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'<text x="1" y="12">{escape(title)}{told_most}</text>'
        f'<line x1="0" x2="{WIDTH}" y1="{base}" y2="{base}"/>{"".join(bars)}</svg>'
    )
