"""The interface of a teacher to the capture: final hidden states and their head, or log-probabilities
alone."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.format.records import TopK
from models.head import Head
from pipeline.packing import Pack
from pipeline.samples import PreparedSample


class Engine(Protocol):
    """A loaded teacher that gives hidden states.

    Results do not depend on batch composition beyond rounding: float32 hidden states of a sample agree
    between batches to about 1e-6 relative, not bit by bit.
    """

    @property
    def head(self) -> Head:
        """The head; its weight stays where the teacher keeps it."""

    @property
    def description(self) -> dict[str, str]:
        """Names and versions to record with every shard."""

    def hidden_states(self, samples: Sequence[PreparedSample]) -> list[Tensor]:
        """One (T, D) tensor per sample, after the final norm, in the teacher's dtype, on its device."""


@runtime_checkable
class PackingEngine(Engine, Protocol):
    """An engine that may take several samples that begin alike as one."""

    @property
    def can_pack(self) -> bool:
        """Whether packed_hidden_states may be tried; the capture then probes that it is exact."""

    def packed_hidden_states(self, packs: Sequence[Pack]) -> list[list[Tensor]]:
        """For every pack one (T, D) tensor per sample, as from hidden_states."""


@runtime_checkable
class RecordEngine(Protocol):
    """A loaded teacher that gives log-probabilities alone: no hidden states, no logits, no relations."""

    @property
    def description(self) -> dict[str, str]:
        """See Engine."""

    def records(
        self, samples: Sequence[PreparedSample], positions: Sequence[Sequence[NDArray[np.int32]]]
    ) -> list[list[TopK]]:
        """For every sample its records, one for each of its arrays of positions; spec.without is None."""


def same_states(hidden: Tensor, reference: Tensor) -> bool:
    """Whether both are the same up to the rounding of their dtype."""
    tolerance = 1e-3 if reference.dtype == torch.float32 else 5e-2
    moved = (hidden - reference).float().norm() / reference.float().norm()
    return float(moved) <= tolerance


def release_memory() -> None:
    """Frees the memory of a deleted engine or a failed batch."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
