"""From prepared samples to captured ones: batches, one forward each, targets of every sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.datasets.conversations import writable
from cache_schema.errors import RowRejected
from cache_schema.format.codecs.topk import topk_rows
from cache_schema.format.records import (
    IGNORE_INDEX,
    CapturedImage,
    CapturedSample,
    QuarantinedRow,
    Relation,
    StoredRelation,
    TopK,
)
from cache_schema.format.spec import TargetSpec
from models.head import Head
from pipeline.engine import Engine, RecordEngine, release_memory
from pipeline.packing import Pack, make_pack, pack_samples
from pipeline.prefix import prefix_keys
from pipeline.samples import PreparedSample
from pipeline.targets import Asked, TargetMaker

Captured = CapturedSample | QuarantinedRow


@dataclass(slots=True)
class _Wanted:
    """The positions of one sample whose records are asked for, kind by kind."""

    sample: PreparedSample
    keys: list[str | None]
    owned: list[bool]  # per image: whether this sample brings its visual and relation records
    response: NDArray[np.int32] | None
    prompt: NDArray[np.int32] | None

    def positions(self, spec: TargetSpec) -> list[NDArray[np.int32]]:
        """Position arrays in the order response, prompt, each owned image."""
        parts = [part for part in (self.response, self.prompt) if part is not None]
        if "visual" in spec.targets:
            images = zip(self.sample.images, self.owned, strict=True)
            parts += [image.positions for image, owned in images if owned]
        return parts


class Extractor:
    """Captures windows of samples with one engine.

    head: turns the engine's hidden states into logits; None for an engine that gives records itself.
    share: images with equal prefix keys (under `fingerprint`) get their visual and relation records once.
    pack: conversations about the same images are also computed as one sequence (needs share).
    batch_tokens: padded tokens of a batch; it halves by itself when memory runs out, and stays so.
    """

    def __init__(
        self,
        engine: Engine | RecordEngine,
        head: Head | None,
        spec: TargetSpec,
        *,
        fingerprint: str,
        share: bool,
        pack: bool,
        batch_tokens: int,
    ) -> None:
        self._engine = engine
        self._spec = spec
        self._maker = None if head is None else TargetMaker(head, spec)
        self._fingerprint = fingerprint
        self._share = share
        self._pack = pack
        self.batch_tokens = batch_tokens

    def capture(self, samples: Sequence[PreparedSample], seen: set[str]) -> Iterator[list[Captured]]:
        """Captured samples (or rows that turned out not to be capturable), a list for every batch run.

        A row may come twice; the later result counts.
        seen: prefix keys whose records the shard already has; keys captured here are added. The first of
        `samples` with a key brings the records, the others refer to them.
        """
        waiting = list(samples)
        while waiting:
            claimed: set[str] = set()
            wanted = [self._wanted(sample, seen, claimed) for sample in waiting]
            orphans = []
            results: dict[int, Captured] = {}
            keys = [want.keys[-1] if self._pack and want.keys else None for want in wanted]
            groups = pack_samples(waiting, keys, self.batch_tokens)
            packs = [make_pack([waiting[i] for i in group]) for group in groups]
            for batch in self._batches(packs):
                captured = self._run([[wanted[i] for i in groups[number]] for number in batch])
                results |= zip((i for number in batch for i in groups[number]), captured, strict=True)
                yield captured
            for index, want in enumerate(wanted):
                if isinstance(results[index], CapturedSample):
                    seen.update(k for k, owned in zip(want.keys, want.owned, strict=True) if owned and k)
            # Samples whose records an uncapturable one was to bring are captured again, on their own.
            for index, want in enumerate(wanted):
                if isinstance(results[index], CapturedSample) and not seen.issuperset(
                    filter(None, want.keys)
                ):
                    orphans.append(want.sample)
            waiting = orphans

    def _batches(self, packs: Sequence[Pack]) -> Iterator[list[int]]:
        """The batches of packs; those to come are formed anew when the budget has shrunk."""
        left = list(range(len(packs)))
        while left:
            budget = self.batch_tokens
            done: set[int] = set()
            for batch in batches([packs[number] for number in left], budget):
                chosen = [left[place] for place in batch]
                yield chosen
                done.update(chosen)
                if self.batch_tokens != budget:
                    break
            left = [number for number in left if number not in done]

    def _wanted(self, sample: PreparedSample, seen: set[str], claimed: set[str]) -> _Wanted:
        keys: list[str | None] = [None] * len(sample.images)
        if self._share:
            keys = list(prefix_keys(sample, self._fingerprint))
        owned = []
        for key in keys:
            owned.append(key is None or (key not in seen and key not in claimed))
            if key is not None:
                claimed.add(key)
        positions = sample.positions
        return _Wanted(
            sample=sample,
            keys=keys,
            owned=owned,
            response=positions["response"] if "response" in self._spec.targets else None,
            prompt=positions["prompt"] if "prompt" in self._spec.targets else None,
        )

    def _run(self, groups: Sequence[Sequence[_Wanted]]) -> list[Captured]:
        """One batch of packs. On exhausted memory its halves, and the budget shrinks; its halves, too, when
        the engine refuses one of the samples, until that one is alone."""
        try:
            return self._forward(groups)
        except RowRejected as error:
            return self._apart(groups, error)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        release_memory()
        longest = max(len(make_pack([want.sample for want in group])) for group in groups)
        if len(groups) > 1:
            self.batch_tokens = max(longest, min(self.batch_tokens, longest * len(groups)) // 2)
        detail = f"{longest} tokens do not fit into memory on their own"
        return self._apart(groups, RowRejected("out_of_memory", detail))

    def _apart(self, groups: Sequence[Sequence[_Wanted]], error: RowRejected) -> list[Captured]:
        """A batch in halves, a pack sample by sample; one sample alone goes to quarantine for `error`."""
        if len(groups) > 1:
            half = len(groups) // 2
            return self._run(groups[:half]) + self._run(groups[half:])
        (group,) = groups
        if len(group) > 1:
            return [captured for want in group for captured in self._run([[want]])]
        sample = group[0].sample
        return [
            QuarantinedRow(
                row=sample.row, sample_id=sample.sample_id, reason=error.reason, detail=writable(error.detail)
            )
        ]

    def _hidden_states(self, groups: Sequence[Sequence[_Wanted]]) -> list[Tensor]:
        """One (T, D) a sample, in order."""
        assert not isinstance(self._engine, RecordEngine)
        if all(len(group) == 1 for group in groups):
            return self._engine.hidden_states([want.sample for (want,) in groups])
        packs = [make_pack([want.sample for want in group]) for group in groups]
        return [hidden for pack in self._engine.packed_hidden_states(packs) for hidden in pack]

    def _forward(self, groups: Sequence[Sequence[_Wanted]]) -> list[Captured]:
        wanted = [want for group in groups for want in group]
        parts = [want.positions(self._spec) for want in wanted]
        if isinstance(self._engine, RecordEngine):
            given = self._engine.records([want.sample for want in wanted], parts)
            return [
                self._assemble(want, own, (), all(np.isfinite(record.logprobs).all() for record in own))
                for want, own in zip(wanted, given, strict=True)
            ]
        assert self._maker is not None
        hidden = self._hidden_states(groups)
        asked = self._asked(wanted, parts, [len(states) for states in hidden])
        made = self._maker.batch(torch.cat(hidden), asked).wait()
        records = iter(_split(made.topk, [len(part) for own in parts for part in own]))
        relations, sound = iter(made.relations), iter(made.images_finite)
        ends = np.cumsum([sum(map(len, own)) for own in parts])
        found: list[Captured] = []
        for want, own, finite in zip(wanted, parts, np.split(made.finite, ends[:-1]), strict=True):
            images = sum(want.owned) if "relation" in self._spec.targets else 0
            good = np.concatenate([finite, list(islice(sound, images))]).all()
            own_records = [next(records) for _ in own]
            found.append(self._assemble(want, own_records, list(islice(relations, images)), bool(good)))
        return found

    def _asked(
        self, wanted: Sequence[_Wanted], parts: Sequence[Sequence[NDArray[np.int32]]], lengths: Sequence[int]
    ) -> Asked:
        """What is asked of the hidden states of all samples, one after the other, of these lengths."""
        none: NDArray[np.integer] = np.empty(0, dtype=np.int64)
        places, labels, rows, positions = [none], [none], [none], [none]
        images: list[NDArray[np.integer]] = []
        for want, own, start in zip(wanted, parts, np.cumsum([0, *lengths[:-1]]), strict=True):
            ids = np.append(want.sample.input_ids[1:], IGNORE_INDEX)
            for part in own:
                places.append(start + part)
                labels.append(ids[part])
                rows.append(np.full(len(part), want.sample.row))
                positions.append(part)
            if "relation" in self._spec.targets:
                owned = zip(want.sample.images, want.owned, strict=True)
                images += [start + image.positions for image, own_it in owned if own_it]
        return Asked(
            places=np.concatenate(places),
            labels=np.concatenate(labels),
            rows=np.concatenate(rows),
            positions=np.concatenate(positions),
            images=images,
        )

    def _assemble(
        self,
        want: _Wanted,
        records: Sequence[TopK],
        relations: Sequence[Relation | StoredRelation],
        finite: bool,
    ) -> Captured:
        """records, relations: those of the sample's parts and owned images, in order."""
        sample = want.sample
        left, related = iter(records), iter(relations)
        response = next(left) if want.response is not None else None
        prompt = next(left) if want.prompt is not None else None
        images = []
        for image, key, owned in zip(sample.images, want.keys, want.owned, strict=True):
            visual = relation = None
            if owned and "visual" in self._spec.targets:
                visual = replace(next(left), label_logprob=None)  # no text follows there
            if owned and "relation" in self._spec.targets:
                relation = next(related)
            images.append(CapturedImage(record=image, prefix_key=key, visual=visual, relation=relation))
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
            model_inputs=sample.token_inputs,
            answers_cut=sample.answers_cut,
        )


def batches(packs: Sequence[Pack], batch_tokens: int) -> list[list[int]]:
    """Indices of packs, cut into batches of similar length, longest first, at most batch_tokens padded.

    A pack over the budget is a batch of its own. Samples with and without images do not mix, nor do packs
    of one and of several samples. Depends on the samples alone: every worker forms the same batches.
    """

    def kind(pack: Pack) -> tuple[bool, bool]:
        return (not pack.first.images, len(pack.samples) == 1)

    found: list[list[int]] = []
    for index in sorted(range(len(packs)), key=lambda i: (kind(packs[i]), -len(packs[i]), i)):
        if found:
            longest = packs[found[-1][0]]
            fits = len(longest) * (len(found[-1]) + 1) <= batch_tokens
            if fits and kind(longest) == kind(packs[index]):
                found[-1].append(index)
                continue
        found.append([index])
    return found


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch failed for want of memory, on an accelerator or on the CPU."""
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "can't allocate memory" in text
        or "out of memory" in text
    )


def _split(whole: TopK, lengths: Sequence[int]) -> list[TopK]:
    """Consecutive pieces of a record."""
    ends = np.cumsum(lengths)
    return [topk_rows(whole, slice(end - n, end)) for n, end in zip(lengths, ends, strict=True)]
