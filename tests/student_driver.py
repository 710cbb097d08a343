"""Training runs in processes of their own, which may kill themselves at a chosen moment: see `run`.

Called as `python student_driver.py RUNS.json`: a list of settings, each with a `kill` entry that is null or
the name of a function that writes and at which of its calls to send SIGKILL. Several runs are forked one
after the other from one process, so that torch is imported once; their exit codes go to RUNS.json.codes.
Several processes make their runs without forks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent


def run(file: Path, runs: Sequence[dict[str, Any]], *, ranks: int = 1) -> list[int]:
    """Trains with each of `runs` (fields of TrainConfig, `base` and changes of a `stage`); exit codes."""
    file.write_text(json.dumps([{"kill": None, **settings} for settings in runs], default=str))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if ranks > 1:
        address = {
            "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(20000 + os.getpid() % 20000),
        }
        environment |= {**address, "WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(file)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    return json.loads(file.with_suffix(".codes").read_text()) if ranks == 1 < len(runs) else [0]


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


@contextmanager
def recorded(out: Path, *, stop: int | None = None) -> Iterator[None]:
    """Meanwhile this process writes the samples of each of its steps, as cache and row, and the seconds that
    it has waited for data so far, to a file of its own in `out`. It asks itself to stop after step `stop`."""
    import student.train

    original = student.train._Run._step
    file = out / f"seen-{os.environ.get('RANK', '0')}.jsonl"
    out.mkdir(parents=True, exist_ok=True)

    def step(run: Any, micro_batches: Any, agreed: Any) -> None:
        pairs = [pair for batch in micro_batches for pair in zip(batch.sources, batch.rows, strict=True)]
        with file.open("a") as lines:
            lines.write(json.dumps([run.state.step, pairs, run.stopwatch.seconds["data wait"]]) + "\n")
        original(run, micro_batches, agreed)
        if run.state.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    with patch.object(student.train._Run, "_step", step):
        yield


def shard() -> None:
    """Makes accelerate shard on the CPU what it shards on accelerators: everything of its FSDP2 runs, but
    for the line that asks for another device."""
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    import student.prepare

    class Sharding(Accelerator):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.state.distributed_type = DistributedType.FSDP
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin()
            assert self.state.fsdp_plugin.fsdp_version == 2
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    given = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }
    os.environ |= {name: value for name, value in given.items() if name not in os.environ}
    student.prepare.Accelerator = Sharding  # type: ignore[misc]


def train_one(settings: dict[str, Any]) -> None:
    from cache_schema.errors import StoppedEarly
    from cache_schema.file_cache import FileCacheConfig
    from cache_schema.progress import Silent
    from student.settings import TrainConfig
    from student.sources import mixture_from
    from student.stages import stage_from
    from student.train import train

    kill = settings.pop("kill")
    if kill is not None:
        arm(*kill)
    if settings.pop("shard", False):
        shard()
    stage = stage_from({"base": settings.pop("base"), **settings.pop("stage", {})})
    if (mixture := settings.pop("mixture", None)) is not None:
        settings["mixture"] = mixture_from(mixture["caches"], mixture["mixture"], "test")
    if (files := settings.pop("files", None)) is not None:
        settings["files"] = FileCacheConfig(
            file_cache=Path(files["file_cache"]), file_cache_gib=files["file_cache_gib"]
        )
    paths = {name: Path(settings.pop(name)) for name in ("student", "out")}
    record, stop = settings.pop("record", False), settings.pop("stop", None)
    config = TrainConfig(stage=stage, trackers=(), **paths, **settings)
    with recorded(config.out, stop=stop) if record else nullcontext():
        try:
            train(config, Silent())
        except StoppedEarly:
            if stop is None:
                raise


def main() -> None:
    file = Path(sys.argv[1])
    runs = json.loads(file.read_text())
    if len(runs) == 1 or "RANK" in os.environ:
        for settings in runs:
            train_one(settings)
        return
    import student.train  # noqa: F401  (imported once, before the forks)

    codes = []
    for settings in runs:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                train_one(settings)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        codes.append(os.waitstatus_to_exitcode(status))
    file.with_suffix(".codes").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
