"""What the processes of a run agree on: sums by name, and whether one of them failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from student.collate import Batch
from student.losses import Denominators

AddUp = Callable[[Tensor], Tensor]
"""The sum over the ranks of a float64 tensor on the CPU."""


def summed(values: Mapping[str, float], add_up: AddUp) -> dict[str, float]:
    """The sums of named numbers over the ranks, in one reduction."""
    total = add_up(torch.tensor(list(values.values()), dtype=torch.float64))
    return dict(zip(values, total.tolist(), strict=True))


class Ranks:
    """The processes that train together, as accelerate launched them."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.main: bool = accelerator.is_main_process

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over the ranks of a float64 tensor on the CPU."""
        if self.count == 1:
            return values
        total: Tensor = self._accelerator.reduce(values.to(self._accelerator.device), reduction="sum")
        return total.cpu()

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sums of named numbers over the ranks."""
        return summed(values, self.add_up)

    def agree(self, error: Exception | None) -> BaseException | None:
        """Of an error that any rank has: itself where it happened, and on the other ranks what ends them
        quietly. None when no rank has one. Every rank must ask."""
        if not self.sums({"failed": error is not None})["failed"]:
            return None
        return error if error is not None else SystemExit(1)

    def wait(self) -> None:
        """Until all ranks are here."""
        self._accelerator.wait_for_everyone()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAgreement:
    """What the ranks together bring to a step: counts of its global batch, and whether any of them was asked
    to stop or could not read its data; tokens: without padding, which are `padded`."""

    counts: Denominators
    tokens: int
    padded: int
    asked_to_stop: bool
    failed: bool


def agree_on_step(
    ranks: Ranks, micro_batches: Sequence[Batch], asked_to_stop: bool, fault: Exception | None
) -> StepAgreement:
    """Of what each rank has."""
    counts = sum((batch.denominators for batch in micro_batches), Denominators())
    flags = {"asked_to_stop": asked_to_stop, "failed": fault is not None}
    tokens = sum(batch.tokens for batch in micro_batches)
    padded = sum(batch.labels.numel() for batch in micro_batches) - tokens
    sums = ranks.sums({**counts.by_name, **flags, "tokens": tokens, "padded": padded})
    return StepAgreement(
        tokens=int(sums.pop("tokens")),
        padded=int(sums.pop("padded")),
        asked_to_stop=sums.pop("asked_to_stop") > 0,
        failed=sums.pop("failed") > 0,
        counts=Denominators.from_names(sums),
    )
