"""Rows: every form in which LLaVA and `messages` data come, and every way in which they are broken."""

import base64
import errno
import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cache_schema.datasets.json_rows as json_rows
from cache_schema.datasets.conversations import conversation_of
from cache_schema.datasets.rows import open_dataset
from cache_schema.errors import KdcacheError, RowRejected
from tests.tiny_models import tiny_rows, write_png


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
    monkeypatch.setattr(json_rows, "_STEP", step)
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
    with pytest.raises(KdcacheError, match=r"has no space for a copy of .*a\.parquet.*; set TMPDIR"):
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
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "video"),
    ],
)
def test_malformed_rows_are_rejected_with_a_reason(row: Any, reason: str) -> None:
    with pytest.raises(RowRejected) as caught:
        conversation_of(row, 9)
    assert caught.value.reason == reason
    assert "row 9" in caught.value.detail


def messages(*parts: Any, **turn: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": list(parts) if parts else "What?", **turn},
            {"role": "assistant", "content": "A cat."},
        ]
    }


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (llava("<video>\nWhat happens?", "A fall.", video="clip.mp4"), "video"),
        (llava("What happens?", "A fall.", videos=["clip.mp4"]), "video"),
        (llava("<|video_pad|>What happens?", "A fall."), "video"),
        (llava("What is heard?", "A bell.", audio_path="a.wav"), "audio"),
        (llava("<audio>What is heard?", "A bell."), "audio"),
        (messages({"type": "input_audio", "input_audio": {"data": "AAAA"}}, text("What?")), "audio"),
        (messages(video="clip.mp4"), "video"),
        (llava("<image>\nq", "a", image="0.png", images=["1.png"]), "image_conflict"),
        (llava("q", "a", image_path="0.png"), "image_key"),
        (llava("<image_1>\nq", "a", image="0.png"), "image_mark"),
        (llava("q", "a", tools=[{"name": "f"}]), "tools"),
        (messages(tool_calls=[{"type": "function"}]), "tools"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "tools"),
        (messages(reasoning_content="I think."), "reasoning"),
        (messages({"type": "thinking", "thinking": "I think."}), "reasoning"),
        (messages(weight=0.5), "turn_weight"),
        (messages(weight="none"), "turn_weight"),
        (messages({"type": "image", "index": 1}, text("What?")) | {"images": ["0.png"]}, "image_count"),
        (messages({"type": "image", "index": 0.5}) | {"images": ["0.png"]}, "broken_row"),
        (messages({"type": "text", "text": "What?", "image": "0.png"}), "broken_row"),
        (messages(image=["0.png", "1.png"], value="<image>"), "broken_row"),
        ({"conversations": "[" * 100_000}, "no_turns"),
        (llava("q", "a", image={"bytes": 3.0, "path": None}), "broken_row"),
    ],
)
def test_what_would_be_lost_is_told(row: Any, reason: str) -> None:
    with pytest.raises(RowRejected) as caught:
        conversation_of(row, 9)
    assert caught.value.reason == reason
    assert "row 9" in caught.value.detail


@pytest.mark.parametrize(
    ("row", "images"),
    [
        (llava("<image>\nq", "a", image="0.png", images=[]), ["0.png"]),
        (llava("<image>\nq", "a", image="", images=["0.png", None]), ["0.png"]),
        (llava("<image>\nq", "a", image="0.png", images=["0.png"]), ["0.png"]),
        (llava("q", "a", image=[None]), []),
        (llava("q", "a", image={"bytes": None, "path": None}, images=[{}]), []),
        (llava("q", "a", image=float("nan")), []),
        (llava("q", "a", image="0.png", image_url="https://example.org/0.png"), ["0.png"]),
        (llava("q", "a", video=None, audio="", videos=[], tools=[]), []),
        (llava("<img>a/0.png</img>\nWhat?", "A cat."), ["a/0.png"]),
        (llava("q", "a", images='["0.png", "1.png"]'), ["0.png", "1.png"]),
        (messages(text("What?"), images=["0.png"]), ["0.png"]),
        (
            messages({"type": "image", "index": 1}, text("or"), {"type": "image", "index": 0.0})
            | {"images": ["0.png", "1.png"]},
            ["1.png", "0.png"],
        ),
        (messages({"type": "image", "index": None}) | {"images": ["0.png"]}, ["0.png"]),
    ],
)
def test_images_by_every_name(row: Any, images: list[str]) -> None:
    conversation = conversation_of(row, 0)
    assert list(conversation.images) == images
    parts = [part["type"] for message in conversation.messages for part in message["content"]]
    assert parts.count("image") == len(images)


