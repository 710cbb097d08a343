"""Which hidden states of a batch of packs are needed, and the captured samples that its records make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from cache_schema.format.codecs.hidden import hidden_at
from cache_schema.format.codecs.topk import topk_at
from cache_schema.format.records import (
    IGNORE_INDEX,
    CapturedImage,
    CapturedSample,
    HiddenStates,
    QuarantinedRow,
    Relation,
    StoredRelation,
    TopK,
)
from cache_schema.format.spec import Kind, TargetSpec
from pipeline.entry_rules import cut, fitted, limits_of
from pipeline.packing import Pack, Wanted
from pipeline.samples import PreparedSample
from pipeline.targets import Asked, BatchRecords

Captured = CapturedSample | QuarantinedRow


def asked_of(packs: Sequence[Pack], lengths: Sequence[int], spec: TargetSpec) -> Asked:
    """What is asked of the hidden states of all samples of the packs, in a row, of these lengths."""
    none: NDArray[np.integer] = np.empty(0, dtype=np.int64)
    places, labels, rows, positions = [none], [none], [none], [none]
    images: list[NDArray[np.integer]] = []
    kinds: list[Kind] = []
    for (sample, want), start in zip(_wanted_of(packs), np.cumsum([0, *lengths[:-1]]), strict=True):
        ids = np.append(sample.input_ids[1:], IGNORE_INDEX)
        for part in want.positions(sample, spec):
            places.append(start + part)
            labels.append(ids[part])
            rows.append(np.full(len(part), sample.row))
            positions.append(part)
        kinds += want.kinds(spec)
        if "relation" in spec.targets:
            owned = zip(sample.images, want.owned, strict=True)
            images += [start + image.positions for image, own_it in owned if own_it]
    lengths_of_parts = [len(part) for part in positions[1:]]
    return Asked(
        places=np.concatenate(places),
        labels=np.concatenate(labels),
        rows=np.concatenate(rows),
        positions=np.concatenate(positions),
        images=images,
        limits=limits_of(kinds, lengths_of_parts, spec),
        hidden=np.repeat([kind in spec.hidden for kind in kinds], lengths_of_parts) if spec.hidden else None,
    )


def captured_of(packs: Sequence[Pack], made: BatchRecords, spec: TargetSpec) -> list[Captured]:
    """The samples of the packs from the records of what they asked for."""
    parts = [[len(part) for part in want.positions(sample, spec)] for sample, want in _wanted_of(packs)]
    records = iter(_split(made.topk, [length for own in parts for length in own]))
    states = iter(_hidden_of(packs, made, spec))
    relations, sound = iter(made.relations), iter(made.images_finite)
    ends = np.cumsum([sum(own) for own in parts])
    found: list[Captured] = []
    for (sample, want), own, finite in zip(
        _wanted_of(packs), parts, np.split(made.finite, ends[:-1]), strict=True
    ):
        images = sum(want.owned) if "relation" in spec.targets else 0
        good = bool(np.concatenate([finite, list(islice(sound, images))]).all())
        own_records, own_relations = list(islice(records, len(own))), list(islice(relations, images))
        own_states = [next(states) if kind in spec.hidden else None for kind in want.kinds(spec)]
        found.append(_assemble(sample, want, own_records, own_relations, good, spec, own_states))
    return found


def _hidden_of(packs: Sequence[Pack], made: BatchRecords, spec: TargetSpec) -> list[HiddenStates]:
    """The hidden states of each part that has some, in order."""
    if made.hidden is None:
        return []
    lengths = [
        len(part)
        for sample, want in _wanted_of(packs)
        for kind, part in zip(want.kinds(spec), want.positions(sample, spec), strict=True)
        if kind in spec.hidden
    ]
    ends = np.cumsum(lengths)
    return [hidden_at(made.hidden, slice(end - n, end)) for n, end in zip(lengths, ends, strict=True)]


def captured_by_engine(
    packs: Sequence[Pack], given: Sequence[Sequence[TopK]], spec: TargetSpec
) -> list[Captured]:
    """The samples of the packs from the records that an engine gave of each."""
    found = []
    for (sample, want), own in zip(_wanted_of(packs), given, strict=True):
        finite = all(np.isfinite(record.logprobs).all() for record in own)
        rules = [spec.rule(kind) for kind in want.kinds(spec)]
        records = [cut(record, rule) for record, rule in zip(own, rules, strict=True)] if finite else own
        found.append(_assemble(sample, want, records, (), finite, spec))
    return found


def _wanted_of(packs: Sequence[Pack]) -> list[tuple[PreparedSample, Wanted]]:
    return [pair for pack in packs for pair in zip(pack.samples, pack.wanted, strict=True)]


def _split(whole: TopK, lengths: Sequence[int]) -> list[TopK]:
    """Consecutive pieces of a record."""
    ends = np.cumsum(lengths)
    return [topk_at(whole, slice(end - n, end)) for n, end in zip(lengths, ends, strict=True)]


def _assemble(
    sample: PreparedSample,
    want: Wanted,
    records: Sequence[TopK],
    relations: Sequence[Relation | StoredRelation],
    finite: bool,
    spec: TargetSpec,
    hidden: Sequence[HiddenStates | None] = (),
) -> Captured:
    """records, relations, hidden: those of the sample's parts and owned images, in order."""
    rules = [spec.rule(kind) for kind in want.kinds(spec)]
    records = [fitted(record, rule) for record, rule in zip(records, rules, strict=True)]
    if sample.veil is not None:
        places = want.positions(sample, spec)
        records = [sample.veil.over(record, part) for record, part in zip(records, places, strict=True)]
    left, related = iter(records), iter(relations)
    states = iter(hidden or [None] * len(records))
    response, response_states = (next(left), next(states)) if want.response is not None else (None, None)
    prompt, _ = (next(left), next(states)) if want.prompt is not None else (None, None)
    images = []
    for image, key, owned in zip(sample.images, want.keys, want.owned, strict=True):
        visual = relation = image_states = None
        if owned and "visual" in spec.targets:
            visual, image_states = replace(next(left), label_logprob=None), next(states)  # no text follows
        if owned and "relation" in spec.targets:
            relation = next(related)
        images.append(
            CapturedImage(record=image, prefix_key=key, visual=visual, hidden=image_states, relation=relation)
        )
    if not finite:
        return QuarantinedRow(
            row=sample.row,
            sample_id=sample.sample_id,
            reason="not_finite",
            detail="the teacher's logits are not finite numbers",
        )
    return CapturedSample(
        row=sample.row,
        seconds=sample.seconds,
        sample_id=sample.sample_id,
        input_ids=sample.input_ids,
        label_spans=sample.label_spans,
        images=tuple(images),
        response=response,
        prompt=prompt,
        hidden=response_states,
        model_inputs=sample.token_inputs,
        answers_cut=sample.answers_cut,
    )
