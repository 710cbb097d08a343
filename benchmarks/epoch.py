"""Memory over an epoch of 100,000 small samples, from a local and from a remote cache.

    python -m benchmarks.epoch [--samples N] [--json FILE]

Samples of 12 tokens (4 visual, 3 response), K = 8, in shards of 512, read in shuffled order through the
loader as tensors of a batch, without their images. The process's memory in each fifth of the epoch, and how
many shards were in memory at most. Remote: fsspec's `memory://`, whose files lie in the same process from the
beginning.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import fsspec
import psutil
import torch

from benchmarks._random_cache import write_cache
from benchmarks.training import WithoutPixels, collator_for, table
from cache_schema import open_cache
from cache_schema.format.block import ShardBlock
from student.loader import load_ahead
from student.stream import Stream, StreamConfig

PARTS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cache(
            folder,
            rows=arguments.samples,
            shard=512,
            visual=4,
            text=5,
            answer=3,
            vocab=1000,
            top_k=8,
            size=64,
        )
        results = {"local": epoch(folder, str(folder / "cache"))}
        fsspec.filesystem("memory").put(str(folder / "cache"), "/epoch", recursive=True)
        results["remote"] = epoch(folder, "memory://epoch")
    table(
        f"memory over an epoch of {arguments.samples:,} samples, MB at most in each fifth",
        ("", *(f"{part + 1}/{PARTS}" for part in range(PARTS)), "shards in memory", "samples/CPU s"),
        [
            (name, *one["megabytes"], one["shards_in_memory"], one["samples_per_cpu_second"])
            for name, one in results.items()
        ],
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1))


def epoch(folder: Path, url: str) -> dict[str, Any]:
    cache = open_cache(url)
    alive: weakref.WeakSet[ShardBlock] = weakref.WeakSet()
    read = cache.read_shard

    def counted(shard: int, **options: Any) -> ShardBlock:
        block = read(shard, **options)
        alive.add(block)
        return block

    cache.read_shard = counted  # type: ignore[method-assign]
    source = Stream(
        cache,
        StreamConfig(global_batch=32, window=8),
        micro_batch=16,
        targets=tuple(cache.spec.targets),
    )
    collator = collator_for(folder, cache, kind=WithoutPixels)
    process, steps = psutil.Process(), source.steps_per_epoch
    peaks, shards, spent = [0.0] * PARTS, 0, time.process_time()
    for step, _ in load_ahead(source.read(0, steps), collator, workers=1):
        part = min(step * PARTS // steps, PARTS - 1)
        peaks[part] = max(peaks[part], process.memory_info().rss / 1e6)
        shards = max(shards, len(alive))
    return {
        "megabytes": [round(peak) for peak in peaks],
        "shards_in_memory": shards,
        "samples_per_cpu_second": round(len(cache) / (time.process_time() - spent)),
    }


if __name__ == "__main__":
    main()
