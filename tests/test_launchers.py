"""The examples of docs/scaling.md run as they are, two processes each; what a cluster sets is set by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from cache_schema.operations.verify import verify
from tests.cache_teacher import assert_same_cache
from tests.student_caches import make_world
from tests.tiny_models import tiny_dataset, tiny_llava

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples"
OPTIONS = ("--dtype", "float32", "--shard-size", "4", "--device", "cpu")
SHARDS = 6

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, rows, the cache of one undisturbed worker, and a `bin` of commands as if installed."""
    folder = tmp_path_factory.mktemp("launchers")
    tiny_llava(folder / "teacher")
    tiny_dataset(folder / "data", rows=4 * SHARDS)
    (folder / "bin").mkdir()
    command(folder, "kdcache", f'exec {sys.executable} -P -m cli "$@"')
    command(folder, "torchrun", f'exec {sys.executable} -P -m torch.distributed.run "$@"')
    assert finished(start(folder, "kdcache", "build", *asked(folder, folder / "whole"))) == [0]
    return folder


def command(world: Path, name: str, line: str) -> None:
    path = world / "bin" / name
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def asked(world: Path, out: Path) -> list[object]:
    data = world / "data"
    words = ["--teacher", world / "teacher", "--data", data / "data.json", "--image-root", data / "images"]
    return [*words, "--out", out, *OPTIONS]


def start(world: Path, *words: object, **variables: object) -> subprocess.Popen[str]:
    """A command in another folder, with the world's commands first on its path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"PATH": f"{world / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    environment |= {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(
        list(map(str, words)), cwd=world, env=environment, stderr=subprocess.PIPE, text=True
    )


def finished(*processes: subprocess.Popen[str]) -> list[int]:
    said = [process.communicate(timeout=500)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [0] * len(codes), [text[-2000:] for text in said]
    return codes


def test_the_job_array_of_slurm(world, tmp_path):
    """Its worker's line, as two tasks numbered 5 and 6."""
    data = world / "data"
    words = [world / "teacher", data / "data.json", data / "images", tmp_path / "cache", *OPTIONS]
    array = {"SLURM_ARRAY_TASK_MIN": 5, "SLURM_ARRAY_TASK_COUNT": 2}
    finished(
        *(
            start(world, "bash", EXAMPLES / "slurm_build.sh", *words, SLURM_ARRAY_TASK_ID=task, **array)
            for task in (5, 6)
        )
    )
    assert verify(tmp_path / "cache").ok
    assert_same_cache(tmp_path / "cache", world / "whole")


def test_the_job_of_kubernetes(world, tmp_path):
    """The command of its container, as two pods."""
    job = yaml.safe_load((EXAMPLES / "kubernetes_build.yaml").read_text(encoding="utf-8"))["spec"]
    (container,) = job["template"]["spec"]["containers"]
    named = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == int(named["WORKERS"])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert set(named) == {"WORKERS", "TEACHER", "DATA", "IMAGES", "CACHE"}
    data = world / "data"
    given = {"WORKERS": 2, "TEACHER": world / "teacher", "DATA": data / "data.json"}
    given |= {"IMAGES": data / "images", "CACHE": tmp_path / "cache"}
    (line,) = container["args"]
    words = [*container["command"], f"{line} {' '.join(OPTIONS)}"]
    finished(*(start(world, *words, JOB_COMPLETION_INDEX=index, **given) for index in (0, 1)))
    assert verify(tmp_path / "cache").ok
    assert_same_cache(tmp_path / "cache", world / "whole")


def test_two_workers_of_torchrun(world, tmp_path):
    launch = ["torchrun", "--nproc-per-node", "2", "--master-port", "29651", "--no-python"]
    finished(start(world, *launch, "kdcache", "build", *asked(world, tmp_path / "cache")))
    assert_same_cache(tmp_path / "cache", world / "whole")


def test_the_training_job_of_slurm(world, tmp_path):
    """On one machine with two processes: `srun` and `scontrol` are stand-ins, torchrun and all else are not.
    A second submission finds the run finished."""
    made = make_world(tmp_path, rows=12)
    command(world, "scontrol", "echo 127.0.0.1")
    command(world, "srun", 'shift; exec "$@"')
    words = [made.cache, made.image_root, made.student, tmp_path / "run", "--stage", "dft", "--device", "cpu"]
    words += ["--global-batch", "4", "--micro-batch", "2", "--precision", "fp32"]
    variables = {"SLURM_NNODES": 1, "SLURM_GPUS_ON_NODE": 2, "SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "one"}
    finished(start(world, "bash", EXAMPLES / "slurm_train.sh", *words, **variables))
    before = (tmp_path / "run/model/model.safetensors").stat().st_mtime_ns
    alone = ["kdcache", "train", "--cache", made.cache, "--image-root", made.image_root]
    alone += ["--student", made.student, "--out", tmp_path / "alone", *words[4:]]
    finished(start(world, *alone))
    finished(start(world, "bash", EXAMPLES / "slurm_train.sh", *words, **variables))
    assert (tmp_path / "run/model/model.safetensors").stat().st_mtime_ns == before
    two, one = (load_file(tmp_path / name / "model/model.safetensors") for name in ("run", "alone"))
    assert all(abs(two[name] - tensor).max() < 1e-3 for name, tensor in one.items())
