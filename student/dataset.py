"""Cached samples for other trainers: an iterable dataset of plain dictionaries, and their collation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from cache_schema.datasets.image_roots import open_root
from cache_schema.errors import WrongUsage
from cache_schema.format.cache import open_cache
from cache_schema.format.records import ImageRecord, Relation, Sample, TopK, positions_by_kind
from cache_schema.format.spec import KINDS
from models.inputs import join
from models.tokens import pad_token_id_of
from student.collate import Collator
from student.loss_weights import LossWeights
from student.pixels import PixelInputs
from student.stream import Stream, StreamConfig

_TOPK = tuple(field.name for field in fields(TopK))
_RELATION = tuple(field.name for field in fields(Relation))


class CachedSamples(IterableDataset[dict[str, Any]]):
    """The samples of a cache as plain dictionaries, in the order in which `kdcache train` reads them.

    cache: a folder or an fsspec URL. processor: the student's, of transformers; its tokenizer must be the
    teacher's. image_root: a folder or URL that the cache's image paths start from; None where the cache
    embeds its images. targets: some of the cache's `response`, `visual`, `prompt`, `relation`; None: all.
    batch_size: samples per batch of one process; a DataLoader must be given the same. rank, world_size: None:
    of torch.distributed where it is initialised, else one process. window: shards that the shuffle mixes.

    An item holds `row`, `sample_id`; `input_ids`, `labels` (T,) int32, labels IGNORE_INDEX where not
    supervised; `model_inputs` and `pixels`: further inputs of the model by name; `image_positions`: per image
    (P,); per kind of positions that was captured `positions` (N,) and the fields of `TopK`; `relations`: per
    image the fields of `Relation`. All but the tensors in `pixels` are numpy arrays.

    An iteration goes to the end of an epoch, the next one through the epoch after it. Samples that fill no
    batch of all processes are left out of that epoch. The loader's workers share the batches round about, so
    that neither their number nor that of the processes changes what is in a global batch. The place is one
    integer, see `state_dict`. A DataLoader with workers iterates over copies: call `set_epoch` before each
    epoch there, or use a loader that keeps the states of its workers.

    KdcacheError: as `open_cache`, or an image that is missing or is not the captured one. WrongUsage: a
    target that the cache does not have, or fewer samples than a batch. Not promised: hidden states, mixtures.
    """

    def __init__(
        self,
        cache: str | Path,
        processor: Any,
        *,
        batch_size: int,
        image_root: str | Path | None = None,
        targets: Sequence[str] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        window: int = 8,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        if rank is None or world_size is None:
            spread = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if spread else 0
            world_size = torch.distributed.get_world_size() if spread else 1
        if batch_size < 1 or not 0 <= rank < world_size:
            raise WrongUsage(f"batch_size {batch_size}, rank {rank} of {world_size} make no batches")
        self._cache, self._processor, self._image_root = str(cache), processor, image_root
        self._asked = None if targets is None else tuple(targets)
        self._order = StreamConfig(
            seed=seed, global_batch=batch_size * world_size, window=window, shuffle=shuffle
        )
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._step = 0
        _ = self._opened

    def __getstate__(self) -> dict[str, Any]:
        # A worker opens the cache by itself: an open one is of one process.
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    @cached_property
    def _opened(self) -> tuple[Stream, Collator]:
        cache = open_cache(self._cache)
        present = tuple(target for target in cache.spec.targets if target != "hidden")
        targets = present if self._asked is None else self._asked
        if absent := [target for target in targets if target not in present]:
            raise WrongUsage(f"{self._cache} has no {', '.join(absent)} targets, but {', '.join(present)}")
        if self._image_root is None and not cache.spec.embed_images:
            raise WrongUsage(f"{self._cache} does not embed its images: give image_root")
        collator = Collator(
            pixels=PixelInputs(self._processor),
            image_root=open_root(self._image_root),
            pad_token_id=pad_token_id_of(self._processor.tokenizer),
            image_token_id=cache.manifest.fingerprint.training["image_token_id"],
            targets=targets,
            sample_temperature=cache.spec.sample_temperature,
            losses=LossWeights(),
        )
        stream = Stream(
            cache,
            self._order,
            micro_batch=self._batch_size,
            targets=targets,
            rank=self._rank,
            world_size=self._world_size,
        )
        if len(stream) < self._order.global_batch:
            raise WrongUsage(f"{self._cache} has {len(stream)} samples, a batch {self._order.global_batch}")
        return stream, collator

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, of this process and of every other."""
        return len(self._opened[0]) // self._order.global_batch

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, unless the place is within it."""
        steps = self._opened[0].steps_per_epoch
        if self._step // steps != epoch:
            self._step = epoch * steps

    def state_dict(self) -> dict[str, int]:
        """The place: `step`, the next step that is not begun, of epochs of `ceil(samples / global batch)`."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a place, on any number of processes with the same global batch."""
        self._step = int(state["step"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        stream, collator = self._opened
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        start = self._step
        end = (start // stream.steps_per_epoch + 1) * stream.steps_per_epoch
        for step in stream.read(start, end):
            if (step.number - start) % workers == number:
                mine = [located for part in step.micro_batches for located in part]
                for located in mine if len(mine) == self._batch_size else ():
                    self._step = step.number + 1
                    yield _item(located.sample(), collator)
        self._step = end

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch of items: the model's inputs by name, right-padded to (B, T); `labels` (B, T); `targets`,
        the DistillationTargets of the losses.

        It is a `collate_fn`. All values are tensors but `targets`, which has `to(device)` as they have.
        """
        samples = [_sample(item) for item in items]
        names = {name: None for item in items for name in item["pixels"]}
        pixels = {
            name: join([item["pixels"][name] for item in items if name in item["pixels"]]) for name in names
        }
        batch = self._opened[1].batch_of(samples, pixels)
        return {**batch.inputs, "labels": batch.labels, "targets": batch.targets}


def _item(sample: Sample, collator: Collator) -> dict[str, Any]:
    item: dict[str, Any] = {
        "row": sample.row,
        "sample_id": sample.sample_id,
        "input_ids": sample.input_ids,
        "labels": sample.labels,
        "model_inputs": dict(sample.model_inputs),
        "pixels": collator.images([sample.images], [sample.row]),
        "image_positions": [image.positions for image in sample.images],
        "relations": [{name: getattr(relation, name) for name in _RELATION} for relation in sample.relations],
    }
    for kind in KINDS:
        if (record := sample.records[kind]) is not None:
            values = {name: getattr(record, name) for name in _TOPK}
            item[kind] = {"positions": sample.positions[kind], **values}
    return item


def _sample(item: dict[str, Any]) -> Sample:
    """What the targets of a batch are made of."""
    records = {kind: item[kind] for kind in KINDS if kind in item}
    images = item["image_positions"]
    return Sample(
        row=item["row"],
        sample_id=item["sample_id"],
        input_ids=item["input_ids"],
        labels=item["labels"],
        positions=positions_by_kind(item["labels"], images),
        images=tuple(
            ImageRecord(path="", sha256="", width=0, height=0, positions=positions) for positions in images
        ),
        records={
            kind: TopK(**{name: records[kind][name] for name in _TOPK}) if kind in records else None
            for kind in KINDS
        },
        relations=[Relation(**{name: given[name] for name in _RELATION}) for given in item["relations"]],
        model_inputs=item["model_inputs"],
    )
