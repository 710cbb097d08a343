"""Checkpoints of a run: a folder that exists completely or not at all, and is refused by any other run."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache_schema.errors import IdentityMismatch, KdcacheError, first_line
from cache_schema.file_cache import sha256_of
from cache_schema.format.cache import Cache
from cache_schema.format.identity import digest_of
from cache_schema.output import sync, write_text, writing
from cache_schema.progress import Progress
from student.folder import WRITE_ERRORS, folder_digest, processor_digest
from student.run_state import RunState
from student.settings import TrainConfig

_NAME = re.compile(r"^step-(\d{8})$")
_FILES = ("weights.safetensors", "optimizer.pt")
_READ_ERRORS = (OSError, ValueError, TypeError, RuntimeError, EOFError, UnpicklingError, SafetensorError)


def identity_of(config: TrainConfig, caches: Sequence[Cache]) -> dict[str, Any]:
    """What decides every step of a run: only a run with the same can use its checkpoints.

    Micro-batch, ranks and workers are not in it: they change rounding only.
    """
    found = [
        {
            "identity": cache.manifest.identity,
            "samples": len(cache),
            "shards": digest_of([[shard, cache.commits[shard].attempt] for shard in cache.shards]),
        }
        for cache in caches
    ]
    if config.mixture is None:
        names = ("cache", "rejected")
        data: dict[str, Any] = dict(zip(names, found, strict=False))
    else:
        weights = (source.weight for source in config.sources)
        pairs = enumerate(zip(found, weights, strict=True))
        data = {
            "caches": {str(place): {**each, "weight": weight} for place, (each, weight) in pairs},
            "mixture": config.mixture.to_json()["mixture"],
        }
    return {
        "stage": config.resolved_stage.to_json(),
        "seed": config.seed,
        "precision": config.precision,
        "window": config.window,
        "student": folder_digest(config.student),
        "processor": processor_digest(config.student),
        **data,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Everything that a run needs to continue.

    state: its step and what else the run knows there. weights: the trained parameters by name (the frozen
    ones are the student's own, whose digest is in `identity`). optimizer: its state dictionary. identity:
    what a run must share with the checkpoint to use it. The learning rate and the random numbers are
    functions of seed, step and rank and have no state.
    """

    state: RunState
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    identity: Mapping[str, Any]


