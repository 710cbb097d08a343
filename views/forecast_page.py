"""The result of `kdcache plan` in the terminal, and its curves as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cache_schema.errors import KdcacheError
from views.figures import count, duration, size
from views.terminal import results

Row = Mapping[str, Any]

_GOOD, _BAD = "green", "red"


def print_forecast(document: Mapping[str, Any], console: Console = results) -> None:
    """Prints the document of `pipeline.forecast.advice.forecast`."""
    for part in (
        _samples(document),
        *_positions(document),
        _relations(document),
        _hidden(document),
        _legend(),
        _dataset(document),
        _cost(document),
        _break_even(document),
        _recommendation(document),
    ):
        if part is not None:
            console.print(part)
    console.print(document["command"], markup=False, soft_wrap=True)


def draw_forecast(document: Mapping[str, Any], file: Path) -> None:
    """Plots bytes of the whole dataset against degrees, one line per kind of target and precision.

    KdcacheError when the file cannot be written or its format is not supported.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, rows in _lines(document).items():
        sizes = [row["dataset_bytes"] / 1e9 for row in rows]
        axes.plot(sizes, [row["angle"] for row in rows], marker="o", label=name)
        for row, x in zip(rows, sizes, strict=True):
            told = row["rule"] if "rule" in row else _form(row["relation"])
            axes.annotate(told, (x, row["angle"]), textcoords="offset points", xytext=(4, 4), fontsize=7)
    for bound, names in _bounds(document).items():
        told = f"{', '.join(names)}: at most {bound:g}"
        axes.axhline(bound, linestyle="--", color="grey", linewidth=0.8, label=told)
    axes.set_xscale("log")
    axes.set_xlabel("GB for the whole dataset")
    axes.set_ylabel("angle to the dense gradient, degrees")
    axes.legend(fontsize=8)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise KdcacheError(f"cannot draw {file}: {error}; give a .png, .svg or .pdf file") from error


def _bounds(document: Mapping[str, Any]) -> dict[float, list[str]]:
    """The allowed degrees and their targets."""
    bounds: dict[float, list[str]] = {}
    for name, angle in document["recommended"]["max_angle"].items():
        bounds.setdefault(angle, []).append(name)
    return bounds


