"""Training from a cache: the reader, what the stream costs a step, what the absent teacher saves.

    python -m benchmarks.training [--part reader stream teacher] [--json FILE]

reader   shuffled epochs over samples of 859 positions (729 visual, 130 response), K = 64, relations on:
         samples per second of processor time, decoded (`sample`) and as tensors (`tensors`); memory in the
         second and last quarter. Ids are uniformly random: the worst case for dictionary and cache.
stream   a step of DFT fed by the cache against the same step fed from memory, in short turns one after the
         other: the median of the pairs' ratios. JPEGs of 480 x 480 are read, decoded and resized on the way.
teacher  DFT from the cache, DFT with a live teacher of 2, 4 and 8 times the student's language-model
         parameters (dense losses, as LLaVA-KD's trainer computes them), and plain SFT: each in a process
         of its own, whose peak memory is taken; all take a step in turn. The result is the median of the
         ratios to plain SFT within a turn, by the clock and in processor time, without the capture.

Targets are random: nothing here depends on their values. Models have random weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from benchmarks._image_processor import siglip_processor
from benchmarks._memory import peak
from benchmarks._random_cache import IMAGE_ID, write_cache
from benchmarks._shapes import Shape
from cache_schema import Cache, ImageRecord, open_cache
from cache_schema.datasets.image_roots import open_root
from student.collate import Batch, Collator
from student.loader import load_ahead
from student.losses import Denominators, LossWeights
from student.model import DistilledStudent
from student.pixels import PixelInputs
from student.stages import CE_ONLY
from student.stream import Stream, StreamConfig

IMAGE_SIZE, PATCH = 392, 28


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", nargs="*", choices=["reader", "stream", "teacher"], default=None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        steps_on_request(arguments.one, arguments.folder)
        return
    results = {}
    for measure, show in ((reader, print_reader), (stream, print_stream), (teacher, print_teacher)):
        name = measure.__name__
        if name in (arguments.part or [name]):
            with tempfile.TemporaryDirectory() as folder:
                results[name] = measure(Path(folder))
            show(results[name])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows under their columns, the first to the left, all others to the right."""
    text = [[*columns], *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    print(f"\n{title}")
    for first, *rest in text:
        aligned = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *aligned]), flush=True)


# ---- the reader ----


class WithoutPixels(Collator):
    """Everything of a batch but its images."""

    def images(self, samples: Sequence[Sequence[ImageRecord]]) -> dict[str, torch.Tensor]:
        return {}


def reader(folder: Path, *, epochs: int = 3) -> dict[str, Any]:
    torch.set_num_threads(1)
    url = write_cache(
        folder, rows=1024, shard=128, visual=729, text=40, answer=130, vocab=151_936, top_k=64, size=384
    )
    cache = open_cache(url)
    stored = sum(file.bytes for commit in cache.commits.values() for file in commit.files)
    result: dict[str, Any] = {
        "samples": len(cache),
        "positions": 859,
        "bytes_per_sample": stored // len(cache),
    }
    collator = collator_for(folder, cache, kind=WithoutPixels)
    for name in ("sample", "tensors"):
        memory, rates = [], []
        for epoch in range(epochs):
            source = Stream(
                cache, StreamConfig(global_batch=16, window=4), micro_batch=8, targets=cache.spec.targets
            )
            spent = time.process_time()
            first = epoch * source.steps_per_epoch
            for step in source.read(first, first + source.steps_per_epoch):
                for part in step.micro_batches:
                    samples = [located.sample() for located in part]
                    if name == "tensors":
                        collator(samples)
                memory.append(psutil.Process().memory_info().rss / 1e6)
            rates.append(len(cache) / (time.process_time() - spent))
        quarter = len(memory) // 4
        result[name] = {
            "samples_per_cpu_second": round(statistics.median(rates)),
            "best_epoch": round(max(rates)),
            "megabytes_second_quarter": round(max(memory[quarter : 2 * quarter])),
            "megabytes_last_quarter": round(max(memory[-quarter:])),
        }
    return result


def print_reader(result: dict[str, Any]) -> None:
    table(
        f"reader: {result['positions']} positions, {result['bytes_per_sample']:,} bytes per sample",
        ("", "samples/s a core", "best epoch", "MB, 2nd quarter", "MB, last quarter"),
        [(name, *result[name].values()) for name in ("sample", "tensors")],
    )


def collator_for(
    folder: Path,
    cache: Cache,
    kind: type[Collator] = Collator,
    *,
    image_size: int = IMAGE_SIZE,
    patch_size: int = PATCH,
    as_bytes: bool = False,
) -> Collator:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<image>": 0, "<unk>": 1}, unk_token="<unk>")),
        extra_special_tokens={"image_token": "<image>"},
    )
    processor = LlavaProcessor(
        image_processor=siglip_processor(image_size),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="full",
    )
    return kind(
        pixels=PixelInputs(processor, as_bytes=as_bytes),
        image_root=open_root(folder / "images"),
        pad_token_id=1,
        image_token_id=IMAGE_ID,
        targets=tuple(cache.spec.targets),
    )


