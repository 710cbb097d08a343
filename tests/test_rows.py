"""Rows: every form in which LLaVA and `messages` data come, and every way in which they are broken."""

import base64
import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cache_schema.datasets.rows as rows_module
from cache_schema.datasets.conversations import conversation_of
from cache_schema.datasets.rows import open_dataset
from cache_schema.errors import KdcacheError, RowRejected
from tests.tiny_models import tiny_rows


def llava(*turns: str, **rest: Any) -> dict[str, Any]:
    roles = ("human", "gpt")
    return {
        "id": "a",
        **rest,
        "conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)],
    }


IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


@pytest.mark.parametrize("indent", [None, 1])
def test_array_and_lines_hold_the_same_rows(tmp_path: Path, indent: int | None) -> None:
    rows = tiny_rows(7)
    rows[3]["conversations"][1]["value"] = 'Ça alors: "]}{[,\\" — 漢字 😀'
    rows[5]["id"] = 12
    array, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    array.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    lines.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    first, second = open_dataset(array), open_dataset(lines)
    assert len(first) == len(second) == 7
    assert list(first) == list(second)
    assert first[3].answers[0] == rows[3]["conversations"][1]["value"]
    assert [first.label_of(row) for row in (4, 5)] == ["row-4", "12"]
    assert first.digest != second.digest
    assert np.array_equal(first.first_images, second.first_images)


@pytest.mark.parametrize("step", [1, 7, 64, 1000])
def test_array_is_read_whatever_the_window(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_STEP", step)
    rows = tiny_rows(5)
    rows[1]["conversations"][0]["value"] += "é" * 200
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [row.sample_id for row in open_dataset(path)] == [row["id"] for row in rows]
    assert open_dataset(path)[1].messages[0]["content"][1]["text"].endswith("é" * 200)


def test_first_images_group_by_path(tmp_path: Path) -> None:
    rows = [llava("q", "a", image="x.png"), llava("q", "a"), llava("p", "b", image=["x.png"]), llava()]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    keys = open_dataset(path).first_images
    assert keys[0] == keys[2] != 0
    assert keys[1] == keys[3] == 0


def test_marks_become_image_parts_in_place() -> None:
    row = llava("What is\n<image>\nthis?", "A cat.", "And <image>?", "A dog.", images=["1.png", "2.png"])
    conversation = conversation_of(row, 0)
    assert conversation.images == ("1.png", "2.png")
    assert conversation.messages[0]["content"] == [text("What is"), IMAGE, text("this?")]
    assert conversation.messages[2]["content"] == [text("And "), IMAGE, text("?")]


def test_an_image_without_a_mark_stands_first() -> None:
    conversation = conversation_of(llava("What?", "A cat.", image="1.png"), 0)
    assert conversation.messages[0]["content"] == [IMAGE, text("What?")]


def test_turns_that_answer_nothing_are_skipped() -> None:
    turns = llava("q", "a", "unanswered")["conversations"]
    row = {"conversations": [{"from": "gpt", "value": "leading"}, *turns], "model": "", "kind": "shape"}
    conversation = conversation_of(row, 3)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert conversation.sample_id == "3"
    assert conversation.extra == {"model": "", "kind": "shape"}


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, text("What?")]},
    {"role": "assistant", "content": [text("A cat.")]},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_messages_rows(tmp_path: Path, suffix: str) -> None:
    messages = [{"role": m["role"], "content": [text(m["content"])]} for m in MESSAGES[:1]] + MESSAGES[1:]
    rows = [{"messages": messages, "images": [f"{i}.png"]} for i in range(5)]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":  # Arrow gives every part every key, with nulls
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    dataset = open_dataset(path)
    assert [row.images for row in dataset] == [(f"{i}.png",) for i in range(5)]
    assert dataset[4].messages[0] == {"role": "system", "content": [text("Be brief.")]}
    assert dataset[0].messages[1]["content"] == [IMAGE, text("What?")]
    assert len(set(dataset.first_images)) == 5


def test_image_parts_may_carry_their_paths() -> None:
    content = [
        {"type": "image", "path": "1.png"},
        {"type": "image_url", "image_url": {"url": "file://2.png"}},
    ]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Two."}]}
    assert conversation_of(row, 0).images == ("1.png", "2.png")


def test_images_that_rows_carry_themselves(tmp_path: Path) -> None:
    """As `datasets` stores them (a struct of bytes and path), and as data URLs in JSON."""
    content = [b"one", b"two"]
    paths = [f"embedded/{d[:2]}/{d}" for d in (hashlib.sha256(each).hexdigest() for each in content)]
    images = [{"bytes": each, "path": "ignored.png"} for each in content]
    rows = [
        {"messages": MESSAGES[1:], "images": images[:1]},
        {"messages": MESSAGES[1:], "images": images[1:]},
    ]
    rows.append({"messages": MESSAGES[1:], "images": [{"bytes": None, "path": "x.png"}]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1)
    dataset = open_dataset(tmp_path / "a.parquet")
    assert [row.images for row in dataset] == [(paths[0],), (paths[1],), ("x.png",)]
    assert [row.embedded for row in dataset] == [{paths[0]: b"one"}, {paths[1]: b"two"}, {}]
    assert len(set(dataset.first_images)) == 3

    url = "data:image/png;base64," + base64.b64encode(b"two").decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, text("What?")]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Two."}]}
    assert conversation_of(row, 0).embedded == {paths[1]: b"two"}


