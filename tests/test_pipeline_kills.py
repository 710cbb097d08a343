"""A build with a real (tiny) teacher, killed five times and run again, ends as if nothing had happened."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache_schema.operations.verify import verify
from tests.cache_teacher import assert_same_cache
from tests.tiny_models import tiny_dataset, tiny_llava

ROOT = Path(__file__).resolve().parent.parent
SHARDS = 5


def start(world: Path, out: Path) -> subprocess.Popen[bytes]:
    arguments = ["build", "--teacher", world / "teacher", "--data", world / "data" / "data.json"]
    arguments += ["--image-root", world / "data" / "images", "--out", out, "--dtype", "float32"]
    arguments += ["--shard-size", "4"]
    command = [sys.executable, "-m", "cli", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_five_kills_of_a_real_teacher_leave_no_trace(tmp_path: Path) -> None:
    tiny_llava(tmp_path / "teacher")
    tiny_dataset(tmp_path / "data", rows=4 * SHARDS)
    undisturbed = tmp_path / "undisturbed"
    assert start(tmp_path, undisturbed).wait(timeout=240) == 0

    out, seen = tmp_path / "cache", []
    for kill in range(SHARDS):
        process = start(tmp_path, out)
        # Each life gets one shard further, the first dies as soon as the manifest stands.
        awaited = out / "manifest.json" if kill == 0 else out / "commits" / f"{kill - 1:05d}.json"
        while not awaited.exists() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        assert process.wait(timeout=60) in (-signal.SIGKILL, 0)
        report = verify(out)
        assert report.intact, report.problems
        seen.append(report.shards)
    assert seen == sorted(seen)
    assert seen[0] < SHARDS
    assert start(tmp_path, out).wait(timeout=240) == 0
    assert_same_cache(out, undisturbed)
