"""FSDP2 on the CPU: the sharded student takes the steps of the whole one."""

import os
import subprocess
import sys
from pathlib import Path

from tests.student_caches import make_world

ROOT = Path(__file__).resolve().parent.parent


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
