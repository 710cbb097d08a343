"""Cached samples for other trainers: an iterable dataset of plain dictionaries, and their collation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from cache_schema.datasets.image_roots import open_root
from cache_schema.errors import IdentityMismatch, WrongUsage
from cache_schema.format.cache import Cache, open_cache
from cache_schema.format.records import ImageRecord, Relation, Sample, TopK, positions_by_kind
from cache_schema.format.spec import KINDS
from models.inputs import join
from models.tokens import pad_token_id_of
from student.collate import Collator
from student.loss_weights import LossWeights
from student.mixture import MixedStream, Weighting
from student.order import Catalogue
from student.pixels import PixelInputs
from student.sources import Mixture, Source
from student.stream import OrderedStream, Stream, StreamConfig

_TOPK = tuple(field.name for field in fields(TopK))
_RELATION = tuple(field.name for field in fields(Relation))


class CachedSamples(IterableDataset[dict[str, Any]]):
    """The samples of caches as plain dictionaries, in the order in which `kdcache train` reads them.

    cache: a folder or an fsspec URL, or the Sources of a mixture, each with its weight (none: in proportion
    to their sizes) and, where it is another than image_root, its own. processor: the student's, of
    transformers; its tokenizer must be the teacher's. image_root: a folder or URL that the cache's image
    paths start from; None where the cache embeds its images. targets: some of the cache's `response`,
    `visual`, `prompt`, `relation`; None: all that every cache has. batch_size: samples per batch of one
    process; a DataLoader must be given the same. rank, world_size: None: of torch.distributed where it is
    initialised, else one process. window: shards that the shuffle mixes.

    An item holds `row`, `sample_id`, `source` (which cache of the mixture); `input_ids`, `labels` (T,)
    int32, labels IGNORE_INDEX where not supervised; `model_inputs` and `pixels`: further inputs of the model
    by name; `image_positions`: per image (P,); per kind of positions that was captured `positions` (N,) and
    the fields of `TopK`; `relations`: per image the fields of `Relation`. All but the tensors in `pixels`
    are numpy arrays.

    An iteration goes to the end of an epoch, the next one through the epoch after it. Samples that fill no
    batch of all processes are left out of that epoch. In a mixture all batches are full: an epoch has as
    many as the caches together fill, and each cache is passed through again and again at its own share. The
    loader's workers share the batches round about, so that neither their number nor that of the processes
    changes what is in a global batch. The place is one integer, see `state_dict`; shares of a mixture may
    change on the way, see `set_shares`. A DataLoader with workers iterates over copies: call `set_epoch`
    before each epoch there, or use a loader that keeps the states of its workers.

    KdcacheError: as `open_cache`, or an image that is missing or is not the captured one. WrongUsage: a
    target that a cache does not have, or fewer samples than a batch. IdentityMismatch: caches of a mixture
    with different tokenizers. Not promised: hidden states.
    """

    def __init__(
        self,
        cache: str | Path | Sequence[Source],
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
        if isinstance(cache, Mixture):
            raise WrongUsage(
                "CachedSamples takes the sources of a mixture; shares that follow the student (rule ddk) "
                "need a measurement of it: give them to set_shares"
            )
        given = (Source(cache=str(cache)),) if isinstance(cache, str | Path) else tuple(cache)
        self._mixture, self._processor, self._image_root = Mixture(sources=given), processor, image_root
        self._asked = None if targets is None else tuple(targets)
        self._order = StreamConfig(
            seed=seed, global_batch=batch_size * world_size, window=window, shuffle=shuffle
        )
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._step = self._taken = 0  # taken: batches since, by this worker of a loader
        self._weighting: Weighting | None = None  # since shares were set
        _ = self._opened

    def __getstate__(self) -> dict[str, Any]:
        # A worker opens the cache by itself: an open one is of one process.
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    @cached_property
    def _opened(self) -> tuple[OrderedStream, Collator]:
        caches = [open_cache(source.cache) for source in self._mixture.sources]
        first, *others = [cache.manifest.fingerprint.training.get("tokenizer") for cache in caches]
        for cache, other in zip(caches[1:], others, strict=True):
            if other != first:
                raise IdentityMismatch(f"{cache.url} and {caches[0].url} have different tokenizers")
        targets = self._targets(caches)
        made = [
            self._collator(cache, source, targets)
            for cache, source in zip(caches, self._mixture.sources, strict=True)
        ]
        reading: dict[str, Any] = {
            "micro_batch": self._batch_size,
            "targets": targets,
            "rank": self._rank,
            "world_size": self._world_size,
        }
        stream = self._stream(caches, reading)
        return stream, replace(made[0], further=tuple(made[1:]))

    def _targets(self, caches: Sequence[Cache]) -> tuple[str, ...]:
        """Those that were asked for, else all that every cache has."""
        common = [t for t in caches[0].spec.targets if all(t in cache.spec.targets for cache in caches)]
        targets = tuple(t for t in common if t != "hidden") if self._asked is None else self._asked
        for cache in caches:
            present = [target for target in cache.spec.targets if target != "hidden"]
            if absent := [target for target in targets if target not in present]:
                raise WrongUsage(f"{cache.url} has no {', '.join(absent)} targets, but {', '.join(present)}")
        return targets

    def _collator(self, cache: Cache, source: Source, targets: tuple[str, ...]) -> Collator:
        image_root = source.image_root or self._image_root
        if image_root is None and not cache.spec.embed_images:
            raise WrongUsage(f"{cache.url} does not embed its images: give image_root")
        return Collator(
            pixels=PixelInputs(self._processor),
            image_root=open_root(image_root),
            pad_token_id=pad_token_id_of(self._processor.tokenizer),
            image_token_id=cache.manifest.fingerprint.training["image_token_id"],
            targets=targets,
            sample_temperature=cache.spec.sample_temperature,
            losses=LossWeights(),
        )

    def _stream(self, caches: Sequence[Cache], reading: dict[str, Any]) -> OrderedStream:
        if len(caches) > 1:
            catalogue = Catalogue(caches)
            domains = [catalogue.samples_of(source) for source in range(len(caches))]
            mixed = MixedStream(catalogue, self._order, domains, self._mixture.shares, **reading)
            if self._weighting is not None:
                mixed.order.restore(self._weighting)
            return mixed
        stream = Stream(caches[0], self._order, **reading)
        if len(stream) < self._order.global_batch:
            raise WrongUsage(f"{caches[0].url} has {len(stream)} samples, a batch {self._order.global_batch}")
        return stream

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, of this process and of every other."""
        stream = self._opened[0]
        return (
            len(stream) // self._order.global_batch if isinstance(stream, Stream) else stream.steps_per_epoch
        )

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, unless the place is within it. WrongUsage before the step at which
        shares were set."""
        steps = self._opened[0].steps_per_epoch
        if self._step // steps == epoch:
            return
        self._taken = 0
        if self._weighting is not None and epoch * steps < self._weighting.start:
            raise WrongUsage(
                f"epoch {epoch} begins before step {self._weighting.start}, where shares were set"
            )
        self._step = epoch * steps

    def set_shares(self, shares: Sequence[float]) -> None:
        """Other shares of a mixture's caches, in their order and of any sum, from the place on.

        An iteration in this process ends where it is, and the next one goes on from there; a DataLoader's
        workers see the shares at their next iteration, so set them between epochs there, after `set_epoch`.
        Every process must set the same shares at the same step. They are in `state_dict`.
        `student.domains.discrepancy` gives those of DDK. WrongUsage where they are not one share per cache.
        """
        stream, count = self._opened[0], len(self._mixture.sources)
        if not isinstance(stream, MixedStream):
            raise WrongUsage("shares are of the caches of a mixture; here is one cache")
        sound = len(shares) == count and all(0 <= share < math.inf for share in shares) and sum(shares) > 0
        if not sound:
            raise WrongUsage(f"shares must be {count} numbers from 0, not all 0: {list(shares)}")
        stream.order.reweigh(self._step, shares)
        self._weighting = stream.order.weighting

    def state_dict(self) -> dict[str, Any]:
        """The place: `step`, the next step that is not begun, of epochs of `ceil(samples / global batch)`.
        Where shares were set, `weighting` too. JSON values.

        In a loader's worker `step` is where the iteration began and `taken` the worker's batches since. The
        dataset outside the workers does not move: see docs/trainers.md.
        """
        given: dict[str, Any] = {"taken": self._taken} if self._taken else {}
        if self._weighting is not None:
            given["weighting"] = asdict(self._weighting)
        return {"step": self._step, **given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a place, on any number of processes with the same global batch; at a worker's place in the
        worker of the same number."""
        self._step, self._taken = int(state["step"]), int(state.get("taken", 0))
        given, before = state.get("weighting"), self._weighting
        self._weighting = None
        if given is not None:
            self._weighting = Weighting(
                start=given["start"], shares=tuple(given["shares"]), drawn=tuple(given["drawn"])
            )
        if self._weighting != before:
            self.__dict__.pop("_opened", None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        stream, collator = self._opened
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        weighting = self._weighting
        end = (self._step // stream.steps_per_epoch + 1) * stream.steps_per_epoch
        start = min(self._step + number + self._taken * workers, end)
        for step in stream.read(start, end):
            mine = [located for part in step.micro_batches for located in part]
            if (step.number - start) % workers or len(mine) < self._batch_size:
                continue
            if worker is None:
                self._step = step.number + 1
            else:
                self._taken += 1
            for located in mine:
                yield _item(located.sample(), collator)
            if self._weighting is not weighting:  # set meanwhile
                return
        self._step, self._taken = end, 0

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
        inputs = {name: getattr(each, "plain", each) for name, each in batch.inputs.items()}
        return {**inputs, "labels": batch.labels, "targets": batch.targets}


def _item(sample: Sample, collator: Collator) -> dict[str, Any]:
    item: dict[str, Any] = {
        "row": sample.row,
        "sample_id": sample.sample_id,
        "source": sample.source,
        "input_ids": sample.input_ids,
        "labels": sample.labels,
        "model_inputs": dict(sample.model_inputs),
        "pixels": collator.images([sample.images], [sample.row], [sample.source]),
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
        relation_records=[
            Relation(**{name: given[name] for name in _RELATION}) for given in item["relations"]
        ],
        model_inputs=item["model_inputs"],
        source=item["source"],
    )
