"""Samples drawn at random and captured as a build would, with some hidden states kept for comparison."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.errors import KdcacheError, RowRejected
from cache_schema.format.codecs.topk import join_topk, topk_at
from cache_schema.format.records import (
    CapturedSample,
    QuarantinedRow,
    Relation,
    StoredRelation,
    TopK,
)
from cache_schema.format.spec import KINDS, TargetSpec
from cache_schema.progress import Progress, task
from models.folder import load_processor
from models.head import Head
from models.tokens import image_token_id_of
from pipeline.engine import Engine
from pipeline.extract import Extractor
from pipeline.forecast.stand_in import Picked, Witness, require_same_tokens
from pipeline.forecast.workload import MeasuredSample, Speed
from pipeline.job import Job
from pipeline.packing import Pack, batches
from pipeline.prefix import prefix_keys
from pipeline.samples import PreparedSample, SamplePreparer
from pipeline.shard_capture import ShardCapture
from pipeline.transformers_engine import load_engine

_WINDOW_BYTES = 256 << 20  # pixels in memory at once
_PAIRS = 64  # rows compared with another about the same image
_IMAGES = 32  # images whose relations are measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """rows: as drawn; keys: of their first images, 0 for none."""

    rows: NDArray[np.int64]
    keys: NDArray[np.int64]

    @property
    def by_side(self) -> dict[bool, int]:
        """How many rows have an image (True) and how many have none."""
        images = int((self.keys != 0).sum())
        return {True: images, False: len(self.rows) - images}


def draw_rows(job: Job, samples: int, seed: int) -> Draw:
    """At most `samples` rows of the plan, uniformly drawn, in plan order: rows about one image are adjacent,
    which compresses better."""
    generator = np.random.Generator(np.random.Philox(seed))
    places = generator.choice(job.plan.rows, min(samples, job.plan.rows), replace=False)
    rows = job.plan.order[np.sort(places)]
    return Draw(rows=rows, keys=job.dataset.first_images[rows])


@dataclass(slots=True, kw_only=True)
class Survey:
    """The collected data. records: of all positions by kind; picked_records: of those whose hidden states
    were kept, in the same order. relations: of the images whose hidden states were kept, as captured.
    students: the student's hidden states at the same places, where a student was given.
    """

    samples: list[MeasuredSample] = field(default_factory=list)
    bare: list[CapturedSample] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    example: str = ""
    records: dict[str, TopK] = field(default_factory=dict)
    picked_records: dict[str, TopK] = field(default_factory=dict)
    relations: list[Relation | StoredRelation] = field(default_factory=list)
    teacher: Picked = field(default_factory=lambda: Picked(positions={}, images=[]))
    student: Picked = field(default_factory=lambda: Picked(positions={}, images=[]))
    speed: Speed = field(default_factory=lambda: Speed(seconds=0.0, tokens=0, preparing=0.0, threads=1))

    def reject(self, row: QuarantinedRow) -> None:
        """Counts a row that cannot be captured."""
        self.bad[row.reason] += 1
        self.example = self.example or f"row {row.row}: {row.detail}"


class GivenModel:
    """A student with the teacher's tokens, loaded to run on the teacher's samples."""

    def __init__(self, folder: Path, job: Job) -> None:
        processor = load_processor(folder)
        self.name = str(folder)
        self._job = job
        self.engine = load_engine(
            folder,
            vocab_size=job.vocab_size,
            pad_token_id=job.pad_token_id,
            dtype=job.config.dtype,
            device=job.config.device,
        )
        self._preparer = SamplePreparer(
            processor,
            job.template,
            image_token_id=image_token_id_of(self.engine.model.config),
            image_root=job.image_root,
            max_length=job.rules["max_length"],
            over_long=job.config.over_long,
        )
        self.head: Head = self.engine.verified_head([self.prepare(job.probe())])

    def prepare(self, sample: PreparedSample) -> PreparedSample:
        """The teacher's sample with the student's pixels. KdcacheError when its tokens differ."""
        try:
            theirs = self._preparer.prepare(self._job.dataset[sample.row])
        except RowRejected as error:
            raise KdcacheError(f"{self.name} cannot read row {sample.row}: {error.detail}") from error
        require_same_tokens(sample, theirs, self.name)
        return theirs


class Surveyor:
    """Captures drawn rows, window by window.

    spec: with the widest records that are wanted. sharing: images with equal prefixes are measured once, as
    they are stored once. positions: of each kind, whose hidden states are kept.
    """

    def __init__(
        self,
        job: Job,
        engine: Engine,
        head: Head,
        spec: TargetSpec,
        *,
        sharing: bool,
        batch_tokens: int,
        positions: int,
        seed: int,
    ) -> None:
        self._batch_tokens = batch_tokens
        self._job = job
        self._head = head
        self._spec = spec
        self._sharing = sharing
        self._seen: set[str] = set()
        self._positions = positions
        self._seed = seed
        self._kinds = [kind for kind in KINDS if kind in spec.targets]
        self._wanted: dict[int, list[NDArray[np.integer]]] = {}
        self._picks: dict[int, dict[str, NDArray[np.integer]]] = {}
        self._fresh: dict[int, list[int]] = {}  # row -> its images that no earlier row has
        self._witness = Witness(engine, self._wanted)
        self._extractor = Extractor(
            self._witness,
            head,
            spec,
            fingerprint="",
            share=False,
            pack=False,
            batch_tokens=batch_tokens,
        )
        self._images = 0
        self._blocks: dict[str, list[TopK]] = {kind: [] for kind in self._kinds}
        self._picked: dict[str, list[TopK]] = {kind: [] for kind in self._kinds}
        self._states: dict[str, list[Tensor]] = {kind: [] for kind in self._kinds}
        self._student_states: dict[str, list[Tensor]] = {kind: [] for kind in self._kinds}

    def run(self, draw: Draw, student: GivenModel | None, progress: Progress) -> Survey:
        """KdcacheError, with every reason, when no row can be captured."""
        found = Survey()
        self._quota = -(-self._positions // len(draw.rows))
        preparing = seconds = 0.0
        tokens = 0
        with task(progress, "capturing samples", len(draw.rows)):
            started = time.perf_counter()
            for window, tried in self._windows(draw.rows, found):
                preparing += time.perf_counter() - started
                for sample in window:
                    self._pick(sample)
                started = time.perf_counter()
                results = ShardCapture(self._extractor).run(window)
                seconds += time.perf_counter() - started
                tokens += sum(map(len, window))
                good = [sample for sample in window if isinstance(results[sample.row], CapturedSample)]
                theirs = self._student_states_of(student, good) if student is not None else {}
                for sample in window:
                    result = results[sample.row]
                    if isinstance(result, QuarantinedRow):
                        found.reject(result)
                    else:
                        self._keep(result, theirs.get(sample.row), found)
                self._witness.kept.clear()
                progress.update(tried, bad=str(found.bad.total()))
                started = time.perf_counter()
        if not found.samples:
            reasons = ", ".join(f"{reason} {count}" for reason, count in found.bad.most_common())
            raise KdcacheError(
                f"none of {len(draw.rows)} rows drawn can be captured ({reasons}); "
                f"for example {found.example}"
            )
        for kind in self._kinds:
            if self._blocks[kind]:
                found.records[kind] = join_topk(self._blocks[kind])
                found.picked_records[kind] = join_topk(self._picked[kind])
        found.teacher.positions = _joined(self._states)
        found.student.positions = _joined(self._student_states)
        found.speed = Speed(
            seconds=seconds,
            tokens=tokens,
            preparing=preparing / len(draw.rows),
            threads=self._job.prepare_threads,
        )
        return found

    def _windows(self, rows: NDArray[np.int64], found: Survey) -> Iterator[tuple[list[PreparedSample], int]]:
        """(prepared samples, rows tried so far), as many at a time as their pixels allow."""
        window: list[PreparedSample] = []
        for tried, row in enumerate(rows.tolist(), start=1):
            try:
                window.append(self._job.preparer.prepare(self._job.dataset[row]))
            except RowRejected as error:
                label = self._job.dataset.label_of(row)
                found.reject(
                    QuarantinedRow(row=row, sample_id=label, reason=error.reason, detail=error.detail)
                )
            if tried == len(rows) or sum(sample.pixel_bytes for sample in window) >= _WINDOW_BYTES:
                yield window, tried
                window = []

    def _pick(self, sample: PreparedSample) -> None:
        """Decides which positions and images of a sample are kept."""
        keys = prefix_keys(sample, "") if self._sharing else [None] * len(sample.images)
        fresh = [number for number, key in enumerate(keys) if key is None or key not in self._seen]
        self._seen.update(filter(None, keys))
        self._fresh[sample.row] = fresh
        places = sample.positions
        images = [sample.images[number].positions for number in fresh]
        places["visual"] = np.concatenate([np.empty(0, np.int32), *images])
        generator = np.random.default_rng((self._seed, sample.row))
        picks: dict[str, NDArray[np.integer]] = {}
        parts: list[NDArray[np.integer]] = []
        for kind in self._kinds:
            count = len(places[kind])
            picks[kind] = np.sort(generator.choice(count, min(self._quota, count), replace=False))
            parts.append(places[kind][picks[kind]])
        if "relation" in self._spec.targets:
            chosen = images[: max(_IMAGES - self._images, 0)]
            parts += chosen
            self._images += len(chosen)
        self._picks[sample.row], self._wanted[sample.row] = picks, parts

    def _keep(self, sample: CapturedSample, theirs: list[Tensor] | None, found: Survey) -> None:
        """Collects what is wanted of a captured sample; theirs: the student's hidden states."""
        fresh = [sample.images[number] for number in self._fresh.pop(sample.row)]
        of_kind = {
            "response": [sample.response],
            "prompt": [sample.prompt],
            "visual": [image.visual for image in fresh],
        }
        kept = self._witness.kept[sample.row]
        for number, kind in enumerate(self._kinds):
            records = [record for record in of_kind[kind] if record is not None and len(record)]
            if not records:
                continue
            whole = join_topk(records)
            self._blocks[kind].append(whole)
            self._picked[kind].append(topk_at(whole, self._picks[sample.row][kind]))
            self._states[kind].append(kept[number])
            if theirs is not None:
                self._student_states[kind].append(theirs[number])
        images = kept[len(self._kinds) :]
        found.teacher.images += images
        if theirs is not None:
            found.student.images += theirs[len(self._kinds) :]
        found.relations += [image.relation for image in fresh[: len(images)] if image.relation is not None]
        response, prompt = sample.response, sample.prompt
        found.samples.append(
            MeasuredSample(
                tokens=len(sample.input_ids),
                prefix=int(sample.images[-1].record.positions[-1]) + 1 if sample.images else 0,
                images=tuple(len(image.record.positions) for image in sample.images),
                positions={
                    "response": 0 if response is None else len(response),
                    "prompt": 0 if prompt is None else len(prompt),
                },
            )
        )
        images_bare = tuple(replace(image, visual=None, relation=None) for image in sample.images)
        found.bare.append(replace(sample, response=None, prompt=None, images=images_bare))

    def _student_states_of(
        self, student: GivenModel, samples: Sequence[PreparedSample]
    ) -> dict[int, list[Tensor]]:
        """The student's hidden states at the places that are kept of the teacher's."""
        witness = Witness(student.engine, self._wanted)
        theirs = [student.prepare(sample) for sample in samples]
        for batch in batches([Pack(samples=(sample,)) for sample in theirs], self._batch_tokens):
            witness.hidden_states([theirs[index] for index in batch])
        return witness.kept


def sharing_of(job: Job, draw: Draw, seed: int, progress: Progress) -> float | None:
    """The share of drawn rows whose first image has the same targets in another row about it, picked at
    random, as the text before it decides. None where no image comes twice."""
    generator = np.random.default_rng((seed, 1))
    keys = job.dataset.first_images[: job.plan.rows]
    rows = draw.rows[draw.keys != 0]
    rows = generator.choice(rows, min(_PAIRS, len(rows)), replace=False)
    tried = alike = 0
    with task(progress, "comparing rows about the same image", len(rows)):
        for number, row in enumerate(rows.tolist()):
            progress.update(number)
            others = np.flatnonzero(keys == keys[row])
            others = others[others != row]
            if not len(others):
                continue
            pair = (row, int(generator.choice(others)))
            try:
                first, second = (prefix_keys(job.preparer.prepare(job.dataset[one]), "")[0] for one in pair)
            except RowRejected:
                continue
            tried, alike = tried + 1, alike + (first == second)
    return alike / tried if tried else None


def _joined(states: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    return {kind: torch.cat(parts) for kind, parts in states.items() if parts}
