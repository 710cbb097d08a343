"""Files of questions, answers and uploads, as LLaVA's evaluation scripts read and write them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from cache_schema.errors import KdcacheError, first_line, shown
from cache_schema.output import write_text, writing


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A question of a benchmark.

    question_id: as in its file; several questions may share one. text: what is asked, after the image.
    prompt: what the answer file tells of it. image: a path under the image folder, None for no image.
    content: the bytes of an image that the question file itself carries. preset: the answer of a question
    that is not asked. told: the rest of what the question file says.
    """

    question_id: str | int
    text: str
    prompt: str
    image: str | None = None
    content: bytes | None = None
    preset: str | None = None
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark of LLaVA-KD's tables.

    folder: its folder in LLaVA's `eval`. questions: names of its question file. images: its image folder, and
    annotations: its annotations ("" where none are published), all under `folder`. read: the questions of a
    file. score: from questions, answers and the annotations' path to scores, with the number of the paper's
    column under `value`; None for questions without annotations. upload: the files for the server or the
    official tool: from questions, answers, the question file, the annotations and the path without suffix.
    """

    name: str
    title: str
    folder: str
    questions: tuple[str, ...]
    images: str
    annotations: str
    read: Callable[[Path], list[Item]]
    score: Callable[[Sequence[Item], Sequence[str], Path | None], dict[str, Any] | None]
    upload: Callable[[Sequence[Item], Sequence[str], Path, Path | None, Path], Path | None] | None = None
    max_new_tokens: int = 128


def load_json(path: Path) -> Any:
    """The value of a JSON file. KdcacheError with the file's name."""
    return _parsed(path, _text(path), 0)


def load_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. KdcacheError with file and line."""
    lines = []
    for number, line in enumerate(_text(path).split("\n"), start=1):  # not at U+2028 within a text
        if line.strip():
            value = _parsed(path, line, number)
            if not isinstance(value, dict):
                raise KdcacheError(f"{path}, line {number}: not a JSON object; give the published file")
            lines.append(value)
    if not lines:
        raise KdcacheError(f"{path} has no questions; give the published file")
    return lines


def load_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table of tab-separated values with a header."""
    csv.field_size_limit(sys.maxsize)  # images are fields
    rows = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter="\t")
    return [{key: value or "" for key, value in row.items() if key is not None} for row in rows]


def value_of(path: Path, holder: Mapping[str, Any], key: str, *others: str) -> Any:
    """`holder[key]`, or under the first other key it has. KdcacheError naming the file where it has none."""
    for name in (key, *others):
        if name in holder:
            return holder[name]
    raise KdcacheError(
        f"{path}: {shown(json.dumps(holder, default=str))} has no `{key}`; give the published file"
    )


def write_answers(path: Path, items: Sequence[Item], answers: Sequence[str], model: str) -> None:
    """LLaVA's answer file: JSON lines in the order of the questions."""
    lines = []
    for row, (item, answer) in enumerate(zip(items, answers, strict=True)):
        identity = hashlib.blake2b(f"{row} {item.question_id} {answer}".encode(), digest_size=11).hexdigest()
        line = {"question_id": item.question_id, "prompt": item.prompt, "text": answer}
        line |= {"answer_id": identity, "model_id": model}
        lines.append(json.dumps({**line, "metadata": {}}) + "\n")
    write_text(path, "".join(lines))


def write_xlsx(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """A workbook with one sheet of texts; whole numbers are stored as numbers."""
    cells = []
    for row in rows:
        texts = [
            f"<c><v>{value}</v></c>"
            if value.isascii() and value.isdecimal() and (value == "0" or value[0] != "0")
            else f'<c t="inlineStr"><is><t xml:space="preserve">{escape(_printable(value))}</t></is></c>'
            if value
            else "<c/>"
            for value in row
        ]
        cells.append(f"<row>{''.join(texts)}</row>")
    office = "http://schemas.openxmlformats.org"
    main, kinds = f"{office}/spreadsheetml/2006/main", f"{office}/officeDocument/2006/relationships"
    types, kind = f"{office}/package/2006/content-types", "application/vnd.openxmlformats-officedocument"
    relations = (
        f'<Relationships xmlns="{office}/package/2006/relationships"><Relationship Id="r1" Type="{kinds}'
    )
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{types}"><Default Extension="rels" ContentType='
        '"application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/xl/workbook.xml" '
        f'ContentType="{kind}.spreadsheetml.sheet.main+xml"/><Override PartName="/xl/worksheets/sheet1.xml" '
        f'ContentType="{kind}.spreadsheetml.worksheet+xml"/></Types>',
        "_rels/.rels": f'{relations}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/_rels/workbook.xml.rels": f'{relations}/worksheet" '
        'Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{kinds}"><sheets>'
        '<sheet name="Sheet1" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{"".join(cells)}'
        "</sheetData></worksheet>",
    }
    with writing(path), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in parts.items():
            archive.writestr(name, f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n{text}')


def _printable(text: str) -> str:
    """Without the control characters that XML has no form for."""
    return "".join(character for character in text if character >= " " or character in "\t\n")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise KdcacheError(f"{path} cannot be read: {first_line(error)}; give the published file") from error


def _parsed(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"{path}, line {line}" if line else str(path)
        raise KdcacheError(f"{where}: not JSON ({first_line(error)}); give the published file") from error
