"""The student with its optimizer: gradients of a global batch, their step, and a checkpoint of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from student.checkpoint import Checkpoint
from student.collate import Batch
from student.loader import on_device
from student.losses import Denominators, LossParts
from student.model import DistilledStudent, unsharded
from student.run_folder import TERMS
from student.run_state import RunState
from student.stages import Stage
from student.throughput import compile_language_model, needs_mask
from student.timing import Stopwatch

SUMS = (*TERMS, "unsupervised")
"""What a micro-batch adds to the sums of its step: the loss, its terms, samples without supervised token.
The measures of the student's objective follow."""

# By name and unsharded, so that a checkpoint serves any number of ranks.
_WHOLE_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Optimization:
    """AdamW on the trained parameters of a student, on all the processes of an Accelerator."""

    def __init__(
        self, student: DistilledStudent, stage: Stage, accelerator: Accelerator, stopwatch: Stopwatch
    ) -> None:
        self.student = student
        self.sums = (*SUMS, *student.loss.measures)
        self._accelerator, self._stopwatch = accelerator, stopwatch
        self._bound = stage.max_grad_norm or math.inf
        optimizer = torch.optim.AdamW(
            [parameter for parameter in student.parameters() if parameter.requires_grad],
            lr=stage.learning_rate,
            betas=(stage.beta1, stage.beta2),
            eps=stage.epsilon,
            weight_decay=stage.weight_decay,
            fused=fused(accelerator.device),
        )
        self._wrapped, self._optimizer = accelerator.prepare(student, optimizer)
        register_fsdp_forward_method(student, "measure")

    def tune(self, batch: Batch, *, compiled: bool) -> list[str]:
        """Finds by trial on `batch`, padded at the right, whether the student needs a mask, and compiles its
        layers where asked. Nothing of it changes what is computed beyond rounding. Returns what to tell.

        Not where FSDP shards the student: every rank would have to come to the same decision.
        """
        device = self._accelerator.device
        if any(isinstance(module, FSDPModule) for module in self.student.modules()):
            return ["--compile is not used with FSDP"] if compiled else []
        inputs = batch.to(device).inputs
        told = []
        with self._accelerator.autocast():
            if device.type != "cpu":
                self.student.needs_mask = needs_mask(self.student.hidden_states, inputs)
            if compiled:
                told.append(self._compile(inputs))
        return told

    def _compile(self, inputs: Mapping[str, Tensor]) -> str:
        """Compiles the layers, where bf16 is trained with their states in bfloat16; what to tell."""
        ways = [True, False] if self._accelerator.mixed_precision == "bf16" else [False]
        reasons: list[str] = []
        for narrow in ways:
            reason = compile_language_model(
                self.student.model, lambda: self.student.hidden_states(inputs), narrow=narrow
            )
            states = ", their states in bfloat16" if narrow else ""
            if reason is None:
                return "; ".join([f"the language model's layers are compiled{states}", *reasons])
            reasons.append(f"not compiled{states}: {reason}")
        return f"the language model's layers are {'; '.join(reasons)}"

    def gradients(
        self,
        micro_batches: list[Batch],
        counts: Denominators,
        *,
        seed: int,
        step: int,
        before: Callable[[Batch], None] = lambda batch: None,
    ) -> tuple[Tensor, Tensor]:
        """Adds up the gradients of a global batch, which `counts` counts, and clips them.

        Returns `sums` of every micro-batch (M, len(sums)), and the gradient's norm over all ranks and
        parameters before clipping, both on the device, for which nothing has waited: `read` does. Random
        numbers are those of (seed, step, rank). before: called with each micro-batch on the device.
        """
        ranks = self._accelerator.num_processes
        torch.manual_seed(_seed_of(seed, step, self._accelerator.process_index))
        values = []
        with self.student.one_step():
            for place, moved in enumerate(on_device(micro_batches, self._accelerator.device)):
                last = place == len(micro_batches) - 1
                before(moved)
                with nullcontext() if last else self._accelerator.no_sync(self._wrapped):
                    parts = self._wrapped(moved.inputs, moved.labels, moved.targets, counts, ranks)
                    with self._stopwatch.lap("backward"):
                        self._accelerator.backward(parts.total)
                values.append(_sums_of(parts, ranks))
        with self._stopwatch.lap("optimizer"):
            norm = self._accelerator.clip_grad_norm_(self.student.parameters(), self._bound)
        return torch.stack(values), unsharded(norm)

    def read(self, sums: Tensor, norm: Tensor) -> tuple[Tensor, float]:
        """What `gradients` returned, on the host, in float64: for this alone a step waits for the device."""
        with self._stopwatch.lap("optimizer"):
            *found, clipped = torch.cat([sums.flatten(), norm.to(sums).reshape(1)]).tolist()
        return torch.tensor(found, dtype=torch.float64).view(sums.shape), clipped

    @property
    def skips_infinite_gradients(self) -> bool:
        """Whether the gradient scaler of fp16 leaves such a step out and lowers its scale."""
        return self._accelerator.scaler is not None

    def step(self, learning_rate: float) -> None:
        """Moves the parameters along the gradients, which are gone then."""
        with self._stopwatch.lap("optimizer"):
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            self._optimizer.zero_grad()

    def drop_gradients(self) -> None:
        """Forgets them; the parameters stay as they are."""
        self._optimizer.zero_grad()

    def checkpoint(self, state: RunState, identity: Mapping[str, Any]) -> Checkpoint:
        """All of it, unsharded: every rank must ask."""
        scaler = self._accelerator.scaler
        state.scaler = None if scaler is None else scaler.state_dict()
        optimizer = get_optimizer_state_dict(self.student, self._optimizer.optimizer, options=_WHOLE_ON_CPU)
        return Checkpoint(state=state, weights=self.student.trained(), optimizer=optimizer, identity=identity)

    def restore(self, saved: Checkpoint) -> None:
        """Takes over the optimizer's state of a checkpoint whose weights the student has already."""
        set_optimizer_state_dict(
            self.student, self._optimizer.optimizer, dict(saved.optimizer), options=_WHOLE_ON_CPU
        )
        if self._accelerator.scaler is not None and saved.state.scaler is not None:
            self._accelerator.scaler.load_state_dict(saved.state.scaler)


def fused(device: torch.device) -> bool | None:
    """Whether AdamW is one kernel; None: as torch decides."""
    return device.type == "cuda" or None


def _sums_of(parts: LossParts, ranks: int) -> Tensor:
    total = parts.total.detach() / ranks
    unsupervised = total.new_full((), float(parts.unsupervised))  # a tensor of a number is a copy, and waits
    terms = (total, *parts.by_term.values(), unsupervised, *parts.measures.values())
    return torch.stack([term.to(total) for term in terms])


def _seed_of(seed: int, step: int, rank: int) -> int:
    """Random numbers (dropout) are a function of seed, step and rank: a checkpoint needs no state of them."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
