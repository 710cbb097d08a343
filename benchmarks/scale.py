"""The chain of commands on caches as large as the paper's, and how its time and memory grow.

    python -m benchmarks.scale [--samples 6650,66500,665000] [--captured N] [--records 10000000] [--out DIR]
        [--json FILE]

Samples have 859 positions with targets (729 visual, 130 response) and full metadata, in shards of 512. They
are captured by the command `build`: rows, templates, tokens, images, batches, records, codecs, commits.
Scaled down: the teacher takes no time and its records come from a store; 2 entries per position and
relations of rank 1; images of 27 x 27 pixels, a visual token each, and a processor without transformers'
overhead. `--captured N`: of a larger dataset the build finds N rows left, in whole shards spread over the
cache; the others were written through the real writer, all with the same targets. Every step is a process of
its own: its seconds, processor seconds, the most memory over what it held at its start, how much of that is
pages of mapped files (the system takes them back when it must), and the most open file handles (looked at
every 2 ms; pages every 100 ms). `--records`: rows of a cache of which there are only manifest, commit records
and sizes of samples. The data is removed at the end.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._memory import mapped, peak, reset_peak
from benchmarks._scale_cache import (
    RESPONSE,
    SHARD,
    VISUAL,
    commit_record,
    first_images,
    manifest_of,
    write_shards,
)
from cache_schema.datasets.rows import open_dataset
from cache_schema.format.cache import Cache, CacheIndex, open_cache
from cache_schema.format.manifest import Manifest
from cache_schema.format.writer import CacheWriter
from cache_schema.operations.select import select
from cache_schema.operations.summary import summarise
from cache_schema.operations.verify import verify
from pipeline.shard_plan import plan_rows
from student.stream import Stream, StreamConfig

STREAMED = 133_000  # samples of an epoch that are read, of which the order is made whole
CAPTURED = "SCALE_CAPTURED"  # the variable that hands `--captured` to the steps' processes
Step = Callable[[Path, int], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", default="6650,66500,665000")
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--captured", type=int, help="rows of each size that go through the capture (all)")
    parser.add_argument("--out", type=Path, help="where the data is made and removed (a temporary folder)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(measured(options.step, options.out, int(options.samples))))
        return
    os.environ[CAPTURED] = str(options.captured or max(sizes_of(options.samples), default=0))
    report: dict[str, dict[str, Any]] = {}
    plans = [(size, CHAIN) for size in sizes_of(options.samples)] + (
        [(options.records, RECORDS)] if options.records else []
    )
    for size, steps in plans:
        with tempfile.TemporaryDirectory(dir=options.out) as folder:
            names = ("s", "CPU s", "MB", "mapped", "handles")
            print(f"\n{size:,} samples\n{'':16} {' '.join(f'{name:>8}' for name in names)}", flush=True)
            report[str(size)] = {step: alone(step, Path(folder), size) for step in steps}
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


def sizes_of(text: str) -> list[int]:
    """The sizes in `6650,66500`."""
    return [int(size) for size in text.split(",") if size]


def alone(step: str, folder: Path, size: int) -> dict[str, Any]:
    """A step in a process of its own."""
    words = ["-m", "benchmarks.scale", "--step", step, "--samples", str(size), "--out", str(folder)]
    ran = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ran.stdout)
    numbers = [found[name] for name in RESOURCES]
    rest = {name: value for name, value in found.items() if name not in RESOURCES}
    print(f"{step:16} {' '.join(f'{number:8g}' for number in numbers)}  {rest or ''}", flush=True)
    return found


RESOURCES = ("seconds", "cpu_seconds", "megabytes", "mapped", "handles")


def measured(step: str, folder: Path, size: int) -> dict[str, Any]:
    """What a step took of this process, and what it says of itself."""
    if step in ("rows", "leave", "build", "rebuild"):  # transformers is not measured, nor held by other steps
        importlib.import_module("benchmarks._scale_build")
    work, before, files = STEPS[step], reset_peak(), mapped()
    handles, pages, over = [0], [files], threading.Event()

    def look() -> None:
        for turn in itertools.count():
            if over.wait(0.002):
                break
            with suppress(OSError):
                handles[0] = max(handles[0], len(os.listdir("/proc/self/fd")) - 1)
            if turn % 50 == 0:
                pages[0] = max(pages[0], mapped())

    watcher = threading.Thread(target=look)
    watcher.start()
    started, spent = time.perf_counter(), time.process_time()
    try:
        found = work(folder, size)
    finally:
        over.set()
        watcher.join()
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - spent, 2),
        "megabytes": round((peak() - before) / 1e6),
        "mapped": round((pages[0] - files) / 1e6),
        "handles": handles[0],
        **found,
    }


def rows(folder: Path, size: int) -> dict[str, Any]:
    """The teacher's folder and the data file, which are not of the chain."""
    from benchmarks._scale_build import write_data

    write_data(folder, size)
    return {}


