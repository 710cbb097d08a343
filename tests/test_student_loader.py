"""The loader: threads that are always busy, errors and ends in their place, data there before it is due."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from models import device
from student.collate import Batch
from student.loader import load_ahead, on_device, with_tensors
from student.losses import Denominators, PlannedTargets
from student.stream import Located, Step
from tests.distillation_batches import LENGTH, SPANS, collate, make_samples


class Numbered:
    """A block whose samples are their places."""

    def sample(self, place: int) -> int:
        return place


def steps_of(count: int, micro_batches: int, size: int = 1) -> Iterator[Step]:
    block = Numbered()
    for number in range(count):
        first = number * micro_batches * size
        parts = tuple(
            tuple(Located(block=block, place=first + part * size + place) for place in range(size))  # type: ignore[arg-type]
            for part in range(micro_batches)
        )
        yield Step(number=number, micro_batches=parts)


def test_short_steps_keep_all_threads_busy() -> None:
    """Four threads, steps of one micro-batch: four are under way at once."""
    together = threading.Barrier(4)

    def collate_with_others(samples: list[int]) -> list[int]:
        together.wait(30)  # breaks unless three other threads are here
        return samples

    batches = load_ahead(steps_of(12, 1), collate_with_others, workers=4)  # type: ignore[arg-type]
    assert list(batches) == [(number, [[number]]) for number in range(12)]


def test_no_more_is_under_way_than_a_step_and_one_for_every_thread() -> None:
    begun: list[int] = []
    batches = load_ahead(steps_of(50, 3), lambda samples: begun.append(samples[0]), workers=2)  # type: ignore[arg-type,func-returns-value]
    next(batches)
    time.sleep(0.2)
    assert len(begun) <= 3 + 2 + 3
    batches.close()
    assert not [each for each in threading.enumerate() if each.name.startswith(("feeder", "loader"))]


def test_waiting_for_data_is_no_part_of_a_step_that_takes_longer() -> None:
    """A device that takes 8 ms per sample, batches that take 3: after the first none is waited for."""
    size, steps = 8, 12

    def made(samples: list[int]) -> list[int]:
        time.sleep(0.003 * len(samples))
        return samples

    waited, started = [], time.perf_counter()
    batches = load_ahead(steps_of(steps, 2, size), made, workers=1)  # type: ignore[arg-type]
    for _ in range(steps):
        before = time.perf_counter()
        _, micro_batches = next(batches)
        waited.append(time.perf_counter() - before)
        for batch in micro_batches:
            time.sleep(0.008 * len(batch))
    whole = time.perf_counter() - started - waited[0]
    assert sum(waited[1:]) < 0.02 * whole
    batches.close()


def test_one_slow_batch_among_short_steps_is_not_waited_for() -> None:
    """Steps of one sample of 8 ms; every tenth sample takes 24 ms to make."""

    def made(samples: list[int]) -> list[int]:
        time.sleep(0.024 if samples[0] % 10 == 9 else 0.004)
        return samples

    waited = 0.0
    batches = load_ahead(steps_of(60, 1), made, workers=2)  # type: ignore[arg-type]
    next(batches)
    for _ in range(59):
        time.sleep(0.008)
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
    assert waited < 0.02 * 59 * 0.008
    batches.close()


def test_a_pause_of_the_stream_is_not_waited_for_in_steps_of_one_sample() -> None:
    """Samples of 4 ms for steps of 8 ms; once, for 0.2 s, none comes, as while a shard is read."""

    def paused() -> Iterator[Step]:
        for step in steps_of(60, 1):
            if step.number == 45:
                time.sleep(0.2)
            yield step

    def made(samples: list[int]) -> list[int]:
        time.sleep(0.004)
        return samples

    waited = 0.0
    batches = load_ahead(paused(), made, workers=2)  # type: ignore[arg-type]
    next(batches)
    for _ in range(59):
        time.sleep(0.008)
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
    assert waited < 0.1
    batches.close()


@pytest.mark.parametrize(("size", "most"), [(1, 32), (8, 4), (64, 3)])
def test_what_is_ahead_of_steps_of_one_micro_batch_is_bounded_in_samples(size: int, most: int) -> None:
    begun: list[int] = []
    batches = load_ahead(steps_of(90, 1, size), lambda samples: begun.append(samples[0]), workers=1)  # type: ignore[arg-type,func-returns-value]
    next(batches)
    for _ in range(200):
        if len(begun) >= most:
            break
        time.sleep(0.05)
    time.sleep(0.1)
    assert len(begun) == most
    batches.close()


def test_every_tensor_of_a_batch_is_reached_and_nothing_else_changes() -> None:
    """What is pinned, or kept while the device works on it."""
    labels, samples = make_samples(torch.Generator().manual_seed(0), SPANS, LENGTH, draws=2)
    batch = Batch(
        inputs={"input_ids": labels.clamp(min=0), "attention_mask": torch.ones_like(labels)},
        labels=labels,
        targets=collate(samples, LENGTH),
        denominators=Denominators(samples=5.0),
        rows=(4, 3, 2, 1, 0),
        sample_ids=("e", "d", "c", "b", "a"),
    )
    reached: list[Tensor] = []

    def moved(tensor: Tensor) -> Tensor:
        reached.append(tensor)
        return tensor + 0

    copy = with_tensors(batch, moved)
    assert {id(tensor) for tensor in tensors_of(batch)} == {id(tensor) for tensor in reached}
    assert len(reached) > 20
    for name in ("rows", "sample_ids", "denominators"):
        assert getattr(copy, name) == getattr(batch, name)
    assert copy.targets.relations[2].sample == batch.targets.relations[2].sample
    for ours, theirs in zip(tensors_of(copy), tensors_of(batch), strict=True):
        assert ours is not theirs
        assert torch.equal(ours, theirs)
    (alone,) = on_device([batch], torch.device("cpu"))
    assert all(torch.equal(*pair) for pair in zip(tensors_of(alone), tensors_of(batch), strict=True))


def test_of_planned_targets_a_device_gets_the_plan_alone() -> None:
    labels, samples = make_samples(torch.Generator().manual_seed(0), SPANS, LENGTH)
    targets = PlannedTargets.of(labels, collate(samples, LENGTH))
    reached: list[Tensor] = []
    with_tensors(targets, lambda tensor: reached.append(tensor) or tensor)
    assert {id(tensor) for tensor in reached} == {id(tensor) for tensor in tensors_of(targets.plan)}


def test_pixels_are_bytes_until_they_are_on_a_device() -> None:
    levels = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    table = torch.randn(3, 256)
    labels = torch.zeros(2, 3, dtype=torch.long)
    batch = Batch(
        inputs={"input_ids": labels, "pixel_values": levels},
        labels=labels,
        targets=None,
        denominators=Denominators(samples=2.0),
        rows=(0, 1),
        sample_ids=("a", "b"),
        pixel_table=table,
    )
    moved = batch.to(torch.device("cpu"))
    for channel in range(3):
        expected = table[channel][levels[:, channel].long()]
        assert torch.equal(moved.inputs["pixel_values"][:, channel], expected)
    again = moved.to(torch.device("cpu"))
    assert torch.equal(again.inputs["pixel_values"], moved.inputs["pixel_values"])


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for each in value.values() for tensor in tensors_of(each)]
    if isinstance(value, tuple):
        return [tensor for each in value for tensor in tensors_of(each)]
    names = getattr(value, "__dataclass_fields__", ())
    return [tensor for name in names for tensor in tensors_of(getattr(value, name))]


@pytest.mark.parametrize(("processes", "cores"), [(None, 8), ("1", 8), ("2", 4), ("3", 2), ("16", 1)])
def test_cores_are_shared_among_the_processes_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, processes: str | None, cores: int
) -> None:
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert device.cores_per_process() == cores
