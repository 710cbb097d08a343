"""Prepares the next items while the teacher works on the current ones."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """Iterates `source` in a thread of its own, `depth` items ahead. Use it in a `with` block.

    Exceptions of the source are raised here, in order. Leaving the block stops the thread.
    """

    def __init__(self, source: Iterator[Item], depth: int = 1) -> None:
        self._source = source
        self._ready: queue.Queue[tuple[str, Item | BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetch[Item]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:  # a full queue would keep the thread waiting
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def __iter__(self) -> Iterator[Item]:
        while True:
            kind, value = self._ready.get()
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            yield value  # type: ignore[misc]

    def _work(self) -> None:
        try:
            for item in self._source:
                self._put("item", item)
                if self._stop.is_set():
                    return
            self._put("end", None)
        except BaseException as error:  # noqa: BLE001 - handed over to the thread that iterates
            self._put("error", error)

    def _put(self, kind: str, value: Item | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put((kind, value), timeout=0.1)
                return
            except queue.Full:
                continue
