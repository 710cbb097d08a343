"""Training from a cache: the reader, what the stream costs a step, what the absent teacher saves.

    python -m benchmarks.training [--part reader stream teacher] [--json FILE]

reader   a shuffled epoch over samples of 859 positions (729 visual, 130 response), K = 64, relations on:
         samples/s of one thread, decoded (`sample`) and as tensors of a batch (`tensors`), and the
         process's memory in the first and in the last quarter of the epoch.
stream   seconds a step of DFT fed by the cache over seconds of the same step fed from memory, rounds of
         both in turn; JPEGs of 480 x 480 are read, decoded and resized on the way.
teacher  DFT from the cache, DFT with a live teacher of 2, 4 and 8 times the student's language-model
         parameters (dense losses, as LLaVA-KD's trainer computes them), and plain SFT: seconds a step (of
         the clock and of the processor, which a busy machine disturbs less) and peak memory of the
         process, each variant in a process of its own. Capturing is not counted.

Targets are random: nothing here depends on their values. Models have random weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from cache_schema import (
    Cache,
    CacheWriter,
    CapturedImage,
    CapturedSample,
    ImageRecord,
    Relation,
    TargetSpec,
    TopK,
    open_cache,
)
from cache_schema.identity import Fingerprint
from cache_schema.manifest import Manifest, Plan
from student.collate import Batch, Collator, load_ahead
from student.losses import Denominators, LossWeights
from student.model import DistilledStudent
from student.pixels import PixelInputs
from student.stages import CE_ONLY
from student.stream import Stream, StreamConfig

IMAGE_ID, END = 2, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", nargs="*", choices=["reader", "stream", "teacher"], default=None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(step_cost(arguments.one, arguments.folder)))
        return
    parts = {"reader": reader, "stream": stream, "teacher": teacher}
    results = {}
    for name in arguments.part or parts:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = parts[name](Path(folder))
        print(f"\n{name}\n{json.dumps(results[name], indent=1)}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1))


# ---- a cache of random targets ----


def write_cache(
    folder: Path,
    *,
    rows: int,
    shard: int,
    visual: int,
    text: int,
    answer: int,
    vocab: int,
    top_k: int,
    size: int,
) -> Path:
    """Samples of `visual` image tokens, `text` tokens of a question and `answer` supervised ones."""
    spec = TargetSpec(top_k=top_k)
    random = np.random.default_rng(0)
    plan = Plan(rows=rows, shard_size=shard, order=np.arange(rows))
    training = {
        "vocab_size": vocab,
        "image_token_id": IMAGE_ID,
        "template_name": "plain",
        "tokenizer": "none",
    }
    manifest = Manifest(
        fingerprint=Fingerprint(capture={"spec": spec.to_json()}, training=training),
        spec=spec,
        plan=plan,
        created="2026-01-01T00:00:00+00:00",
        assets={},
        dataset={"rows": rows},
    )
    writer = CacheWriter.open(folder / "cache", manifest)
    pool = _pool(random, 4 * (visual + answer), vocab, top_k)
    factor = (random.normal(size=(visual, 24)) * 0.7 ** np.arange(24) * 100).astype(np.float32)
    gram = factor @ factor.T
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(min(rows, 32)):
        pixels = random.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((size, size)).save(folder / f"images/{number}.jpg")
    digests = [
        hashlib.sha256((folder / f"images/{number}.jpg").read_bytes()).hexdigest()
        for number in range(min(rows, 32))
    ]
    for index in writer.pending():
        samples = []
        for row in plan.rows_of(index).tolist():
            ids = random.integers(3, vocab, visual + text + answer).astype(np.int32)
            ids[:visual] = IMAGE_ID
            ids[-1] = END
            order = random.permutation(len(pool.token_ids))
            record = ImageRecord(
                path=f"{row % 32}.jpg",
                sha256=digests[row % 32],
                width=size,
                height=size,
                positions=np.arange(visual, dtype=np.int32),
            )
            samples.append(
                CapturedSample(
                    row=row,
                    sample_id=str(row),
                    input_ids=ids,
                    label_spans=np.array([[visual + text, len(ids)]], np.int32),
                    response=_rows(pool, order[:answer], ids[visual + text :]),
                    images=(
                        CapturedImage(
                            record=record,
                            visual=_rows(pool, order[answer : answer + visual], None),
                            relation=Relation(residual=0.0, norm=float(np.linalg.norm(gram)), factor=factor),
                        ),
                    ),
                )
            )
        writer.write_shard(index, samples, [], engine={"name": "random"}, seconds=0.0)
    return folder / "cache"


def _pool(random: np.random.Generator, count: int, vocab: int, top_k: int) -> TopK:
    """Records whose log-probabilities fall off as a language model's do."""
    ids = np.stack([random.choice(vocab, top_k, replace=False) for _ in range(count)]).astype(np.int32)
    logits = -1.2 * np.log1p(np.arange(top_k)) + 0.3 * random.normal(size=(count, top_k))
    logits = -np.sort(-logits, axis=1)
    tail = np.full((count, 1), np.log(0.05))
    kept = logits - np.log(np.exp(logits).sum(1, keepdims=True)) + np.log(0.95)
    return TopK(
        token_ids=ids,
        logprobs=kept.astype(np.float32),
        tail_logprob=tail.astype(np.float32),
        temperatures=np.ones(1, np.float32),
        logsumexp=np.full(count, 20.0, np.float32),
        entropy=np.full(count, 2.0, np.float32),
    )


