"""What a build's host does beside the device, measured without one.

    python -m benchmarks.host_work [--rows 1024] [--seconds 0.018] [--json FILE]

The teacher is a stand-in that sleeps `seconds` per sample (the interpreter released) and gives random
records; samples have 729 visual and about 160 other tokens and a JPEG of 640 x 480, K = 32, relations of rank
64 and of full rank. For each rank: milliseconds of processor time per sample to prepare it (file, template,
tokens, pixels), to make its records from the device's tensors (slice), to encode and to write them, each
alone on one thread; then a whole `build` by the clock against the stand-in's own speed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks._image_processor import BACKEND
from benchmarks._stand_in import VISUAL, StandInEngine, StoredTargets, stand_in_folder
from benchmarks.capture import Clock, make_data
from cache_schema import TargetSpec
from cache_schema.format.shard import encode_shard
from cache_schema.format.writer import CacheWriter
from cache_schema.progress import Silent
from pipeline import capture, extract
from pipeline.assemble import captured_of
from pipeline.capture import BuildConfig, build
from pipeline.extract import Extractor
from pipeline.job import Job, open_job
from pipeline.packing import Pack
from pipeline.samples import PreparedSample
from pipeline.teachers import Teacher

SPEC = TargetSpec(targets=("response", "visual", "relation"), top_k=32, relation_max_rank=VISUAL)
REACH = {"rank 64": (12.0, 0.90), "full rank": (22.0, 0.75)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=0.018, help="of the stand-in, per sample")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        report = measure(Path(name), options.rows, options.seconds)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


def measure(folder: Path, rows: int, seconds: float) -> dict[str, Any]:
    """Milliseconds per sample by part, and the ratio of a build's speed to the stand-in's."""
    teacher = stand_in_folder(folder / "teacher")
    data = make_data(folder / "data", rows, (1,), words=(40, 70))
    report: dict[str, Any] = {"images": BACKEND}
    print(f"images by {BACKEND}")
    print(
        f"{'CPU ms per sample':20} {'prepare':>8} {'slice':>8} {'encode':>8} {'write':>8} {'all':>8}  build"
    )
    for name, rank in (("rank 64", 64), ("full rank", 1024)):
        config = BuildConfig(
            teacher=teacher,
            data=data / "data.json",
            image_root=data,
            out=str(folder / f"{rank}"),
            spec=SPEC,
            device="cpu",
            shard_size=256,
        )
        targets = StoredTargets(SPEC, rank=rank)
        parts = host_parts(open_job(config, Silent()), targets, min(rows, 128))
        ratio = seconds * rows / whole_build(config, targets, seconds)
        report[name] = {
            "cpu_milliseconds": parts | {"all": round(sum(parts.values()), 2)},
            "build_over_stand_in": round(ratio, 3),
            "reach": REACH[name],
        }
        numbers = " ".join(f"{value:8.2f}" for value in report[name]["cpu_milliseconds"].values())
        print(f"{name:20} {numbers}  {ratio:.3f}", flush=True)
    return report


def host_parts(job: Job, targets: StoredTargets, rows: int) -> dict[str, float]:
    """Processor milliseconds per sample of each part, on one thread."""
    found: dict[str, float] = {}

    def timed(part: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        made = work()
        found[part] = round(1e3 * (time.process_time() - started) / rows, 2)
        return made

    shard = job.plan.rows_of(0).tolist()[:rows]
    job.preparer.prepare(job.dataset[shard[0]])
    samples: list[PreparedSample] = timed(
        "prepare", lambda: [job.preparer.prepare(job.dataset[row]) for row in shard]
    )
    extractor = Extractor(
        StandInEngine(0.0), None, SPEC, fingerprint="", share=True, pack=False, batch_tokens=16384
    )
    claimed: set[str] = set()
    packs = [Pack(samples=(one,), wanted=(extractor._wanted(one, claimed),)) for one in samples]
    batch = [packs[start : start + 18] for start in range(0, rows, 18)]
    asked = [extract.asked_of(part, [len(pack) for pack in part], SPEC) for part in batch]
    pending = [targets.batch(torch.empty(0), each) for each in asked]
    arrays = [[tensor.numpy() for tensor in each.tensors] for each in pending]
    captured = timed(
        "slice",
        lambda: [
            one
            for part, each, own in zip(batch, pending, arrays, strict=True)
            for one in captured_of(part, each.records(own), SPEC)
        ],
    )
    writer = CacheWriter.open(f"{job.config.out}-parts", job.manifest(sharing=True, weights=""))
    encode_shard("00000-0123456789ab", captured[:1], [], SPEC)  # zarr's start, once per build, is not timed
    encoded = timed("encode", lambda: encode_shard("00000-0123456789ab", captured, [], SPEC))
    timed("write", lambda: writer.commit(0, "0123456789ab", encoded, engine={}, seconds=1.0))
    return found


def whole_build(config: BuildConfig, targets: StoredTargets, seconds: float) -> float:
    """Seconds of capturing in a whole `build` whose teacher is the stand-in."""
    engine = StandInEngine(seconds)
    teacher = Teacher(engine=engine, head=engine.head, sharing=True, packing=False, batch_tokens=16384)
    clock = Clock()
    with (
        patch.object(capture, "load_teacher", lambda job, progress: teacher),
        patch.object(extract, "TargetMaker", lambda head, spec: targets),
    ):
        build(config, clock)
    return clock.seconds


if __name__ == "__main__":
    main()
