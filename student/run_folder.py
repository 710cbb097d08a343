"""The folder of a run: recipe.yaml, metrics.jsonl, tensorboard/, checkpoints/, model/, result.json."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
import yaml
from accelerate import Accelerator

from cache_schema.errors import KdcacheError
from cache_schema.output import write_text
from cache_schema.runs import read_metrics, read_result
from cache_schema.version import VERSION
from student import loss_weights
from student.checkpoint import refuse_other
from student.ranks import Ranks
from student.run_state import RunState
from student.settings import TrainConfig
from student.timing import Stopwatch, shares

TERMS = ("loss", *loss_weights.TERMS)


def write_settings(config: TrainConfig, identity: Mapping[str, Any]) -> None:
    """Writes recipe.yaml: every setting as resolved, the identity and the library versions."""
    document = _settings_document(config, identity)
    write_text(config.out / "recipe.yaml", yaml.safe_dump(document, sort_keys=False))


def _settings_document(config: TrainConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    versions = {"kdcache": VERSION}
    versions |= {library.__name__: str(library.__version__) for library in (torch, transformers, accelerate)}
    return {**config.to_json(), "identity": dict(identity), "versions": versions}


def write_result(config: TrainConfig, result: Mapping[str, Any]) -> None:
    """Writes training.json into the model, then result.json, the proof that the run is finished."""
    stage = {**_settings_document(config, result["identity"]), "result": dict(result)}
    write_history(config.out / "model", [*read_history(config.student), stage])
    write_text(config.out / "result.json", json.dumps(result, indent=1) + "\n")


def write_history(model: Path, stages: list[dict[str, Any]]) -> None:
    """Writes how a model was trained into its folder: settings and result of every stage, first one first."""
    write_text(model / "training.json", json.dumps({"stages": stages}, indent=1) + "\n")


def read_history(model: Path) -> list[dict[str, Any]]:
    """What `write_history` wrote; empty where it was not written or cannot be read."""
    try:
        return list(json.loads((model / "training.json").read_text(encoding="utf-8"))["stages"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def finished(out: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result when `out` holds this very run, finished. IdentityMismatch when it holds another one."""
    result = read_result(out)
    if result is not None:
        refuse_other(identity, result["identity"], out)
    return result


@contextmanager
def locked(out: Path, ranks: Ranks) -> Iterator[None]:
    """Holds the folder of a run for these processes. KdcacheError when another run holds it; what a dead run
    held is free."""
    handle, error = None, None
    if ranks.main:
        try:
            out.mkdir(parents=True, exist_ok=True)
            handle = os.open(out, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            error = KdcacheError(
                f"another process trains in {out} now: wait for it, stop it, or choose another --out"
            )
        except OSError as problem:
            error = KdcacheError(f"{out} cannot be used: {problem.strerror}; choose another --out")
    try:
        if (end := ranks.agree(error)) is not None:
            raise end
        yield
    finally:
        if handle is not None:
            os.close(handle)


class Journal:
    """metrics.jsonl, one JSON object per line, and the same to accelerate's trackers.

    Lines of what a run that goes on from `state` will do again are dropped. Only the main process writes.
    """

    def __init__(self, accelerator: Accelerator, out: Path, state: RunState) -> None:
        self._accelerator = accelerator
        self._path = out / "metrics.jsonl"
        step = state.step
        if accelerator.is_main_process:
            measured = None if state.mixture is None else state.mixture["measured"]
            last = {
                "held-out": step if state.evaluated == step else step - 1,
                "mixture": step if measured == step else step - 1,
            }
            kept = [line for line in read_metrics(out) if line["step"] <= last.get(line["group"], step)]
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        if accelerator.log_with:
            purge = {"purge_step": step + 1} if step else {}
            accelerator.init_trackers("kdcache", init_kwargs={"tensorboard": purge})

    def write(self, step: int, values: Mapping[str, Any], *, group: str) -> None:
        """One line: step, group (`train`, `held-out`, `mixture`) and values; `group/name` to the trackers."""
        finite = {
            name: value if not isinstance(value, float) or math.isfinite(value) else None
            for name, value in values.items()
        }
        if self._accelerator.is_main_process:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "group": group, **finite}) + "\n")
        numbers = {f"{group}/{name}": value for name, value in finite.items() if value is not None}
        self._accelerator.log(numbers, step=step)

    def close(self) -> None:
        """Ends the trackers."""
        if self._accelerator.is_main_process:
            for tracker in self._accelerator.trackers:
                tracker.finish()


class Meter:
    """Means over the steps since the last line of the journal."""

    def __init__(self, stopwatch: Stopwatch, peak_flops: float | None = None) -> None:
        """peak_flops: of this process's device, for the share that is used (MFU); None where unknown."""
        self._stopwatch, self._peak_flops = stopwatch, peak_flops
        self.latest: dict[str, Any] = {}
        self._begin()

    def add(
        self,
        terms: Mapping[str, float],
        *,
        norm: float,
        samples: int,
        tokens: int,
        padded: int = 0,
        flops: float = 0.0,
    ) -> None:
        """A step: the terms of its loss, its gradient norm, its samples, its tokens without padding and those
        of padding over all ranks; flops: of this process."""
        self._steps += 1
        for name, value in {**terms, "grad_norm": norm}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._samples += samples
        self._tokens += tokens
        self._padded += padded
        self._flops += flops

    def fields(self) -> dict[str, str]:
        """Short values for the screen."""
        shown = {
            name: f"{self._sums[name] / self._steps:.3f}"
            for name in TERMS
            if self._sums.get(name, 0.0) != 0.0
        }
        wait = shares(self._stopwatch.seconds)["data wait"]
        used = self._utilisation()
        return {
            **shown,
            "samples/s": f"{self._rate(self._samples):.1f}",
            "MFU": "n/a" if used is None else f"{used:.1%}",
            "data wait": f"{wait:.0%}",
        }

    def close(self) -> dict[str, Any]:
        """The means since the last call; resets them."""
        spent = {
            name: value - self._seconds.get(name, 0.0) for name, value in self._stopwatch.seconds.items()
        }
        self.latest = {
            **{name: value / self._steps for name, value in self._sums.items()},
            "samples_per_second": self._rate(self._samples),
            "tokens_per_second": self._rate(self._tokens),
            "padding": self._padded / max(self._tokens + self._padded, 1),
            "mfu": self._utilisation(),
            **{f"time {name}": share for name, share in shares(spent).items()},
        }
        self._begin()
        return dict(self.latest)

    def _begin(self) -> None:
        self._steps = self._samples = self._tokens = self._padded = 0
        self._flops = 0.0
        self._sums: dict[str, float] = {}
        self._seconds = dict(self._stopwatch.seconds)
        self._started = time.perf_counter()

    def _utilisation(self) -> float | None:
        """The share of the device's peak that the steps' floating-point operations come to."""
        return None if self._peak_flops is None else self._rate(self._flops) / self._peak_flops

    def _rate(self, count: float) -> float:
        return count / max(time.perf_counter() - self._started, 1e-9)


def time_line(seconds: Mapping[str, float]) -> str:
    """The shares of time, as a line of text."""
    return "time: " + ", ".join(f"{name} {share:.1%}" for name, share in shares(seconds).items())
