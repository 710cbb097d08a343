"""Batches ahead of time: decoded and collated by threads, and on the device before they are needed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from cache_schema.format.records import Sample
from models.device import cores_per_process
from student.collate import Batch
from student.stream import Located, Step

Made = TypeVar("Made")

_MOST_WORKERS = 8  # 1,000 samples per second

_SHORT_AHEAD = 32
"""Samples that are under way or ready where a step is one micro-batch: a quarter of a second of 8 ms each."""


def load_ahead(
    steps: Generator[Step],
    collator: Callable[[Sequence[Sample]], Made],
    *,
    workers: int | None = None,
    pin: bool = False,
) -> Generator[tuple[int, list[Made]]]:
    """(step, its micro-batches) in order, decoded and collated by `workers` threads ahead of time.

    The order of what comes out does not depend on `workers`; 0 does the work in the calling thread; None: as
    many as this process has cores, less one, from 2 to 8. Threads suffice: reading, decoding, resizing and
    array work all release the interpreter's lock. As many micro-batches are under way or ready as a step has,
    and one more for every thread, or three for every thread where that is more; where steps are of one
    micro-batch, _SHORT_AHEAD samples where that is more: short steps keep all threads busy and do not wait
    while a shard is read. pin: Batches come in pinned memory, from which copies to a device do not wait.
    """

    def collate(part: Sequence[Located]) -> Made:
        made = collator([located.sample() for located in part])
        return with_tensors(made, Tensor.pin_memory) if pin else made

    if workers is None:
        workers = max(2, min(_MOST_WORKERS, cores_per_process() - 1))
    if workers == 0:
        for step in steps:
            yield step.number, [collate(part) for part in step.micro_batches]
        return

    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="loader")
    ready: queue.Queue[tuple[int, list[Future[Made]]] | BaseException | None] = queue.Queue()
    consumed = threading.Condition()
    under_way, stopped = 0, False

    def feed() -> None:
        nonlocal under_way
        try:
            for step in steps:
                with consumed:
                    size, samples = len(step.micro_batches), sum(map(len, step.micro_batches))
                    short = _SHORT_AHEAD // max(samples, 1) if size == 1 else 0
                    ahead = max(workers + size, 3 * workers, short)
                    consumed.wait_for(lambda: stopped or under_way < ahead)  # noqa: B023
                    if stopped:
                        return
                    under_way += size
                ready.put((step.number, [pool.submit(collate, part) for part in step.micro_batches]))
            ready.put(None)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that iterates
            ready.put(error)

    feeder = threading.Thread(target=feed, name="feeder", daemon=True)
    feeder.start()
    try:
        while (entry := ready.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0], [future.result() for future in entry[1]]
            with consumed:
                under_way -= len(entry[1])
                consumed.notify()
    finally:
        with consumed:
            stopped = True
            consumed.notify()
        feeder.join()
        pool.shutdown(wait=True, cancel_futures=True)
        steps.close()


def on_device(batches: Sequence[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device`. On CUDA each is copied, in a stream of its own, while the device works on the
    one before it; nothing waits on the host."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    side, work = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def copied(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(side):
            return batch.to(device), side.record_event()

    def in_use(tensor: Tensor) -> Tensor:
        if tensor.device.type == "cuda":
            tensor.record_stream(work)  # its memory is not free before the work on it is done
        return tensor

    coming = [copied(batch) for batch in batches[:1]]
    for place in range(len(batches)):
        coming += [copied(batch) for batch in batches[place + 1 : place + 2]]
        batch, there = coming.pop(0)
        work.wait_event(there)
        yield with_tensors(batch, in_use)


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch, or a part of one, with every tensor that a device reads changed, in its fields, mappings and
    sequences."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: with_tensors(each, change) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(with_tensors(each, change) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {
            field.name: with_tensors(getattr(value, field.name), change)
            for field in fields(value)
            if field.init and not field.metadata.get("on_the_host")
        }
        return replace(value, **changed)
    return value