def test_line_ends_and_blanks_at_a_mark() -> None:
    for written in ("<image>\r\nWhat?", "<image> \n\r\nWhat?", "What?\r\n \t\n<image>"):
        parts = conversation_of(llava(written, "A\r\ncat.\rYes.", image="0.png"), 0).messages
        assert sorted(parts[0]["content"], key=str) == [IMAGE, text("What?")]
        assert parts[1]["content"] == [text("A\ncat.\nYes.")]
    (_, kept) = conversation_of(llava("<image>\n    code", "a", image="0.png"), 0).messages[0]["content"]
    assert kept == text("    code")
    assert conversation_of(llava("<image>" + "\n" * 200_000 + "x", "a", image="0.png"), 0).images


def test_one_of_two_schemas_is_null(tmp_path: Path) -> None:
    """Arrow gives every turn every key."""
    turns = llava("q", "a")["conversations"]
    rows = [{"conversations": turns, "messages": None}, {"conversations": None, "messages": MESSAGES[:2]}]
    rows[1]["messages"] = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}]
    mixed = [{"from": None, "value": None, "role": "user", "content": "r"}]
    mixed.append({"from": "gpt", "value": "c", "role": None, "content": None})
    pq.write_table(pa.Table.from_pylist([*rows, {"conversations": mixed}]), tmp_path / "a.parquet")
    assert [row.answers for row in open_dataset(tmp_path / "a.parquet")] == [["a"], ["b"], ["c"]]
    with pytest.raises(RowRejected, match="differ"):
        conversation_of({"conversations": [{"from": "human", "role": "assistant", "value": "q"}]}, 0)


def test_turns_that_are_not_to_be_learned() -> None:
    row = llava("q", "a", "p", "b")
    assert conversation_of(row, 0).supervised == ()
    row["conversations"][1]["weight"] = 0
    row["conversations"][3]["weight"] = 1.0
    assert conversation_of(row, 0).supervised == (False, True)
    row["conversations"][3]["train"] = False
    assert conversation_of(row, 0).supervised == (False, False)


def test_turns_as_text_and_as_columns() -> None:
    turns = llava("q", "a")["conversations"]
    columns = {"from": ["human", "gpt"], "value": ["q", "a"]}
    for form in (json.dumps(turns), columns, json.dumps(columns)):
        assert conversation_of({"conversations": form}, 0).answers == ["a"]
    with pytest.raises(RowRejected, match="no_turns"):
        conversation_of({"conversations": "q"}, 0)


def test_images_as_text_and_bytes(tmp_path: Path) -> None:
    content = write_png(tmp_path / "0.png", seed=0).read_bytes()
    path = f"embedded/{hashlib.sha256(content).hexdigest()[:2]}/{hashlib.sha256(content).hexdigest()}"
    bare = base64.b64encode(content).decode()
    wrapped = base64.encodebytes(content).decode()
    safe = base64.urlsafe_b64encode(content).decode().rstrip("=")
    forms = [bare, wrapped, safe, content, {"bytes": bare}, {"bytes": content, "path": "0.png"}]
    forms += [f"data:image/png;base64,{form}" for form in (bare, wrapped, safe, bare.replace("+", "%2B"))]
    for form in forms:
        conversation = conversation_of(llava("q", "a", image=form), 0)
        assert conversation.images == (path,), form
        assert conversation.embedded == {path: content}
    long_path = "iVBORw0KGgo" + "/a" * 60 + ".png"
    assert conversation_of(llava("q", "a", image=long_path), 0).images == (long_path,)