def left(folder: Path, size: int) -> dict[str, Any]:
    """All but the rows that are to be captured: see `--captured`."""
    from benchmarks._scale_build import leave

    leave(folder, int(os.environ[CAPTURED]))
    return {}


def plan(folder: Path, size: int) -> dict[str, Any]:
    """Index the rows and plan them, as `build` does."""
    dataset = open_dataset(folder / "data.json")
    made = plan_rows(dataset.first_images, shard_size=SHARD, seed=0)
    return {"shards": made.shards, "data_megabytes": round((folder / "data.json").stat().st_size / 1e6)}


def build(folder: Path, size: int) -> dict[str, Any]:
    """The whole command `build`, one worker with one thread that prepares; its teacher is a stand-in."""
    from benchmarks._scale_build import build_all

    summary = build_all(folder)
    assert summary.captured == summary.images == size
    files = [path for path in (folder / "cache").rglob("*") if path.is_file()]
    return {"files": len(files), "gigabytes": round(sum(path.stat().st_size for path in files) / 1e9, 2)}


def rebuild(folder: Path, size: int) -> dict[str, Any]:
    """The same command as one of 16 workers, which finds nothing to do."""
    from benchmarks._scale_build import build_all

    assert build_all(folder, rank=3, world_size=16).already_done
    return {}


def opened(folder: Path, size: int) -> dict[str, Any]:
    cache = open_cache(folder / "cache")
    assert len(cache) == size
    return {"manifest_megabytes": round((folder / "cache/manifest.json").stat().st_size / 1e6, 2)}


def index(folder: Path, size: int) -> dict[str, Any]:
    """The sizes of all samples, as training begins."""
    cache = open_cache(folder / "cache")
    read = counting(cache)
    assert len(cache.index().row) == size
    return {"read_megabytes": round(read[0] / 1e6)}


