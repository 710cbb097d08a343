"""Mutated rows, templates, images, recipes, answer files and row files: some 40,000 inputs, each by its seed.

Every row ends captured or in quarantine; every file, template and recipe is read or refused in one line of
bounded length; every build ends with 0, 1 or 2; all in bounded time and memory. A seed that ever failed is
kept in FAILED and tried first.
"""

import gzip
import io
import json
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from transformers import AutoProcessor

from cache_schema import open_cache
from cache_schema.datasets.conversations import Conversation, conversation_of, label_of
from cache_schema.datasets.images import open_image
from cache_schema.datasets.rows import open_dataset
from cache_schema.operations.verify import verify
from cache_schema.progress import Silent
from pipeline.samples import SamplePreparer
from pipeline.templates import load_template
from student import evaluate as evaluation
from student.stages import open_recipe
from tests.chat_templates import FAMILIES
from tests.fuzzing import LONGEST_LINE, changed_bytes, changed_text, mutated, within_bounds
from tests.test_cli import run
from tests.test_templates import processor_of
from tests.tiny_models import tiny_llava, tiny_rows, write_png

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

MEMORY = 3 << 30  # bytes that the whole suite may add to the process

FAILED: dict[str, tuple[int, ...]] = {
    "rows": (),
    "samples": (),
    "templates": (),
    "images": (),
    "recipes": (),
    "answers": (),
    "files": (),
    "builds": (),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny teacher, its processor, and a root with a few images."""
    folder = tmp_path_factory.mktemp("world")
    teacher = tiny_llava(folder / "teacher")
    for number in range(5):
        write_png(folder / "images" / f"{number}.png", seed=number, size=(24 + 4 * number, 20))
    return SimpleNamespace(
        folder=folder,
        teacher=teacher,
        processor=AutoProcessor.from_pretrained(teacher),
        root=folder / "images",
    )


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def seeds(kind: str, count: int) -> Iterator[tuple[int, random.Random]]:
    for seed in (*FAILED[kind], *range(count)):
        yield seed, random.Random(f"{kind} {seed}")


def seed_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tiny_rows(6, images=5)
    for row in rows:
        if "image" in row:
            row["image"] = row["image"].removeprefix("pictures/")
    parts = [{"type": "image", "index": 0}, {"type": "text", "text": "What is it?"}]
    said = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    system = {"role": "system", "content": "Be brief."}
    rows += [
        {"messages": [system, {"role": "user", "content": parts}, said], "images": ["0.png"]},
        {
            "messages": [
                {"role": "user", "content": "Hm?"},
                {"role": "assistant", "content": "A.", "weight": 1},
            ]
        },
        {"conversations": json.dumps(rows[0]["conversations"]), "image": "1.png"},
        rows[0] | {"image": {"bytes": b"\x89PNG\r\n\x1a\n", "path": "0.png"}},
        rows[1] | {"kind": "colour", "answers": [["red", "blue"]]},
    ]
    return rows


def mutated_row(rng: random.Random) -> Any:
    return mutated(rng.choice(seed_rows()), rng, rng.choice((1, 1, 2, 3, 6)))


def test_rows() -> None:
    good = 0
    for seed, rng in seeds("rows", 15000):
        row = mutated_row(rng)
        with within_bounds("rows", seed):
            assert len(label_of(row, 7)) <= 420
            conversation = conversation_of(row, 7)
            good += 1
            check_conversation(conversation)
    assert 2000 < good < 14900


def check_conversation(conversation: Conversation) -> None:
    roles = [message["role"] for message in conversation.messages]
    assert roles[-1] == "assistant"
    assert all(isinstance(path, str) for path in conversation.images)
    placed = sum(part["type"] == "image" for message in conversation.messages for part in message["content"])
    assert placed == len(conversation.images)
    assert len(conversation.supervised) in (0, roles.count("assistant"))


def test_samples(world: SimpleNamespace) -> None:
    """Through images, template, tokenizer and processor: prepared or rejected, nothing else."""
    preparer = SamplePreparer(
        world.processor,
        load_template(world.processor, None),
        image_token_id=2,
        image_root=world.root,
        max_length=512,
    )
    good = 0
    for seed, rng in seeds("samples", 4000):
        row = mutated_row(rng)
        with within_bounds("samples", seed):
            sample = preparer.prepare(conversation_of(row, 7))
            good += 1
            assert len(sample.label_spans) > 0
            assert (sample.label_spans[:, 1] <= len(sample)).all()
            assert all(not Path(image.path).is_absolute() for image in sample.images)
    assert good > 200


TEMPLATE_WORDS = (
    "{%", "%}", "{{", "}}", "{#", "#}", "{% for m in messages %}", "{% endfor %}", "{% if x %}",
    "{% endif %}", "{% set x = messages %}", "{% generation %}", "{% endgeneration %}", "{{ messages }}",
    "{% break %}", "{{ range(99999) | list }}", "{% for i in range(9999) %}", "| length", "| tojson",
    "| trim", "[0]", ".content", "{{ strftime_now('%Y') }}", "{% macro m() %}", "{% endmacro %}",
    "{{ m() }}", "* 99999999", "~ 'x'", "\x1b", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{% raw %}",
    "{% include 'x' %}", "\ufdd0", "-", "+", "(", ")",
)  # fmt: skip


def test_templates(world: SimpleNamespace, tmp_path: Path) -> None:
    texts = list(FAMILIES.values())
    rows = [conversation_of(row, 0) for row in seed_rows()[:8]]
    path = tmp_path / "t.jinja"
    good = 0
    for seed, rng in seeds("templates", 4000):
        family = rng.choice(texts)
        text = family.text
        for _ in range(rng.choice((1, 1, 2, 4))):
            text = changed_text(text, rng, TEMPLATE_WORDS)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with within_bounds("templates", seed):
            template = load_template(processor_of(family), str(path))
            rendered = template.render(rng.choice(rows).messages)
            good += 1
            assert len(rendered.text) <= 1 << 22
            places = [place for span in rendered.spans for place in span]
            assert places == sorted(places)
            assert not places or places[-1] <= len(rendered.text)
    assert good > 100


def seed_images() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = []
    for form, kind in (
        ("PNG", image), ("JPEG", image), ("GIF", image), ("BMP", image), ("WEBP", image), ("TIFF", image),
        ("PPM", image), ("ICO", image), ("TGA", image), ("PCX", image), ("AVIF", image), ("JPEG2000", image),
        ("PNG", image.convert("I;16")), ("TIFF", image.convert("F")), ("JPEG", image.convert("CMYK")),
        ("PNG", image.quantize(16)), ("PNG", image.convert("LA")), ("EPS", image), ("DDS", image),
        ("MPO", image),
    ):  # fmt: skip
        file = io.BytesIO()
        try:
            kind.save(file, format=form)
        except (KeyError, OSError, ValueError):  # a pillow built without it
            continue
        found.append(file.getvalue())
    return found


def test_images(tmp_path: Path) -> None:
    originals = seed_images()
    assert len(originals) >= 15
    good = 0
    for seed, rng in seeds("images", 8000):
        (tmp_path / "x").write_bytes(changed_bytes(rng.choice(originals), rng))
        with within_bounds("images", seed):
            opened = open_image(tmp_path, "x")
            good += 1
            assert opened.image.mode == "RGB"
    assert good > 300


RECIPE = """
name: mine
stages:
  - base: dpt
    name: first
    cache: caches/a
    image_root: images
    learning_rate: 1.0e-3
    losses: {response: 1.0, visual: 0.5}
    epochs: 1
  - base: dft
    name: second
    cache: caches/b
    global_batch: 64
"""


def test_recipes(tmp_path: Path) -> None:
    document = yaml.safe_load(RECIPE)
    good = 0
    for seed, rng in seeds("recipes", 3000):
        path = tmp_path / "r.yaml"
        if rng.random() < 0.5:
            text = RECIPE
            for _ in range(rng.choice((1, 1, 2, 4))):
                text = changed_text(text, rng)
        else:
            text = yaml.safe_dump(mutated(document, rng, rng.choice((1, 1, 2, 4))), allow_unicode=True)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with within_bounds("recipes", seed):
            recipe = open_recipe(str(path))
            good += 1
            assert recipe.stages
    assert good > 50


def test_answer_files(world: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with references and kinds through `evaluate`, whose model says nothing."""
    monkeypatch.setattr(
        evaluation.Answerer,
        "answer",
        lambda self, questions, image_root: iter([dict.fromkeys(range(len(questions)), "")]),
    )
    loaded = evaluation.load_for_answers(world.teacher, "cpu")
    monkeypatch.setattr(evaluation, "load_for_answers", lambda *_: loaded)
    said = seed_rows()[1]
    asked = [
        said | {"answers": answers, "kind": kind}
        for answers in (
            ["red"],
            [["red", "blue"]],
            "red",
            [{"answer": "red"}] * 10,
            [2],
            None,
            {"answer": "red"},
        )
        for kind in ("colour", ["colour"], None)
    ]
    per_file = 20
    scored = 0
    for seed, rng in seeds("answers", 150):
        rows = [mutated(rng.choice(asked), rng, rng.choice((0, 1, 2))) for _ in range(per_file)]
        (tmp_path / "a.json").write_text(json.dumps(rows, default=str))
        config = evaluation.EvaluateConfig(
            model=world.teacher, data=tmp_path / "a.json", image_root=world.root
        )
        with within_bounds("answers", seed):
            evaluation.evaluate(config, Silent())
            scored += 1
    assert scored > 75


def seed_files(folder: Path) -> list[Path]:
    rows = [row for row in seed_rows() if "conversations" in row and isinstance(row["conversations"], list)]
    plain = [{key: row.get(key) for key in ("id", "conversations")} | {"image": "0.png"} for row in rows]
    table = pa.Table.from_pylist(plain * 4)
    text = json.dumps(plain)
    lines = "\n".join(map(json.dumps, plain))
    contents = {
        "a.json": text.encode(),
        "wrapped.json": json.dumps({"version": 1, "data": plain}, indent=1).encode(),
        "a.jsonl": lines.encode(),
        "b.jsonl": lines.encode("utf-16"),
        "c.json": text.encode("utf-32-le"),
        "a.json.gz": gzip.compress(text.encode(), mtime=0),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    pq.write_table(table, folder / "a.parquet", row_group_size=7)
    pq.write_table(table, folder / "b.parquet", compression="NONE", use_dictionary=False)
    with pa.ipc.new_file(str(folder / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    with pa.OSFile(str(folder / "b.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=9)
    return sorted(folder.iterdir())


def test_row_files(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    originals = [(path.name, path.read_bytes()) for path in seed_files(tmp_path / "whole")]
    read: dict[str, int] = dict.fromkeys((name for name, _ in originals), 0)
    for seed, rng in seeds("files", 5000):
        name, content = rng.choice(originals)
        (tmp_path / name).write_bytes(changed_bytes(content, rng))
        with within_bounds("files", seed):
            dataset = open_dataset(tmp_path / name)
            read[name] += 1
            for row in range(len(dataset)):
                with within_bounds("files", seed):
                    check_conversation(dataset[row])
                assert len(dataset.label_of(row)) <= 420
    assert all(read.values()), read


def test_builds(world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole builds from the command line: 0, 1 or 2, at most one line of error, all rows accounted for."""
    codes = []
    originals = seed_images()
    for seed, rng in seeds("builds", 60):
        folder = tmp_path / str(seed)
        folder.mkdir()
        rows = [mutated_row(rng) if rng.random() < 0.6 else rng.choice(seed_rows()[:6]) for _ in range(24)]
        for row in rows:
            if isinstance(row, dict) and rng.random() < 0.1:
                row["image"] = f"fuzz-{seed}.img"
        (world.root / f"fuzz-{seed}.img").write_bytes(changed_bytes(rng.choice(originals), rng))
        content = "\n".join(json.dumps(row, default=repr) for row in rows).encode("utf-8", "surrogatepass")
        (folder / "a.jsonl").write_bytes(changed_bytes(content, rng) if rng.random() < 0.3 else content)
        options: dict[str, Any] = {
            "teacher": world.teacher,
            "data": folder / "a.jsonl",
            "out": folder / "cache",
        }
        options |= {"image-root": world.root, "shard-size": 8, "max-bad": 1.0, "device": "cpu"}
        options |= rng.choice(({}, {}, {"template": "llava_v1"}, {"template": "plain"}, {"max-length": 64}))
        options |= rng.choice(({}, {}, {"top-k": 0}, {"targets": "response"}, {"temperatures": "nan"}))
        began = time.monotonic()
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        code, _, err = run("build", *words, capsys=capsys)
        assert time.monotonic() - began < 60, seed
        assert code in (0, 1, 2), (seed, code)
        codes.append(code)
        told = [line for line in err.splitlines() if line.startswith("error:")]
        assert len(told) <= 1, (seed, err)
        assert told or code == 0 or "Usage:" in err, (seed, err)
        assert all(len(line) <= LONGEST_LINE for line in err.splitlines()), seed
        if code == 0:
            cache = open_cache(folder / "cache")
            assert not verify(folder / "cache").problems
            assert len(cache) + len(list(cache.quarantined())) == len(open_dataset(folder / "a.jsonl"))
    assert codes.count(0) >= 10
    assert 2 in codes
