"""The teacher of a build, loaded and checked: which engine, which head, what may be shared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from cache_schema.errors import KdcacheError, first_line
from cache_schema.progress import Progress, task
from models.device import choose_device
from models.head import Head, read_head
from pipeline.batch_size import batch_tokens_for
from pipeline.engine import Engine, RecordEngine, release_memory
from pipeline.entry_rules import most_selected
from pipeline.job import Job
from pipeline.prefix import packing_is_exact, prefix_is_independent
from pipeline.samples import PreparedSample
from pipeline.settings import BATCH_TOKENS
from pipeline.spot_check import Finding, finding_of, require_agreement
from pipeline.transformers_engine import DTYPES, TransformersEngine, load_engine
from pipeline.vllm_engine import VllmExtracted, engine_of
from pipeline.vllm_start import start_vllm

_TRIES = 16  # samples on which a teacher is tried before it counts as faulty


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A loaded teacher that has passed its checks.

    head: None for an engine that gives records itself. sharing: whether conversations about one image may
    share its targets; packing: whether they may be computed as one sequence; batch_tokens: of a batch.
    """

    engine: Engine | RecordEngine
    head: Head | None
    sharing: bool
    packing: bool
    batch_tokens: int


def load_teacher(job: Job, progress: Progress) -> Teacher:
    """Loads the teacher of `job` and checks it. KdcacheError where either fails."""
    if job.config.engine == "vllm":
        return _load_vllm(job, progress)
    engine, head, sharing, packing, batch_tokens = load_with_transformers(job, progress)
    return Teacher(engine=engine, head=head, sharing=sharing, packing=packing, batch_tokens=batch_tokens)


def load_with_transformers(job: Job, progress: Progress) -> tuple[TransformersEngine, Head, bool, bool, int]:
    """(engine, head, sharing, packing, batch_tokens) as `Teacher` has them, whatever engine the build asks
    for."""
    with task(progress, "loading the teacher"):
        engine = _load_transformers(job)
        sample = _sample_of_numbers(engine, job)
        head = engine.verified_head([sample])
        if job.config.compile and (problem := engine.compile(sample)) is not None:
            progress.message(f"the teacher runs uncompiled: {problem}")
        sharing = bool(sample.images) and prefix_is_independent(engine, sample)
        packing = sharing and packing_is_exact(engine, sample)
        batch_tokens = job.config.batch_tokens or batch_tokens_for(engine, sample, progress)
    return engine, head, sharing, packing, batch_tokens


def _sample_of_numbers(engine: TransformersEngine, job: Job) -> PreparedSample:
    """A sample on which the teacher works and whose hidden states are finite: one on which it does not says
    nothing of the others. KdcacheError when there is none among the first."""
    fault, tried = "", 0
    for sample in islice(job.candidates(), _TRIES):
        tried += 1
        if (found := _fault_at(engine, sample)) is None:
            return sample
        fault = found
    remedy = "try another --dtype (bfloat16 or float32), or fetch the checkpoint again"
    if "image" in fault and "features" in fault:
        remedy = "processor and model count image tokens differently: take both from one checkpoint"
    raise KdcacheError(
        f"the teacher {job.config.teacher} in {job.dtype} {fault}, on all of {tried} samples tried; {remedy}"
    )


def _fault_at(engine: TransformersEngine, sample: PreparedSample) -> str | None:
    """What is wrong with the teacher's hidden states of a sample; None if they are finite numbers."""
    try:
        (hidden,) = engine.hidden_states([sample])
    except (KdcacheError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - told if other samples fail too
        return f"fails: {first_line(error)}"
    return None if hidden.isfinite().all() else "gives hidden states that are not finite numbers"


def _load_transformers(job: Job) -> TransformersEngine:
    config = job.config
    return load_engine(
        config.teacher,
        vocab_size=job.vocab_size,
        pad_token_id=job.pad_token_id,
        dtype=config.dtype,
        device=config.device,
        device_map=config.device_map,
        quantization=config.quantization,
    )


def _load_vllm(job: Job, progress: Progress) -> Teacher:
    """vLLM, after a few samples have gone through transformers and before they go through it."""
    config = job.config
    with task(progress, "running a few samples in transformers"):
        samples, ours, softcap = _ask_transformers(job)
        release_memory()
    with task(progress, "loading the teacher into vLLM"):
        llm = start_vllm(
            Path(config.teacher),
            mode=config.engine_mode,
            dtype=job.dtype,
            max_length=job.rules["max_length"],
            batch_tokens=config.batch_tokens or BATCH_TOKENS,
            memory_share=config.memory_share,
            top_k=most_selected(config.spec, job.vocab_size),
            processor=job.processor,
            vision_type=getattr(getattr(job.teacher_config, "vision_config", None), "model_type", ""),
            layers=job.teacher_config.get_text_config().num_hidden_layers,
        )
        head: Head | None = None
        if config.engine_mode != "logprobs":
            head = read_head(
                Path(config.teacher),
                job.teacher_config,
                vocab_size=job.vocab_size,
                dtype=DTYPES[job.dtype],
                device=choose_device(config.device),
            )
            head = replace(head, softcap=softcap)
        engine = engine_of(
            llm,
            head,
            samples,
            mode=config.engine_mode,
            top_k=most_selected(config.spec, job.vocab_size),
            tokenizer=job.processor.tokenizer,
            image_root=job.image_root,
        )
        theirs = finding_of(engine, head, config.spec, samples)
        require_agreement(ours, theirs, samples, dtype=job.dtype, engine="vllm")
        # Log-probabilities make no targets of images, so there is nothing to share.
        sharing = (
            not isinstance(engine, RecordEngine)
            and bool(samples[0].images)
            and prefix_is_independent(engine, samples[0])
        )
        if sharing and isinstance(engine, VllmExtracted):
            engine.share_prefixes()
    return Teacher(
        engine=engine,
        head=head,
        sharing=sharing,
        packing=False,
        batch_tokens=config.batch_tokens or BATCH_TOKENS,
    )


def _ask_transformers(job: Job) -> tuple[list[PreparedSample], Finding, float | None]:
    """Samples of finite hidden states, the output of transformers for them, and the soft-cap that its model
    really applies; the model is freed on return."""
    engine = _load_transformers(job)
    probes = job.probes(job.config.spot_check)
    samples = [sample for sample in probes if _fault_at(engine, sample) is None]
    samples = samples or [_sample_of_numbers(engine, job)]
    head = engine.verified_head(samples[:1])
    return samples, finding_of(engine, head, job.config.spec, samples), head.softcap