def find(folder: Path, size: int) -> dict[str, Any]:
    """The sample of a row, as `inspect --sample ROW`."""
    cache = open_cache(folder / "cache")
    read = counting(cache)
    (place,) = cache.find(size // 2)
    assert cache[place].row == size // 2
    return {"read_megabytes": round(read[0] / 1e6, 1)}


def inspect(folder: Path, size: int) -> dict[str, Any]:
    summary = summarise(open_cache(folder / "cache"))
    assert summary["counts"]["visual_positions"] == size * VISUAL
    assert summary["counts"]["response_positions"] == size * RESPONSE
    return {}


def verified(folder: Path, size: int) -> dict[str, Any]:
    report = verify(folder / "cache", quick=True)
    assert report.ok, report.problems[:3]
    return {"megabytes_read": round(report.bytes / 1e6)}


def selected(folder: Path, size: int) -> dict[str, Any]:
    """Every shard gives a few of its samples: all are read, and joined to new ones."""
    found = select(str(folder / "cache"), f"row < {size // 50}", str(folder / "selected"))
    assert found["samples"] == size // 50
    return {"samples": found["samples"], "shards": found["shards"]}


def stream(folder: Path, size: int) -> dict[str, Any]:
    """A single rank: batches of 256, a window of 8 shards, all targets. Pixels are not read."""
    begun = time.perf_counter()
    cache = open_cache(folder / "cache")
    source = Stream(cache, StreamConfig(global_batch=256), micro_batch=16, targets=tuple(cache.spec.targets))
    first, done = 0.0, 0
    for step in source.read(0, min(source.steps_per_epoch, -(-STREAMED // 256))):
        for batch in step.micro_batches:
            for located in batch:
                assert len(located.sample().input_ids)
                done += 1
        first = first or time.perf_counter() - begun
    return {"samples": done, "first_batch_seconds": round(first, 2)}


def counting(cache: Cache) -> list[int]:
    """The bytes that a cache reads from now on."""
    total, read = [0], cache.store.read_many

    def counted(ranges: Any) -> list[bytes]:
        found = read(ranges)
        total[0] += sum(map(len, found))
        return found

    cache.store.read_many = counted  # type: ignore[method-assign]
    return total


# ---- metadata alone ----


def plan_of_keys(folder: Path, size: int) -> dict[str, Any]:
    """The plan from the images' keys, and the manifest with it."""
    manifest = manifest_of(plan_rows(first_images(size), shard_size=SHARD, seed=0))
    (folder / "cache" / "commits").mkdir(parents=True)
    data = manifest.to_bytes()
    (folder / "cache" / "manifest.json").write_bytes(data)
    return {"shards": manifest.plan.shards, "manifest_megabytes": round(len(data) / 1e6, 1)}


def read_manifest(folder: Path, size: int) -> dict[str, Any]:
    manifest = Manifest.from_bytes((folder / "cache" / "manifest.json").read_bytes())
    assert manifest.plan.rows == size
    return {}


def commits(folder: Path, size: int) -> dict[str, Any]:
    """The records of all shards, without their files."""
    small = manifest_of(plan_rows(first_images(SHARD), shard_size=SHARD, seed=0))
    (like,) = write_shards(CacheWriter.open(folder / "small", small), [0])
    assert like is not None
    manifest = Manifest.from_bytes((folder / "cache" / "manifest.json").read_bytes())
    for shard in range(manifest.plan.shards):
        record = commit_record(manifest, shard, like)
        (folder / "cache" / record.path).write_bytes(record.to_bytes())
    return {"kilobytes_each": round((folder / "cache" / like.path).stat().st_size / 1e3, 1)}


def open_records(folder: Path, size: int) -> dict[str, Any]:
    cache = open_cache(folder / "cache")
    assert len(cache) == size
    return {}


def inspect_records(folder: Path, size: int) -> dict[str, Any]:
    summary = summarise(open_cache(folder / "cache"))
    assert summary["counts"]["samples"] == size
    return {}


def pending_records(folder: Path, size: int) -> dict[str, Any]:
    """Nothing to do for one of 16 workers, from the manifest on."""
    writer = CacheWriter.open(
        folder / "cache", manifest_of(plan_rows(first_images(size), shard_size=SHARD, seed=0))
    )
    assert not list(writer.pending(3, 16))
    return {}


def order(folder: Path, size: int) -> dict[str, Any]:
    """The order of an epoch, from the sizes of all samples."""
    cache = open_cache(folder / "cache")
    sizes = np.full(size, VISUAL + RESPONSE, dtype=np.int64)
    given = CacheIndex(row=np.arange(size), tokens=sizes, images=np.ones_like(sizes), responses=sizes)
    cache.index = lambda: given  # type: ignore[method-assign]
    source = Stream(cache, StreamConfig(global_batch=256), micro_batch=16)
    assert sum(map(len, source.batches(0))) == size
    return {}


CHAIN = (
    "rows",
    "leave",
    "plan",
    "build",
    "rebuild",
    "open",
    "index",
    "find",
    "inspect",
    "verify",
    "select",
    "stream",
)
RECORDS = (
    "plan and write",
    "read manifest",
    "commits",
    "open records",
    "inspect records",
    "nothing to do",
    "order",
)
STEPS: dict[str, Step] = {
    "rows": rows,
    "leave": left,
    "plan": plan,
    "build": build,
    "rebuild": rebuild,
    "open": opened,
    "index": index,
    "find": find,
    "inspect": inspect,
    "verify": verified,
    "select": selected,
    "stream": stream,
    "plan and write": plan_of_keys,
    "read manifest": read_manifest,
    "commits": commits,
    "open records": open_records,
    "inspect records": inspect_records,
    "nothing to do": pending_records,
    "order": order,
}


if __name__ == "__main__":
    main()
