"""A cache at a glance in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cache_schema.errors import printable
from views.figures import PARTS, bin_label, count, duration, mass, progress_of, size, units_of, what_it_is
from views.terminal import results

BAR = 28
EIGHTHS = " ▏▎▍▌▋▊▉█"


def print_summary_page(summary: Mapping[str, Any], console: Console = results) -> None:
    """Prints the document of `cache_schema.operations.summary.summarise`."""
    console.print(_heading(summary))
    for part in (
        _what(summary),
        _holdings(summary),
        *_positions(summary),
        _relation(summary),
        _odds(summary),
    ):
        if part is not None:
            console.print(part)


def _heading(summary: Mapping[str, Any]) -> Text:
    built, counts = summary["built"], summary["counts"]
    text = Text(printable(summary["cache"]), style="bold")
    share = built["rows"] / built["of_rows"]
    state = "complete" if built["complete"] else f"{share:.1%} built"
    style = "green" if built["complete"] else "yellow"
    text.append(f"   {state}", style)
    if not built["complete"]:
        text.append(f"   {_bar(share).ljust(BAR, '·')}", style)
    text.append(
        f"\n{count(counts.get('samples', 0))} samples, {count(counts.get('tokens', 0))} tokens, "
        f"{count(counts.get('images', 0))} images, {size(summary['bytes']['total'])}",
        "not bold",
    )
    if not built["complete"]:
        for line in progress_of(summary, datetime.now(UTC)):
            text.append(f"\n{line}", "not bold")
    return text


def _what(summary: Mapping[str, Any]) -> Panel:
    return Panel(_pairs(what_it_is(summary)), title="contents", title_align="left")


def _holdings(summary: Mapping[str, Any]) -> Panel:
    sizes, counts = summary["bytes"], summary["counts"]
    table = _table("part", "bytes", "share", "", "of", "each")
    for name in PARTS:
        part = sizes["by_part"].get(name, 0)
        if not part:
            continue
        number, unit = units_of(name, counts)
        share = part / max(sizes["total"], 1)
        table.add_row(
            name,
            size(part),
            f"{share:.1%}",
            _bar(share),
            f"{count(number)} {unit}" if number else "",
            f"{part / number:,.1f} B" if number else "",
        )
    lines: list[RenderableType] = [table]
    sharing = summary["sharing"]
    if sharing["shared"]:
        lines.append(
            f"{count(sharing['shared'])} of {count(sharing['images'])} images share the targets of an equal "
            f"prefix: about {size(sharing['bytes_saved'])} saved"
        )
    return Panel(Group(*lines), title="bytes on disk", title_align="left")


def _positions(summary: Mapping[str, Any]) -> list[Panel]:
    panels = []
    for kind, found in summary["positions"].items():
        if not found["positions"]:
            continue
        facts = [f"mass covered {mass(found['mean_covered_mass'])}"]
        if found["mean_entries"] is not None:
            facts.append(f"{found['mean_entries']:.3g} entries")
        if found["mean_entropy"] is not None:
            facts.append(f"entropy {found['mean_entropy']:.3f} nats")
        if found["labels"]:
            facts.append(f"teacher's accuracy on the labels {found['label_accuracy']:.1%}")
            facts.append(f"perplexity {found['perplexity']:.4g}")
        title = f"{kind}: {count(found['positions'])} positions"
        histogram = _histogram(found["covered_mass"], "mass within the entries")
        panels.append(Panel(Group("   ".join(facts), histogram), title=title, title_align="left"))
    return panels


def _relation(summary: Mapping[str, Any]) -> Panel | None:
    relation = summary["relation"]
    if relation is None or not relation["relations"]:
        return None
    facts = (
        f"mean rank {relation['mean_rank']:.1f}   residual 1 - cos: mean {relation['mean_residual']:.2e}, "
        f"largest {relation['max_residual']:.2e}"
    )
    body = Group(facts, _histogram(relation["ranks"], "rank"))
    return Panel(body, title=f"relation: {count(relation['relations'])} images", title_align="left")


def _odds(summary: Mapping[str, Any]) -> Panel | None:
    lines: list[RenderableType] = []
    if summary["quarantine"]:
        table = _table("reason for quarantine", "rows")
        for reason, rows in summary["quarantine"].items():
            table.add_row(Text(printable(reason)), count(rows))
        lines.append(table)
    if summary["cut"]:
        lines.append(
            f"{count(summary['cut'])} samples were too long and were cut after the last answer that fits"
        )
    if summary["slowest_shards"]:
        shards = ", ".join(
            f"{entry['shard']} ({entry['samples_per_second']:.3g}/s)"
            for entry in summary["slowest_shards"]
            if entry["samples_per_second"] is not None
        )
        lines.append(f"slowest shards: {shards}")
    if summary["slowest_samples"]:
        rows = ", ".join(f"row {e['row']} ({duration(e['seconds'])})" for e in summary["slowest_samples"])
        lines.append(f"slowest samples to read and prepare: {rows}")
    if summary["longest_samples"]:
        rows = ", ".join(f"row {e['row']} ({count(e['tokens'])})" for e in summary["longest_samples"])
        lines.append(f"longest samples in tokens: {rows}")
    return Panel(Group(*lines), title="outliers", title_align="left") if lines else None


def _histogram(histogram: Mapping[str, Sequence[float]], what: str) -> Table:
    """One bar per bin, from the first to the last bin that is not empty."""
    edges, counts = histogram["edges"], [int(n) for n in histogram["counts"]]
    filled = [place for place, number in enumerate(counts) if number]
    table = _table(what, "", "share")
    for place in range(filled[0], filled[-1] + 1) if filled else ():
        share = counts[place] / sum(counts)
        table.add_row(bin_label(edges, place), _bar(counts[place] / max(counts)), f"{share:.1%}")
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    numbers = ("bytes", "share", "each", "rows", "of")
    for name in names:
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=True)
    return table


def _pairs(lines: Sequence[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(name, Text(printable(value)))
    return table


def _bar(share: float) -> str:
    eighths = max(round(share * BAR * 8), 1 if share > 0 else 0)
    return "█" * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")
