"""Consistency checks of records, made before they are written and again by `verify`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.format.codecs.hidden import LARGEST
from cache_schema.format.records import HiddenStates, Relation, StoredRelation, TopK
from cache_schema.format.spec import EntryRule, Kind, TargetSpec


def topk_problems(record: TopK, kind: Kind, spec: TargetSpec, vocab_size: int) -> list[str]:
    """Every way in which a block of positions of a kind violates `spec`; empty when it is valid.

    vocab_size: ids must be below it.
    """
    positions = len(record)
    problems: list[str] = []
    if found := _shape_problem(record, spec.rule(kind)):
        return [found]
    there = record.there
    if record.tail_logprob.shape != (positions, len(spec.temperatures)):
        return [f"tail of shape {record.tail_logprob.shape}, temperatures are {list(spec.temperatures)}"]
    if not np.array_equal(record.temperatures, np.array(spec.temperatures, np.float32)):
        problems.append(f"temperatures {record.temperatures.tolist()} are not {list(spec.temperatures)}")
    problems += [
        f"{name} is {'present, against the spec' if name in spec.without else 'missing'}"
        for name in ("logsumexp", "entropy")
        if (getattr(record, name) is None) != (name in spec.without)
    ]
    for name in ("logsumexp", "entropy", "label_logprob", "logprobs"):
        values = getattr(record, name)
        bad = None if values is None else ~np.isfinite(values)
        if bad is not None and name == "logprobs":
            bad &= there
        if bad is not None and bad.any():
            problems.append(f"{name} is not finite at {_first(bad)}")
    bad = np.isnan(record.tail_logprob) | (record.tail_logprob > 1e-6)
    if bad.any():
        problems.append(f"tail_logprob is not the log of a probability at {_first(bad)}")
    rising = there[:, 1:] & (record.logprobs[:, 1:] > record.logprobs[:, :-1])
    if rising.any():
        problems.append(f"logprobs increase along the entries at {_first(rising)}")
    elif not problems and positions:
        at_one = spec.temperatures.index(1.0)
        mass = np.exp(record.logprobs).sum(axis=1) + np.exp(record.tail_logprob[:, at_one])
        if (np.abs(mass - 1.0) > 2e-3).any():
            problems.append(f"entries and tail do not sum to 1 at {_first(np.abs(mass - 1.0) > 2e-3)}")
    problems += _id_problems(record, spec, vocab_size)
    return problems


def _shape_problem(record: TopK, rule: EntryRule) -> str | None:
    """Whether there are as many entries as the rule says."""
    positions, shape = len(record), record.token_ids.shape
    if rule.least_p is None:
        right = record.counts is None and shape == record.logprobs.shape == (positions, rule.most)
        told = f"shapes {shape}, {record.logprobs.shape} are not ({positions}, {rule.most})"
        return None if right else told
    if record.counts is None or record.counts.shape != (positions,):
        return "counts are missing"
    wrong = (record.counts < 1) | (record.counts > rule.most)
    if wrong.any():
        return f"not 1 to {rule.most} entries at {_first(wrong)}"
    if shape != record.logprobs.shape or shape[1] < record.counts.max(initial=0):
        return f"shapes {shape}, {record.logprobs.shape} hold no {record.counts.max(initial=0)} entries"
    return None


def _id_problems(record: TopK, spec: TargetSpec, vocab_size: int) -> list[str]:
    problems = []
    outside = (record.token_ids < 0) | (record.token_ids >= vocab_size)
    if outside.any():
        problems.append(f"token ids outside 0..{vocab_size - 1} at {_first(outside)}")
    padding = -1 - np.arange(record.token_ids.shape[1], dtype=np.int32)
    ordered = np.sort(np.where(record.there, record.token_ids, padding), axis=1)
    twice = ordered[:, 1:] == ordered[:, :-1]
    if twice.any():
        problems.append(f"a token id occurs twice at a position: {_first(twice)}")
    if (record.sampled_ids is None) != (spec.tail_samples == 0):
        problems.append(f"tail samples are {'missing' if spec.tail_samples else 'present, against the spec'}")
    elif record.sampled_ids is not None and record.sampled_counts is not None:
        drawn = record.sampled_counts > 0
        outside = drawn & ((record.sampled_ids < 0) | (record.sampled_ids >= vocab_size))
        if outside.any():
            problems.append(f"sampled ids outside 0..{vocab_size - 1} at {_first(outside)}")
    return problems


def hidden_problems(states: HiddenStates, positions: int) -> list[str]:
    """Every way in which the hidden states of `positions` positions are invalid."""
    width = states.values.shape[-1]
    shapes = states.values.shape, states.scales.shape, states.channel_of.shape, states.channels.shape[1:]
    if shapes != ((positions, width), (positions,), (positions,), (2, width)):
        return [f"shapes {', '.join(map(str, shapes))} for {positions} positions"]
    if states.channel_of.size and not 0 <= states.channel_of.min() <= states.channel_of.max() < len(
        states.channels
    ):
        return [f"channel_of names a table outside 0..{len(states.channels) - 1}"]
    problems = [
        f"{name} is not finite at {_first(~np.isfinite(values))}"
        for name, values in (("scales", states.scales), ("channels", states.channels))
        if not np.isfinite(values).all()
    ]
    if (low := states.values < -LARGEST).any():
        problems.append(f"a value is below -{LARGEST} at {_first(low)}")
    return problems


def relation_problems(record: Relation | StoredRelation, tokens: int) -> list[str]:
    """Every way in which the relation of an image of `tokens` visual tokens is invalid."""
    if isinstance(record, StoredRelation):
        matrix: NDArray[Any] = record.scales
        if record.tokens != tokens or record.columns.shape[1] != tokens:
            return [f"columns of shape {record.columns.shape} for {tokens} tokens"]
    else:
        given = record.factor if record.factor is not None else record.gram
        if given is None or (record.factor is not None and record.gram is not None):
            return ["neither or both of factor and gram are set"]
        if given.ndim != 2 or len(given) != tokens:
            return [f"a matrix of shape {given.shape} for {tokens} tokens"]
        matrix = given
    problems = []
    if not np.isfinite(matrix).all():
        problems.append("the matrix is not finite")
    if not (np.isfinite(record.norm) and record.norm >= 0.0):
        problems.append(f"{record.norm} is not a valid norm")
    if not -1e-6 <= record.residual <= 2.0:
        problems.append(f"{record.residual} is not a valid residual")
    return problems


def _first(bad: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> str:
    where = np.argwhere(bad)[0].tolist()
    return f"position {where[0]}" + (f", entry {where[1]}" if len(where) > 1 else "")