def _rows(pool: TopK, order: np.ndarray, labels: np.ndarray | None) -> TopK:
    names = ("token_ids", "logprobs", "tail_logprob", "logsumexp", "entropy")
    label_logprob = None if labels is None else np.full(len(labels), -1.5, np.float32)
    return replace(pool, **{name: getattr(pool, name)[order] for name in names}, label_logprob=label_logprob)


# ---- the reader ----


class WithoutPixels(Collator):
    """Everything of a batch but its images."""

    def images(self, samples: Sequence[Sequence[ImageRecord]]) -> dict[str, torch.Tensor]:
        return {}


def reader(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    url = write_cache(
        folder, rows=1024, shard=128, visual=729, text=40, answer=130, vocab=151_936, top_k=64, size=384
    )
    cache = open_cache(url)
    stored = sum(file.bytes for commit in cache.commits.values() for file in commit.files)
    result: dict[str, Any] = {"samples": len(cache), "positions": 859, "bytes_a_sample": stored // len(cache)}
    collator = collator_for(folder, cache, kind=WithoutPixels)
    for name in ("sample", "tensors"):
        source = Stream(
            cache, StreamConfig(global_batch=16, window=4), micro_batch=8, targets=cache.spec.targets
        )
        memory = []
        started, spent = time.perf_counter(), time.process_time()
        for step in source.read(0, source.steps_per_epoch):
            for part in step.micro_batches:
                samples = [located.sample() for located in part]
                if name == "tensors":
                    collator(samples)
            memory.append(psutil.Process().memory_info().rss / 1e6)
        quarter = len(memory) // 4
        result[name] = {
            "samples_per_second": round(len(cache) / (time.perf_counter() - started)),
            "samples_per_cpu_second": round(len(cache) / (time.process_time() - spent)),
            "megabytes_second_quarter": round(max(memory[quarter : 2 * quarter])),
            "megabytes_last_quarter": round(max(memory[-quarter:])),
        }
    return result


def collator_for(folder: Path, cache: Cache, kind: type[Collator] = Collator) -> Collator:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<image>": 0, "<unk>": 1}, unk_token="<unk>")),
        extra_special_tokens={"image_token": "<image>"},
    )
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer=tokenizer,
        patch_size=28,
        vision_feature_select_strategy="full",
    )
    return kind(
        pixels=PixelInputs(processor),
        image_root=folder / "images",
        pad_token_id=1,
        image_token_id=IMAGE_ID,
        targets=tuple(cache.spec.targets),
    )


# ---- a step ----

VOCAB, VISUAL, TEXT, ANSWER = 16_000, 196, 30, 100
IMAGE_SIZE = 392
MICRO = 1
STUDENT = (192, 6)  # width and layers


