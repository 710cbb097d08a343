"""FSDP2 on the CPU: the sharded student takes the steps of the whole one."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from cache_schema.runs import read_metrics
from tests.student_caches import make_world
from tests.student_driver import run

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples"


def test_a_sharded_student_takes_the_same_steps(tmp_path):
    """Accelerate refuses FSDP on CPUs, so the module is sharded as accelerate would shard it on GPUs:
    every decoder layer, then the whole. Rank 1 has a batch with images, one of text alone and none."""
    world = make_world(tmp_path, rows=19)
    arguments = [str(path) for path in (world.student, world.cache, world.image_root, tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    environment |= {
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(41000 + os.getpid() % 20000),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/student_fsdp_driver.py"), *arguments],
            env={**environment, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    assert (tmp_path / "rank-0").exists()
    assert (tmp_path / "rank-1").exists()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("accelerate_*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_the_shipped_files(path):
    """Every key is one that accelerate knows, and is what it launches with."""
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    sharded = "fsdp2" in path.stem
    assert config.distributed_type == (DistributedType.FSDP if sharded else DistributedType.MULTI_GPU)
    words = ["--config_file", str(path), "kdcache", "train"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert arguments.use_fsdp == sharded
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert arguments.num_processes == given["num_processes"]
    for name, value in given.get("fsdp_config", {}).items():
        assert getattr(arguments, name) == value, name
    assert not sharded or arguments.fsdp_version == 2


@pytest.mark.slow
def test_a_run_goes_on_with_1_2_and_1_processes(tmp_path):
    """The two are launched by `accelerate launch` from the shipped file and sharded as it says."""
    world = make_world(tmp_path, rows=19)
    common = {
        "base": "dft",
        "stage": {"global_batch": 5, "max_steps": 7, "learning_rate": 1e-3},
        "student": world.student,
        "cache": str(world.cache),
        "image_root": world.image_root,
        "micro_batch": 2,
        "log_every": 1,
        "device": "cpu",
        "record": True,
        "resume": True,
    }
    file, moved = tmp_path / "runs.json", {**common, "out": tmp_path / "moved"}
    run(file, [{**common, "out": tmp_path / "whole"}])
    run(file, [{**moved, "stop": 2}])
    file.write_text(json.dumps([{**moved, "kill": None, "shard": True, "stop": 5}], default=str))
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    launch += ["--config_file", EXAMPLES / "accelerate_fsdp2.yaml", "--main_process_port", "29641"]
    ran = subprocess.run(
        [*map(str, launch), str(ROOT / "tests/student_driver.py"), str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    run(file, [moved])
    whole, changed = (seen(tmp_path / name) for name in ("whole", "moved"))
    assert changed == whole
    assert sorted(whole) == list(range(7))
    assert {len(set(rows)) for rows in whole.values()} == {4, 5}
    lines = [line for line in (tmp_path / "moved/seen-1.jsonl").read_text().splitlines() if line]
    assert [json.loads(line)[0] for line in lines] == [2, 3, 4]
    losses = [
        {line["step"]: line["loss"] for line in read_metrics(tmp_path / name)} for name in ("whole", "moved")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "moved")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=2e-4)
    assert any(not torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


def seen(folder):
    """The rows of each step, of all ranks together, in ascending order."""
    rows = defaultdict(list)
    for path in folder.glob("seen-*.jsonl"):
        for line in path.read_text().splitlines():
            step, pairs, *_ = json.loads(line)
            rows[step] += [row for _, row in pairs]
    return {step: sorted(found) for step, found in rows.items()}
