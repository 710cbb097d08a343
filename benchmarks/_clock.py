"""Times and memory of work on a device: by its own clock on a GPU, by the host's on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Milliseconds of work on a device, those until the host had launched it, and the most bytes held over
    what was held before (0 on a CPU, which does not count them)."""

    device: float
    host: float
    peak: int


class Clock:
    """Measures work on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._counts = device.type == "cuda"

    def span(self, work: Callable[[], Any]) -> Span:
        """One run of `work`."""
        started = time.perf_counter()
        if not self._counts:
            work()
            taken = 1e3 * (time.perf_counter() - started)
            return Span(device=taken, host=taken, peak=0)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        started = time.perf_counter()
        begin.record()
        work()
        end.record()
        host = 1e3 * (time.perf_counter() - started)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - held
        return Span(device=begin.elapsed_time(end), host=host, peak=peak)

    def median(self, work: Callable[[], Any], repeats: int = 7, warm: int = 2) -> float:
        """Median milliseconds on the device, after `warm` runs that do not count."""
        spans = [self.span(work).device for _ in range(warm + repeats)]
        return statistics.median(spans[warm:])

    def free(self) -> None:
        """Gives memory that is not in use back to the device."""
        if self._counts:
            torch.cuda.empty_cache()
