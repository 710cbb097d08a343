"""Training from an S3-like server that is far, slow, and sometimes away: caches and images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.rough_server import BUCKET, Faults, rough_server
from tests.student_caches import fake_capture, make_world
from tests.student_driver import run

ROOT = Path(__file__).parents[1]
STEPS, BATCH, LATENCY, WARM = 14, 8, 0.02, 3
LIMIT_GIB = 2e-4  # 215 kB: less than caches and images take
NAMES = ("first", "second")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def near(tmp_path_factory) -> Any:
    """A student, two caches and their images on the local disk."""
    folder = tmp_path_factory.mktemp("near")
    world = make_world(folder / "first", rows=72, shard_size=8)
    teacher = folder / "first" / "teacher"
    fake_capture(
        folder / "second" / "cache", teacher, folder / "second" / "images", rows=36, shard_size=8, seed=1
    )
    return world


@pytest.fixture(scope="module")
def server(near: Any) -> Iterator[tuple[Faults, dict[str, str]]]:
    """The faults of a server that has them too, and the environment in which it is found."""
    faults = Faults()
    with rough_server(faults) as options:
        store = fsspec.filesystem("s3", **options)
        for name in NAMES:
            for part in ("cache", "images"):
                store.put(str(near.cache.parents[1] / name / part), f"{BUCKET}/{name}/{part}", recursive=True)
        faults.delay = (LATENCY, LATENCY)
        keys = {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "ENDPOINT_URL": options["endpoint_url"]}
        yield faults, {f"AWS_{name}": value for name, value in keys.items()}


def sources(where: str) -> list[dict[str, Any]]:
    """The mixture of both caches below a folder or a URL."""
    return [
        {"cache": f"{where}/{name}/cache", "image_root": f"{where}/{name}/images", "weight": weight}
        for name, weight in zip(NAMES, (3.0, 1.0), strict=True)
    ]


def settings(near: Any, where: str, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "base": "dft",
        "stage": {"global_batch": BATCH, "max_steps": STEPS, "learning_rate": 1e-3},
        "student": near.student,
        "cache": None,
        "image_root": f"{where}/first/images",
        "mixture": {"caches": sources(where), "mixture": "fixed"},
        "out": out,
        "device": "cpu",
        "micro_batch": 2,
        "log_every": 1,
        "save_every": 1,
        "record": True,
        "files": {"file_cache": str(out / "kept"), "file_cache_gib": LIMIT_GIB},
        **changes,
    }


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Meanwhile the bytes that `folder` has are looked at again and again."""
    sizes: list[int] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            found = 0
            for path in folder.glob("*"):
                with suppress(FileNotFoundError):
                    found += path.stat().st_size
            sizes.append(found)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield sizes
    finally:
        ended.set()
        thread.join()