def test_an_id_is_fit_to_be_shown() -> None:
    assert conversation_of(llava("q", "a") | {"id": "\x1b[31mred"}, 0).sample_id == r"\x1b[31mred"
    assert len(conversation_of(llava("q", "a") | {"id": "x" * 10_000}, 0).sample_id) <= 201
    assert conversation_of(llava("q", "a") | {"id": float("nan")}, 4).sample_id == "4"


def test_every_detail_is_short_and_without_control_characters() -> None:
    for row in (
        llava("q", "a", image="data:image/png;base64," + "\x1b[31m" * 200_000),
        llava("q", "a", image=[["\x1b" * 100_000]]),
        {"conversations": [{"from": "\x07" * 100_000, "value": "q"}]},
        messages({"type": "\n" * 100_000}),
        llava("q", "a", **{"images_path": "x", "pictures\x1b": "y"}),
    ):
        with pytest.raises(RowRejected) as caught:
            conversation_of(row, 9)
        assert len(str(caught.value)) <= 520
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("form", ["array", "lines"])
@pytest.mark.parametrize("packed", [False, True])
def test_text_in_other_encodings_and_packed(tmp_path: Path, encoding: str, form: str, packed: bool) -> None:
    rows = [llava("q", f"é 漢字 {i}", image="é.png") for i in range(300)]
    written = json.dumps(rows) if form == "array" else "\n".join(map(json.dumps, rows))
    content = written.replace("\\u00e9", "é").encode(encoding)
    path = tmp_path / ("a.json.gz" if packed else "a.json")
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    dataset = open_dataset(path)
    assert [row.answers for row in dataset] == [[f"é 漢字 {i}"] for i in range(300)]
    assert dataset.digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("before", ['"version": "1", "info": {"data": []}, ', ""])
@pytest.mark.parametrize("after", [', "count": 2', ""])
@pytest.mark.parametrize("indent", [None, 1])
def test_rows_under_a_key(tmp_path: Path, before: str, after: str, indent: int | None) -> None:
    rows = tiny_rows(4)
    path = tmp_path / "a.json"
    path.write_text("{" + before + '"data": ' + json.dumps(rows, indent=indent) + after + "}\n")
    assert [row.sample_id for row in open_dataset(path)] == [row["id"] for row in rows]