class Checkpoints:
    """The folder `checkpoints/` of a run.

    keep: the number of newest checkpoints kept, in addition to the best one.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        assert keep >= 1, keep
        self.folder = folder
        self._keep = keep
        self._damaged: set[int] = set()

    def steps(self) -> list[int]:
        """The steps that were saved, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(found[1]) for path in self.folder.iterdir() if (found := _NAME.match(path.name)))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes to a temporary folder, syncs and renames; then removes what is older than `keep` allows.

        A step that is already saved, and whole, is left as it is. KdcacheError when the disk refuses.
        """
        out = self.path(checkpoint.state.step)
        temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
        try:
            if checkpoint.state.step in self._damaged:
                shutil.rmtree(out, ignore_errors=True)
                self._damaged.remove(checkpoint.state.step)
            if not out.exists():
                self._write(checkpoint, temporary)
                temporary.rename(out)
                sync(out.parent)
            self._prune(checkpoint.state.best_step)
        except WRITE_ERRORS as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise KdcacheError(
                f"checkpoint {out} cannot be written: {first_line(error)}; free space"
            ) from error

    def update(self, state: RunState) -> None:
        """Writes the state of a step whose weights are saved anew. KdcacheError when the disk refuses."""
        path = self.path(state.step) / "state.json"
        with writing(path):
            document = {**json.loads(path.read_text(encoding="utf-8")), "progress": state.to_json()}
            write_text(path, json.dumps(document, indent=1))
            self._prune(state.best_step)

    def take_up(self, identity: Mapping[str, Any], *, resume: bool, progress: Progress) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None for a new run; a damaged one is passed over with a
        message.

        KdcacheError when there is one and it was not asked to resume, or none is whole; IdentityMismatch when
        it is of another run.
        """
        steps, run = self.steps(), self.folder.parent
        if steps and not resume:
            raise KdcacheError(
                f"{run} holds a run at step {steps[-1]}: add --resume to continue, or choose another --out"
            )
        faults = []
        for step in reversed(steps):
            try:
                saved = self.load(step)
            except KdcacheError as error:
                self._damaged.add(step)
                faults.append(str(error))
                continue
            refuse_other(identity, saved.identity, self.path(step))
            for fault in faults:
                progress.message(f"{fault}: the run continues from step {step}")
            return saved
        if faults:
            raise KdcacheError(f"{faults[0]}; no other is whole: remove {self.folder} to start again")
        if resume:
            progress.message(f"{run} holds no checkpoint to resume: the stage begins at step 0")
        return None

    def load(self, step: int) -> Checkpoint:
        """A saved checkpoint on the CPU. KdcacheError when a file of it is missing or altered."""
        folder = self.path(step)
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if state["step"] != step or not isinstance(state["identity"], Mapping):
                raise KdcacheError(f"checkpoint {folder} is damaged: its state.json is not of step {step}")
            for name in _FILES:
                expected = state["files"][name]
                found = sha256_of(folder / name)
                if found != expected:
                    raise KdcacheError(
                        f"checkpoint {folder / name} is damaged: sha256 {found[:12]}, not {expected[:12]}"
                    )
            optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            return Checkpoint(
                state=RunState.from_json(state["step"], state["progress"]),
                weights=load_file(folder / "weights.safetensors"),
                optimizer=optimizer,
                identity=state["identity"],
            )
        except KeyError as error:
            raise KdcacheError(f"checkpoint {folder} is damaged: its state.json lacks {error}") from error
        except _READ_ERRORS as error:
            raise KdcacheError(f"checkpoint {folder} is damaged: {type(error).__name__}") from error

    def sweep(self, *, best: int | None = None) -> None:
        """Removes partial and obsolete checkpoints of killed runs."""
        if self.folder.is_dir():
            self._prune(best)
            for path in self.folder.glob(".*"):
                shutil.rmtree(path, ignore_errors=True)

    def _write(self, checkpoint: Checkpoint, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.weights.items()}
        save_file(weights, temporary / "weights.safetensors")
        torch.save(dict(checkpoint.optimizer), temporary / "optimizer.pt")
        files = {}
        for name in _FILES:
            sync(temporary / name)
            files[name] = sha256_of(temporary / name)
        state = {
            "step": checkpoint.state.step,
            "identity": checkpoint.identity,
            "progress": checkpoint.state.to_json(),
            "files": files,
        }
        (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        sync(temporary / "state.json")
        sync(temporary)

    def _prune(self, best: int | None) -> None:
        for step in self.steps()[: -self._keep]:
            if step != best:
                away = self.folder / f".removed-{step:08d}"
                self.path(step).rename(away)
                shutil.rmtree(away, ignore_errors=True)


def refuse_other(identity: Mapping[str, Any], saved: Mapping[str, Any], where: Path) -> None:
    """IdentityMismatch, with both values of every difference, unless the two identities are equal."""
    ours, theirs = _flat(identity), _flat(saved)
    keys = ours.keys() | theirs.keys()
    if "processor" not in theirs:  # runs before version 0.2 did not record it
        keys -= {"processor"}
    different = [
        f"{key} is {ours.get(key)!r} now and was {theirs.get(key)!r}"
        for key in sorted(keys)
        if ours.get(key) != theirs.get(key)
    ]
    if different:
        raise IdentityMismatch(
            f"{where} belongs to another run: {'; '.join(different)}; give the same settings to continue, "
            "or another --out to start again"
        )


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            made |= _flat(value, f"{prefix}{key}.")
        else:
            made[f"{prefix}{key}"] = value
    return made