def test_parquet_rows_in_any_order(tmp_path: Path) -> None:
    """More rows than a batch, row groups that do not fit the batches, and the file gone afterwards."""
    rows = [{"conversations": llava("q", str(i))["conversations"], "image": f"{i}.png"} for i in range(1200)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=190)
    dataset = open_dataset(path)
    path.unlink()
    for row in np.random.default_rng(0).permutation(1200).tolist():
        assert dataset[row].images == (f"{row}.png",)
        assert dataset[row].answers == [str(row)]


def test_parquet_columns_of_categories(tmp_path: Path) -> None:
    """As pandas writes them: another dictionary in every row group."""
    tables = [
        pa.table(
            {
                "conversations": [llava("q", "a")["conversations"]] * 2,
                "image": pa.array(names).dictionary_encode(),
                "source": pa.array(kinds).dictionary_encode(),
            }
        )
        for names, kinds in ((["a.png", "b.png"], ["vqa", "ocr"]), (["c.png", "a.png"], ["ocr", None]))
    ]
    with pq.ParquetWriter(tmp_path / "a.parquet", tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    dataset = open_dataset(tmp_path / "a.parquet")
    assert [row.images for row in dataset] == [("a.png",), ("b.png",), ("c.png",), ("a.png",)]
    assert [row.extra["source"] for row in dataset] == ["vqa", "ocr", "ocr", None]
    assert dataset.first_images[0] == dataset.first_images[3]


def test_no_room_for_the_copy_of_a_parquet_file_is_not_its_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    pq.write_table(pa.Table.from_pylist([llava("q", "a")]), tmp_path / "a.parquet")
    monkeypatch.setattr(pa.ipc, "new_file", full)
    with pytest.raises(KdcacheError, match=r"has no room for a copy of .*a\.parquet.*; set TMPDIR"):
        open_dataset(tmp_path / "a.parquet")


@pytest.mark.parametrize("damage", ["bom", "crlf", "nan", "bytes", "twice"])
@pytest.mark.parametrize("form", ["array", "lines"])
def test_text_files_as_they_come(tmp_path: Path, form: str, damage: str) -> None:
    rows = [llava("q", str(i), image="é.png", score=1.0) for i in range(3)]
    if damage == "twice":
        rows = [*rows, rows[0]]
    written = [json.dumps(row, ensure_ascii=False) for row in rows]
    content = ("[" + ",\r\n".join(written) + "]" if form == "array" else "\r\n".join(written)).encode()
    if damage == "bom":
        content = b"\xef\xbb\xbf" + content
    elif damage == "nan":
        content = content.replace(b"1.0", b"NaN", 1)
    elif damage == "bytes":  # Latin-1 in one row of a UTF-8 file
        content = content.replace("é".encode(), b"\xe9", 1)
    path = tmp_path / "a.json"
    path.write_bytes(content)
    dataset = open_dataset(path)
    assert len(dataset) == len(rows)
    if damage == "bytes":
        with pytest.raises(RowRejected, match="broken_json"):
            dataset[0]
    else:
        assert dataset[0].answers == ["0"]
    assert [dataset[row].images for row in range(1, len(rows))] == [("é.png",)] * (len(rows) - 1)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (None, "broken_row"),
        ({"id": 1}, "no_turns"),
        ({"conversations": []}, "no_turns"),
        ({"conversations": ["text"]}, "broken_row"),
        ({"conversations": [{"from": "human"}]}, "broken_row"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "unknown_role"),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, "unknown_role"),
        (llava("only a question"), "no_turns"),
        ({"conversations": [{"from": "gpt", "value": "only an answer"}]}, "no_turns"),
        ({"conversations": [{"from": "human", "value": "x"}] * 2}, "turn_order"),
        (llava("<image>", "a"), "image_count"),
        (llava("<image><image>", "a", image="1.png"), "image_count"),
        (llava("<image>", "a", images=["1.png", "2.png"]), "image_count"),
        (llava("q", "a", image=7), "broken_row"),
        (llava("q", "a", image={"bytes": "xx", "path": None}), "broken_row"),
        (llava("q", "a", image="data:image/png;base64,%%"), "broken_row"),
        (llava("q", "a", image="data:application/octet-stream;base64,%%"), "broken_row"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "broken_row"),
    ],
)
def test_malformed_rows_are_rejected_with_a_reason(row: Any, reason: str) -> None:
    with pytest.raises(RowRejected) as caught:
        conversation_of(row, 9)
    assert caught.value.reason == reason
    assert "row 9" in caught.value.detail


def test_a_broken_line_is_one_rejected_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(llava("q", "a")).encode() + b'\n{"id": \n\xff\xfe\n')
    dataset = open_dataset(path)
    assert len(dataset) == 3
    assert dataset[0].answers == ["a"]
    for row in (1, 2):
        with pytest.raises(RowRejected, match="broken_json"):
            dataset[row]
        assert dataset.label_of(row) == str(row)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b"[\n" + json.dumps(llava("q", "a")).encode() + b",\n", "cut off after row 1"),
        ("a.json", b"[" + json.dumps(llava("q", "a")).encode() + b', {"id": ]', "not valid JSON in row 1"),
        ("a.json", b'[{"id": 1}]\n[{"id": 2}]', "goes on after its array ends, at byte 12"),
        ("a.json", b"hello\nworld", "neither a JSON array nor JSON lines"),
        ("a.parquet", b"PAR1 and no more", "not a readable Parquet file"),
    ],
)
def test_files_that_cannot_be_read_as_a_whole(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(KdcacheError, match=message) as caught:
        open_dataset(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(KdcacheError, match="does not exist"):
        open_dataset(tmp_path / "a.json")
