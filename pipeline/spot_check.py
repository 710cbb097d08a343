"""Compares vLLM with transformers before anything is captured, one engine after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.errors import KdcacheError
from cache_schema.format.records import Relation, TopK
from cache_schema.format.spec import TargetSpec
from cache_schema.operations.divergence import kl, relation_cosine
from models.head import Head
from pipeline.engine import Engine, RecordEngine
from pipeline.samples import PreparedSample
from pipeline.targets import TargetMaker

LARGEST_KL = {"float32": 1e-4}
"""Allowed mean KL in nats between two engines of one teacher; for another dtype: _OTHER_KL."""

_OTHER_KL = 1e-2
_LARGEST_RELATION = {"float32": 1e-4}
_OTHER_RELATION = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """An engine's output for samples: for each the record of all positions, and its images' relations."""

    records: list[TopK]
    relations: list[list[Relation]]


def finding_of(
    engine: Engine | RecordEngine, head: Head | None, spec: TargetSpec, samples: Sequence[PreparedSample]
) -> Finding:
    """The output of `engine` for `samples`, as numpy arrays only, so that nothing of the engine stays alive.

    head: of an engine that gives hidden states, else None.
    """
    if isinstance(engine, RecordEngine):
        every = [[np.arange(len(sample), dtype=np.int32)] for sample in samples]
        return Finding(
            records=[record for (record,) in engine.records(samples, every)], relations=[[] for _ in samples]
        )
    assert head is not None
    maker = TargetMaker(head, replace(spec, tail_samples=0))
    records, relations = [], []
    for sample in samples:
        (hidden,) = engine.hidden_states([sample])
        records.append(maker.topk(hidden))
        images = sample.images if "relation" in spec.targets else ()
        relations.append([maker.relation(_at(hidden, image.positions)) for image in images])
    return Finding(records=records, relations=relations)


def _at(hidden: Tensor, positions: NDArray[np.int32]) -> Tensor:
    return hidden[torch.from_numpy(positions).long().to(hidden.device)]


def require_agreement(
    ours: Finding, theirs: Finding, samples: Sequence[PreparedSample], *, dtype: str, engine: str
) -> None:
    """KdcacheError with both values unless `ours` (of transformers) and `theirs` (of `engine`) agree.

    Compared for every sample, visual and other positions apart: mean KL, mean difference of the
    log-sum-exps where both have them, and the cosine of relations.
    """
    for number, sample in enumerate(samples):
        one, other = ours.records[number], theirs.records[number]
        found = [
            _of_distributions(sample, one, other, LARGEST_KL.get(dtype, _OTHER_KL), engine),
            _of_logsumexp(one, other, 10 * LARGEST_KL.get(dtype, _OTHER_KL)),
            _of_relations(
                ours.relations[number],
                theirs.relations[number],
                _LARGEST_RELATION.get(dtype, _OTHER_RELATION),
            ),
        ]
        for difference in filter(None, found):
            raise KdcacheError(
                f"transformers and {engine} do not agree on this teacher: at row {sample.row}, "
                f"{difference}; use --engine transformers"
            )


def _of_distributions(
    sample: PreparedSample, one: TopK, other: TopK, largest: float, engine: str
) -> str | None:
    apart = kl(one, other)
    visual = np.zeros(len(sample), dtype=bool)
    for image in sample.images:
        visual[image.positions] = True
    for kind, part in (("visual", visual), ("text", ~visual)):
        if part.any() and not apart[part].mean() <= largest:
            at = int(np.flatnonzero(part)[np.argmax(apart[part])])
            return (
                f"{_said(one, other, at, engine)} (mean KL at {kind} positions {apart[part].mean():.2g}, of "
                f"which {largest:g} may be rounding)"
            )
    return None


def _of_logsumexp(one: TopK, other: TopK, largest: float) -> str | None:
    if one.logsumexp is None or other.logsumexp is None:
        return None
    moved = np.abs(one.logsumexp - other.logsumexp)
    if moved.mean() <= largest * (1.0 + np.abs(one.logsumexp).mean()):
        return None
    at = int(moved.argmax())
    return f"position {at}, the log-sum-exp is {one.logsumexp[at]:.4f} and {other.logsumexp[at]:.4f}"


def _of_relations(ours: Sequence[Relation], theirs: Sequence[Relation], largest: float) -> str | None:
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        cosine = relation_cosine(one, other)
        if not 1.0 - cosine <= largest:
            return (
                f"image {number}, the relations have a cosine of {cosine:.6f}, norms of {one.norm:.4g} and "
                f"{other.norm:.4g}"
            )
    return None


def _said(one: TopK, other: TopK, at: int, engine: str) -> str:
    token = int(one.token_ids[at, 0])
    place = np.flatnonzero(other.token_ids[at] == token)
    theirs = f"{other.logprobs[at, place[0]]:.4f}" if len(place) else f"under {other.logprobs[at, -1]:.4f}"
    return (
        f"position {at}, token {token} has the log-probability "
        f"{one.logprobs[at, 0]:.4f} in transformers and {theirs} in {engine}"
    )