def llava(width: int, layers: int, seed: int = 0) -> Any:
    """A random Llava whose tower makes 196 tokens of an image."""
    torch.manual_seed(seed)
    vision = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=392,
        patch_size=28,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


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


def stream(folder: Path, *, rounds: int = 6, steps: int = 4) -> dict[str, Any]:
    cache = open_cache(step_cache(folder, 64))
    student, optimizer = prepared(384, 8, LossWeights())  # 25M parameters, small beside any real student
    held = [batches for _, batches in fed(folder, cache, 0, steps)]
    cached_step(student, optimizer, held[0])
    seconds: dict[str, list[float]] = {"memory": [], "cache": []}
    busy: dict[str, list[float]] = {"memory": [], "cache": []}
    for number in range(rounds):
        for name in ("memory", "cache") if number % 2 else ("cache", "memory"):
            # One step to begin with, and two after the last that is timed: the stream is in full flow.
            source = fed(folder, cache, number * steps, steps + 3) if name == "cache" else None
            if source is not None:
                cached_step(student, optimizer, next(source)[1])
            started, spent = time.perf_counter(), time.process_time()
            for place in range(steps):
                cached_step(student, optimizer, held[place] if source is None else next(source)[1])
            seconds[name].append((time.perf_counter() - started) / steps)
            busy[name].append((time.process_time() - spent) / steps)
            if source is not None:
                source.close()
    memory, from_cache = (statistics.median(seconds[name]) for name in ("memory", "cache"))
    return {
        "seconds_a_step_from_memory": round(memory, 4),
        "seconds_a_step_from_cache": round(from_cache, 4),
        "speed_from_cache_over_memory": round(memory / from_cache, 4),
        # The loader's work included, as if there were no second core for it; robust on a busy machine.
        "processor_time_memory_over_cache": round(
            statistics.median(busy["memory"]) / statistics.median(busy["cache"]), 4
        ),
        "rounds": [round(a / b, 3) for a, b in zip(seconds["memory"], seconds["cache"], strict=True)],
    }


# ---- the teacher ----

# Width and layers of language models with 2, 4 and 8 times the parameters of the student's.
TEACHERS = {2: (288, 6), 4: (416, 7), 8: (576, 8)}


def teacher(folder: Path) -> dict[str, Any]:
    step_cache(folder, 32)
    results = {}
    for name in ("sft", "cache", *(f"live{ratio}" for ratio in TEACHERS)):
        command = [sys.executable, "-m", "benchmarks.training", "--one", name, "--folder", str(folder)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[name] = json.loads(output.splitlines()[-1])
    for name in ("cache", *(f"live{ratio}" for ratio in TEACHERS)):
        for measure in ("seconds", "processor_seconds"):
            results[name][f"{measure}_over_sft"] = round(results[name][measure] / results["sft"][measure], 3)
    return results


def step_cost(name: str, folder: Path, *, steps: int = 5) -> dict[str, float]:
    """Median seconds a step and the peak memory of this process."""
    cache = open_cache(folder / "cache")
    student, optimizer = prepared(*STUDENT, CE_ONLY if name == "sft" else LossWeights())
    own = sum(parameter.numel() for parameter in student.model.model.language_model.parameters())
    live, ratio = None, 0.0
    if name.startswith("live"):
        live = llava(*TEACHERS[int(name.removeprefix("live"))], seed=1).eval().requires_grad_(False)
        ratio = sum(parameter.numel() for parameter in live.model.language_model.parameters()) / own
    seconds, busy = [], []
    for _, batches in fed(folder, cache, 0, steps + 1):
        started, spent = time.perf_counter(), time.process_time()
        if live is None:
            cached_step(student, optimizer, batches)
        else:
            for batch in batches:
                (dense_loss(student.model, live, batch) / len(batches)).backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        busy.append(time.process_time() - spent)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {
        "seconds": round(statistics.median(seconds[1:]), 3),
        "processor_seconds": round(statistics.median(busy[1:]), 3),
        "peak_megabytes": round(peak),
        "teacher_over_student": round(ratio, 2),
    }


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
