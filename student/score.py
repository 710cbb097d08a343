"""Scores of a cache by a small reference model: the log-likelihood of every sample's labels."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_schema.datasets.image_roots import open_root
from cache_schema.errors import StoppedEarly, WrongUsage
from cache_schema.format.cache import Cache, open_cache
from cache_schema.format.records import IGNORE_INDEX
from cache_schema.interrupt import Interrupt
from cache_schema.operations.reference_scores import unscored, write_scores
from cache_schema.progress import Progress, task
from models.device import choose_device
from models.folder import load_model, load_processor
from models.tokens import pad_token_id_of
from student.checks import check_student, warn_of_cache
from student.collate import Batch, Collator
from student.folder import folder_digest
from student.loader import load_ahead, on_device
from student.losses import LossWeights
from student.model import DistilledStudent
from student.pixels import PixelInputs
from student.settings import ScoreConfig
from student.stages import SFT
from student.stream import Located, Step

_ROWS = 1024
"""Positions whose logits are made at a time."""


def score_cache(url: str, config: ScoreConfig, progress: Progress) -> dict[str, Any]:
    """Adds to the cache at `url` the log-likelihood of each sample's labels under a reference model.

    One sealed file per shard; shards that have it are skipped, so the command continues where it stopped.
    The softmax is over the tokenizer's tokens, as the teacher's in the cache. KdcacheError when the cache has
    the scores of another model; IdentityMismatch when the model's tokenizer is not the cache's.
    """
    started = time.perf_counter()
    cache, digest = open_cache(url), folder_digest(config.model)
    if config.image_root is None and not cache.spec.embed_images:
        raise WrongUsage(f"cache {url} does not embed its images: give --image-root")
    warn_of_cache(cache, progress)
    missing = unscored(cache, digest)
    done = 0
    if missing:
        done = _score(cache, missing, digest, config, progress)
    return {
        "cache": url,
        "model": digest,
        "shards": len(cache.shards),
        "scored_now": len(missing),
        "samples": done,
        "already_done": not missing,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _score(cache: Cache, missing: list[int], digest: str, config: ScoreConfig, progress: Progress) -> int:
    device = torch.device(choose_device(config.device))
    processor = load_processor(config.model, role="reference model")
    dtype: torch.dtype | str = torch.float32 if device.type == "cpu" else "auto"
    model = load_model(config.model, dtype, role="reference model").to(device).eval()
    vocabulary = cache.manifest.fingerprint.training["vocab_size"]
    reference = DistilledStudent(model, LossWeights(), vocab_size=vocabulary).eval()
    root = open_root(config.image_root, config.files)
    collator = Collator(
        pixels=PixelInputs(processor),
        image_root=root,
        pad_token_id=pad_token_id_of(processor.tokenizer),
        image_token_id=cache.manifest.fingerprint.training["image_token_id"],
        placeholders=check_student(cache, model, processor, root, SFT, adopt_template=True),
    )
    probe = torch.tensor([processor.tokenizer.encode("What is in the image?")], device=device)
    reference.check_head(probe)
    numbers = cache.index().row
    lengths = [cache.shard_length(shard) for shard in cache.shards]
    ends = dict(zip(cache.shards, np.cumsum(lengths).tolist(), strict=True))
    batches = load_ahead(_steps(cache, missing, config.batch_size), collator)
    done = 0
    try:
        with task(progress, "scoring", len(missing)), Interrupt() as interrupt:
            for number, (shard, made) in enumerate(batches):
                found = {
                    row: pair
                    for batch in on_device(made, device)
                    for row, pair in zip(batch.rows, _log_likelihoods(reference, batch), strict=True)
                }
                start = ends[shard] - cache.shard_length(shard)
                rows = numbers[start : ends[shard]]
                values = np.array([found[int(row)] for row in rows], dtype=np.float64).reshape(len(rows), 2)
                write_scores(cache, shard, digest, values[:, 0], values[:, 1])
                done += len(rows)
                progress.update(number + 1)
                if interrupt.asked and number + 1 < len(missing):
                    raise StoppedEarly(
                        f"stopped with {number + 1} of {len(missing)} shards scored; run the same command "
                        "again to continue"
                    )
    finally:
        batches.close()
    return done


def _steps(cache: Cache, shards: list[int], size: int) -> Generator[Step]:
    """A step for every shard: its samples in batches of similar length, the longest first."""
    for shard in shards:
        block = cache.read_shard(shard, parts=(), images=True)
        lengths = [len(block.sample(place).input_ids) for place in range(len(block))]
        order = np.argsort(-np.array(lengths, dtype=np.int64), kind="stable").tolist()
        located = [Located(block=block, place=place) for place in order]
        cuts = range(0, len(located), size)
        yield Step(number=shard, micro_batches=tuple(tuple(located[i : i + size]) for i in cuts))


@torch.inference_mode()
def _log_likelihoods(reference: DistilledStudent, batch: Batch) -> list[tuple[float, float]]:
    """(log-likelihood, number) of the supervised tokens of every sample."""
    hidden = reference.hidden_states(batch.inputs)
    sample, position = torch.nonzero(batch.labels[:, 1:] != IGNORE_INDEX, as_tuple=True)
    labels = batch.labels[sample, position + 1]
    rows = hidden[sample, position]
    found = torch.zeros(len(batch.rows), dtype=torch.float64)
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        values = _logprobs(reference.head.logits(rows[part]), labels[part])
        found.index_add_(0, sample[part].cpu(), values.cpu().double())
    counts = torch.bincount(sample.cpu(), minlength=len(batch.rows)).double()
    return list(zip(found.tolist(), counts.tolist(), strict=True))


def _logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) log-probabilities of labels (N,) under logits (N, V)."""
    return logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(-1)
