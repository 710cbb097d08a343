"""Final hidden states in 8 bits per channel, with a scale per position.

A block of positions is centred and scaled channel by channel, then rounded position by position:

    h[n, d] = mean[d] + unit[d] * scale[n] * value[n, d],   value in -127..127

with mean and unit (the root of the standard deviation) of the channel over the block that was rounded
together. Few channels of a language model carry most of a state's size, in their mean above all; without the
first step they alone would decide the scale. The root is a compromise: dividing by the whole deviation spends
as much on channels that move the logits little. See benchmarks/hidden_states.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.format.records import Float32, HiddenStates

LARGEST = 127
"""Values lie within -LARGEST..LARGEST."""

Places = slice | NDArray[np.integer[Any]]


def hidden_at(states: HiddenStates, places: Places) -> HiddenStates:
    """Those of some positions, with all tables of channels."""
    return HiddenStates(
        values=states.values[places],
        scales=states.scales[places],
        channels=states.channels,
        channel_of=states.channel_of[places],
    )


def join_hidden(parts: Sequence[HiddenStates]) -> HiddenStates:
    """All positions, in order, each with its own channels: nothing is rounded again. Equal tables, and those
    of no position, are kept once."""
    tables: dict[bytes, int] = {}
    kept: list[Float32] = []
    places: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
    for part in parts:
        numbers = np.zeros(len(part.channels), np.int32)
        for table in np.unique(part.channel_of):
            key = part.channels[table].tobytes()
            if key not in tables:
                tables[key] = len(kept)
                kept.append(part.channels[table])
            numbers[table] = tables[key]
        places.append(numbers[part.channel_of])
    return HiddenStates(
        values=np.concatenate([part.values for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        channels=np.stack(kept) if kept else parts[0].channels[:1],
        channel_of=np.concatenate(places),
    )


def hidden_arrays(states: HiddenStates) -> dict[str, NDArray[Any]]:
    """The arrays of a group; see docs/cache-format.md for each."""
    return {
        "values": states.values,
        "scales": states.scales,
        "channels": states.channels,
        "channel_of": states.channel_of.astype(np.min_scalar_type(len(states.channels) - 1)),
    }


def hidden_of(arrays: Mapping[str, NDArray[Any]], places: Places = slice(None)) -> HiddenStates:
    """The states at some positions of a group's arrays."""
    return HiddenStates(
        values=arrays["values"][places],
        scales=arrays["scales"][places],
        channels=arrays["channels"],
        channel_of=arrays["channel_of"][places].astype(np.int32),
    )
