"""The size of batches by free memory, and teachers that are compiled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cache_schema import open_cache
from cache_schema.progress import Silent
from pipeline.batch_size import batch_tokens_for, fitting_tokens
from pipeline.capture import BuildConfig, build
from pipeline.settings import BATCH_TOKENS
from pipeline.transformers_engine import TransformersEngine
from tests.tiny_models import tiny_dataset, tiny_llava

GB = 1 << 30


@pytest.mark.parametrize(
    ("free", "taken", "tokens", "expected"),
    [
        (80 * GB, GB, 3600, 32768),  # more runs no faster
        (16 * GB, 4 * GB, 3600, 8192),  # 0.6 of the free memory, in steps of 1,024
        (GB, 4 * GB, 3600, 1024),
        (GB, 0, 3600, 32768),
    ],
)
def test_a_batch_takes_a_share_of_the_free_memory(free: int, taken: int, tokens: int, expected: int) -> None:
    assert fitting_tokens(free, taken, tokens) == expected


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.fields: dict[str, str] = {}

    def message(self, line: str) -> None:
        self.lines.append(line)

    def update(self, done: int, **fields: str) -> None:
        self.fields = fields or self.fields


def test_a_device_too_small_for_a_few_samples_gets_small_batches_and_that_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(samples: list[Any]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    for name in ("synchronize", "empty_cache", "memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    weight = SimpleNamespace(device=torch.device("cuda", 0))
    engine = SimpleNamespace(hidden_states=full, head=SimpleNamespace(weight=weight))
    notes = Notes()
    assert batch_tokens_for(engine, range(1500), notes) == 1500  # type: ignore[arg-type]
    assert batch_tokens_for(engine, range(900), notes) == 1024  # type: ignore[arg-type]
    assert notes.lines[0].startswith("batches of 1,500 tokens: 4 samples do not fit")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = tiny_dataset(tmp_path_factory.mktemp("data"), rows=6)
    teacher = tiny_llava(tmp_path_factory.mktemp("teacher"))
    return {"teacher": teacher, "data": data.data, "image_root": data.image_root, "device": "cpu"}


def logsumexps(out: Path) -> list[np.ndarray]:
    return [sample.response.logsumexp for sample in open_cache(out)]


def test_a_compiled_teacher_gives_the_same_within_rounding(
    setting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the compiler's front end, its code run by torch itself: what a C++ compiler makes is not ours."""

    def compile_without_compiler(layer: Any) -> None:
        layer._compiled_call_impl = torch.compile(layer._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_compiler)
    lengths: list[int] = []
    run = TransformersEngine._run

    def noted(self: TransformersEngine, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        lengths.append(inputs["input_ids"].shape[1])
        return run(self, inputs)

    notes = Notes()
    build(BuildConfig(**setting, out=str(tmp_path / "plain")), notes)
    assert notes.fields["batch"] == f"{BATCH_TOKENS} tokens"
    monkeypatch.setattr(TransformersEngine, "_run", noted)
    build(BuildConfig(**setting, out=str(tmp_path / "compiled"), compile=True), notes)
    assert not [line for line in notes.lines if "uncompiled" in line]
    assert {length % 64 for length in lengths[3:]} == {0}
    for ours, theirs in zip(logsumexps(tmp_path / "compiled"), logsumexps(tmp_path / "plain"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_a_teacher_that_does_not_compile_runs_without_it(
    setting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def compile_badly(layer: Any) -> None:
        if fault == "raises":
            raise RuntimeError("no compiler here")
        layer._compiled_call_impl = lambda hidden, *_, **__: hidden * 2

    notes = Notes()
    build(BuildConfig(**setting, out=str(tmp_path / "plain")), notes)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_badly)
    build(BuildConfig(**setting, out=str(tmp_path / "c"), compile=True), notes)
    (line,) = [line for line in notes.lines if "uncompiled" in line]
    assert {"raises": "no compiler here", "differs": "other hidden states"}[fault] in line
    for ours, theirs in zip(logsumexps(tmp_path / "c"), logsumexps(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
