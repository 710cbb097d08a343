"""`derive`: a cache of other targets from the hidden states and the head in a cache, without the teacher."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_schema.errors import WrongUsage
from cache_schema.format.block import ShardBlock
from cache_schema.format.cache import Cache, open_cache
from cache_schema.format.codecs.hidden import hidden_at
from cache_schema.format.documents import FORMAT_VERSION
from cache_schema.format.manifest import CommitRecord, Manifest
from cache_schema.format.records import CapturedSample, QuarantinedRow, Sample
from cache_schema.format.spec import Kind, TargetSpec
from cache_schema.format.store import refuse_inside
from cache_schema.format.writer import CacheWriter, look_every
from cache_schema.progress import Progress, task
from cache_schema.version import VERSION
from models.device import choose_device
from models.head import Head
from models.stored_head import head_of, states_on
from pipeline.extract import Extractor
from pipeline.samples import PreparedSample
from pipeline.settings import DeriveConfig
from pipeline.shard_capture import ShardCapture
from pipeline.workers import place_among_workers


def derive(cache: str, config: DeriveConfig, progress: Progress) -> dict[str, Any]:
    """Write the targets that `config.spec` asks for as a cache of the same samples.

    They equal those of a build with these settings, up to what 8 bits lose of the hidden states; hidden
    states that the new cache has are those of the old one, bit by bit. Draws from the tail follow the new
    spec's seed. How many answers were cut short is not carried over. Any number of workers may run it, and
    any run continues the cache. WrongUsage in one line where a target needs hidden states that are not
    stored, KdcacheError when there are none or `out` cannot be written. Embedded images are carried.
    """
    started = time.monotonic()
    source = open_cache(cache)
    refuse_inside(config.out, [source.store])
    with task(progress, "reading the teacher's head"):
        head = head_of(source, choose_device(config.device))
    if config.spec.embed_images and not source.spec.embed_images:
        raise WrongUsage(
            f"{source.url} does not embed its images, so the derived cache cannot; omit --embed-images"
        )
    config = replace(config, spec=replace(config.spec, embed_images=source.spec.embed_images))
    _refuse_what_is_not_there(source, config.spec)
    writer = CacheWriter.open(config.out, _manifest(source, config.spec))
    if writer.lacks_head:
        writer.put_head(source.head_bytes())
    engine = _StoredStates(head)
    extractor = Extractor(
        engine,
        head,
        replace(config.spec, targets=_without_hidden(config.spec), hidden=()),
        fingerprint=writer.manifest.fingerprint.digest,
        share=bool(source.manifest.fingerprint.capture.get("sharing")),
        pack=False,
        batch_tokens=config.batch_tokens,
    )
    quarantined: dict[int, QuarantinedRow] = {row.row: row for row in source.quarantined()}
    before = there = len(writer.committed())
    with task(progress, "deriving", len(source.shards)):
        for number, shard in enumerate(writer.pending(*place_among_workers(None, None)), start=1):
            if shard in source.commits:
                _write(writer, shard, source, engine, extractor, quarantined)
            if number % look_every(source.plan.shards) == 0:
                there = len(writer.committed())
            progress.update(there)
    writer.finish()
    missing = source.plan.shards - len(source.shards)
    if missing:
        progress.message(
            f"{cache} lacks {missing} of its {source.plan.shards} shards: derive again when it is complete"
        )
    written = open_cache(config.out)
    return {
        "out": config.out,
        "samples": len(written),
        "shards": len(written.shards),
        "already_there": before,
        "bytes": sum(file.bytes for commit in written.commits.values() for file in commit.files),
        "seconds": round(time.monotonic() - started, 3),
    }


class _StoredStates:
    """Hidden states of a cache as an engine gives them: zeros where none are stored, and none are asked."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.samples: dict[int, Sample] = {}

    @property
    def description(self) -> dict[str, str]:
        """See Engine."""
        return {"engine": "derived", "kdcache": VERSION}

    def hidden_states(self, samples: Sequence[PreparedSample]) -> list[Tensor]:
        """See Engine; in the dtype of the head, as the teacher's were."""
        weight, found = self.head.weight, []
        for prepared in samples:
            sample = self.samples[prepared.row]
            hidden = torch.zeros(len(prepared), weight.shape[1], dtype=weight.dtype, device=weight.device)
            for kind, states in sample.hidden_states.items():
                places = torch.from_numpy(sample.positions[kind].astype(np.int64)).to(weight.device)
                hidden.index_copy_(0, places, states_on(states, weight.device).to(weight.dtype))
            found.append(hidden)
        return found


