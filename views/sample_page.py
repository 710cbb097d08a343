"""One sample in the terminal: its image, its conversation, and the teacher's distribution at every
position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cache_schema.datasets.image_roots import ImageRoot, open_root
from cache_schema.datasets.images import open_image
from cache_schema.errors import KdcacheError, RowRejected, printable
from cache_schema.format.cache import Cache
from cache_schema.format.records import Relation
from views.blocks import fitted, half_blocks, heat
from views.grid import framed
from views.relation_picture import pooled, principal_factor, similarity
from views.sample_document import find_sample, sample_document
from views.terminal import results
from views.token_text import visible

ROLE_STYLE = {"prompt": "cyan", "visual": "magenta", "response": "green"}
WRONG_STYLE = "red underline"
PICTURE_SIDE = 40
GAP = 3
RELATION_RANK = 64
LEAST_CENTRED_RANK = 4
"""Below this rank, removing the tokens' mean leaves almost nothing."""

NARROWEST_CELL = 6
NOTHING: dict[str, Any] = {"text": "", "probability": 0.0}
LONGEST_WORD = 14


def print_sample(
    cache: Cache, row_or_id: int | str, image_root: Path | str | None, console: Console = results
) -> None:
    """Prints the sample to `console`. KdcacheError when there is no such sample; a missing or changed image
    is noted on the page."""
    sample = find_sample(cache, row_or_id)
    document = sample_document(cache, sample.row, top=3)
    root = None if image_root is None else open_root(image_root, patience=0.0)
    console.print(_heading(document))
    for number, image in enumerate(document["images"]):
        pictures: list[RenderableType] = []
        content = sample.images[number].content
        seen = root is not None or content is not None
        room = (console.width - GAP) // 2 if sample.relations and seen else console.width
        side = max(min(PICTURE_SIDE, room), NARROWEST_CELL)
        if seen:
            pictures.append(_picture(image, root, content, side, console))
        if sample.relations:
            pictures.append(_relation(sample.relations[number], image, side, console))
        console.print(Text(f"\nimage {number}: {printable(image['path'])}", style="bold"))
        console.print(f"{image['width']} x {image['height']} pixels, {image['tokens']} visual tokens")
        if pictures:
            console.print(Columns(pictures, padding=(0, GAP)))
    console.print(_conversation(document))
    if sample.response is not None:
        rows = document["response"]
        wrong = sum(not row["agrees"] for row in rows)
        console.print(
            f"\n[bold]the teacher at {len(rows)} response positions, another token more likely than the "
            f"label at {wrong}[/]"
        )
        console.print(_response(rows, console.width))
    for number, image in enumerate(document["images"]):
        if image["visual"]:
            _print_visual(number, image, console)


def _heading(document: dict[str, Any]) -> Text:
    text = Text(f"row {document['row']}", style="bold")
    text.append(f"   id {printable(document['id'])}   {document['length']} tokens", style="not bold")
    scores = document["scores"]
    if scores:
        text.append(
            f"\nconfidence {scores['confidence']:.3f}   disagreement {scores['disagreement']:.3f}",
            "not bold",
        )
        if scores["perplexity"] is not None:
            text.append(f"   perplexity {scores['perplexity']:.3g}", "not bold")
    rows = document["rows_with_this_id"]
    if rows:
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        text.append(f"\nother rows with this id: {shown}", "not bold dim")
    return text


