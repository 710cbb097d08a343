"""Final hidden states rounded to 8 bits, on the device that made them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.format.codecs.hidden import LARGEST
from cache_schema.format.records import HiddenStates

ROUNDED = ("values", "scales", "channels")


def rounded_states(hidden: Tensor) -> dict[str, Tensor]:
    """`values` (N, D) int8, `scales` (N,) and `channels` (1, 2, D) float32 of finite hidden (N, D), as
    cache_schema.format.codecs.hidden defines them; nothing waits for the device."""
    states = hidden.float()
    mean = states.mean(dim=0) if len(states) else states.new_zeros(states.shape[1])
    states = states - mean
    unit = (torch.linalg.vector_norm(states, dim=0) / max(len(states), 1) ** 0.5).sqrt_()
    unit = unit.masked_fill(unit == 0.0, 1.0)
    states /= unit
    scales = torch.linalg.vector_norm(states, ord=torch.inf, dim=1) / LARGEST
    states /= scales.masked_fill(scales == 0.0, 1.0)[:, None]
    return {
        "values": states.round_().clamp_(-LARGEST, LARGEST).to(torch.int8),
        "scales": scales,
        "channels": torch.stack([mean, unit])[None],
    }


def hidden_record(arrays: Mapping[str, NDArray[np.generic]]) -> HiddenStates:
    """The record of what `rounded_states` gave, on the host."""
    return HiddenStates(**arrays, channel_of=np.zeros(len(arrays["values"]), np.int32))  # type: ignore[arg-type]
