"""What a run leaves behind, however it ends: checkpoints, the model and the result, and the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from cache_schema.errors import KdcacheError
from cache_schema.format.cache import Cache
from cache_schema.progress import Progress
from student.checkpoint import Checkpoints
from student.collate import Batch
from student.model import DistilledStudent
from student.optimize import Optimization
from student.prepare import save_trained
from student.ranks import Ranks
from student.run_folder import Meter, time_line, write_result
from student.run_state import RunState
from student.settings import TrainConfig
from student.stages import Stage


@dataclass(slots=True, kw_only=True)
class Kept:
    """What is written of a stage under way. `state` and `saved_step`, the newest step with a whole
    checkpoint, move; all else is given and stays. Every rank calls its methods together; the main one
    writes."""

    config: TrainConfig
    stage: Stage
    identity: dict[str, Any]
    progress: Progress
    ranks: Ranks
    processor: Any
    student: DistilledStudent
    optimization: Optimization
    caches: Sequence[Cache]
    state: RunState
    checkpoints: Checkpoints
    saved_step: int | None
    meter: Meter

    def save(self) -> Path:
        """Writes a checkpoint of this step, and returns its folder."""
        if (error := self.try_save()) is not None:
            raise error
        return self.checkpoints.path(self.state.step)

    def try_save(self) -> BaseException | None:
        """Writes a checkpoint of this step, or its state alone where the rest is saved; returns what went
        wrong. The main process writes, the others wait."""
        fault: Exception | None = None
        if self.saved_step == self.state.step:
            try:
                if self.ranks.main:
                    self.checkpoints.update(self.state)
            except KdcacheError as error:
                fault = error
            return self.ranks.agree(fault)
        checkpoint = self.optimization.checkpoint(self.state, self.identity)
        try:
            if self.ranks.main:
                self.checkpoints.save(checkpoint)
        except KdcacheError as error:
            fault = error
        ended = self.ranks.agree(fault)
        if ended is None:
            self.saved_step = self.state.step
        return ended

    def finish(self) -> dict[str, Any]:
        """Writes the model and the result."""
        config, state = self.config, self.state
        best = state.best_step if config.early_stop is not None else None
        step = state.step if best is None else best
        result = {
            "stage": self.stage.name,
            "steps": state.step,
            "model_step": step,
            "model": str(config.out / "model"),
            "samples": state.samples,
            "seconds": {name: round(value, 3) for name, value in state.seconds.items()},
            "time": time_line(state.seconds),
            "train": self.meter.latest,
            "evaluation": state.evaluation if step == state.step else state.best_evaluation,
            "identity": self.identity,
        }
        weights = self.student.trained() if step == state.step else self.checkpoints.load(step).weights
        fault: Exception | None = None
        try:
            if self.ranks.main:
                self.write_model(weights)
                write_result(config, result)
        except (KdcacheError, OSError) as error:
            fault = error
        if (ended := self.ranks.agree(fault)) is not None:
            saved = self.saved_step == state.step or self.try_save() is None
            kept = f"the weights are in {self.checkpoints.path(state.step)}" if saved else "nothing more fits"
            raise KdcacheError(f"{fault}; {kept}; then run with --resume") if fault else ended
        self.progress.message(f"stage {self.stage.name}: {state.step} steps; {result['time']}")
        return {**result, "already_done": False}

    def write_model(self, weights: Mapping[str, Tensor]) -> None:
        """Writes the model folder with these of the trained weights."""
        save_trained(self.config, self.caches[0], weights, self.processor, self.config.out / "model")

    def end(self, fault: Exception | None) -> None:
        """Ends the run for data that cannot be read, with everything saved; other ranks than those that have
        the fault end quietly."""
        where = f"; saved in {self.save()}: run with --resume to continue" if self.state.step else ""
        if fault is None:
            raise SystemExit(1)
        if isinstance(fault, KdcacheError | OSError):
            raise KdcacheError(f"{fault}{where}") from fault
        raise fault

    def refuse(self, suspects: list[Batch]) -> None:
        """Saves the weights as they are before this step and names the samples that broke it."""
        self.optimization.drop_gradients()
        where = self.save()
        named = [
            (f"{sample_id} (row {row})", self.caches[source].url)
            for batch in suspects
            for sample_id, row, source in zip(batch.sample_ids, batch.rows, batch.sources, strict=True)
        ]
        several = len(self.caches) > 1
        cache = "CACHE" if several else self.caches[0].url
        names = gather_object([f"{name} of {url}" if several else name for name, url in named])
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise KdcacheError(
            f"the loss or its gradient is not finite at step {self.state.step} for samples "
            f"{', '.join(names[:8])}{more}; the weights before it are in {where}; "
            f"see `kdcache inspect {cache} --sample ROW`, lower the learning rate, or train in bf16 "
            "instead of fp16"
        )