# ---- a step ----

VOCAB, VISUAL, TEXT, ANSWER = 16_000, 196, 30, 100
MICRO = 1
STUDENT = (192, 6)  # width and layers


def llava(width: int, layers: int, seed: int = 0) -> Any:
    """A random Llava whose tower makes 196 tokens of an image."""
    torch.manual_seed(seed)
    return Shape(
        name="student of the benchmark",
        width=width,
        layers=layers,
        heads=width // 32,
        inner=4 * width,
        tied=True,
        vision_width=192,
        vision_layers=4,
        vision_heads=3,
        vision_inner=768,
        image_size=IMAGE_SIZE,
        vocab=VOCAB,
        patch_size=PATCH,
    ).build()


def step_cache(folder: Path, rows: int) -> Path:
    return write_cache(
        folder, rows=rows, shard=16, visual=VISUAL, text=TEXT, answer=ANSWER, vocab=VOCAB, top_k=64, size=480
    )


def prepared(width: int, layers: int, weights: LossWeights) -> tuple[DistilledStudent, torch.optim.Optimizer]:
    parts = ("projector", "language_model")
    student = DistilledStudent(llava(width, layers), weights, vocab_size=VOCAB, trainable=parts).train()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    return student, torch.optim.AdamW(trained, lr=1e-5)


def cached_step(
    student: DistilledStudent, optimizer: torch.optim.Optimizer, batches: Sequence[Batch]
) -> None:
    counts = sum((batch.denominators for batch in batches), Denominators())
    for batch in batches:
        student(batch.inputs, batch.labels, batch.targets, counts).total.backward()
    optimizer.step()
    optimizer.zero_grad()


def fed(folder: Path, cache: Cache, start: int, steps: int) -> Iterator[tuple[int, list[Batch]]]:
    source = Stream(
        cache, StreamConfig(global_batch=2 * MICRO), micro_batch=MICRO, targets=tuple(cache.spec.targets)
    )
    return load_ahead(source.read(start, start + steps), collator_for(folder, cache), workers=1)


def stream(folder: Path, *, turns: int = 20, steps: int = 1) -> dict[str, Any]:
    cache = open_cache(step_cache(folder, 64))
    student, optimizer = prepared(384, 8, LossWeights())  # 25M parameters, small beside any real student
    source = fed(folder, cache, 0, (turns + 2) * steps + 3)  # the loader is in full flow to the end
    held = [next(source)[1] for _ in range(steps)]
    cost: dict[str, list[tuple[float, float]]] = {"memory": [], "cache": []}
    for turn in range(turns + 1):
        for name in ("memory", "cache") if turn % 2 else ("cache", "memory"):
            started, spent = time.perf_counter(), time.process_time()
            for place in range(steps):
                cached_step(student, optimizer, held[place] if name == "memory" else next(source)[1])
            if turn:  # the first warms up
                now = time.perf_counter() - started, time.process_time() - spent
                cost[name].append((now[0] / steps, now[1] / steps))
    source.close()
    pairs = list(zip(cost["memory"], cost["cache"], strict=True))
    ratios = [memory[0] / cached[0] for memory, cached in pairs]
    return {
        "seconds_per_step_from_memory": round(statistics.median(m[0] for m, _ in pairs), 4),
        "seconds_per_step_from_cache": round(statistics.median(c[0] for _, c in pairs), 4),
        "speed_from_cache_over_memory": round(statistics.median(ratios), 4),
        "quartiles": [round(value, 3) for value in statistics.quantiles(ratios, n=4)],
        # The loader's work included, as if there were no second core for it; robust on a busy machine.
        "processor_time_memory_over_cache": round(statistics.median(m[1] / c[1] for m, c in pairs), 4),
        "loader_cpu_milliseconds_per_sample": round(loader_cost(folder, cache) * 1e3, 2),
    }


def loader_cost(folder: Path, cache: Cache, steps: int = 24) -> float:
    """Processor seconds that the whole loader spends on a sample: shard, targets, image, tensors."""
    list(fed(folder, cache, 0, 2))
    spent = time.process_time()
    count = sum(len(batch.rows) for _, batches in fed(folder, cache, 0, steps) for batch in batches)
    return (time.process_time() - spent) / count


def print_stream(result: dict[str, Any]) -> None:
    low, _, high = result["quartiles"]
    table(
        "step of a student of 25M, 2 samples of 326 tokens",
        ("from memory", "from the cache", "speed ratio", "quartiles", "CPU ratio", "loader, CPU ms a sample"),
        [
            (
                f"{result['seconds_per_step_from_memory']:.3f} s",
                f"{result['seconds_per_step_from_cache']:.3f} s",
                f"{result['speed_from_cache_over_memory']:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{result['processor_time_memory_over_cache']:.3f}",
                result["loader_cpu_milliseconds_per_sample"],
            )
        ],
    )