def _picture(
    image: dict[str, Any], root: ImageRoot | None, content: bytes | None, side: int, console: Console
) -> RenderableType:
    try:
        opened = open_image(root, image["path"], image["sha256"], content)
    except KdcacheError as error:
        told = error.detail if isinstance(error, RowRejected) else error
        return Text(f"no picture: {told}", style="yellow")
    seen = framed(opened.image, tuple(image["layout"]["frame"]))
    text = half_blocks(fitted(seen, side, side // 2), colour=_coloured(console))
    if opened.sha256 != image["sha256"]:
        text.append("\nnot the captured file: its digest differs", "yellow")
    return text


def _relation(relation: Relation, image: dict[str, Any], side: int, console: Console) -> Text:
    factor = principal_factor(relation, RELATION_RANK)
    facts = image["relation"]
    rich = facts["rank"] is None or facts["rank"] >= LEAST_CENTRED_RANK
    matrix = similarity(factor) if rich else factor @ factor.T
    picture = pooled(matrix, side - side % 2, side - side % 2)
    text = half_blocks(heat(picture), colour=_coloured(console))
    shape = "exact" if facts["rank"] is None else f"rank {facts['rank']}"
    told = (
        f"relation of its tokens, {'mean removed, ' if rich else ''}{shape}, residual {facts['residual']:.1e}"
    )
    return text.append("\n" + fill(told, side), "dim")


def _conversation(document: dict[str, Any]) -> Panel:
    text = Text()
    wrong = {entry["position"] + 1 for entry in document["response"] if not entry["agrees"]}
    for token in document["tokens"]:
        if token["role"] == "visual":
            text.append(f"[image {token['image']}: {token['count']} tokens]", ROLE_STYLE["visual"])
        else:
            style = WRONG_STYLE if token["position"] in wrong else ROLE_STYLE[token["role"]]
            text.append(printable(token["text"]), style)
    legend = Text("conversation: ")
    for role, style in ROLE_STYLE.items():
        legend.append(f" {role}", style)
    if wrong:
        legend.append("  ").append("the teacher disagrees", WRONG_STYLE)
    return Panel(text, title=legend, title_align="left")


def _response(rows: Sequence[dict[str, Any]], width: int) -> Table:
    """One line per position; ✗ where the label is not the teacher's most likely token. A narrow terminal
    drops the last columns, never part of a number."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    words = [row["label"] for row in rows] + [entry["text"] for row in rows for entry in row["top"]]
    longest = min(max((cell_len(visible(word)) for word in words), default=1), LONGEST_WORD)
    numbers = max(len(str(row["position"])) for row in rows) if rows else 2
    spare = width - max(numbers, 2) - 1 - (longest + 10) - 6
    tops = max(min(spare // (longest + 8), 3), 1)
    spare -= tops * (longest + 8)
    extra = [name for name, cost in (("entropy", 9), ("outside", 18)) if spare >= cost]
    for name in ("at", "", "label", "p(label)", *("1st", "2nd", "3rd")[:tops], *extra):
        right = name in ("at", "p(label)", "entropy", "outside")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        style = "" if row["agrees"] else "red"
        cells = [Text(f"{_word(entry['text'])} {entry['probability']:.3f}") for entry in row["top"][:tops]]
        if cells and style:
            cells[0].stylize("bold red")
        probability = row["label_probability"]
        table.add_row(
            str(row["position"]),
            Text("" if row["agrees"] else "✗", style),
            Text(_word(row["label"]), style or ROLE_STYLE["response"]),
            Text("-" if probability is None else f"{probability:.4f}", style),
            *cells,
            *[""] * (tops - len(cells)),
            *["-" if row["entropy"] is None else f"{row['entropy']:.2f}", f"{row['outside']:.4f}"][
                : len(extra)
            ],
        )
    return table


def _print_visual(number: int, image: dict[str, Any], console: Console) -> None:
    """The most likely token of each patch at its place; in a narrow terminal neighbors share a cell."""
    layers = image["layout"]["layers"]
    if image["layout"]["note"]:
        console.print(Text(f"\nimage {number}: {printable(image['layout']['note'])}", "yellow"))
    for layer in layers:
        where = f", {layer['name']}" if len(layers) > 1 else ""
        _print_layer(f"image {number}{where}", layer, image["visual"], console)


def _print_layer(
    named: str, layer: dict[str, Any], visual: Sequence[dict[str, Any]], console: Console
) -> None:
    tokens = np.array(layer["tokens"])
    rows, columns = tokens.shape
    pool = 1
    while pool < columns and -(-columns // pool) * NARROWEST_CELL > console.width:
        pool += 1
    cell = max(min(console.width // -(-columns // pool) - 1, LONGEST_WORD), 1)
    of = "" if pool == 1 else f", the most confident of {pool} x {pool} patches"
    console.print(f"\n[bold]the teacher's most likely token at each patch of {named}{of}[/]")
    lines: list[list[Text]] = []
    for top in range(0, rows, pool):
        lines.append([])
        for left in range(0, columns, pool):
            here = tokens[top : top + pool, left : left + pool].ravel()
            firsts = [visual[place]["top"][0] for place in here[here >= 0]]
            best = max(firsts, key=lambda entry: entry["probability"], default=NOTHING)
            lines[-1].append(Text(visible(best["text"])[:cell], _certainty(best["probability"])))
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    widest = max(word.cell_len for line in lines for word in line)
    for _ in lines[0]:  # all of one width, as the patches are
        table.add_column(min_width=widest, no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    if layer["row_ends"]:
        ends = [visual[place]["top"][0]["text"] for place in layer["row_ends"]]
        said = ", ".join(f"{visible(word)} x {times}" for word, times in Counter(ends).most_common(5))
        console.print(Text(f"at the tokens that end its rows: {said}", "dim"))


def _certainty(probability: float) -> str:
    return "bold" if probability >= 0.5 else "dim" if probability < 0.1 else ""


def _word(text: str) -> str:
    shown = visible(text)
    return shown if len(shown) <= LONGEST_WORD else shown[: LONGEST_WORD - 1] + "…"


def _coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color
