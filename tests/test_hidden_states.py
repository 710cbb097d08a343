"""Hidden states in 8 bits: their codec, on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cache_schema.format.checks import hidden_problems
from cache_schema.format.codecs.hidden import (
    hidden_arrays,
    hidden_at,
    hidden_of,
    join_hidden,
)
from cache_schema.format.groups import read_groups, write_groups
from cache_schema.format.records import HiddenStates
from pipeline.hidden_states import hidden_record, rounded_states

settings.register_profile("quick", max_examples=60, deadline=None)
settings.load_profile("quick")


def blocks(width: st.SearchStrategy[int]) -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(st.integers(0, 9), width)
    return hnp.arrays(np.float32, shapes, elements=st.floats(-1e4, 1e4, width=32))


def rounded(block: np.ndarray) -> HiddenStates:
    made = rounded_states(torch.from_numpy(block))
    return hidden_record({name: part.numpy() for name, part in made.items()})


@given(blocks(st.integers(1, 7)))
def test_a_value_comes_back_within_half_a_step(block):
    states = rounded(block)
    assert hidden_problems(states, len(block)) == []
    mean, unit = states.channels[0]
    bound = 0.5 * states.scales[:, None] * unit
    rounding = 1e-6 * (np.abs(block) + np.abs(mean) + 127 * bound) + 1e-30
    assert (np.abs(states.decode() - block) <= bound + rounding).all()


@given(st.lists(blocks(st.just(3)), min_size=1, max_size=4))
def test_joined_and_cut_blocks_decode_to_the_same_bits(given_blocks):
    parts = [rounded(block) for block in given_blocks]
    whole = join_hidden([*parts, *parts])
    np.testing.assert_array_equal(
        whole.decode(), np.concatenate([part.decode() for part in [*parts, *parts]])
    )
    assert len(whole.channels) <= max(len(parts), 1)
    picked = np.arange(len(whole))[::-2]
    np.testing.assert_array_equal(hidden_at(whole, picked).decode(), whole.decode()[picked])
    stored = read_groups(write_groups({"hidden_response": hidden_arrays(hidden_at(whole, picked))}, {}))
    back = hidden_of(stored["hidden_response"], slice(1, None))
    np.testing.assert_array_equal(back.decode(), whole.decode()[picked][1:])


def test_one_position_and_equal_positions_come_back_exactly():
    one = np.array([[1.5, -3.25, 700.0]], np.float32)
    for block in (one, np.repeat(one, 4, axis=0)):
        np.testing.assert_array_equal(rounded(block).decode(), block)


def test_channels_of_great_size_leave_the_distribution_as_it_is():
    """A channel with a mean of 80 deviations of the others, and one with 10 times their deviation."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(256, 64)).astype(np.float32)
    hidden[:, 0] += 80.0
    hidden[:, 1] *= 10.0
    weight = (rng.normal(size=(500, 64)) / 4).astype(np.float32)
    back = rounded(hidden).decode()
    own, made = (torch.from_numpy(h @ weight.T).double().log_softmax(1) for h in (hidden, back))
    assert float((own.exp() * (own - made)).sum(1).mean()) < 1e-3
    plain = np.abs(hidden).max(axis=1, keepdims=True) / 127
    worse = torch.from_numpy((np.rint(hidden / plain) * plain) @ weight.T).double().log_softmax(1)
    assert float((own.exp() * (own - worse)).sum(1).mean()) > 5e-3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scales": np.array([1.0, np.nan, 1.0], np.float32)}, "scales is not finite at position 1"),
        ({"values": np.full((3, 4), -128, np.int8)}, "below -127"),
        ({"channel_of": np.array([0, 1, 0], np.int32)}, "outside 0..0"),
        ({"scales": np.ones(2, np.float32)}, "shapes"),
    ],
)
def test_what_cannot_be_is_told(change, told):
    good = rounded(np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32))
    fields = {name: getattr(good, name) for name in HiddenStates.__dataclass_fields__}
    assert hidden_problems(good, 3) == []
    assert told in hidden_problems(HiddenStates(**(fields | change)), 3)[0]