# ---- the teacher ----

# Width and layers of language models with 2, 4 and 8 times the parameters of the student's.
TEACHERS = {2: (288, 6), 4: (416, 7), 8: (576, 8)}


VARIANTS = ("sft", "cache", *(f"live{ratio}" for ratio in TEACHERS))


def teacher(folder: Path, *, turns: int = 16) -> dict[str, Any]:
    step_cache(folder, 32)
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.training", "--one", name, "--folder", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in VARIANTS
    }
    turns_taken: list[dict[str, dict[str, float]]] = []
    try:
        for turn in range(-2, turns):  # two to warm up
            order = VARIANTS[turn % len(VARIANTS) :] + VARIANTS[: turn % len(VARIANTS)]
            costs = {name: asked(processes[name], "step") for name in order}
            if turn >= 0:
                turns_taken.append(costs)
        results = {name: asked(process, "end") for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    for name, result in results.items():
        for measure in ("seconds", "processor_seconds"):
            of_turns = [costs[name][measure] / costs["sft"][measure] for costs in turns_taken]
            result[measure] = round(statistics.median(costs[name][measure] for costs in turns_taken), 3)
            result[f"{measure}_over_sft"] = round(statistics.median(of_turns), 2)
    return results


def asked(process: subprocess.Popen[str], request: str) -> dict[str, float]:
    """What a variant answers: a step's cost, or at the end its peak memory."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{request}\n")
    process.stdin.flush()
    return dict(json.loads(process.stdout.readline()))


def steps_on_request(name: str, folder: Path) -> None:
    """A step of the variant a line of stdin, its cost on stdout; its peak memory at the end."""
    cache = open_cache(folder / "cache")
    student, optimizer = prepared(*STUDENT, CE_ONLY if name == "sft" else LossWeights())
    own = sum(parameter.numel() for parameter in student.model.model.language_model.parameters())
    live, ratio = None, 0.0
    if name.startswith("live"):
        live = llava(*TEACHERS[int(name.removeprefix("live"))], seed=1).eval().requires_grad_(False)
        ratio = sum(parameter.numel() for parameter in live.model.language_model.parameters()) / own
    batches = fed(folder, cache, 0, 1000)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        _, step = next(batches)
        time.sleep(0.05)  # the loader catches up: its work is measured by the other part
        started, spent = time.perf_counter(), time.process_time()
        if live is None:
            cached_step(student, optimizer, step)
        else:
            for batch in step:
                (dense_loss(student.model, live, batch) / len(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        cost = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - spent}
        print(json.dumps(cost), flush=True)
    batches.close()
    end = {"teacher_over_student": round(ratio, 2), "peak_megabytes": round(peak() / 1e6)}
    print(json.dumps(end), flush=True)


def print_teacher(results: dict[str, Any]) -> None:
    names = {"sft": "plain SFT", "cache": "DFT from the cache"}
    names |= {f"live{ratio}": f"DFT, live teacher of {ratio}x" for ratio in TEACHERS}
    columns = ("", "s a step", "over SFT", "CPU s a step", "over SFT", "peak MB", "over SFT")
    rows = []
    for name, one in results.items():
        peak = one["peak_megabytes"]
        rows.append(
            (
                names[name],
                f"{one['seconds']:.3f}",
                f"{one['seconds_over_sft']:.2f}",
                f"{one['processor_seconds']:.3f}",
                f"{one['processor_seconds_over_sft']:.2f}",
                peak,
                f"{peak / results['sft']['peak_megabytes']:.2f}",
            )
        )
    table("a step with and without a live teacher", columns, rows)


def dense_loss(model: Any, live: Any, batch: Batch) -> torch.Tensor:
    """CE + L_res + L_vis + 0.5 L_rel from dense logits of both models, the mean over the samples."""
    with torch.no_grad():
        target = live(**batch.inputs, use_cache=False).logits
    logits = model(**batch.inputs, use_cache=False).logits
    total = logits.new_zeros(())
    for p, q, labels, ids in zip(target, logits, batch.labels, batch.inputs["input_ids"], strict=True):
        supervised = labels[1:] != -100
        total = total + F.cross_entropy(q[:-1][supervised], labels[1:][supervised])
        seen = ids == IMAGE_ID
        for rows in (torch.cat([supervised, supervised.new_zeros(1)]), seen):
            log_p, log_q = torch.log_softmax(p[rows], -1), torch.log_softmax(q[rows], -1)
            total = total + (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        ours, theirs = q[seen] @ q[seen].T, p[seen] @ p[seen].T
        total = total + 0.5 * (1 - torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0))
    return total / len(logits)


if __name__ == "__main__":
    main()
