"""Builds on a local Ray cluster: killed workers change nothing, errors and stops are those of `build`."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cache_schema.errors import WrongUsage
from cache_schema.file_cache import FileCacheConfig
from cache_schema.operations.verify import verify
from cache_schema.progress import Silent
from pipeline.cluster import _everywhere, _start, build_on_cluster
from pipeline.settings import BuildConfig, ClusterConfig
from tests.cache_teacher import assert_same_cache
from tests.test_pipeline_kills import ROOT, start
from tests.tiny_models import tiny_dataset, tiny_llava

SHARDS = 80  # so that a request to stop comes before the last one


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    tiny_llava(folder / "teacher")
    tiny_dataset(folder / "data", rows=4 * SHARDS)
    assert start(folder, folder / "undisturbed").wait(timeout=240) == 0
    return folder


def on_ray(world: Path, out: Path, *more: object) -> subprocess.Popen[str]:
    words = ["build", "--teacher", world / "teacher", "--data", world / "data" / "data.json"]
    words += ["--image-root", world / "data" / "images", "--out", out, "--dtype", "float32"]
    words += ["--shard-size", "4", "--cluster", "local", "--workers", "4", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "cli", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that run tasks."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::kdcache"):
                found.append(child)
        except psutil.Error:
            continue
    return found


def commits(out: Path) -> int:
    return len(list((out / "commits").glob("0*.json")))


@pytest.mark.slow
def test_two_killed_workers_of_four_leave_no_trace(world: Path, tmp_path: Path) -> None:
    out, draws, killed = tmp_path / "cache", random.Random(5), 0
    process = on_ray(world, out)
    while killed < 2 and process.poll() is None:
        time.sleep(draws.uniform(0.1, 0.6))
        if commits(out) > 4 * killed and (running := workers_of(process)):
            draws.choice(running).send_signal(signal.SIGKILL)
            killed += 1
    said, told = process.communicate(timeout=500)
    assert process.returncode == 0, told[-3000:]
    assert killed == 2, (said, told)
    report = verify(out)
    assert report.intact, report.problems
    assert report.shards == SHARDS
    assert_same_cache(out, world / "undisturbed")


@pytest.mark.slow
def test_a_request_to_stop_ends_with_3_and_the_build_goes_on(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    process = on_ray(world, out)
    while commits(out) < 1 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 3, told[-3000:]
    assert commits(out) < SHARDS
    assert start(world, out).wait(timeout=240) == 0
    assert_same_cache(out, world / "undisturbed")


@pytest.mark.slow
def test_an_error_of_a_worker_is_one_line(world: Path, tmp_path: Path) -> None:
    _, told = (process := on_ray(world, tmp_path / "cache", "--max-length", "1")).communicate(timeout=300)
    assert process.returncode == 1
    lines = [line for line in told.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, told[-3000:]
    assert "Traceback" not in told


@pytest.mark.slow
def test_settings_that_do_not_go_together_are_refused(world: Path, tmp_path: Path) -> None:
    _, told = (process := on_ray(world, tmp_path / "cache", "--rank", "0")).communicate(timeout=60)
    assert process.returncode == 2
    assert "set by --cluster" in told


class FewGpus:
    """What `_start` asks of Ray, on a cluster of one GPU."""

    def __init__(self, gpus: float) -> None:
        self.gpus = gpus

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0, **({"GPU": self.gpus} if self.gpus else {})}


@pytest.mark.parametrize("gpus", [0.0, 1.0])
def test_workers_that_fit_no_cluster_are_refused(tmp_path: Path, gpus: float) -> None:
    config = BuildConfig(teacher=tmp_path, data=tmp_path, image_root=str(tmp_path), out=str(tmp_path / "c"))
    with pytest.raises(WrongUsage, match="no worker with 2 GPUs fits a cluster of"):
        _start(FewGpus(gpus), config, ClusterConfig(cluster="auto", gpus_per_worker=2.0), Silent())


def test_workers_get_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jinja").write_text("x")
    config = BuildConfig(
        teacher=Path("teacher"),
        data=Path("data.json"),
        image_root="s3://bucket/images",
        out="cache",
        template="t.jinja",
        files=FileCacheConfig(file_cache=Path("files")),
    )
    made = _everywhere(config)
    assert (made.teacher, made.data) == (tmp_path / "teacher", tmp_path / "data.json")
    assert (made.image_root, made.out) == ("s3://bucket/images", str(tmp_path / "cache"))
    assert made.template == str(tmp_path / "t.jinja")
    assert made.files.file_cache == tmp_path / "files"


def test_a_missing_ray_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    config = BuildConfig(teacher=tmp_path, data=tmp_path, image_root=str(tmp_path), out=str(tmp_path / "c"))
    with pytest.raises(WrongUsage, match=r"pip install 'kdcache\[ray\]'"):
        build_on_cluster(config, ClusterConfig(cluster="local"), Silent())