def _lines(document: Mapping[str, Any]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in [*document["positions"], *document["relations"]]:
        lines.setdefault(f"{row.get('target', 'relation')}, {row['precision']}", []).append(row)
    return lines


def _samples(document: Mapping[str, Any]) -> Text:
    samples, teacher = document["samples"], document["teacher"]
    text = Text(f"{samples['measured']} of {count(document['dataset']['rows'])} rows measured", "bold")
    text.append(f" (drawn with seed {samples['seed']})", "not bold")
    if samples["bad"]:
        reasons = ", ".join(f"{reason} {number}" for reason, number in samples["bad"].items())
        text.append(
            f"\n{sum(samples['bad'].values())} of {samples['drawn']} sampled rows cannot be captured: ",
            "yellow",
        )
        text.append(f"{reasons}; for example: {samples['example_of_bad']}", "yellow")
    text.append(
        f"\nteacher: {teacher['teacher']}, {teacher['parameters'] / 1e6:,.4g} M parameters, "
        f"vocabulary {count(teacher['vocabulary'])}, {teacher['engine']['dtype']} on "
        f"{teacher['engine']['device']}",
        "not bold",
    )
    text.append(f"\nstudent: {_student(document['student'])}", "not bold")
    return text


def _student(student: Mapping[str, Any]) -> str:
    reached = ", ".join(f"{kl:.3g} at {kind}" for kind, kl in student["kl"].items())
    if student["kind"] == "given":
        return f"{student['student']}; KL {reached} positions, nats"
    return f"the teacher with noise on its last hidden state; KL {reached} positions, nats"


def _positions(document: Mapping[str, Any]) -> list[Table]:
    rows: Sequence[Row] = document["positions"]
    chosen = document["recommended"]
    tables = []
    for kind in dict.fromkeys(row["target"] for row in rows):
        seen, whole = (document[part]["positions"][kind] for part in ("samples", "dataset"))
        table = _table(
            f"{kind}: {count(seen)} positions, about {count(whole)} in the dataset",
            *("entries", "stored", "mass %", "bytes", "KL lost", "unseen", "degrees", "dataset"),
        )
        for row in rows:
            if row["target"] == kind:
                best = row["rule"] == chosen["rules"][kind] and row["precision"] == chosen["precision"]
                table.add_row(
                    _marked(row["rule"], best),
                    row["precision"],
                    f"{100 * row['mass']:.2f}",
                    f"{row['bytes']:.1f}",
                    _bounded(row["kl"], chosen["max_kl"], "{:.1e}"),
                    f"{round(row['unseen_kl'], 4) + 0.0:.4f}",
                    _bounded(row["angle"], chosen["max_angle"][kind], "{:.2f}"),
                    size(row["dataset_bytes"]),
                    style="bold" if best else "",
                )
        tables.append(table)
    return tables


def _relations(document: Mapping[str, Any]) -> Table | None:
    chosen, rows = document["recommended"], document["relations"]
    if not rows:
        return None
    table = _table(
        f"relation: {document['samples']['compared_images']} images, "
        f"{count(document['dataset']['stored_images'])} stored in the dataset",
        *("bound", "stored", "rank", "1 - cos", "largest", "kB/image", "degrees", "dataset"),
    )
    for row in rows:
        best = row["relation"] == chosen["relation"] and row["precision"] == chosen["precision"]
        table.add_row(
            _marked(_form(row["relation"]), best),
            row["precision"],
            f"{row['rank']:.0f}" if row["rank"] else "all",
            f"{row['residual']:.1e}",
            f"{row['residual_max']:.1e}",
            f"{row['bytes'] / 1000:.3g}",
            _bounded(row["angle"], chosen["max_angle"]["relation"], "{:.2f}"),
            size(row["dataset_bytes"]),
            style="bold" if best else "",
        )
    return table


def _hidden(document: Mapping[str, Any]) -> Table | None:
    rows = document["hidden"]
    if not rows:
        return None
    table = _table(
        "hidden states, in 8 bits", *("positions", "channels", "bytes/position", "KL lost", "dataset")
    )
    for row in rows:
        table.add_row(
            row["target"],
            count(row["channels"]),
            f"{row['bytes']:.1f}",
            f"{row['kl']:.1e}",
            size(row["dataset_bytes"]),
        )
    return table


def _legend() -> Text:
    return Text(
        "degrees: between the gradient of the stored target and that of the dense one, for this student. "
        "KL lost: nats by which storing changes the record. Unseen: nats of KL(teacher || student) that "
        "the record does not show. mass: within the entries. Bytes: all fields, as the codecs write them.\n",
        "dim",
    )


def _dataset(document: Mapping[str, Any]) -> Table:
    data = document["dataset"]
    sharing = data["sharing"]
    table = _table("the dataset as a build would capture it", "", "")
    table.add_row("rows", f"{count(data['rows'])}, {count(data['rows_text_only'])} of them text-only")
    table.add_row("rows that can be captured", f"about {count(data['rows_captured'])}")
    told = f"about {count(data['stored_images'])} of {count(data['images'])} stored"
    if data["rows_with_image"]:
        told += f"; {count(data['distinct_first_images'])} distinct first images"
        equal = sharing["share_of_equal_prefixes"]
        if not sharing["allowed"]:
            told += "; not shared: with this teacher, images attend to what follows them"
        elif equal is not None:
            told += f", {equal:.0%} of the rows about one image share it"
    table.add_row("images", told)
    table.add_row("tokens", f"about {count(data['tokens'])}, {count(data['computed_tokens'])} to compute")
    table.add_row("shards", count(data["shards"]))
    return table


def _cost(document: Mapping[str, Any]) -> Table:
    chosen, speed = document["recommended"], document["speed"]
    table = _table("the recommended cache", "", "")
    for part, number in chosen["bytes"].items():
        table.add_row(part, size(number))
    table.add_row("together", f"{size(chosen['total_bytes'])} ± {size(chosen['standard_error_bytes'])}")
    table.add_row(
        "time, one worker here",
        f"about {duration(chosen['capture_seconds'])} ({speed['samples_per_second']:.3g} samples/s, "
        f"{speed['tokens_per_second']:,.0f} tokens/s)",
    )
    return table


def _break_even(document: Mapping[str, Any]) -> Text:
    even = document["break_even"]
    text = Text("compared with a teacher in memory: ", "bold")
    text.append(
        f"the teacher would take {duration(even['teacher_seconds_per_epoch'])} of each epoch of each "
        f"distilled stage; the capture pays off after {even['epochs']:.2f} such epochs. After 3 it has "
        f"saved {_signed(even['seconds_saved_after_3_epochs'])}. It saves training "
        f"{size(even['teacher_bytes'])} of weights and {size(even['dense_logits_bytes_per_sample'])} of "
        "dense logits per sample.\n",
        "not bold",
    )
    return text


def _recommendation(document: Mapping[str, Any]) -> Text:
    chosen = document["recommended"]
    of_rule: dict[str, list[str]] = {}
    for kind, rule in chosen["rules"].items():
        of_rule.setdefault(rule if rule.startswith("p") else f"top {rule}", []).append(kind)
    words = [
        rule if len(of_rule) == 1 else f"{' and '.join(kinds)} {rule}" for rule, kinds in of_rule.items()
    ]
    words.append(chosen["precision"])
    if chosen["relation"] is not None:
        form = chosen["relation"]
        words.append("exact relation" if form == "exact" else f"relation within {_form(form)}")
    angles = _bounds(document)
    told = [
        f"{angle:g} degrees" + (f" ({', '.join(of)})" if len(angles) > 1 else "")
        for angle, of in angles.items()
    ]
    bounds = f"{', '.join(told)} and {chosen['max_kl']:g} nats"
    text = Text(f"recommended: {', '.join(words)}", f"bold {_GOOD if chosen['within_bounds'] else 'yellow'}")
    if chosen["within_bounds"]:
        text.append(f" (the smallest within {bounds})", "not bold")
    else:
        text.append(
            f" (the nearest; no setting tried is within {bounds}: {'; '.join(chosen['misses'])}. Try a "
            "larger --top-k, smaller --entries or --relation, or accept more with --max-angle or --max-kl)",
            "not bold",
        )
    return text


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_header=any(columns),
        pad_edge=False,
    )
    for place, name in enumerate(columns):
        plain = not any(columns) or name in ("", "stored")
        table.add_column(name, justify="left" if plain else "right", no_wrap=place != 1 or any(columns))
    return table


def _marked(text: str, best: bool) -> str:
    return f"→ {text}" if best else text


def _bounded(value: float, bound: float, form: str) -> Text:
    return Text(form.format(value), _GOOD if value <= bound else _BAD)


def _form(relation: float | str) -> str:
    return relation if isinstance(relation, str) else f"{relation:.0e}".replace("e-0", "e-")


def _signed(seconds: float) -> str:
    return duration(seconds) if seconds >= 0 else f"-{duration(-seconds)}"
