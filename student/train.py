"""The training loop: one stage from a cache, resumable at every step."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import register_fsdp_forward_method

from cache_schema.errors import KdcacheError, StoppedEarly
from cache_schema.format.cache import Cache, open_cache
from cache_schema.interrupt import Interrupt
from cache_schema.progress import Progress, task
from models.folder import load_processor
from models.tokens import pad_token_id_of
from student.checkpoint import Checkpoint, Checkpoints, identity_of, refuse_other
from student.checks import check_student
from student.collate import Batch, Collator
from student.heldout import measure_cache, weighted
from student.loader import load_ahead, on_device
from student.losses import Denominators, LossParts
from student.model import DistilledStudent, unsharded
from student.pixels import PixelInputs
from student.prepare import checkpoint_activations, load_student, make_accelerator, save_trained
from student.run_folder import TERMS, Journal, Meter, finished, time_line, write_result, write_settings
from student.settings import TrainConfig
from student.stream import Stream, StreamConfig
from student.timing import Stopwatch

# By name and unsharded, so that a checkpoint serves any number of ranks.
_WHOLE_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)


def train(config: TrainConfig, progress: Progress) -> dict[str, Any]:
    """Trains a stage and leaves recipe.yaml, metrics.jsonl, checkpoints/, model/ and result.json in `out`.

    Returns the result. A finished run is not repeated (`already_done`). StoppedEarly after SIGTERM or
    Ctrl-C, with everything saved; KdcacheError when the student does not fit the cache, when `out` holds
    another run, or when the loss is not finite.

    On a CPU a run that was killed at any moment and resumed has bit-equal weights to an undisturbed one
    with the same ranks and micro_batch. The global batches are the same on any number of ranks.
    """
    if config.cache is None:
        raise KdcacheError(f"stage {config.stage.name} has no cache to learn from: give --cache")
    cache = open_cache(config.cache)
    identity = identity_of(config, cache)
    done = finished(config.out, identity)
    if done is not None:
        progress.message(f"stage {config.stage.name} in {config.out} is finished: nothing to do")
        return {**done, "already_done": True}
    run = _Run(config, cache, identity, progress)
    try:
        run.train()
        return run.finish()
    finally:
        run.journal.close()


class _Run:
    """One stage in progress: the state that its steps share."""

    def __init__(
        self, config: TrainConfig, cache: Cache, identity: dict[str, Any], progress: Progress
    ) -> None:
        self.config, self.cache, self.identity, self.progress = config, cache, identity, progress
        self.stage = stage = config.resolved_stage
        self.checkpoints = Checkpoints(config.out / "checkpoints", config.keep)
        saved = self._saved()
        self.accelerator = make_accelerator(config)
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.ranks: int = self.accelerator.num_processes
        self.stopwatch = Stopwatch(self.device)
        self.processor = load_processor(config.student)
        self.student, self.collator = self._prepare_student()
        if saved is not None:
            self.student.load_trained(saved.weights)
        self.stream = Stream(
            cache,
            StreamConfig(
                seed=config.seed,
                global_batch=stage.global_batch,
                window=config.window,
                group_by_modality=stage.group_by_modality,
            ),
            micro_batch=config.micro_batch,
            targets=stage.targets,
            rank=self.rank,
            world_size=self.ranks,
        )
        self.total = stage.total_steps(self.stream.steps_per_epoch)
        optimizer = torch.optim.AdamW(
            [parameter for parameter in self.student.parameters() if parameter.requires_grad],
            lr=stage.learning_rate,
            betas=(stage.beta1, stage.beta2),
            eps=stage.epsilon,
            weight_decay=stage.weight_decay,
        )
        self.wrapped, self.optimizer = self.accelerator.prepare(self.student, optimizer)
        register_fsdp_forward_method(self.student, "measure")
        self.step = 0
        self.memory: dict[str, Any] = {"best": None, "best_step": None, "waited": 0, "evaluation": None}
        self.memory |= {"best_evaluation": None, "samples": 0, "seconds": {}}
        if saved is not None:
            self.step = saved.step
            self.memory |= saved.progress
            self.stopwatch.seconds = dict(self.memory["seconds"])
            set_optimizer_state_dict(
                self.student, self.optimizer.optimizer, dict(saved.optimizer), options=_WHOLE_ON_CPU
            )
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(self.memory["scaler"])
        if self.accelerator.is_main_process:
            self.checkpoints.sweep(best=self.memory["best_step"])
            write_settings(config, identity)
        self.accelerator.wait_for_everyone()
        self.journal = Journal(self.accelerator, config.out, step=self.step)
        self.meter = Meter(self.stopwatch, samples=self.memory["samples"])

    def _saved(self) -> Checkpoint | None:
        """The newest checkpoint in `out`, if this run may use it."""
        newest = self.checkpoints.steps()[-1:]
        if not newest:
            return None
        if not self.config.resume:
            raise KdcacheError(
                f"{self.config.out} holds a run at step {newest[0]}: add --resume to continue, or choose "
                "another --out"
            )
        saved = self.checkpoints.load(newest[0])
        refuse_other(self.identity, saved.identity, self.checkpoints.path(saved.step))
        return saved

    def _prepare_student(self) -> tuple[DistilledStudent, Collator]:
        config, cache, training = self.config, self.cache, self.cache.manifest.fingerprint.training
        student = load_student(config, training["vocab_size"], self.stopwatch)
        placeholders = check_student(
            cache,
            student.model,
            self.processor,
            config.image_root,
            self.stage,
            adopt_template=config.adopt_template,
        )
        if "tokenizer_parts" not in training:
            self.progress.message(
                f"{cache.url} is of an older version, which recorded only vocabulary and special tokens of a "
                "tokenizer: its merges and other parts could not be compared with the student's"
            )
        student.check_head(torch.tensor([self.processor.tokenizer.encode("What is in the image?")]))
        if config.adopt_template:
            self.processor.chat_template = training["chat_template"]
        checkpointing = config.gradient_checkpointing
        if checkpointing if checkpointing is not None else self.device.type != "cpu":
            checkpoint_activations(student)
        collator = Collator(
            pixels=PixelInputs(self.processor),
            image_root=config.image_root,
            pad_token_id=pad_token_id_of(self.processor.tokenizer),
            image_token_id=training["image_token_id"],
            targets=self.stage.targets,
            sample_temperature=cache.spec.sample_temperature,
            placeholders=placeholders,
        )
        return student.train(), collator

    def train(self) -> None:
        """Steps until the stage's end, an early stop, or a signal."""
        batches = load_ahead(
            self.stream.read(self.step, self.total),
            self.collator,
            workers=self.config.workers,
            pin=self.device.type == "cuda",
        )
        try:
            with task(self.progress, f"{self.stage.name}: training", self.total), Interrupt() as interrupt:
                while self.step < self.total and not self._stalled():
                    self.stopwatch.step(measured=self.step % self.config.log_every == 0)
                    with self.stopwatch.lap("data wait"):
                        _, micro_batches = next(batches)
                    if self._step(micro_batches, interrupt):
                        self._stop()
                    self._after_step()
        finally:
            batches.close()

    def _step(self, micro_batches: list[Batch], interrupt: Interrupt) -> bool:
        """One optimizer step. True, with nothing done, when any rank was asked to stop."""
        counts = sum((batch.denominators for batch in micro_batches), Denominators())
        tokens = sum(batch.tokens for batch in micro_batches)
        flags = torch.tensor([float(tokens), float(interrupt.asked)], dtype=torch.float64)
        agreed = self._add_up(torch.cat([counts.to_tensor(), flags]))
        if agreed[-1] > 0:
            return True
        counts = Denominators.from_tensor(agreed[:-2])
        torch.manual_seed(_seed_of(self.config.seed, self.step, self.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.learning_rate_at(self.step, self.total)
        values = []
        for place, moved in enumerate(on_device(micro_batches, self.device)):
            last = place == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                parts = self.wrapped(moved.inputs, moved.labels, moved.targets, counts, self.ranks)
                with self.stopwatch.lap("backward"):
                    self.accelerator.backward(parts.total)
            values.append(_terms_of(parts, self.ranks))
        with self.stopwatch.lap("optimizer"):
            norm = self._clip()
            terms = torch.stack(values).cpu().double()  # (micro-batches, terms)
            sums = dict(zip((*TERMS, "unsupervised"), self._add_up(terms.sum(0)).tolist(), strict=True))
            if not math.isfinite(sums["loss"]) or not (math.isfinite(norm) or self.accelerator.scaler):
                if math.isfinite(sums["loss"]):
                    self._refuse(micro_batches)
                finite = torch.isfinite(terms[:, 0]).tolist()
                self._refuse([b for b, fine in zip(micro_batches, finite, strict=True) if not fine])
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.step += 1
        self.meter.add(sums, norm=norm, samples=int(counts.samples), tokens=int(agreed[-2]))
        return False

    def _clip(self) -> float:
        """The gradient's norm over all ranks and parameters, before clipping."""
        bound = self.stage.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.student.parameters(), bound)
        return float(unsharded(norm))

    def _refuse(self, suspects: list[Batch]) -> None:
        """Saves the weights as they are before this step and names the samples that broke it."""
        self.optimizer.zero_grad()
        where = self._save()
        names = [
            f"{sample_id} (row {row})"
            for batch in suspects
            for sample_id, row in zip(batch.sample_ids, batch.rows, strict=True)
        ]
        names = gather_object(names)
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise KdcacheError(
            f"the loss or its gradient is not finite at step {self.step} for samples "
            f"{', '.join(names[:8])}{more}; the weights before it are in {where}; "
            f"see `kdcache inspect {self.cache.url} --sample ROW`, lower the learning rate, or train in bf16 "
            "instead of fp16"
        )

    def _after_step(self) -> None:
        config, step = self.config, self.step
        last = step == self.total
        rate = self.stage.learning_rate_at(step - 1, self.total)
        self.progress.update(step, **self.meter.fields(), lr=f"{rate:.2e}")
        if step % config.log_every == 0 or last:
            epoch = step / self.stream.steps_per_epoch
            self.journal.write(step, {**self.meter.close(), "lr": rate, "epoch": epoch}, group="train")
        if config.eval_cache and (last or (config.eval_every and step % config.eval_every == 0)):
            self._evaluate(config.eval_cache)
        due = config.save_every and (last or step % config.save_every == 0)
        if due or self.memory["best_step"] == step:
            self._save()

    def _evaluate(self, url: str) -> None:
        """Measures the held-out cache and records the best step."""
        config, cache = self.config, open_cache(url)
        targets = () if self.collator.placeholders else cache.spec.targets
        measured = measure_cache(
            self.student,
            cache,
            replace(
                self.collator, image_root=config.eval_image_root or config.image_root, targets=tuple(targets)
            ),
            device=self.device,
            micro_batch=config.micro_batch,
            samples=config.eval_samples,
            workers=config.workers,
            rank=self.rank,
            world_size=self.ranks,
            add_up=self._add_up,
        )
        self.student.reshard()
        measured["loss"] = weighted(measured, self.stage.losses)
        self.journal.write(self.step, measured, group="held-out")
        best = self.memory["best"]
        better = best is None or measured["loss"] < best
        if better:
            self.memory |= {"best": measured["loss"], "best_step": self.step, "best_evaluation": measured}
        self.memory |= {"waited": 0 if better else self.memory["waited"] + 1, "evaluation": measured}

    def _stalled(self) -> bool:
        patience = self.config.early_stop
        return patience is not None and self.memory["waited"] >= patience

    def _stop(self) -> None:
        where = self._save()
        raise StoppedEarly(
            f"stopped at step {self.step} of {self.total}, saved in {where}; run the same command with "
            "--resume to continue"
        )

    def _save(self) -> Path:
        """Writes a checkpoint of this step in the main process; the others wait."""
        scaler = self.accelerator.scaler
        self.memory |= {"samples": self.meter.samples, "seconds": self.stopwatch.seconds}
        checkpoint = Checkpoint(
            step=self.step,
            weights=self.student.trained(),
            optimizer=get_optimizer_state_dict(self.student, self.optimizer.optimizer, options=_WHOLE_ON_CPU),
            identity=self.identity,
            progress={**self.memory, "scaler": None if scaler is None else scaler.state_dict()},
        )
        if self.accelerator.is_main_process:
            self.checkpoints.save(checkpoint, best=self.memory["best_step"])
        self.accelerator.wait_for_everyone()
        return self.checkpoints.path(self.step)

    def finish(self) -> dict[str, Any]:
        """Writes the model and the result."""
        config, best = self.config, self.memory["best_step"]
        step = best if config.early_stop is not None and best is not None else self.step
        weights = self.student.trained() if step == self.step else self.checkpoints.load(step).weights
        result = {
            "stage": self.stage.name,
            "steps": self.step,
            "model_step": step,
            "model": str(config.out / "model"),
            "samples": self.meter.samples,
            "seconds": {name: round(value, 3) for name, value in self.stopwatch.seconds.items()},
            "time": time_line(self.stopwatch.seconds),
            "train": self.meter.latest,
            "evaluation": self.memory["evaluation" if step == self.step else "best_evaluation"],
            "identity": self.identity,
        }
        if self.accelerator.is_main_process:
            save_trained(config, self.student.vocab_size, weights, self.processor, config.out / "model")
            write_result(config.out, result)
        self.accelerator.wait_for_everyone()
        self.progress.message(f"stage {self.stage.name}: {self.step} steps; {result['time']}")
        return {**result, "already_done": False}

    def _add_up(self, values: Tensor) -> Tensor:
        """The sum over the ranks of a float64 tensor on the CPU."""
        if self.ranks == 1:
            return values
        total: Tensor = self.accelerator.reduce(values.to(self.device), reduction="sum")
        return total.cpu()


def _terms_of(parts: LossParts, ranks: int) -> Tensor:
    """The values of TERMS and the samples without supervised token, as one tensor."""
    total = parts.total.detach() / ranks
    unsupervised = total.new_tensor(float(parts.unsupervised))
    terms = (total, *parts.by_term.values(), unsupervised)
    return torch.stack([term.to(total) for term in terms])


def _seed_of(seed: int, step: int, rank: int) -> int:
    """Random numbers (dropout) are a function of seed, step and rank: a checkpoint needs no state of them."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
