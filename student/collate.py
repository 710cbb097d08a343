"""Samples to tensors: padded ids and labels, pixels by the student's processor, targets by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.datasets.image_roots import ImageRoot, open_root
from cache_schema.errors import CacheDamaged, KdcacheError, RowRejected
from cache_schema.format.codecs.hidden import join_hidden
from cache_schema.format.records import IGNORE_INDEX, ImageRecord, Sample, TopK, positions_by_kind
from cache_schema.format.spec import KINDS, Kind
from models.inputs import open_recorded, pad
from models.known import text_inputs
from models.pixels import look_up
from models.stored_head import state_tensors
from student.losses import (
    Denominators,
    DistillationTargets,
    LossWeights,
    PlannedTargets,
    PositionTargets,
    PreferenceTargets,
    RelationTargets,
    TeacherStates,
)
from student.pixels import PixelInputs

_READ_ON_HOST = ("image_sizes", "batch_num_images")
"""Inputs whose numbers the models of transformers take one by one, as numbers of Python."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch on one device.

    inputs: what the model's forward takes: input_ids (B, T) and attention_mask (B, T) int64, which are
    `PlacedIds` and a `KnownMask`, pixel inputs when any sample has an image, and all other inputs that the
    cache stores. labels (B, T) int64.
    rows, sample_ids, sources: of these samples; empty in an idle batch, which only keeps a rank synchronised.
    pixel_table (C, 256): where pixel_values are still bytes, their values, which they take on a device.
    teacher_ce: of each sample, the teacher's mean cross entropy in nats; where fusion ratios need it.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    targets: DistillationTargets | None
    denominators: Denominators
    rows: tuple[int, ...]
    sample_ids: tuple[str, ...]
    sources: tuple[int, ...] = ()
    pixel_table: Tensor | None = None
    teacher_ce: tuple[float, ...] | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`, without those that are read on the host."""
        inputs = {
            name: tensor if name in _READ_ON_HOST else tensor.to(device, non_blocking=True)
            for name, tensor in self.inputs.items()
        }
        if self.pixel_table is not None and "pixel_values" in inputs:
            table = self.pixel_table.to(device, non_blocking=True)
            inputs["pixel_values"] = look_up(inputs["pixel_values"], table)
        return replace(
            self,
            inputs=inputs,
            pixel_table=None,
            labels=self.labels.to(device, non_blocking=True),
            targets=None if self.targets is None else self.targets.to(device),
        )

    @property
    def positions_with_logits(self) -> int:
        """At how many positions the losses make the student's logits; each kind's overlaps are few."""
        counts = self.denominators
        answers = max(counts.ce_tokens, counts.tokens["response"])
        return int(answers + counts.tokens["visual"] + counts.tokens["prompt"])

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.inputs["attention_mask"].sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Makes a Batch of samples, in any thread.

    pixels: by the student's processor. image_root: what the cache's image paths start
    from. pad_token_id: fills the right of shorter samples. targets: which of the cache's targets
    become tensors. sample_temperature: at which the tail was drawn. placeholders: when set, every image's
    placeholder tokens are replaced by this many of `image_token_id` (for a student with another number of
    visual tokens than the teacher; visual and relation targets are then impossible). losses: the objective
    that batches are prepared for. pairs: samples come as chosen and rejected, in turn,
    and of the cache only the teacher's likelihoods of the labels are needed. further: the collators of the
    other caches; their image roots and placeholders are used for their samples.
    """

    pixels: PixelInputs
    image_root: ImageRoot
    pad_token_id: int
    image_token_id: int
    targets: tuple[str, ...] = ()
    sample_temperature: float = 1.0
    placeholders: int | None = None
    losses: LossWeights = field(default_factory=LossWeights)
    pairs: bool = False
    further: tuple[Collator, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_root", open_root(self.image_root))  # a folder may be given

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """A Batch of `samples`. KdcacheError when an image is missing or is not the captured one."""
        if not samples:
            return self._idle()
        samples = [self._of(sample.source).fitted(sample) for sample in samples]
        pixels = self.images(
            [sample.images for sample in samples],
            [sample.row for sample in samples],
            [sample.source for sample in samples],
        )
        return self.batch_of(samples, pixels)

    def batch_of(self, samples: Sequence[Sample], pixels: Mapping[str, Tensor]) -> Batch:
        """The Batch of samples whose pixel inputs are at hand, joined in their order."""
        length = max(len(sample.input_ids) for sample in samples)
        ids = [sample.input_ids for sample in samples]
        inputs = text_inputs(ids, length, self.pad_token_id, self.image_token_id)
        inputs |= _extra_inputs(samples, length)
        inputs |= pixels
        labels = pad([sample.labels for sample in samples], length, IGNORE_INDEX, np.int64)
        targets: DistillationTargets = (
            PreferenceTargets.of(labels, _likelihoods(samples))
            if self.pairs
            else PlannedTargets.of(labels, self._targets(samples, length), self.losses)
        )
        return Batch(
            inputs=inputs,
            labels=labels,
            targets=targets,
            denominators=Denominators.of(labels, targets),
            pixel_table=self.pixels.table,
            rows=tuple(sample.row for sample in samples),
            sample_ids=tuple(sample.sample_id for sample in samples),
            sources=tuple(sample.source for sample in samples),
            teacher_ce=tuple(map(_teacher_ce, samples)) if self.losses.fusion_every else None,
        )

    def fitted(self, sample: Sample) -> Sample:
        """The sample with as many placeholders as the student makes visual tokens."""
        if self.placeholders is None:
            return sample
        return respan(sample, self.placeholders, self.image_token_id)

    def images(
        self,
        samples: Sequence[Sequence[ImageRecord]],
        rows: Sequence[int] | None = None,
        sources: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """The pixel inputs of the images of each sample; empty without images. rows: for messages. sources:
        the cache that each sample is from; None: the first."""
        owners = [self._of(source) for source in sources or [0] * len(samples)]
        for owner in (self, *self.further):
            pairs = zip(samples, owners, strict=True)
            mine = [image for images, other in pairs if other is owner for image in images]
            owner.image_root.prefetch((image.path, image.sha256) for image in mine if image.content is None)
        places = rows if rows is not None else [None] * len(samples)
        return self.pixels(
            [
                [owner._open(image, row) for image in images]
                for images, row, owner in zip(samples, places, owners, strict=True)
            ]
        )

    def _of(self, source: int) -> Collator:
        """The collator of a cache."""
        return self.further[source - 1] if source else self

    def _open(self, record: ImageRecord, row: int | None) -> Any:
        try:
            return open_recorded(self.image_root, record, recorded="in the cache")
        except KdcacheError as error:
            where = "" if row is None else f" (row {row})"
            reason = error.detail if isinstance(error, RowRejected) else error
            raise KdcacheError(
                f"image {record.path} of the cache{where} cannot be read under {self.image_root.name} "
                f"({reason}); give the --image-root that the cache was built with, or restore the file"
            ) from error

    def _idle(self) -> Batch:
        ids = torch.full((1, 1), self.pad_token_id)
        labels = torch.full((1, 1), IGNORE_INDEX)
        nothing = Denominators.of(labels[:0], None)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return Batch(inputs=inputs, labels=labels, targets=None, denominators=nothing, rows=(), sample_ids=())

    def _targets(self, samples: Sequence[Sample], length: int) -> DistillationTargets | None:
        if not self.targets:
            return None
        dense = "hidden" in self.targets
        found = (
            (kind, _position_targets(samples, length, kind, self.sample_temperature, dense=dense))
            for kind in KINDS
            if kind in self.targets
        )
        relations = _relation_targets(samples, length) if "relation" in self.targets else ()
        return DistillationTargets(
            positions={kind: target for kind, target in found if target is not None}, relations=relations
        )


def respan(sample: Sample, placeholders: int, image_token_id: int) -> Sample:
    """The sample with `placeholders` tokens for each of its images in place of those that were captured.

    Response positions move accordingly: one at an image's last token stays at its last token.
    Visual and prompt targets and relations have no counterpart and are dropped.
    """
    old = sample.input_ids
    keep = np.ones(len(old), dtype=bool)
    repeats = np.ones(len(old), dtype=np.int64)
    for image in sample.images:
        keep[image.positions] = False
        keep[image.positions[-1]] = True
        repeats[image.positions] = 0
        repeats[image.positions[-1]] = placeholders
    new_end = np.cumsum(repeats)  # one past the last new token of each old one
    input_ids = np.repeat(old, repeats).astype(np.int32)
    labels = np.repeat(sample.labels, repeats).astype(np.int32)
    images = []
    for image in sample.images:
        end = int(new_end[image.positions[-1]])
        positions = np.arange(end - placeholders, end, dtype=np.int32)
        input_ids[positions] = image_token_id
        labels[positions] = IGNORE_INDEX
        images.append(replace(image, positions=positions))
    return replace(
        sample,
        input_ids=input_ids,
        labels=labels,
        positions=positions_by_kind(labels, (image.positions for image in images)),
        images=tuple(images),
        records={**sample.records, "visual": None, "prompt": None},
        relation_records=(),
        model_inputs={},
        hidden_states={kind: each for kind, each in sample.hidden_states.items() if kind == "response"},
    )


def _likelihoods(samples: Sequence[Sample]) -> Tensor:
    """(B,) float64: the teacher's log-likelihoods of the labels of chosen and rejected samples, in turn.
    KdcacheError for a pair that answers different prompts, or where they are not stored."""
    for chosen, rejected in zip(samples[::2], samples[1::2], strict=True):
        first, second = (
            sample.input_ids[: int(min(sample.response_positions, default=-2)) + 1]
            for sample in (chosen, rejected)
        )
        if not np.array_equal(first, second):
            raise KdcacheError(
                f"the chosen sample {chosen.sample_id} (row {chosen.row}) and its rejected one (row "
                f"{rejected.row}) answer different prompts; give only rows of one prompt the same id"
            )
    found = []
    for sample in samples:
        record = sample.response
        if record is None or record.label_logprob is None:
            raise KdcacheError(f"row {sample.row} has no response targets: build its cache with `response`")
        found.append(float(record.label_logprob.astype(np.float64).sum()))
    return torch.tensor(found, dtype=torch.float64)


def _teacher_ce(sample: Sample) -> float:
    """The teacher's mean cross entropy over the labels of a sample. KdcacheError where it is not stored."""
    record = sample.response
    if record is None or record.label_logprob is None:
        raise KdcacheError(f"row {sample.row} has no response targets: build its cache with `response`")
    return -float(record.label_logprob.astype(np.float64).mean())


def _extra_inputs(samples: Sequence[Sample], length: int) -> dict[str, Tensor]:
    """The cache's further inputs: (T,) arrays padded with 0 to (B, T), others concatenated."""
    made: dict[str, Tensor] = {}
    for name in sorted({name for sample in samples for name in sample.model_inputs}):
        arrays = [np.asarray(sample.model_inputs[name]) for sample in samples if name in sample.model_inputs]
        per_token = all(
            name in sample.model_inputs and sample.model_inputs[name].shape == sample.input_ids.shape
            for sample in samples
        )
        if per_token:
            made[name] = pad(arrays, length, 0)
        else:
            made[name] = torch.from_numpy(np.concatenate(arrays))
    return made


def _position_targets(
    samples: Sequence[Sample], length: int, kind: Kind, sample_temperature: float, *, dense: bool
) -> PositionTargets | None:
    """The TopK records of all samples, concatenated, with their indices into hidden.reshape(B * T, D)."""
    records: list[tuple[int, NDArray[Any], TopK]] = []
    for place, sample in enumerate(samples):
        record, positions = sample.records[kind], sample.positions[kind]
        if record is None or len(record) == 0:
            continue
        if len(record) != len(positions):
            raise CacheDamaged(
                f"row {sample.row} has {len(positions)} {kind} positions but {len(record)} targets; "
                "run `kdcache verify` on the cache"
            )
        records.append((place, positions.astype(np.int64) + place * length, record))
    if not records:
        return None

    def joined(name: str) -> Tensor | None:
        arrays = [getattr(record, name) for _, _, record in records]
        if any(array is None for array in arrays):
            return None
        most = max(array.shape[1] for array in arrays)  # caches of a mixture may differ; no draw: id -1, 0
        nothing = -1 if name == "sampled_ids" else 0
        widths = [((0, 0), (0, most - array.shape[1])) for array in arrays]
        padded = [
            np.pad(each, width, constant_values=nothing) for each, width in zip(arrays, widths, strict=True)
        ]
        return torch.from_numpy(np.concatenate(padded))

    token_ids, logprobs = _entries([record for _, _, record in records])
    temperatures, tail = _tails([record for _, _, record in records])
    counts_drawn = joined("sampled_counts")
    counts = [len(record) for _, _, record in records]
    places = np.repeat([place for place, _, _ in records], counts)
    return PositionTargets(
        positions=torch.from_numpy(np.concatenate([positions for _, positions, _ in records])),
        samples=torch.from_numpy(places.astype(np.int64)),
        token_ids=torch.from_numpy(token_ids),
        logprobs=torch.from_numpy(logprobs),
        tail_logprob=torch.from_numpy(tail),
        temperatures=torch.from_numpy(temperatures),
        sampled_ids=joined("sampled_ids"),
        sampled_counts=None if counts_drawn is None else counts_drawn.float(),
        sample_temperature=sample_temperature,
        states=_states([samples[place] for place, _, _ in records], kind) if dense else None,
    )


def _tails(records: Sequence[TopK]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """temperatures (n_T,) that all records have, and their tail_logprob (N, n_T)."""
    first = np.array(records[0].temperatures, dtype=np.float32)
    if all(np.array_equal(first, record.temperatures) for record in records):
        return first, np.concatenate([record.tail_logprob for record in records])
    common = [each for each in first if all(each in record.temperatures for record in records)]
    columns = [[list(record.temperatures).index(each) for each in common] for record in records]
    tails = [record.tail_logprob[:, each] for record, each in zip(records, columns, strict=True)]
    return np.array(common, dtype=np.float32), np.concatenate(tails)


def _states(samples: Sequence[Sample], kind: Kind) -> TeacherStates | None:
    """The teacher's hidden states of all samples, concatenated; None where they are not stored."""
    found = [sample.hidden_states[kind] for sample in samples if kind in sample.hidden_states]
    if len(found) < len(samples):
        return None
    values, scales, channels, channel_of = state_tensors(join_hidden(found))
    return TeacherStates(values=values, scales=scales, channels=channels, channel_of=channel_of)


def _entries(records: Sequence[TopK]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """token_ids and logprobs (N, K) of all records, K the most of any; where no entry is, id -1 and -inf."""
    shape = sum(map(len, records)), max(record.token_ids.shape[1] for record in records)
    token_ids, logprobs = np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32)
    start = 0
    for record in records:
        rows, width = slice(start, start + len(record)), record.token_ids.shape[1]
        np.copyto(token_ids[rows, :width], record.token_ids, where=record.there)
        np.copyto(logprobs[rows, :width], record.logprobs, where=record.there)
        start += len(record)
    return token_ids, logprobs


def _relation_targets(samples: Sequence[Sample], length: int) -> tuple[RelationTargets, ...]:
    made = []
    for place, sample in enumerate(samples):
        if not sample.relation_records:
            continue
        for image, record in zip(sample.images, sample.relation_records, strict=True):
            positions = torch.from_numpy(image.positions.astype(np.int64) + place * length)
            made.append(RelationTargets.of(record, positions, place))
    return tuple(made)
