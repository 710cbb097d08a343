"""SIGKILL at any moment: the run that goes on ends with the bits of one that was never disturbed."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.student_caches import make_world
from tests.student_driver import run

STEPS = 5
QUICK = [("step", 4), ("save_file", 2), ("rename", 2)]
# A checkpoint calls save_file once, sync five times, rename once or, when an older one goes, twice.
MOMENTS = [
    *(("step", call) for call in range(1, STEPS + 1)),
    *(("save_file", call) for call in range(1, STEPS + 2)),
    *(("sync", call) for call in range(1, 5 * STEPS + 1, 3)),
    *(("rename", call) for call in range(1, 2 * STEPS, 2)),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def kill_and_resume(world, folder: Path, moments):
    """Every moment: a run killed there, then resumed; the codes of the kills and the folders."""
    common = {
        "base": "dft",
        "stage": {"global_batch": 8, "max_steps": STEPS, "learning_rate": 1e-3},
        "student": world.student,
        "cache": str(world.cache),
        "image_root": world.image_root,
        "micro_batch": 4,
        "save_every": 1,
        "log_every": 1,
        "keep": 1,
        "device": "cpu",
    }
    runs = [{**common, "out": folder / "whole"}]
    for number, moment in enumerate(moments):
        out = {**common, "out": folder / str(number), "resume": True}
        runs += [{**out, "kill": moment}, out]
    return run(folder / "runs.json", runs)


def check(folder: Path, codes, moments):
    assert codes[0] == 0
    expected = load_file(folder / "whole/model/model.safetensors")
    for number, moment in enumerate(moments):
        killed, resumed = codes[1 + 2 * number : 3 + 2 * number]
        assert killed == -signal.SIGKILL, f"{moment} was never reached"
        assert resumed == 0, moment
        found = load_file(folder / f"{number}/model/model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), moment
        names = [path.name for path in (folder / f"{number}/checkpoints").iterdir()]
        assert names == [f"step-{STEPS:08d}"], (moment, names)
        lines = (folder / f"{number}/metrics.jsonl").read_text().splitlines()
        assert len(lines) == STEPS, moment


def test_killed_and_resumed_runs_are_bit_equal(world, tmp_path):
    check(tmp_path, kill_and_resume(world, tmp_path, QUICK), QUICK)


@pytest.mark.slow
def test_killed_at_many_moments_runs_are_bit_equal(world, tmp_path):
    assert len(MOMENTS) >= 20
    check(tmp_path, kill_and_resume(world, tmp_path, MOMENTS), MOMENTS)