def test_a_line_with_a_list_of_its_own_is_a_row(tmp_path: Path) -> None:
    rows = [{"annotations": [{"box": 1}]} | row for row in tiny_rows(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(open_dataset(tmp_path / "a.jsonl")) == 3


def table_of(rows: int, first: int = 0) -> pa.Table:
    said = [llava("q", str(first + i), image=f"{first + i}.png") for i in range(rows)]
    return pa.Table.from_pylist(said)


def write_stream(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def write_file(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.PARQUET", pq.write_table),
        ("rows.json", pq.write_table),
        ("a.arrow", write_file),
        ("b.arrow", write_stream),
    ],
)
def test_tables_by_any_name(tmp_path: Path, name: str, write: Any) -> None:
    write(table_of(600), tmp_path / name)
    dataset = open_dataset(tmp_path / name)
    assert [dataset[row].answers for row in (599, 0, 256)] == [["599"], ["0"], ["256"]]


def test_an_arrow_file_whose_offsets_lead_elsewhere_is_refused(tmp_path: Path) -> None:
    """pyarrow would read outside its memory."""
    table = pa.table({"id": ["a", "bc", "def"]})
    good, bad = (np.array([0, 1, 3, end], dtype=np.int32).tobytes() for end in (6, 2**30))
    for write, name in ((write_file, "a.arrow"), (write_stream, "b.arrow")):
        write(table, tmp_path / name)
        content = (tmp_path / name).read_bytes()
        assert content.count(good) == 1
        (tmp_path / name).write_bytes(content.replace(good, bad))
        with pytest.raises(KdcacheError, match="not a readable Arrow file"):
            open_dataset(tmp_path / name)


def test_a_folder_of_shards(tmp_path: Path) -> None:
    pq.write_table(table_of(300), tmp_path / "train-00000-of-00002.parquet")
    second = table_of(20, 300).drop_columns(["id"])
    pq.write_table(second, tmp_path / "train-00001-of-00002.parquet")
    (tmp_path / "README.md").write_text("What it is.")
    dataset = open_dataset(tmp_path)
    assert [dataset[row].answers[0] for row in range(len(dataset))] == [str(i) for i in range(320)]
    assert len(set(dataset.first_images)) == 320
    pq.write_table(table_of(20), tmp_path / "train-00001-of-00002.parquet")
    assert open_dataset(tmp_path).digest != dataset.digest
    pq.write_table(table_of(1), tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(KdcacheError, match="shards of test and train"):
        open_dataset(tmp_path)


def test_columns_of_categories_inside_turns(tmp_path: Path) -> None:
    roles = pa.array(["human", "gpt"] * 3).dictionary_encode()
    turns = pa.StructArray.from_arrays([roles, pa.array(["q", "a", "q", "b", "q", "c"])], ["from", "value"])
    table = pa.table({"conversations": pa.ListArray.from_arrays(pa.array([0, 2, 4, 6]), turns)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert [row.answers for row in open_dataset(tmp_path / "a.parquet")] == [["a"], ["b"], ["c"]]


def test_a_cell_that_python_cannot_hold_is_one_bad_row(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 2, [None, *pa.array([b"ok", b"\xff\xfe"]).buffers()[1:]])
    table = table_of(2).append_column("note", broken)
    pq.write_table(table, tmp_path / "a.parquet")
    dataset = open_dataset(tmp_path / "a.parquet")
    assert dataset[0].answers == ["0"]
    with pytest.raises(RowRejected, match="broken_row"):
        dataset[1]
    assert dataset.label_of(1) == "1"


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
        ("a.json", b"[\n" + json.dumps(llava("q", "a")).encode() + b",\n", "truncated after row 1"),
        ("a.json", b"[" + json.dumps(llava("q", "a")).encode() + b', {"id": ]', "not valid JSON in row 1"),
        ("a.json", b'[{"id": 1}]\n[{"id": 2}]', "continues after its array ends, at byte 12"),
        ("a.json", b"hello\nworld", "neither a JSON array nor JSON lines"),
        ("a.json", b'{"train": [{"id": 1}], "test": [{"id": 2}]}', "holds rows under test too"),
        ("a.json", b'{"data": [{"id": 1}]} {"data": []}', "continues after its array ends"),
        ("a.json", b'{\n"a": 1\n}', "alone or under one of data, rows"),
        ("a.json.gz", gzip.compress(b"[]", mtime=0), "holds no rows"),
        ("a.json.gz", gzip.compress(b"", mtime=0), "holds no rows"),
        ("a.json.gz", gzip.compress(b"[]" * 999, mtime=0)[:-9], "a damaged gzip file"),
        ("a.json", '[{"id": 1}]'.encode("utf-16")[:-1], "not valid utf-16 text"),
        ("a.json.zst", b"\x28\xb5\x2f\xfd" + bytes(20), "packed by zstd; unpack it"),
        ("a.xlsx", b"PK\x03\x04" + bytes(20), "a ZIP archive; unpack it"),
        ("a.parquet", b"PAR1 and no more", "not a readable Parquet file"),
        ("a.arrow", b"ARROW1 and no more", "not a readable Arrow file"),
        ("a.arrow", b"no more", "not a readable Arrow file"),
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


def test_data_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(KdcacheError, match="a pipe or a device"):
        open_dataset(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(KdcacheError, match="holds no Parquet or Arrow files"):
        open_dataset(tmp_path / "folder")
