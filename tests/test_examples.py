"""The files of docs/examples run as they are, and leave a model that loads."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.student_caches import make_world

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
TWO = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("examples"), rows=14, shard_size=4)


def run_example(name, world, out, *launcher):
    script = ["-m", "tests.example_ranks"] if launcher else []
    words = [*script, EXAMPLES / name, world.student, world.cache, world.image_root, out, "5"]
    # In the folder of the model: nothing of the checkout is imported by accident.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent.parent)}
    return subprocess.run(
        [sys.executable, *launcher, *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.mark.parametrize(
    ("name", "launcher"),
    [
        ("plain_torch.py", ()),
        ("with_accelerate.py", ()),
        ("with_accelerate.py", TWO),
        ("hf_trainer.py", ()),
        ("hf_trainer.py", TWO),
        ("trl_sft.py", ()),
    ],
)
def test_an_example_trains_a_student(world, tmp_path, name, launcher):
    ran = run_example(name, world, tmp_path / "out", *launcher)
    assert ran.returncode == 0, ran.stderr[-3000:]
    if launcher:
        digests = re.findall(r"weights ([0-9a-f]{64})", ran.stdout)
        assert len(digests) == 2
        assert len(set(digests)) == 1, "the processes end with other weights"
    losses = [float(value) for value in re.findall(r"loss'?:? '?([0-9.]+)", ran.stdout + ran.stderr)]
    assert len(losses) >= 5
    before = AutoModelForImageTextToText.from_pretrained(world.student).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
    moved = [key for key, value in after.items() if not torch.equal(value, before[key])]
    assert any("language_model" in key for key in moved)
    assert all(value.isfinite().all() for value in after.values())
