"""Whether the loader keeps up with an accelerator, without one.

    python -m benchmarks.loader [--samples 768] [--seconds 0.008] [--json FILE]

A stand-in student sleeps `seconds` per sample (the interpreter released) in place of a device; everything
before it is real: shards of a cache, targets, JPEGs of 640 x 640 brought to 384 x 384, tensors. Pixels stay
bytes, whose values a device looks up. Samples have 729 visual and 105 response positions, K = 32. For
relations of a falling spectrum (24 columns, of which the bound keeps fewer), of half rank and of full rank
(flat ones: some 290 and 576 kB per image, the worst case), over micro-batches of 8 (steps of 64) and of 1
(steps of 1): the share of time that is waited for data after the first step, and processor milliseconds per
sample, of all threads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._image_processor import BACKEND
from benchmarks._random_cache import write_cache
from benchmarks.training import collator_for
from cache_schema import Cache, open_cache
from student.loader import load_ahead
from student.stream import Stream, StreamConfig

VISUAL, TEXT, ANSWER, VOCAB = 729, 56, 105, 151_936
REACH = {"data_wait": 0.02, "cpu_milliseconds": 8.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=768)
    parser.add_argument("--seconds", type=float, default=0.008, help="of the stand-in, per sample")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"reach": REACH, "images": BACKEND}
    print(f"images by {BACKEND}")
    print(f"{'':34} {'data wait':>10} {'CPU ms per sample':>18}")
    for name, rank, flat in (
        ("rank 24", 24, False),
        ("half rank", VISUAL // 2, True),
        ("full rank", VISUAL, True),
    ):
        with tempfile.TemporaryDirectory() as folder:
            url = write_cache(
                Path(folder),
                rows=options.samples,
                shard=128,
                visual=VISUAL,
                text=TEXT,
                answer=ANSWER,
                vocab=VOCAB,
                top_k=32,
                size=640,
                rank=rank,
                flat=flat,
            )
            cache = open_cache(url)
            kept = [record.statistics["relation"] for record in cache.commits.values()]
            report[f"{name}, stored"] = sum(each["sum_rank"] for each in kept) / options.samples
            for micro_batch, step in ((8, 64), (1, 1)):
                found = waited(Path(folder), cache, micro_batch, step, options.seconds)
                setting = f"{name}, {micro_batch} per micro-batch"
                report[setting] = found
                wait, cpu = found["data_wait"], found["cpu_milliseconds"]
                print(f"{setting:34} {wait:10.3f} {cpu:18.2f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


def waited(folder: Path, cache: Cache, micro_batch: int, step: int, seconds: float) -> dict[str, float]:
    """The share of time waited for data over an epoch, and processor milliseconds per sample."""
    stream = Stream(
        cache,
        StreamConfig(global_batch=step, window=4),
        micro_batch=micro_batch,
        targets=tuple(cache.spec.targets),
    )
    collator = collator_for(folder, cache, image_size=384, patch_size=14, as_bytes=True)
    batches = load_ahead(stream.read(0, stream.steps_per_epoch), collator)
    waits, samples = [], 0
    spent = time.process_time()
    while True:
        before = time.perf_counter()
        _, made = next(batches, (0, []))
        waits.append(time.perf_counter() - before)
        if len(waits) == 1:
            started = time.perf_counter()
        if not made:
            break
        for batch in made:
            time.sleep(seconds * len(batch.rows))
            samples += len(batch.rows)
    return {
        "data_wait": round(sum(waits[1:]) / (time.perf_counter() - started), 4),
        "cpu_milliseconds": round(1e3 * (time.process_time() - spent) / samples, 2),
    }


if __name__ == "__main__":
    main()
