"""`kdcache build` on a GPU beside the teacher's plain forward, at LLaVA-KD's shapes, with random weights.

    python -m benchmarks.gpu_capture [--small] [--rows 768] [--device cuda] [--json FILE]

The teacher (4.4 B parameters in bfloat16) is saved as a folder; rows are JPEGs of 640 x 480 with about 160
tokens of text. Of batches of 16 samples that lie on the device: the plain forward `model(**inputs).logits`,
hidden states only, and each target alone from these, beside what the cost model foretells. Each build
runs as a command of its own: wall is all of it, start-up included; steady is the pace between its first and
its last shard. The head of the teacher has rank 64 ("rank 64": every relation record needs no more), or is
random ("full rank").
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from benchmarks import _shapes
from benchmarks._capture_forecast import SPEC, TARGETS, asked_of, shown, table
from benchmarks._clock import Clock
from benchmarks._image_processor import siglip_processor
from benchmarks.roofline import DEVICES
from cache_schema import open_cache
from models.device import device_name
from models.folder import load_model
from models.head import Head
from pipeline.targets import TargetMaker

BATCH, SHARD = 16, 128
TEMPLATE = (
    "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<image> ' }}{%- else -%}{{ item['text'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- else -%}{% generation %}{{ ' ' ~ message['content'][0]['text'] ~ ' <end>' }}{% endgeneration %}"
    "{%- endif -%}{%- endfor -%}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a small teacher, for small cards")
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--device", default="cuda", help="cpu: a tiny teacher, to try the script")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    shape = _shapes.SMALL_TEACHER if arguments.small else _shapes.TEACHER
    if device.type == "cpu":
        shape = _shapes.TINY_TEACHER
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            measure(Path(folder), arguments.rows, device, shape, result)
        finally:  # what was measured before a build failed
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


def measure(
    folder: Path, rows: int, device: torch.device, shape: _shapes.Shape, result: dict[str, Any]
) -> None:
    """Puts samples per second of the plain forward and of builds in `result`."""
    make_data(folder, rows, shape.vocab - 4)
    teacher = make_teacher(folder, device, shape, rank=64)
    parts = parts_of(teacher, device, shape)
    plain = parts["plain forward"]
    Clock(device).free()
    result |= {
        "device": device_name(device),
        "torch": torch.__version__,
        "teacher": shape.name,
        "rows": rows,
        "plain_samples_per_second": plain,
        "samples_per_second": parts,
        "builds": {},
    }
    print(f"{result['device']}, {shape.name}, plain forward {plain:.1f} samples/s", flush=True)
    for name, speed in parts.items():  # those of targets without the forward before them
        print(f"{name:34} {1e3 / speed:8.2f} ms per sample, {plain / speed:.3f} of the plain forward's")
    known = [one for one in DEVICES.values() if one.name in result["device"] and shape is _shapes.TEACHER]
    for one in known:
        result["foretold"] = table(one)
        print(f"foretold by the cost model for {one.name}\n{shown(result['foretold'])}", flush=True)
    print(f"{'':34} {'wall/s':>8} {'of plain':>9} {'steady/s':>9} {'of plain':>9}")
    for name, rank, targets in (
        ("all targets, rank 64", 64, "response,visual,relation"),
        ("response alone", 64, "response"),
        ("all targets, full rank", None, "response,visual,relation"),
    ):
        if rank is None:
            teacher = make_teacher(folder, device, shape, rank=None)
        found = timed_build(teacher, folder, targets, rows)
        result["builds"][name] = found | {
            "wall_over_plain": found["wall_samples_per_second"] / plain,
            "steady_over_plain": found["steady_samples_per_second"] / plain,
        }
        wall, steady = found["wall_samples_per_second"], found["steady_samples_per_second"]
        print(f"{name:34} {wall:8.1f} {wall / plain:9.2f} {steady:9.1f} {steady / plain:9.2f}", flush=True)


def make_data(folder: Path, rows: int, words_known: int) -> None:
    """Rows of one image, a question of 40 words and an answer of 104, of `words_known` ones."""
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    made = []
    for row in range(rows):
        pixels = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480)).save(folder / f"images/{row}.jpg")
        words = [f"w{number}" for number in random.integers(0, words_known, 144)]
        turns = [
            {"from": "human", "value": "<image>\n" + " ".join(words[:40])},
            {"from": "gpt", "value": " ".join(words[40:])},
        ]
        made.append({"id": str(row), "image": f"{row}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(made), encoding="utf-8")


def make_teacher(folder: Path, device: torch.device, shape: _shapes.Shape, *, rank: int | None) -> Path:
    """The teacher's folder. rank: of its head, None for a random one; its other weights are the same."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = shape.build()
    finally:
        torch.set_default_dtype(torch.float32)
    head = model.get_output_embeddings().weight
    if rank is not None:
        with torch.no_grad():
            left = torch.randn(head.shape[0], rank, device=head.device)
            head.copy_(left @ torch.randn(rank, head.shape[1], device=head.device) * 0.02 / rank**0.5)
    words = {"<image>": _shapes.IMAGE_ID, "<unk>": 0, "<end>": 1, "<pad>": 3}
    vocabulary = words | {f"w{number}": number + 4 for number in range(shape.vocab - 4)}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    processor = LlavaProcessor(
        image_processor=siglip_processor(shape.image_size),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )
    teacher = folder / "teacher"
    model.save_pretrained(teacher)
    processor.save_pretrained(teacher)
    del model
    Clock(device).free()
    return teacher


