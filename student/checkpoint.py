"""Checkpoints of a run: a folder that exists completely or not at all, and is refused by any other run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache_schema.errors import IdentityMismatch, KdcacheError
from cache_schema.format.cache import Cache
from cache_schema.format.identity import digest_of
from student.folder import folder_digest, sync
from student.settings import TrainConfig

_NAME = re.compile(r"^step-(\d{8})$")


def identity_of(config: TrainConfig, cache: Cache) -> dict[str, Any]:
    """What decides every step of a run: only a run with the same can use its checkpoints.

    Micro-batch, ranks and workers are not in it: they change rounding only.
    """
    attempts = [[shard, cache.commits[shard].attempt] for shard in cache.shards]
    return {
        "stage": config.resolved_stage.to_json(),
        "seed": config.seed,
        "precision": config.precision,
        "window": config.window,
        "student": folder_digest(config.student),
        "cache": {
            "identity": cache.manifest.identity,
            "samples": len(cache),
            "shards": digest_of(attempts),
        },
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Everything that a run needs to continue.

    step: optimizer steps done, which is the position in the stream too. weights: the trained parameters by
    name (the frozen ones are the student's own, whose digest is in `identity`). optimizer: its state
    dictionary. identity: what a run must share with the checkpoint to use it. progress: small values
    (best evaluation, seconds spent, the gradient scaler's state). The learning rate and the random numbers
    are functions of seed, step and rank and have no state.
    """

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    identity: Mapping[str, Any]
    progress: Mapping[str, Any]


class Checkpoints:
    """The folder `checkpoints/` of a run.

    keep: the number of newest checkpoints kept, in addition to the best one.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        assert keep >= 1, keep
        self.folder = folder
        self._keep = keep

    def steps(self) -> list[int]:
        """The steps that were saved, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(found[1]) for path in self.folder.iterdir() if (found := _NAME.match(path.name)))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, checkpoint: Checkpoint, *, best: int | None = None) -> Path:
        """Writes to a temporary folder, syncs and renames; then removes what is older than `keep` allows.

        A step that is already saved stays unchanged. KdcacheError when writing fails.
        """
        out = self.path(checkpoint.step)
        try:
            if not out.exists():
                self._write(checkpoint, out)
            self._prune(best)
        except OSError as error:
            raise KdcacheError(
                f"checkpoint {out} cannot be written: {error.strerror or error}; free space"
            ) from error
        return out

    def load(self, step: int) -> Checkpoint:
        """A saved checkpoint on the CPU. KdcacheError when a file of it is missing or altered."""
        folder = self.path(step)
        remedy = f"remove {folder} to continue from the previous one"
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            for name, expected in state["files"].items():
                with (folder / name).open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != expected:
                    raise KdcacheError(
                        f"checkpoint {folder / name} is damaged: sha256 {found[:12]}, not {expected[:12]}; "
                        + remedy
                    )
            optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            weights = load_file(folder / "weights.safetensors")
        except (OSError, ValueError, KeyError) as error:
            raise KdcacheError(f"checkpoint {folder} is damaged: {error}; {remedy}") from error
        return Checkpoint(
            step=state["step"],
            weights=weights,
            optimizer=optimizer,
            identity=state["identity"],
            progress=state["progress"],
        )

    def sweep(self, *, best: int | None = None) -> None:
        """Removes partial and obsolete checkpoints of killed runs."""
        if self.folder.is_dir():
            self._prune(best)
            for path in self.folder.glob(".*"):
                shutil.rmtree(path, ignore_errors=True)

    def _write(self, checkpoint: Checkpoint, out: Path) -> None:
        temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.weights.items()}
        save_file(weights, temporary / "weights.safetensors")
        torch.save(dict(checkpoint.optimizer), temporary / "optimizer.pt")
        files = {}
        for name in ("weights.safetensors", "optimizer.pt"):
            sync(temporary / name)
            with (temporary / name).open("rb") as file:
                files[name] = hashlib.file_digest(file, "sha256").hexdigest()
        state = {
            "step": checkpoint.step,
            "identity": checkpoint.identity,
            "progress": checkpoint.progress,
            "files": files,
        }
        (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        sync(temporary / "state.json")
        sync(temporary)
        temporary.rename(out)
        sync(out.parent)

    def _prune(self, best: int | None) -> None:
        for step in self.steps()[: -self._keep]:
            if step != best:
                away = self.folder / f".removed-{step:08d}"
                self.path(step).rename(away)
                shutil.rmtree(away, ignore_errors=True)


def refuse_other(identity: Mapping[str, Any], saved: Mapping[str, Any], where: Path) -> None:
    """IdentityMismatch, with both values of every difference, unless the two identities are equal."""
    ours, theirs = _flat(identity), _flat(saved)
    different = [
        f"{key} is {ours.get(key)!r} now and was {theirs.get(key)!r}"
        for key in sorted(ours.keys() | theirs.keys())
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
