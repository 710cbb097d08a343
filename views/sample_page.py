"""One sample in the terminal: its image, its conversation, and what the teacher says at every position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cache_schema.cache import Cache
from cache_schema.errors import RowRejected
from cache_schema.images import open_image
from cache_schema.records import Relation
from views.blocks import fitted, half_blocks, heat
from views.grid import ImageSettings
from views.relation_picture import pooled, principal_factor, similarity
from views.sample_document import find_sample, sample_document
from views.terminal import results
from views.token_text import printable, visible

ROLE_STYLE = {"prompt": "cyan", "visual": "magenta", "response": "green"}
PICTURE_LINES = 20
RELATION_SIDE = 40
RELATION_RANK = 64
LEAST_CENTRED_RANK = 4
"""Of a lower rank hardly anything is left when the tokens' mean is taken away."""

NARROWEST_CELL = 6
LONGEST_WORD = 14


def print_sample(
    cache: Cache, row_or_id: int | str, image_root: Path | None, console: Console = results
) -> None:
    """Prints the sample to `console`. KdcacheError when there is no such sample; an image that is missing or
    no longer the captured one is said on the page."""
    sample = find_sample(cache, row_or_id)
    document = sample_document(cache, sample.row, top=3)
    console.print(_heading(document))
    settings = ImageSettings(cache.assets)
    for number, image in enumerate(document["images"]):
        pictures: list[RenderableType] = []
        if image_root is not None:
            pictures.append(_picture(image, image_root, settings, console))
        if sample.relations:
            pictures.append(_relation(sample.relations[number], image, console))
        console.print(Text(f"\nimage {number}: {printable(image['path'])}", style="bold"))
        console.print(f"{image['width']} x {image['height']} pixels, {image['tokens']} visual tokens")
        if pictures:
            console.print(Columns(pictures, padding=(0, 3)))
    console.print(_conversation(document))
    if sample.response is not None:
        rows = document["response"]
        wrong = sum(not row["agrees"] for row in rows)
        console.print(
            f"\n[bold]the teacher at {len(rows)} response positions, "
            f"another token likelier than the label at {wrong}[/]"
        )
        console.print(_response(rows))
    for number, image in enumerate(document["images"]):
        if image["visual"]:
            _print_visual(number, image, console)


def _heading(document: dict[str, Any]) -> Text:
    text = Text(f"row {document['row']}", style="bold")
    text.append(f"   id {printable(document['id'])}   {document['length']} tokens", style="not bold")
    scores = document["scores"]
    if scores:
        text.append(
            f"   confidence {scores['confidence']:.3f}   disagreement {scores['disagreement']:.3f}",
            "not bold",
        )
        if scores["perplexity"] is not None:
            text.append(f"   perplexity {scores['perplexity']:.3g}", "not bold")
    rows = document["rows_with_this_id"]
    if rows:
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        text.append(f"\nother rows with this id: {shown}", "not bold dim")
    return text


def _picture(image: dict[str, Any], root: Path, settings: ImageSettings, console: Console) -> RenderableType:
    try:
        opened = open_image(root, image["path"])
    except RowRejected as rejected:
        return Text(f"no picture: {rejected.detail}", style="yellow")
    seen = settings.as_seen(opened.image)
    text = half_blocks(fitted(seen, min(console.width, 60), PICTURE_LINES), colour=_coloured(console))
    if opened.sha256 != image["sha256"]:
        text.append("\nnot the file that was captured: its digest differs", "yellow")
    return text


def _relation(relation: Relation, image: dict[str, Any], console: Console) -> Text:
    factor = principal_factor(relation, RELATION_RANK)
    facts = image["relation"]
    rich = facts["rank"] is None or facts["rank"] >= LEAST_CENTRED_RANK
    matrix = similarity(factor) if rich else factor @ factor.T
    picture = pooled(matrix, RELATION_SIDE, RELATION_SIDE)
    text = half_blocks(heat(picture), colour=_coloured(console))
    shape = "exact" if facts["rank"] is None else f"rank {facts['rank']}"
    text.append(
        f"\nrelation{', mean removed' if rich else ''}: {shape}, residual {facts['residual']:.1e}", "dim"
    )
    return text


def _conversation(document: dict[str, Any]) -> Panel:
    text = Text()
    for token in document["tokens"]:
        if token["role"] == "visual":
            text.append(f"[image {token['image']}: {token['count']} tokens]", ROLE_STYLE["visual"])
        else:
            text.append(printable(token["text"]), ROLE_STYLE[token["role"]])
    legend = Text("conversation: ")
    for role, style in ROLE_STYLE.items():
        legend.append(f" {role}", style)
    return Panel(text, title=legend, title_align="left")


def _response(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("at", "label", "p(label)", "1st", "2nd", "3rd", "entropy", "outside"):
        table.add_column(
            name, justify="right" if name in ("at", "p(label)", "entropy", "outside") else "left"
        )
    for row in rows:
        style = "" if row["agrees"] else "red"
        label = Text(_word(row["label"]), style or ROLE_STYLE["response"])
        tops = [Text(f"{_word(entry['text'])} {entry['probability']:.3f}") for entry in row["top"]]
        if tops and style:
            tops[0].stylize("bold red")
        probability = row["label_probability"]
        table.add_row(
            str(row["position"]),
            label,
            Text("-" if probability is None else f"{probability:.4f}", style),
            *tops,
            *[""] * (3 - len(tops)),
            "-" if row["entropy"] is None else f"{row['entropy']:.2f}",
            f"{row['outside']:.4f}",
        )
    return table


def _print_visual(number: int, image: dict[str, Any], console: Console) -> None:
    """The likeliest token of each patch where it lies; in a narrow terminal neighbours share a cell."""
    rows, columns = image["grid"]["rows"], image["grid"]["columns"]
    pool = 1
    while -(-columns // pool) * NARROWEST_CELL > console.width:
        pool += 1
    cell = min(console.width // -(-columns // pool) - 1, LONGEST_WORD)
    words = np.full((rows, columns), "", dtype=object)
    sure = np.full((rows, columns), -1.0)
    for place, entry in enumerate(image["visual"]):
        words.flat[place] = entry["top"][0]["text"]
        sure.flat[place] = entry["top"][0]["probability"]
    of = "" if pool == 1 else f", the surest of {pool} x {pool} patches"
    console.print(f"\n[bold]the teacher's likeliest token at each patch of image {number}{of}[/]")
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    for top in range(0, rows, pool):
        cells = []
        for left in range(0, columns, pool):
            part = sure[top : top + pool, left : left + pool]
            i, j = np.unravel_index(int(part.argmax()), part.shape)
            word = visible(str(words[top + i, left + j]))[:cell]
            cells.append(Text(word, _certainty(float(part[i, j])), no_wrap=True, overflow="crop"))
        table.add_row(*cells)
    console.print(table)


def _certainty(probability: float) -> str:
    return "bold" if probability >= 0.5 else "dim" if probability < 0.1 else ""


def _word(text: str) -> str:
    shown = visible(text)
    return shown if len(shown) <= LONGEST_WORD else shown[: LONGEST_WORD - 1] + "…"


def _coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color