def parts_of(teacher: Path, device: torch.device, shape: _shapes.Shape) -> dict[str, float]:
    """Samples per second of `model(**inputs).logits`, of hidden states alone, and of the records of each of
    TARGETS from these; inputs on the device."""
    model = load_model(teacher, torch.bfloat16).to(device).eval()
    length = shape.visual + _shapes.TEXT + _shapes.ANSWER
    ids = torch.randint(4, shape.vocab, (BATCH, length), device=device)
    ids[:, : shape.visual] = _shapes.IMAGE_ID
    size = shape.image_size
    pixels = torch.randn(BATCH, 3, size, size, device=device, dtype=torch.bfloat16)
    given: dict[str, Any] = {"input_ids": ids, "pixel_values": pixels, "use_cache": False}
    clock = Clock(device)
    with torch.inference_mode():
        took = {
            "plain forward": clock.median(lambda: model(**given).logits, 6),
            "hidden only": clock.median(lambda: model.base_model(**given).last_hidden_state, 6),
        }
        states = model.base_model(**given).last_hidden_state.flatten(0, 1)
    head = Head.of(model, shape.vocab)
    for name, targets in TARGETS.items():
        maker, asked = TargetMaker(head, replace(SPEC, targets=targets)), asked_of(targets, shape)
        took[name] = clock.median(lambda m=maker, a=asked: m.batch(states, a), 6)
    return {name: 1e3 * BATCH / milliseconds for name, milliseconds in took.items()}


def timed_build(teacher: Path, folder: Path, targets: str, rows: int) -> dict[str, Any]:
    """Samples per second of one command, and its own account."""
    out = folder / f"cache-{time.monotonic_ns()}"
    started = time.perf_counter()
    done = subprocess.run(
        [
            *(sys.executable, "-c", "import cli; cli.main()", "build", "--teacher", str(teacher)),
            *("--data", str(folder / "data.json"), "--image-root", str(folder / "images")),
            *("--out", str(out), "--targets", targets, "--json"),
            *("--shard-size", str(min(SHARD, max(1, rows // 3)))),
        ],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    wall = time.perf_counter() - started
    commits = sorted(open_cache(str(out)).commits.values(), key=lambda commit: commit.created)
    first, last = (datetime.fromisoformat(commits[place].created) for place in (0, -1))
    samples = sum(commit.counts["samples"] for commit in commits[1:])
    stored = sum(file.bytes for commit in commits for file in commit.files)
    return {
        "wall_seconds": wall,
        "wall_samples_per_second": rows / wall,
        "steady_samples_per_second": samples / max((last - first).total_seconds(), 1e-9),
        "bytes_per_sample": stored / rows,
        "summary": json.loads(done.stdout),
    }


if __name__ == "__main__":
    main()