def _without_hidden(spec: TargetSpec) -> tuple[Any, ...]:
    return tuple(target for target in spec.targets if target != "hidden")


def _refuse_what_is_not_there(source: Cache, spec: TargetSpec) -> None:
    """WrongUsage where a target needs hidden states at positions where the cache has none."""
    needs: Mapping[str, Kind] = {"response": "response", "visual": "visual", "relation": "visual"}
    stored = source.spec.hidden
    absent = [name for name in _without_hidden(spec) if needs.get(name, name) not in stored]
    absent += [f"hidden ({kind})" for kind in spec.hidden if kind not in stored]
    if absent:
        possible = [name for name, kind in needs.items() if kind in stored]
        raise WrongUsage(
            f"{source.url} holds hidden states of {' and '.join(stored)} positions, which do not give "
            f"{', '.join(absent)}; use --targets {','.join([*possible, 'hidden'])} or some of them"
        )


def _manifest(source: Cache, spec: TargetSpec) -> Manifest:
    """That of the new cache: of another identity than a build's, for the codec's error in its targets."""
    given = source.manifest
    capture = given.fingerprint.capture | {
        "spec": spec.to_json(),
        "derived": {"hidden": given.spec.to_json()["hidden"]},
    }
    return replace(
        given,
        fingerprint=replace(given.fingerprint, capture=capture),
        spec=spec,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        kdcache_version=VERSION,
        format_version=FORMAT_VERSION,
        head=given.head if spec.hidden else None,
    )


def _write(
    writer: CacheWriter,
    shard: int,
    source: Cache,
    engine: _StoredStates,
    extractor: Extractor,
    quarantined: Mapping[int, QuarantinedRow],
) -> CommitRecord | None:
    """One shard of the new cache."""
    started = time.monotonic()
    table, groups = source.stored_shard(shard, ("hidden",))
    block = ShardBlock(table, groups, source.manifest, frozenset({"hidden"}), source.images_of(shard))
    spans = table["label_spans"].to_pylist()
    engine.samples = {sample.row: sample for sample in map(block.sample, range(len(block)))}
    prepared = [
        PreparedSample(
            row=sample.row,
            sample_id=sample.sample_id,
            input_ids=sample.input_ids,
            label_spans=np.array(own, np.int32).reshape(-1, 2),
            images=sample.images,
            token_inputs=sample.model_inputs,
            pixel_inputs={},
            answers_kept=0,
        )
        for sample, own in zip(engine.samples.values(), spans, strict=True)
    ]
    results = ShardCapture(extractor).run(prepared)
    rows = [results.get(row) or quarantined[row] for row in source.plan.rows_of(shard).tolist()]
    return writer.write_shard(
        shard,
        [
            _with_states(row, engine.samples[row.row], writer.manifest.spec)
            for row in rows
            if isinstance(row, CapturedSample)
        ],
        [row for row in rows if isinstance(row, QuarantinedRow)],
        engine=engine.description,
        seconds=time.monotonic() - started,
    )


def _with_states(captured: CapturedSample, sample: Sample, spec: TargetSpec) -> CapturedSample:
    """With the hidden states that the new cache has, as stored in the old one."""
    states, images, start = sample.hidden_states, [], 0
    for image in captured.images:
        end = start + len(image.record.positions)
        if "visual" in spec.hidden and image.visual is not None:
            image = replace(image, hidden=hidden_at(states["visual"], slice(start, end)))
        images.append(image)
        start = end
    return replace(
        captured,
        images=tuple(images),
        hidden=states["response"] if "response" in spec.hidden else None,
    )
