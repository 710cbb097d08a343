"""Everything about a build that is known before the teacher's weights are loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import transformers

from cache_schema.datasets.image_roots import ImageRoot, open_root, require_root
from cache_schema.datasets.rows import Dataset, open_dataset
from cache_schema.errors import KdcacheError, RowRejected
from cache_schema.format.manifest import Manifest, Plan
from cache_schema.format.stored_head import StoredHead
from cache_schema.progress import Progress
from models.device import cores_per_process
from models.folder import load_config, load_processor, outline_of
from models.pixels import with_table
from models.tokens import image_token_id_of, pad_token_id_of
from pipeline.fingerprint import fingerprint_of, read_assets
from pipeline.private_spans import private_spans
from pipeline.samples import PreparedSample, SamplePreparer
from pipeline.settings import BuildConfig
from pipeline.shard_plan import plan_rows
from pipeline.teacher_checks import require_capturable, require_engine_for
from pipeline.templates import ChatTemplate, load_template
from pipeline.transformers_engine import require_bitsandbytes

_MOST_THREADS = 8  # more than an accelerator needs
_PROBES = 64  # rows tried to find probes of the teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A dataset, its plan, and what a teacher's small files describe."""

    config: BuildConfig
    dataset: Dataset
    plan: Plan
    processor: Any
    template: ChatTemplate
    teacher_config: Any
    preparer: SamplePreparer
    image_root: ImageRoot
    rules: dict[str, Any]

    @property
    def prepare_threads(self) -> int:
        """Threads that decode and process images."""
        return self.config.prepare_threads or max(1, min(_MOST_THREADS, cores_per_process() - 1))

    @property
    def vocab_size(self) -> int:
        """The tokenizer's length."""
        return len(self.processor.tokenizer)

    @property
    def pad_token_id(self) -> int:
        """See pad_token_id_of."""
        return pad_token_id_of(self.processor.tokenizer)

    @property
    def dtype(self) -> str:
        """The name of the teacher's dtype: as asked for, or as its config says."""
        if self.config.dtype != "auto":
            return self.config.dtype
        return str(self.teacher_config.dtype or "float32").removeprefix("torch.")

    def manifest(self, sharing: bool, weights: str, head: StoredHead | None = None) -> Manifest:
        """The manifest of this build; sharing: whether images with equal prefixes share records. weights: the
        digest of the teacher's weights. head: that of a cache with hidden states."""
        fingerprint = fingerprint_of(
            weights=weights,
            config=self.teacher_config,
            processor=self.processor,
            template=self.template,
            image_token_id=image_token_id_of(self.teacher_config),
            dtype=" ".join(filter(None, (self.config.quantization, self.dtype))),
            dataset=self.dataset.digest,
            spec=self.config.spec,
            sharing=sharing,
            rules=self.rules,
            recorded={"transformers": transformers.__version__, **self._engine()},
        )
        return Manifest(
            fingerprint=fingerprint,
            spec=self.config.spec,
            plan=self.plan,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            assets=read_assets(self.config.teacher),
            head=head,
            dataset={
                "data": str(self.config.data),
                "image_root": str(self.config.image_root),
                "rows": len(self.dataset),
                "rows_captured_from": self.plan.rows,
                "teacher": str(self.config.teacher),
            },
        )

    def _engine(self) -> dict[str, str]:
        if self.config.engine == "transformers":
            return {"engine": "transformers"}
        return {"engine": self.config.engine, "engine_mode": self.config.engine_mode}

    def probes(self, count: int) -> list[PreparedSample]:
        """Up to `count` capturable samples, the first with an image where there is any; of two or more one
        without an image, where the dataset has both. KdcacheError as in `probe`."""
        first = self.probe()
        found = {first.row: first}
        order, images = self.plan.order, self.dataset.first_images
        texts, pictures = order[images[order] == 0], order[images[order] != 0]
        for row in (int(row) for row in [*texts[:1], *pictures[:_PROBES], *texts[1:_PROBES]]):
            if len(found) >= count:
                break
            if row not in found:
                try:
                    found[row] = self.preparer.prepare(self.dataset[row])
                except RowRejected:
                    continue
        return list(found.values())

    def probe(self) -> PreparedSample:
        """The first of `candidates`."""
        return next(self.candidates())

    def candidates(self) -> Iterator[PreparedSample]:
        """Samples to try the teacher on, those with an image first, in plan order.

        KdcacheError when none of the rows tried can be prepared: then the data or its root is wrong.
        """
        order, images = self.plan.order, self.dataset.first_images
        looked_at = [*order[images[order] != 0][:_PROBES], *order[images[order] == 0][:_PROBES]]
        failures: list[RowRejected] = []
        for row in looked_at:
            try:
                yield self.preparer.prepare(self.dataset[int(row)])
            except RowRejected as error:
                failures.append(error)
        if len(failures) < len(looked_at):
            return
        reasons = Counter(error.reason for error in failures)
        raise KdcacheError(
            f"none of {len(failures)} rows tried can be captured "
            f"({', '.join(f'{reason} {count}' for reason, count in reasons.most_common())}); "
            f"for example row {looked_at[0]}: {failures[0].detail}"
        )


def open_job(config: BuildConfig, progress: Progress) -> Job:
    """Reads everything but the weights' values. KdcacheError names what is missing or does not fit."""
    if config.quantization is not None:
        require_bitsandbytes(config.quantization)
    processor = load_processor(config.teacher, "teacher")
    teacher_config = load_config(config.teacher, "teacher")
    require_engine_for(teacher_config, config.engine)
    outline = partial(outline_of, config.teacher, "teacher")
    require_capturable(teacher_config, processor, config.teacher, outline)
    template = load_template(processor, config.template)
    dataset = open_dataset(config.data, progress)
    rows = min(len(dataset), config.limit or len(dataset))
    root = open_root(config.image_root, config.files)
    if dataset.first_images[:rows].any():
        require_root(root)
    max_length = config.max_length
    longest = getattr(teacher_config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        progress.message(
            f"max_length {max_length} is more than the teacher's {longest} positions; using {longest}"
        )
        max_length = longest
    return Job(
        config=config,
        dataset=dataset,
        plan=plan_rows(dataset.groups[:rows], shard_size=config.shard_size, seed=config.spec.seed),
        processor=processor,
        template=template,
        teacher_config=teacher_config,
        preparer=SamplePreparer(
            with_table(processor, as_bytes=config.engine == "transformers"),
            template,
            image_token_id=image_token_id_of(teacher_config),
            image_root=root,
            max_length=max_length,
            embed_images=config.spec.embed_images,
            over_long=config.over_long,
            private=private_spans(
                config.private,
                config.private_field,
                temperature=config.private_temperature,
                noise=config.private_noise,
                tokens=len(processor.tokenizer),
                seed=config.spec.seed,
            ),
        ),
        image_root=root,
        rules={"max_length": max_length, "over_long": config.over_long, **_private_rules(config)},
    )


def _private_rules(config: BuildConfig) -> dict[str, Any]:
    """What the fingerprint says of private spans; nothing where none are named."""
    names = ("private", "private_field", "private_temperature", "private_noise")
    named = config.private is not None or config.private_field is not None
    return {name: getattr(config, name) for name in names} if named else {}
