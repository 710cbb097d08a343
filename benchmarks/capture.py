"""What capturing costs beside a plain forward, and what packing conversations about one image gains.

    python -m benchmarks.capture [--images 12] [--rounds 3] [--json FILE]

The teacher is a Llava with the real SmolLM2-135M as language model and a small random SigLIP tower (256
visual tokens); conversations have about 130 tokens of English text. Per round and in turn: the plain
`model(**inputs).logits` over the capture's own batches, the capture of the same samples with all targets
(response, visual, relation), and both again over 1.7 conversations an image; and of the first samples
hidden states only and each target alone; all in CPU seconds of
the one thread that computes, which other work on the machine does not disturb. Then in wall time a whole
`build` against the plain forward: torch has one thread, and another core reads images, encodes shards and
writes them meanwhile, as the host of a GPU would. Last what the cost model foretells of the same parts on a
GPU at LLaVA-KD's shapes (benchmarks.roofline), and the CPU time per sample there to prepare, encode and
write (benchmarks.host_work).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import SiglipVisionConfig

from benchmarks._capture_forecast import table
from benchmarks._smollm2 import load_smollm2, save_llava
from benchmarks._teachers import english
from benchmarks.roofline import DEVICES
from cache_schema import TargetSpec
from cache_schema.datasets.rows import open_dataset
from cache_schema.progress import Silent
from models.folder import load_processor
from pipeline.capture import BuildConfig, build
from pipeline.extract import Extractor
from pipeline.packing import Pack, batches
from pipeline.samples import PreparedSample, SamplePreparer
from pipeline.shard_capture import ShardCapture
from pipeline.templates import load_template
from pipeline.transformers_engine import TransformersEngine, load_engine

SPEC = TargetSpec(targets=("response", "visual", "relation"))
BATCH_TOKENS = 2048
GROUPS = (1, 2, 2, 1, 2, 2, 1, 2, 2, 2)  # conversations an image, 1.7 on average
HOST_ROWS = 128
REACH = {"one conversation an image": 0.95, "1.7 conversations an image": 1.4}


def make_teacher(folder: Path) -> Path:
    """The Llava of the benchmark, saved."""
    tokenizer, language = load_smollm2()
    vision = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=256,
        patch_size=16,
        vision_use_head=False,
    )
    return save_llava(
        folder,
        tokenizer=tokenizer,
        language=language,
        vision=vision,
    )


def make_data(folder: Path, images: int, groups: Sequence[int], words: tuple[int, int] = (14, 60)) -> Path:
    """Rows about photographs-like images, each `groups[i]` conversations, one question and answer each.

    words: of a question and of an answer, about.
    """
    folder.mkdir()
    prose = english("\n\n".join(topics[name] for name in sorted(topics))).split()
    generator = np.random.default_rng(0)
    spans = ((words[0] - 4, words[0] + 4), (words[1] - 6, words[1] + 6))
    rows: list[dict[str, Any]] = []
    for image in range(images):
        pixels = generator.integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{image}.jpg")
        for _ in range(groups[image % len(groups)]):
            start = int(generator.integers(0, len(prose) - 200))
            asked, said = (int(generator.integers(*span)) for span in spans)
            text = [
                " ".join(prose[start : start + asked]) + "?",
                " ".join(prose[start + asked : start + asked + said]),
            ]
            turns = [{"from": side, "value": part} for side, part in zip(("human", "gpt"), text, strict=True)]
            rows.append({"image": f"{image}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def plain(engine: TransformersEngine, samples: Sequence[PreparedSample]) -> None:
    """`model(**inputs).logits` over the batches that the capture forms."""
    packs = [Pack(samples=(sample,)) for sample in samples]
    for batch in batches(packs, BATCH_TOKENS):
        engine.logits([samples[i] for i in batch])


def hidden_only(engine: TransformersEngine, samples: Sequence[PreparedSample]) -> None:
    """The hidden states of the same batches."""
    packs = [Pack(samples=(sample,)) for sample in samples]
    for batch in batches(packs, BATCH_TOKENS):
        engine.hidden_states([samples[i] for i in batch])


def capture(extractor: Extractor, samples: Sequence[PreparedSample]) -> None:
    """The capture of samples that are prepared already."""
    ShardCapture(extractor).run(samples)


def seconds_per_sample(work: Callable[[], None], samples: int) -> tuple[float, float]:
    """(CPU seconds of this thread, wall seconds) a sample."""
    cpu, wall = time.thread_time(), time.perf_counter()
    work()
    return (time.thread_time() - cpu) / samples, (time.perf_counter() - wall) / samples


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        report = measure(Path(name), options.images, options.rounds)
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report))


def measure(folder: Path, images: int, rounds: int) -> dict[str, Any]:
    """The ratios of samples/s to those of the plain forward."""
    from benchmarks import host_work  # which takes data and clock from here

    (folder / "host").mkdir()
    teacher = make_teacher(folder / "teacher")
    processor = load_processor(teacher)
    engine = load_engine(teacher, vocab_size=len(processor.tokenizer), pad_token_id=0, device="cpu")
    single, several = (
        make_data(folder / "single", images, (1,)),
        make_data(folder / "several", images, GROUPS),
    )
    samples = {}
    for root in (single, several):
        preparer = SamplePreparer(
            processor,
            load_template(processor, None),
            image_token_id=engine.model.config.image_token_id,
            image_root=root,
            max_length=2048,
        )
        samples[root] = [preparer.prepare(row) for row in open_dataset(root / "data.json")]
    head = engine.verified_head(samples[single][:1])
    alone, packed = (
        Extractor(engine, head, SPEC, fingerprint="", share=pack, pack=pack, batch_tokens=BATCH_TOKENS)
        for pack in (False, True)
    )
    each = {
        f"{target} alone": Extractor(
            engine,
            head,
            replace(SPEC, targets=(target,)),
            fingerprint="",
            share=False,
            pack=False,
            batch_tokens=BATCH_TOKENS,
        )
        for target in SPEC.targets
    }
    text = [len(sample) - 256 for sample in samples[several]]
    one, many = samples[single], samples[several]
    found: dict[str, list[float]] = {
        "plain": [],
        "hidden only": [],
        **{name: [] for name in each},
        "capture": [],
        "plain, several": [],
        "packed": [],
        "plain, wall": [],
        "build, wall": [],
    }
    for number in range(rounds + 1):
        cpu, wall = seconds_per_sample(lambda: plain(engine, one), len(one))
        times = {
            "plain": cpu,
            "hidden only": seconds_per_sample(lambda: hidden_only(engine, one), len(one))[0],
            **{
                name: seconds_per_sample(lambda e=extractor: capture(e, one), len(one))[0]
                for name, extractor in each.items()
            },
            "capture": seconds_per_sample(lambda: capture(alone, one), len(one))[0],
            "plain, several": seconds_per_sample(lambda: plain(engine, many), len(many))[0],
            "packed": seconds_per_sample(lambda: capture(packed, many), len(many))[0],
            "plain, wall": wall,
            "build, wall": whole_build(teacher, single, folder / f"cache-{number}") / len(one),
        }
        if number:  # the first round warms up
            for part, value in times.items():
                found[part].append(value)

    def ratio(base: str, part: str) -> float:
        return round(statistics.median(a / b for a, b in zip(found[base], found[part], strict=True)), 3)

    return {
        "seconds a sample": {part: round(statistics.median(values), 3) for part, values in found.items()},
        "rounds": rounds,
        "samples": [len(one), len(many)],
        "text tokens": [min(text), round(statistics.mean(text), 1), max(text)],
        "samples/s over the plain forward's": {
            **{name: ratio("plain", name) for name in ("hidden only", *each)},
            "one conversation an image": ratio("plain", "capture"),
            "1.7 conversations an image": ratio("plain, several", "packed"),
            "whole build, wall time": ratio("plain, wall", "build, wall"),
        },
        "reach": REACH,
        "host": host_work.measure(folder / "host", HOST_ROWS, 0.018),
        # Last: what the recorder's fake tensors leave in caches of torch code is of no use to real ones.
        "foretold on a GPU": {name: table(DEVICES[name]) for name in ("H100", "H200")},
    }


def whole_build(teacher: Path, data: Path, out: Path) -> float:
    """Seconds of capturing in a whole `build`, without loading the teacher."""
    clock = Clock()
    config = BuildConfig(
        teacher=teacher,
        data=data / "data.json",
        image_root=data,
        out=str(out),
        spec=SPEC,
        batch_tokens=BATCH_TOKENS,
        shard_size=6,
        device="cpu",
    )
    build(config, clock)
    return clock.seconds


class Clock(Silent):
    """Takes the time of the task `capturing`."""

    def begin(self, what: str, total: int | None) -> None:
        self.started = time.perf_counter()

    def end(self) -> None:
        self.seconds = time.perf_counter() - self.started


if __name__ == "__main__":
    main()
