"""What a capture costs on a GPU by the cost model: the teacher and each target at LLaVA-KD's shapes.

Recorded on fake tensors like the losses (benchmarks.roofline): a batch of 16 samples, each with 729 visual
positions and 105 supervised ones, V = 151,936, D = 2,560, K = 32, bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks import _shapes
from benchmarks._recorder import Recording, imagined
from benchmarks.roofline import SAMPLES, Device, foretell
from cache_schema import TargetSpec
from models.head import Head, _padded_product
from pipeline.targets import Asked, TargetMaker

SPEC = TargetSpec(targets=("response", "visual", "relation"), top_k=32)
TARGETS = {
    "response alone": ("response",),
    "visual alone": ("visual",),
    "relation alone": ("relation",),
    "all targets": SPEC.targets,
}


@torch.library.custom_op("kdcache_recorder::block_statistics", mutates_args=())
def _statistics(logits: Tensor, blocks: int, temperatures: int) -> tuple[Tensor, Tensor, Tensor]:
    return logits.new_empty(0), logits.new_empty(0), logits.new_empty(0)


@_statistics.register_fake
def _(logits: Tensor, blocks: int, temperatures: int) -> tuple[Tensor, Tensor, Tensor]:
    peak = logits.new_empty(len(logits), blocks)
    return peak, logits.new_empty(temperatures, len(logits), blocks), torch.empty_like(peak)


@torch.library.custom_op("kdcache_recorder::block_fields", mutates_args=())
def _fields(near: Tensor, peak: Tensor, mass: Tensor, moment: Tensor, k: int) -> Tensor:
    return near.new_empty(0)


@_fields.register_fake
def _(near: Tensor, peak: Tensor, mass: Tensor, moment: Tensor, k: int) -> Tensor:
    return near.new_empty(len(near), k)


def _fused_statistics(logits: Tensor, temperatures: Sequence[float], size: int) -> Any:
    return _statistics(logits, -(-logits.shape[1] // size), len(temperatures))


def _fused_fields(
    logits: Tensor, statistics: Any, temperatures: Sequence[float], k: int, size: int, limits: Tensor | None
) -> Any:
    """One kernel that reads the statistics, and the k blocks of each row that hold its largest entries."""
    values = _fields(logits[:, : k * size], *statistics, k)
    one = logits.new_empty(len(logits))
    tails = logits.new_empty(len(logits), len(temperatures))
    ids = logits.new_empty(len(logits), k, dtype=torch.int32)
    return {"token_ids": ids, "logprobs": values, "logsumexp": one, "entropy": one, "tail_logprob": tails}


@contextmanager
def _capture_as_on_cuda() -> Iterator[None]:
    """Targets choose what they choose on CUDA, under `imagined`."""
    kernels = SimpleNamespace(
        fused_statistics=_fused_statistics, fused_fields=_fused_fields, selects=lambda *_, **__: True
    )

    def logits(self: Head, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        return _padded_product(hidden, self.weight, self.columns)

    with (
        patch.object(Head, "logits", logits),
        patch.object(TargetMaker, "_scratch", lambda self, rows: None),
        patch("pipeline.targets._GROUP_BYTES", 1 << 40),
        patch("pipeline.targets._chunk_bytes", lambda device, **_: 2 << 30),
        patch("pipeline.targets.kernels", lambda device, **_: kernels),
        patch("pipeline.block_statistics.kernels", lambda device, **_: kernels),
        patch("pipeline.relation.by_need", lambda device, **_: False),
        patch("pipeline.relation.root_of", lambda head: torch.empty(2 * head.weight.shape[1:])),
    ):
        yield


def forward_recordings(shape: _shapes.Shape = _shapes.TEACHER) -> dict[str, Recording]:
    """A batch of the teacher: `hidden only`, and `plain forward` with its logits."""
    found = {}
    with imagined() as recorder, torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = shape.build().eval()
            pixels = torch.empty(SAMPLES, 3, shape.image_size, shape.image_size)
        finally:
            torch.set_default_dtype(torch.float32)
        ids = torch.empty(SAMPLES, _length(shape), dtype=torch.int64)
        for name, module in (("hidden only", model.base_model), ("plain forward", model)):
            recorder.operations.clear()
            module(input_ids=ids, pixel_values=pixels, use_cache=False)
            found[name] = recorder.operations.copy()
    return found


def target_recordings(shape: _shapes.Shape = _shapes.TEACHER) -> dict[str, Recording]:
    """The records of a batch from its hidden states, by name of TARGETS."""
    found = {}
    for name, targets in TARGETS.items():
        with imagined() as recorder, _capture_as_on_cuda():
            weight = torch.empty(shape.vocab, shape.width, dtype=torch.bfloat16)
            maker = TargetMaker(Head(weight=weight), replace(SPEC, targets=targets))
            states = torch.empty(SAMPLES * _length(shape), shape.width, dtype=torch.bfloat16)
            recorder.operations.clear()
            maker.batch(states, asked_of(targets, shape))
            found[name] = recorder.operations.copy()
    return found


def table(device: Device) -> dict[str, dict[str, float]]:
    """Milliseconds per sample of each part, and the speed of a capture with it relative to the plain forward:
    records are made after the forward, and all else runs beside it."""
    parts = forward_recordings() | target_recordings()
    took = {name: 1e3 * foretell(part, device).seconds / SAMPLES for name, part in parts.items()}
    before = {name: took["hidden only"] if name in TARGETS else 0.0 for name in took}
    return {
        name: {
            "ms_per_sample": round(took[name], 2),
            "of_plain": round(took["plain forward"] / (before[name] + took[name]), 3),
        }
        for name in took
    }


def shown(rows: dict[str, dict[str, float]]) -> str:
    """`table` as text."""
    lines = [f"{'':18} {'ms/sample':>10} {'of plain':>9}"]
    lines += [f"{name:18} {row['ms_per_sample']:10.2f} {row['of_plain']:9.3f}" for name, row in rows.items()]
    return "\n".join(lines)


def _length(shape: _shapes.Shape) -> int:
    return shape.visual + _shapes.TEXT + _shapes.ANSWER


def asked_of(targets: Sequence[str], shape: _shapes.Shape) -> Asked:
    """What a batch of SAMPLES samples asks of its hidden states."""
    length = _length(shape)
    starts = np.arange(SAMPLES)[:, None] * length
    visual, response = np.arange(shape.visual), np.arange(length - _shapes.ANSWER - 1, length - 1)
    parts = [part for kind, part in (("response", response), ("visual", visual)) if kind in targets]
    places = (starts + np.concatenate([np.empty(0, np.int64), *parts])).ravel()
    numbers = np.zeros(len(places), dtype=np.int64)
    images = list(starts + visual) if "relation" in targets else []
    return Asked(places=places, labels=numbers, rows=numbers, positions=places % length, images=images)
