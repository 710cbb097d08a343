"""Preparation of a run: the student with its parts frozen or adapted, and the accelerator."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, ProjectConfiguration
from torch import Tensor

from cache_schema.datasets.image_roots import open_root
from cache_schema.errors import IdentityMismatch, KdcacheError, WrongUsage
from cache_schema.format.cache import Cache, open_cache
from cache_schema.progress import Progress
from models.device import choose_device
from models.folder import load_model, load_processor
from models.stored_head import head_of
from models.tokens import pad_token_id_of
from student.checkpoint import Checkpoints
from student.checks import check_student
from student.collate import Batch, Collator
from student.folder import save_folder
from student.generation import answer_ends, settle_generation
from student.heldout import HeldOut, held_out
from student.lora import add_adapters, merge_adapters
from student.model import DistilledStudent
from student.pixels import PixelInputs
from student.ranks import Ranks
from student.run_folder import write_result
from student.settings import TrainConfig
from student.throughput import activations_fit, hold_frozen
from student.timing import Stopwatch

_COMPUTE = {"bf16": torch.bfloat16}


def load_student(
    config: TrainConfig, vocab_size: int, stopwatch: Stopwatch | None = None
) -> DistilledStudent:
    """The student of a run as it stands before the first step, in float32 on the CPU."""
    stage = config.resolved_stage
    model = load_model(config.student, torch.float32, role="student")
    if stage.lora_rank:
        add_adapters(
            model,
            rank=stage.lora_rank,
            alpha=stage.lora_alpha,
            dropout=stage.lora_dropout,
            seed=config.seed,
        )
    return DistilledStudent(
        model,
        stage.losses,
        vocab_size=vocab_size,
        trainable=stage.trainable,
        preference=stage.preference,
        stopwatch=stopwatch,
    )


def checkpoint_activations(student: DistilledStudent) -> None:
    """Recomputes activations in the backward pass instead of keeping them."""
    model = student.model
    enable = getattr(model, "activation_checkpointing_enable", None)  # its newer name
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def prepare_student(
    config: TrainConfig,
    caches: Sequence[Cache],
    processor: Any,
    stopwatch: Stopwatch,
    accelerator: Accelerator,
    progress: Progress,
) -> tuple[DistilledStudent, Collator, HeldOut | None]:
    """The student in training mode, still on the CPU, the collator of its batches, and what it is measured
    on, if anything. IdentityMismatch when it does not fit one of the caches, KdcacheError when its head is
    not understood."""
    stage = config.resolved_stage
    student = load_student(config, caches[0].manifest.fingerprint.training["vocab_size"], stopwatch)
    collator = _collator(config, caches, student.model, processor, accelerator.device)
    student.check_head(torch.tensor([processor.tokenizer.encode("What is in the image?")]))
    measured = _held_out(config, student, processor)  # while all of the student has one dtype
    student.autocast = accelerator.autocast
    if "hidden" in stage.parts:
        _refuse_other_heads(caches)
        student.loss.teacher = head_of(caches[0], accelerator.device)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if accelerator.mixed_precision in _COMPUTE and not sharded:  # FSDP wants one dtype
        hold_frozen(student.model, _COMPUTE[accelerator.mixed_precision])
    if config.gradient_checkpointing or (
        config.gradient_checkpointing is None
        and accelerator.device.type != "cpu"
        and not _keeps_activations(config, caches, student, accelerator.device, progress)
    ):
        checkpoint_activations(student)
    return student.train(), collator, measured


def _collator(
    config: TrainConfig, caches: Sequence[Cache], model: Any, processor: Any, device: torch.device
) -> Collator:
    """The collator of the first cache, with those of the others in it. IdentityMismatch when the student does
    not fit one of them."""
    stage = config.resolved_stage
    made = []
    for number, (cache, source) in enumerate(zip(caches, config.sources, strict=True)):
        if source.image_root is None and not cache.spec.embed_images:
            raise WrongUsage(
                f"cache {cache.url} does not embed its images: give --image-root (stage {stage.name})"
            )
        root = open_root(source.image_root, config.files)
        # The template that is adopted is that of the first cache: the others must have the same.
        adopted = config.adopt_template and number == 0
        placeholders = check_student(cache, model, processor, root, stage, adopt_template=adopted)
        made.append(
            Collator(
                pixels=PixelInputs(processor, as_bytes=device.type != "cpu"),
                image_root=root,
                pad_token_id=pad_token_id_of(processor.tokenizer),
                image_token_id=cache.manifest.fingerprint.training["image_token_id"],
                targets=stage.parts,
                sample_temperature=cache.spec.sample_temperature,
                placeholders=placeholders,
                losses=stage.losses,
                pairs=stage.preference > 0.0,
            )
        )
    return replace(made[0], further=tuple(made[1:]))


def _refuse_other_heads(caches: Sequence[Cache]) -> None:
    heads = [None if cache.manifest.head is None else cache.manifest.head.sha256 for cache in caches]
    if other := [cache.url for cache, head in zip(caches, heads, strict=True) if head != heads[0]]:
        raise IdentityMismatch(
            f"tail `dense` reads the head of one teacher, and {', '.join(other)} has another than "
            f"{caches[0].url}; use tail `bucket`, or caches of one teacher"
        )


def _held_out(config: TrainConfig, student: DistilledStudent, processor: Any) -> HeldOut | None:
    if not config.eval_cache:
        return None
    return held_out(
        open_cache(config.eval_cache, files=config.files),
        student.model,
        processor,
        open_root(config.eval_image_root or config.image_root, config.files),
        adopt_template=config.adopt_template,
    )


def _keeps_activations(
    config: TrainConfig,
    caches: Sequence[Cache],
    student: DistilledStudent,
    device: torch.device,
    progress: Progress,
) -> bool:
    """Whether the longest micro-batch fits the accelerator without recomputing activations."""
    indices = [cache.index() for cache in caches]
    tokens, images = (
        config.micro_batch * max(int(max(getattr(index, name), default=0)) for index in indices)
        for name in ("tokens", "images")
    )
    second = student.second_head
    further = 0 if second is None else sum(each.numel() for each in second.parameters())
    fits, estimate = activations_fit(student.model, device, tokens=tokens, images=images, further=further)
    progress.message(f"{estimate}: activations are {'kept' if fits else 'recomputed'}")
    return fits


def padded_batch(cache: Cache, collator: Collator) -> Batch | None:
    """The shortest and the longest sample of the first shard; None where they cannot be read (training will
    say so)."""
    first = cache.index().tokens[: cache.shard_length(cache.shards[0])]
    places = [int(np.argmax(first)), int(np.argmin(first))]
    try:
        block = cache.read_shard(cache.shards[0], parts=(), images=True)
        return replace(collator, targets=(), pairs=False)([block.sample(place) for place in places])
    except (KdcacheError, OSError):
        return None


def student_processor(config: TrainConfig, cache: Cache) -> Any:
    """The student's processor, with the cache's chat template where that is to be adopted."""
    processor = load_processor(config.student, role="student")
    if config.adopt_template:
        processor.chat_template = cache.manifest.fingerprint.training["chat_template"]
    return processor


def save_trained(
    config: TrainConfig, cache: Cache, weights: Mapping[str, Tensor], processor: Any, out: Path
) -> None:
    """Writes the student with its trained weights as a model folder, adapters merged.

    Frozen weights are read from the student's folder again: no device or autocast has touched them. Its
    generation stops at the tokens that end the cache's answers.
    KdcacheError when a weight is not finite, or the disk refuses.
    """
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise KdcacheError(
            f"{len(broken)} of the trained weights are not finite ({broken[0]}, ...): no model is written; "
            "lower the learning rate, or train in bf16 instead of fp16"
        )
    student = load_student(config, cache.manifest.fingerprint.training["vocab_size"])
    student.load_trained(weights)
    if config.resolved_stage.lora_rank:
        merge_adapters(student.model)
    settle_generation(student.model, processor, answer_ends(cache, processor.tokenizer))
    save_folder(student.model, processor, out)


def rewrite_model(
    config: TrainConfig, cache: Cache, result: dict[str, Any], ranks: Ranks, progress: Progress
) -> None:
    """Writes the model of a finished run, which is missing or damaged, from its checkpoint."""
    step, out = result["model_step"], config.out / "model"
    checkpoints = Checkpoints(config.out / "checkpoints")
    if step not in checkpoints.steps():
        raise KdcacheError(
            f"{config.out} is finished, but {out} is missing or damaged and no checkpoint of step {step} is "
            f"left; remove {config.out / 'result.json'} to train again"
        )
    if ranks.main:
        weights = checkpoints.load(step).weights
        save_trained(config, cache, weights, student_processor(config, cache), out)
        write_result(config, result)
    ranks.wait()
    progress.message(f"{out} was missing or damaged: written again from the checkpoint of step {step}")


def make_accelerator(config: TrainConfig) -> Accelerator:
    """An Accelerator as `accelerate launch` configured it.

    WrongUsage when it refuses; KdcacheError when FSDP is asked for on a CPU, where accelerate would silently
    run DDP, or when a tracker is not installed.
    """
    # A second stage in the same process may ask for another precision, which the shared state forbids.
    AcceleratorState._reset_state()
    # A tower's last layers come after the selected features, and text-only batches skip the tower.
    unused = "vision_tower" in config.resolved_stage.trainable
    # Without this, accelerate does not connect the processes of a machine without accelerator.
    cpu = choose_device(config.device) == "cpu"
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no" if config.precision == "fp32" else config.precision,
            log_with=list(config.used_trackers) or None,
            project_config=ProjectConfiguration(
                project_dir=str(config.out), logging_dir=str(config.out / "tensorboard")
            ),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
        )
    except ValueError as error:
        raise WrongUsage(
            f"accelerate refuses precision {config.precision} with trackers {', '.join(config.trackers)}: "
            f"{' '.join(str(error).split())}; choose others"
        ) from error
    started = {str(getattr(each, "value", each)) for each in accelerator.log_with}
    absent = {*config.used_trackers} - {"all"} - started
    if absent:
        raise KdcacheError(
            f"tracker {', '.join(sorted(absent))} is not installed: install it, or choose another --tracker"
        )
    sharded = accelerator.distributed_type == DistributedType.FSDP
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu and not sharded and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise KdcacheError(
            "accelerate shards on accelerators only, and this is a CPU: launch without FSDP, with `torchrun "
            "--nproc-per-node N --no-python kdcache train ...` for DDP"
        )
    return accelerator
