"""Tensors on their way from the device to the host, while the device works on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Download:
    """Copies of tensors, begun at once: on CUDA into pinned memory, in a stream of their own behind the work
    that makes them. Elsewhere they are copied when asked for, and that waits for the device."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._done: list[torch.cuda.Event] = []
        for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
            self._begin(device)

    def _begin(self, device: torch.device) -> None:
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.inference_mode():
            for place, tensor in enumerate(self._tensors):
                if tensor.device == device:
                    tensor.record_stream(stream)
                    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                    self._tensors[place] = host.copy_(tensor, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # a waiting thread sleeps
            done.record(stream)
        self._done.append(done)

    def arrays(self) -> list[NDArray[np.generic]]:
        """The copies, once they are there; from any thread."""
        for done in self._done:
            done.synchronize()
        if self._done:  # pinned memory is scarce: it serves the next batch
            return [tensor.cpu().numpy().copy() for tensor in self._tensors]
        return [tensor.cpu().numpy() for tensor in self._tensors]


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
