"""The training loop: one stage from a cache, resumable at every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from cache_schema.errors import KdcacheError, StoppedEarly, WrongUsage
from cache_schema.format.cache import Cache, open_cache
from cache_schema.interrupt import Interrupt
from cache_schema.output import require_folder
from cache_schema.progress import Progress, Silent, task
from models.device import peak_flops
from student.cache_wait import wait_for_caches
from student.calibration import calibrated
from student.checkpoint import Checkpoints, identity_of
from student.checks import warn_of_cache
from student.collate import Batch
from student.feed import Feed
from student.folder import model_is_whole
from student.fusion import Fusion, RatioNetwork, fusion_of
from student.heldout import HeldOut, measure_samples, weighted
from student.interpolation import Interpolation
from student.kept import Kept
from student.model import DistilledStudent
from student.optimize import SUMS, Optimization
from student.prepare import (
    make_accelerator,
    padded_batch,
    prepare_student,
    rewrite_model,
    student_processor,
)
from student.ranks import Ranks, StepAgreement, agree_on_step
from student.run_folder import Journal, Meter, finished, locked, write_settings
from student.run_state import RunState
from student.settings import TrainConfig
from student.stages import Stage
from student.throughput import StepFlops
from student.timing import Stopwatch


def train(config: TrainConfig, progress: Progress) -> dict[str, Any]:
    """Trains a stage and leaves recipe.yaml, metrics.jsonl, checkpoints/, model/ and result.json in `out`.

    Returns the result. A finished run is not repeated (`already_done`). StoppedEarly after SIGTERM or
    Ctrl-C, with everything saved; KdcacheError when the student does not fit the cache, when `out` holds
    another run or another process trains in it, when data cannot be read or the loss is not finite (both
    with everything saved), or when the disk refuses.

    On a CPU a run that was killed at any moment and resumed has bit-equal weights to an undisturbed one
    with the same ranks and micro_batch. The global batches are the same on any number of ranks.
    """
    if not config.sources:
        raise WrongUsage(f"stage {config.stage.name} has no cache to learn from: give --cache")
    config.refuse_half_pairs()
    require_folder(config.out, new=False)
    if config.wait:
        wait_for_caches(config, progress)
    caches = [open_cache(source.cache, files=config.files) for source in config.sources]
    identity = identity_of(config, caches)
    done = finished(config.out, identity)
    if done is not None and model_is_whole(config.out / "model"):
        progress.message(f"stage {config.stage.name} in {config.out} is finished: nothing to do")
        return {**done, "already_done": True}
    accelerator = make_accelerator(config)
    ranks = Ranks(accelerator)
    progress = progress if ranks.main else Silent()
    with locked(config.out, ranks):
        if done is not None:
            rewrite_model(config, caches[0], done, ranks, progress)
            return {**done, "already_done": True}
        run = _begin(config, caches, identity, accelerator, ranks, progress)
        try:
            run.train()
            return run.kept.finish()
        finally:
            run.journal.close()


def _begin(
    config: TrainConfig,
    caches: Sequence[Cache],
    identity: dict[str, Any],
    accelerator: Accelerator,
    ranks: Ranks,
    progress: Progress,
) -> _Run:
    """A run as it stands before its next step: from the start, or from its newest checkpoint."""
    for cache in caches:
        warn_of_cache(cache, progress)
    checkpoints = Checkpoints(config.out / "checkpoints", config.keep)
    saved = checkpoints.take_up(identity, resume=config.resume, progress=progress)
    state = RunState() if saved is None else saved.state
    config = calibrated(config, state, progress)
    stage = config.resolved_stage
    state.interpolation = state.interpolation or Interpolation.of(stage.losses)
    stopwatch = Stopwatch(accelerator.device, state.seconds)
    processor = student_processor(config, caches[0])
    student, collator, measured = prepare_student(config, caches, processor, stopwatch, accelerator, progress)
    if measured is not None:
        warn_of_cache(measured.cache, progress)
        state.measure_against(measured.identity)
    if saved is not None:
        student.load_trained(saved.weights)
    fusion = fusion_of(
        student,
        measured,
        stage.losses,
        None if state.fusion is None else RatioNetwork(**state.fusion),
        accelerator,
        seed=config.seed,
        add_up=ranks.add_up,
    )
    feed = Feed(config, caches, collator, ranks, accelerator.device, state)
    if feed.note:
        progress.message(feed.note)
    optimization = Optimization(student, stage, accelerator, stopwatch)
    if accelerator.device.type != "cpu" or config.compile:
        probe = padded_batch(caches[0], collator)
        for line in [] if probe is None else optimization.tune(probe, compiled=config.compile):
            progress.message(line)
    if saved is not None:
        optimization.restore(saved)
    if ranks.main:
        checkpoints.sweep(best=state.best_step)
        write_settings(config, identity)
    ranks.wait()
    meter = Meter(stopwatch, peak_flops(accelerator.device))
    return _Run(
        config=config,
        stage=stage,
        progress=progress,
        ranks=ranks,
        device=accelerator.device,
        stopwatch=stopwatch,
        student=student,
        optimization=optimization,
        held_out=measured,
        fusion=fusion,
        feed=feed,
        total=stage.total_steps(feed.steps_per_epoch),
        state=state,
        journal=Journal(accelerator, config.out, state),
        meter=meter,
        flops=StepFlops(student.model),
        kept=Kept(
            config=config,
            stage=stage,
            identity=identity,
            progress=progress,
            ranks=ranks,
            processor=processor,
            student=student,
            optimization=optimization,
            caches=caches,
            state=state,
            checkpoints=checkpoints,
            saved_step=None if saved is None else state.step,
            meter=meter,
        ),
    )


@dataclass(slots=True, kw_only=True)
class _Run:
    """One stage under way. `state` moves; all else is given and stays."""

    config: TrainConfig
    stage: Stage
    progress: Progress
    ranks: Ranks
    device: torch.device
    stopwatch: Stopwatch
    student: DistilledStudent
    optimization: Optimization
    held_out: HeldOut | None
    fusion: Fusion | None
    feed: Feed
    total: int
    state: RunState
    journal: Journal
    meter: Meter
    flops: StepFlops
    kept: Kept

    def train(self) -> None:
        """Steps until the stage's end, an early stop, a signal, or data that cannot be read."""
        if self.state.step and self._evaluation_is_due():  # stopped between a checkpoint and its evaluation
            self._evaluate()
        try:
            with task(self.progress, f"{self.stage.name}: training", self.total), Interrupt() as interrupt:
                while self.state.step < self.total and not self._stalled():
                    self._reweigh()
                    self.stopwatch.step(measured=self.state.step % self.config.log_every == 0)
                    micro_batches: list[Batch] = []
                    fault: Exception | None = None
                    with self.stopwatch.lap("data wait"):
                        try:
                            micro_batches = self.feed.next()
                        except Exception as error:  # noqa: BLE001  (whatever it is, it is saved first)
                            fault = error
                    agreed = agree_on_step(self.ranks, micro_batches, interrupt.asked, fault)
                    if agreed.failed:
                        self.kept.end(fault)
                    if agreed.asked_to_stop:
                        raise StoppedEarly(
                            f"stopped at step {self.state.step} of {self.total}, saved in "
                            f"{self.kept.save()}; run the same command with --resume to continue"
                        )
                    self._step(micro_batches, agreed)
                    self._after_step()
        finally:
            self.feed.close()

    def _reweigh(self) -> None:
        """Sets the shares of a mixture where they are measured; faults end the run with everything saved."""
        try:
            written = self.feed.reweigh(self.student)
        except (KdcacheError, OSError) as error:
            self.kept.end(error)
        else:
            if written is not None:
                self.journal.write(self.state.step, written, group="mixture")

    def _step(self, micro_batches: list[Batch], agreed: StepAgreement) -> None:
        """One optimizer step."""
        rate = self.stage.learning_rate_at(self.state.step, self.total)
        step, interpolation = self.state.step, self.state.interpolation
        self.student.loss.teacher_share = None if interpolation is None else interpolation.share
        try:
            weigh = {}
            if self.fusion is not None:
                self.fusion.begin(micro_batches, step)
                weigh = {"before": self.fusion.weigh}
            made = self.optimization.gradients(
                micro_batches, agreed.counts, seed=self.config.seed, step=step, **weigh
            )
            if self.fusion is not None:
                self.fusion.learn(step, rate, self.device)
            terms, norm = self.optimization.read(*made)
        except Exception:
            if self.ranks.count == 1:  # the weights are still those before this step
                self.kept.try_save()
            raise
        sums = self.ranks.sums(dict(zip(self.optimization.sums, terms.sum(0).tolist(), strict=True)))
        if not math.isfinite(sums["loss"]):
            finite = torch.isfinite(terms[:, SUMS.index("loss")]).tolist()
            self.kept.refuse([b for b, fine in zip(micro_batches, finite, strict=True) if not fine])
        if not math.isfinite(norm) and not self.optimization.skips_infinite_gradients:
            self.kept.refuse(micro_batches)
        self.optimization.step(rate)
        if self.fusion is not None:
            self.state.fusion = self.fusion.network.to_json()
            sums["fusion_ratio"] = self.fusion.mean
        if interpolation is not None:
            sums["teacher_share"] = interpolation.share
            interpolation.advance(self.stage.losses, sums, step, self.total)
        self.state.step += 1
        self.state.samples += int(agreed.counts.samples)
        self.meter.add(
            sums,
            norm=norm,
            samples=int(agreed.counts.samples),
            tokens=agreed.tokens,
            padded=agreed.padded,
            flops=sum(self.flops(batch.inputs, batch.positions_with_logits) for batch in micro_batches),
        )

    def _after_step(self) -> None:
        config, step = self.config, self.state.step
        last = step == self.total
        rate = self.stage.learning_rate_at(step - 1, self.total)
        self.progress.update(step, **self.meter.fields(), lr=f"{rate:.2e}")
        if step % config.log_every == 0 or last:
            epoch = step / self.feed.steps_per_epoch
            self.journal.write(step, {**self.meter.close(), "lr": rate, "epoch": epoch}, group="train")
        if config.save_every and (last or step % config.save_every == 0):
            error = self.kept.try_save()
            if error is not None and not last:
                raise error
            if error is not None:  # the model is smaller than a checkpoint and may still fit
                self.progress.message(str(error))
        if self._evaluation_is_due():
            self._evaluate()

    def _evaluation_is_due(self) -> bool:
        step, every = self.state.step, self.config.eval_every
        due = step == self.total or (every > 0 and step % every == 0)
        return self.held_out is not None and due and self.state.evaluated != step

    def _evaluate(self) -> None:
        """Measures the held-out cache. Its faults end the run with everything saved, the model too at the
        last step."""
        assert self.held_out is not None
        measured: dict[str, float] = {}
        fault: Exception | None = None
        try:
            measured = measure_samples(
                self.student,
                *self.held_out.samples(self.config.eval_samples),
                self.held_out.collator,
                device=self.device,
                micro_batch=self.config.micro_batch,
                workers=self.config.workers,
                rank=self.ranks.rank,
                world_size=self.ranks.count,
                add_up=self.ranks.add_up,
            )
        except (KdcacheError, OSError) as error:
            fault = error
        self.student.reshard()
        if fault is not None:
            if self.state.step == self.total and self.ranks.main:
                self.kept.write_model(self.student.trained())
            self.kept.end(fault)
        watch: str = self.config.watch
        if self.stage.preference:
            watch = "ce"  # a held-out cache has no pairs, and so no loss
        else:
            measured["loss"] = weighted(measured, self.stage.losses)
        self.journal.write(self.state.step, measured, group="held-out")
        self.state.take(measured, watch)
        if self.kept.saved_step == self.state.step or self.state.best_step == self.state.step:
            self.kept.save()

    def _stalled(self) -> bool:
        patience = self.config.early_stop
        return patience is not None and self.state.waited >= patience
