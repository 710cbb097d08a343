"""One training run in a process of its own, which may kill itself at a chosen moment: see `run`.

Called as `python student_driver.py CONFIG.json`; the moment, if any, is the `kill` entry: the name of a
function that checkpoints and models are written with, and at which of its calls to send SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run(
    config: Path, settings: dict[str, Any], *, kill: tuple[str, int] | None = None, ranks: int = 1
) -> list[int]:
    """Trains with `settings` (fields of TrainConfig, and `base` with changes of a stage); exit codes."""
    config.write_text(json.dumps({**settings, "kill": kill}, default=str))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if ranks > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
        environment |= {**address, "WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(config)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert all(code in (0, -signal.SIGKILL) for code in codes), errors
    return codes


def arm(name: str, call: int) -> None:
    """Makes the `call`-th use of a writing function the last thing that this process does."""
    import student.checkpoint
    import student.folder

    calls = 0

    def armed(original: Any) -> Any:
        def function(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return function

    if name == "step":
        import student.train

        student.train._Run._step = armed(student.train._Run._step)
    elif name == "rename":
        Path.rename = armed(Path.rename)  # type: ignore[method-assign]
    elif name == "sync":
        student.checkpoint.sync = armed(student.checkpoint.sync)
    else:
        assert name == "save_file", name
        student.checkpoint.save_file = armed(student.checkpoint.save_file)
        student.folder.save_file = armed(student.folder.save_file)


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    from cache_schema.progress import Silent
    from student.settings import TrainConfig
    from student.stages import stage_from
    from student.train import train

    kill = settings.pop("kill")
    if kill is not None:
        arm(*kill)
    stage = stage_from({"base": settings.pop("base"), **settings.pop("stage", {})})
    paths = {name: Path(settings.pop(name)) for name in ("student", "image_root", "out")}
    train(TrainConfig(stage=stage, trackers=(), **paths, **settings), Silent())


if __name__ == "__main__":
    main()
