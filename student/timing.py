"""The breakdown of training time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

LAPS = ("data wait", "forward", "loss", "backward", "optimizer")


class Stopwatch:
    """Seconds by name, added up over laps.

    On an accelerator work is queued, so the host's clock would only measure its launch: there a lap waits for
    the device at both ends, and only laps of steps started by `step(measured=True)` count, so that waiting
    costs little. On a CPU every lap counts. seconds: what to add to, in place.
    """

    def __init__(self, device: torch.device | None = None, seconds: dict[str, float] | None = None) -> None:
        self.seconds = {} if seconds is None else seconds
        self._waits = device is not None and device.type != "cpu"
        self._counts = not self._waits

    def step(self, *, measured: bool) -> None:
        """Starts a step whose laps count on an accelerator only if `measured`."""
        self._counts = measured or not self._waits

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `name`."""
        if not self._counts:
            yield
            return
        started = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started

    def _now(self) -> float:
        if self._waits:
            torch.accelerator.synchronize()
        return time.perf_counter()


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """The share of each lap in the time of all laps."""
    whole = sum(seconds.values())
    return {name: seconds.get(name, 0.0) / whole if whole else 0.0 for name in LAPS}
