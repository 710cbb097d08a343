"""`build`: turns a dataset and a teacher into a cache."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain

from cache_schema.errors import WrongUsage
from cache_schema.format.cache import open_cache
from cache_schema.format.manifest import CommitRecord, Manifest
from cache_schema.format.spec import TargetSpec
from cache_schema.format.store import open_store
from cache_schema.format.writer import MANIFEST, CacheWriter, pending_shards
from cache_schema.progress import Progress, task
from models.stored_head import head_file
from pipeline.extract import Extractor
from pipeline.fingerprint import weights_digest
from pipeline.job import open_job
from pipeline.loop import CaptureLoop
from pipeline.prefetch import Prefetch
from pipeline.settings import BuildConfig, BuildSummary
from pipeline.teachers import load_teacher
from pipeline.vllm_start import claim_device, require_vllm
from pipeline.windows import Windows
from pipeline.workers import place_among_workers

__all__ = ["BuildConfig", "BuildSummary", "build"]


def build(config: BuildConfig, progress: Progress) -> BuildSummary:
    """Captures every row of the dataset that is not yet in the cache.

    Any number of workers may run it on one cache, and any run continues the cache. KdcacheError in one line
    when it cannot continue; StoppedEarly after Ctrl-C or SIGTERM. Finished shards are always kept.
    """
    started = time.monotonic()
    config = replace(config, spec=spec_for_engine(config))
    if config.engine == "vllm":
        require_vllm()
        config = replace(config, device=claim_device(config.device))
    rank, world_size = place_among_workers(config.rank, config.world_size)
    job = open_job(config, progress)
    weights = weights_digest(config.teacher)  # while they are loaded
    present = present_manifest(config.out)
    again: list[int] = []
    if present is not None:
        known = present.fingerprint.capture
        # all but the weights is compared at once; they are, before anything is written
        writer = CacheWriter.open(config.out, job.manifest(known["sharing"], known["teacher_weights"]))
        if "tokenizer_parts" not in known:
            progress.message(
                f"{config.out} is of an older version, which holds only vocabulary and special tokens of a "
                "tokenizer: these are equal; its merges and other parts could not be compared"
            )
        if config.retry_quarantine:
            again = _with_quarantine(config.out, rank, world_size)
        if not again and not writer.lacks_head and len(writer.committed()) == job.plan.shards:
            with task(progress, "hashing the teacher's weights"):
                CacheWriter.open(config.out, job.manifest(known["sharing"], weights.result()))
            progress.message(f"{config.out} is finished: nothing left to capture")
            return summary_of(config.out, started, already_done=True)
    pending = pending_shards(open_store(config.out), job.plan.shards, rank, world_size)
    shards = chain(again, (shard for shard in pending if shard not in again))
    with Prefetch(Windows(job).of(shards)) as windows:  # the first are ready when the teacher is
        teacher = load_teacher(job, progress)
        head = head_file(teacher.head) if config.spec.hidden and teacher.head is not None else None
        with task(progress, "hashing the teacher's weights"):
            manifest = job.manifest(teacher.sharing, weights.result(), None if head is None else head[0])
        writer = CacheWriter.open(config.out, manifest)
        if head is not None:
            writer.put_head(head[1])
        for shard in again:  # only now: a teacher that cannot be loaded costs no shard
            writer.reopen(shard)
        extractor = Extractor(
            teacher.engine,
            teacher.head,
            config.spec,
            fingerprint=writer.manifest.fingerprint.digest,
            share=teacher.sharing,
            pack=teacher.packing,
            batch_tokens=teacher.batch_tokens,
        )
        commits = list(open_cache(config.out).commits.values())
        _tell_other_versions(commits, teacher.engine.description, progress)
        CaptureLoop(job, writer, extractor, teacher.engine, progress).run(windows, commits)
        writer.finish()
    if job.dataset.pairs:
        _tell_parted_pairs(config.out, progress)
    return summary_of(config.out, started, already_done=False)


def spec_for_engine(config: BuildConfig) -> TargetSpec:
    """The spec of what the engine of `config` can provide.

    Log-probabilities give entries, label and a tail at temperature 1; they do not give logits, so neither
    relations nor log-sum-exp, nor the entropy of the tail: the spec is `without` these.
    WrongUsage in one line where engine, mode and targets do not go together.
    """
    spec = config.spec
    if config.engine == "transformers":
        if config.engine_mode != "hidden":
            raise WrongUsage(
                f"--engine-mode {config.engine_mode} is a mode of vLLM: add --engine vllm, or omit it"
            )
        return spec
    for name in ("quantization", "device_map", "compile"):
        if getattr(config, name):
            option = "--" + name.replace("_", "-")
            raise WrongUsage(f"{option} belongs to the engine transformers; omit it with --engine vllm")
    if config.engine_mode != "logprobs":
        return spec
    wanted = [name for name in ("visual", "relation", "hidden") if name in spec.targets]
    if wanted:
        raise WrongUsage(
            f"--engine-mode logprobs gives no logits, so it cannot capture {' and '.join(wanted)}; use "
            "--engine-mode hidden, or --targets response (or response,prompt)"
        )
    if spec.temperatures != (1.0,) or spec.tail_samples:
        what = "--tail-samples" if spec.tail_samples else "tails at other --temperatures than 1"
        raise WrongUsage(
            f"--engine-mode logprobs gives no logits, which {what} need; use --engine-mode hidden, or omit it"
        )
    return replace(spec, without=("logsumexp", "entropy"))


def _tell_other_versions(commits: list[CommitRecord], engine: Mapping[str, str], progress: Progress) -> None:
    """Warns where this run differs, in recorded values, from the one that wrote the newest shard."""
    if not commits:
        return
    before = max(commits, key=lambda commit: commit.created).engine
    changed = [
        f"{name} {before.get(name)}, now {now}" for name, now in engine.items() if before.get(name) != now
    ]
    if changed:
        progress.message(
            f"finished shards were captured with {'; '.join(changed)}: their targets agree with the new ones "
            "up to rounding"
        )


def _tell_parted_pairs(out: str, progress: Progress) -> None:
    """Says how many pairs have lost one half to quarantine."""
    lost = Counter(row.row // 2 for row in open_cache(out).quarantined())
    if parted := sum(halves == 1 for halves in lost.values()):
        progress.message(f"pairs of which one half alone is in quarantine, left out in training: {parted}")


def present_manifest(out: str) -> Manifest | None:
    """The manifest of the cache at `out`, if there is one."""
    store = open_store(out)
    if not store.exists(MANIFEST):
        return None
    return Manifest.from_bytes(store.read(MANIFEST), f"{store.url}/{MANIFEST}")


def _with_quarantine(out: str, rank: int, world_size: int) -> list[int]:
    """This worker's shards that hold quarantined rows."""
    return [
        shard
        for shard, commit in open_cache(out).commits.items()
        if shard % world_size == rank and commit.counts["quarantined"]
    ]


def summary_of(out: str, started: float, *, already_done: bool) -> BuildSummary:
    """What the cache at `out` holds; started: of `time.monotonic`."""
    commits = open_cache(out).commits.values()
    reasons: Counter[str] = Counter()
    for commit in commits:
        reasons.update(commit.statistics["quarantined"])
    return BuildSummary(
        captured=sum(commit.counts["samples"] for commit in commits),
        cut=sum(commit.statistics.get("cut", 0) for commit in commits),
        quarantined=dict(sorted(reasons.items())),
        shards=len(commits),
        tokens=sum(commit.counts["tokens"] for commit in commits),
        images=sum(commit.counts["images"] for commit in commits),
        seconds=time.monotonic() - started,
        already_done=already_done,
    )