def seen(out: Path) -> dict[int, list[tuple[int, int]]]:
    """The samples of each step, as (cache, row), of all ranks."""
    found: dict[int, list[tuple[int, int]]] = {}
    for file in out.glob("seen-*.jsonl"):
        for line in file.read_text().splitlines():
            step, pairs, *_ = json.loads(line)
            found.setdefault(step, []).extend(map(tuple, pairs))
    return {step: sorted(pairs) for step, pairs in sorted(found.items())}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(near: Any, tmp_path_factory) -> Path:
    """A run of one process from the local disk."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder / "runs.json", [settings(near, str(near.cache.parents[1]), folder / "run")])
    return folder / "run"


def test_ranks_come_and_go_in_an_epoch(near, server, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with environment(server[1]), watched(out / "kept") as sizes:
        for ranks, stop in ((2, 4), (1, 8), (2, None)):
            changes = {"stop": stop, "resume": True}
            run(tmp_path / "runs.json", [settings(near, f"s3://{BUCKET}", out, **changes)], ranks=ranks)
    assert seen(out) == seen(undisturbed)
    assert [len(pairs) for pairs in seen(out).values()] == [BATCH] * STEPS
    expected, found = weights(undisturbed), weights(out)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=1e-4, rtol=1e-3)
    limit = LIMIT_GIB * 2**30
    assert limit / 2 < max(sizes) <= limit * (1 + 2 / 16)


def test_steps_do_not_wait_for_a_far_server(near, server, tmp_path: Path) -> None:
    """After the first epoch's warm-up, at the rate at which this CPU trains the tiny student."""
    out = tmp_path / "run"
    with environment(server[1]):
        run(tmp_path / "runs.json", [settings(near, f"s3://{BUCKET}", out, save_every=0)], ranks=2)
    for file in out.glob("seen-*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        waits = [line[2] for line in lines]
        waited = [after - before for before, after in zip(waits[WARM:], waits[WARM + 1 :], strict=False)]
        print(file.name, "waits in ms:", [round(1e3 * wait, 1) for wait in waited])
        # A step that asked the server for anything would wait for a whole request.
        assert sorted(waited)[len(waited) // 2] < LATENCY / 2


def test_a_server_that_is_away_for_half_a_minute_only_delays(
    near, server, undisturbed: Path, tmp_path
) -> None:
    faults, where = server
    out = tmp_path / "run"
    away: list[float] = []

    def go() -> None:
        while len(seen(out)) < 3:
            time.sleep(0.05)
        faults.down = True
        time.sleep(30.0)
        faults.down = False
        away.append(time.monotonic())

    thread = threading.Thread(target=go)
    with environment(where):
        thread.start()
        run(tmp_path / "runs.json", [settings(near, f"s3://{BUCKET}", out)])
    ended = time.monotonic()
    thread.join()
    assert away[0] < ended, "the run needed the server"
    assert seen(out) == seen(undisturbed)
    found = weights(out)
    assert all(torch.equal(values, found[name]) for name, values in weights(undisturbed).items())


def train_command(near: Any, where: str, out: Path) -> list[Any]:
    """`kdcache train` of the mixture of both caches below a folder or a URL."""
    recipe = out.with_suffix(".yaml")
    stage = {"base": "dft", "caches": sources(where), "max_steps": STEPS, "global_batch": BATCH}
    recipe.write_text(yaml.safe_dump({"stages": [stage]}))
    command = [sys.executable, "-P", "-m", "cli", "train", "--recipe", recipe]
    command += ["--student", near.student, "--out", out, "--device", "cpu", "--micro-batch", "2", "--resume"]
    kept = ["--file-cache", out.with_suffix(".kept"), "--file-cache-gib", str(LIMIT_GIB)]
    return [*command, *kept, "--log-every", "1"]


def test_a_server_that_stays_away_ends_in_one_line_and_a_checkpoint(near, server, tmp_path: Path) -> None:
    faults, where = server
    out = tmp_path / "run"
    command = train_command(near, f"s3://{BUCKET}", out)
    environ = {**os.environ, **where, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environ, **streams)
    metrics = out / "1-dft" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.05)
    faults.down = True
    try:
        _, said = process.communicate(timeout=300)
    finally:
        faults.down = False
    assert process.returncode == 1, said
    last = said.strip().splitlines()[-1]
    assert "saved in" in last, said
    assert "--resume" in last
    assert "Traceback" not in said
    again = subprocess.run(command, env=environ, check=False, **streams)
    assert again.returncode == 0, again.stderr
    assert len({json.loads(line)["step"] for line in metrics.read_text().splitlines()}) == STEPS
    home = tmp_path / "home"
    command = train_command(near, str(near.cache.parents[1]), home)
    undisturbed = subprocess.run(command, env=environ, check=False, **streams)
    assert undisturbed.returncode == 0, undisturbed.stderr
    found = weights(out / "1-dft")
    assert all(torch.equal(values, found[name]) for name, values in weights(home / "1-dft").items())
