"""What the capture asks of a teacher: final hidden states, and the head that turns them into logits."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.errors import KdcacheError
from cache_schema.format.records import TopK
from pipeline.packing import Pack
from pipeline.samples import PreparedSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The map from a final hidden state h (D,) to logits (V,), after the last norm.

    z = scale * (weight h + bias), then softcap * tanh(z / softcap) where softcap is set. weight (rows, D)
    may have more rows than vocab_size (V, the tokenizer's length); those columns do not exist for us.
    """

    weight: Tensor
    vocab_size: int
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """(N, V) float32 logits of hidden (N, D): low-precision inputs, float32 products and output.

        out (N, V) float32 on the head's device: where to put them.
        """
        weight = self.weight[: self.vocab_size]
        logits = _product(hidden.to(weight.device), weight, out)
        if self.bias is not None:
            logits += self.bias[: self.vocab_size].float()
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def _product(hidden: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    """hidden (N, D) @ weight (V, D)^T, accumulated and returned in float32."""
    if weight.dtype == torch.float32 or weight.device.type != "cuda":
        return torch.mm(hidden.float(), weight.float().T, out=out)
    return torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)


def head_from(config: Any, weight: Tensor, bias: Tensor | None, vocab_size: int) -> Head:
    """The head of a text config of transformers, which names soft-cap and logit scale. weight (rows, D)."""
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    if weight.shape[0] < vocab_size:
        raise KdcacheError(
            f"the teacher's head has {weight.shape[0]} rows but its tokenizer {vocab_size} tokens; "
            "the folder mixes two models"
        )
    return Head(
        weight=weight,
        vocab_size=vocab_size,
        bias=bias,
        softcap=None if softcap is None else float(softcap),
        scale=scale,
    )


class Engine(Protocol):
    """A loaded teacher that gives hidden states.

    Nothing is promised about batch composition beyond rounding: float32 hidden states of a sample agree
    between batches to about 1e-6 relative, not bit by bit.
    """

    @property
    def head(self) -> Head:
        """The head; its weight stays where the teacher keeps it."""

    @property
    def description(self) -> dict[str, str]:
        """Names and versions to record with every shard."""

    def hidden_states(self, samples: Sequence[PreparedSample]) -> list[Tensor]:
        """One (T, D) tensor a sample, after the final norm, in the teacher's dtype, on its device."""

    @property
    def can_pack(self) -> bool:
        """Whether packed_hidden_states may be tried; the capture then probes that it is exact."""

    def packed_hidden_states(self, packs: Sequence[Pack]) -> list[list[Tensor]]:
        """For every pack one (T, D) tensor a sample, as hidden_states gives them."""


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


class LogitsEngine(Engine, Protocol):
    """An engine whose model's own logits can be asked for, to hold its head against them."""

    def logits(self, samples: Sequence[PreparedSample]) -> list[Tensor]:
        """The model's own logits (T, rows), one tensor a sample, for checks only."""


def verified_head(engine: LogitsEngine, samples: Sequence[PreparedSample]) -> Head:
    """The head that turns the engine's hidden states into the model's own logits, tried on `samples`.

    A soft-cap that the config names counts only if the model really applies it (Gemma 3 with images does
    not). KdcacheError when the logits differ by more than the dtype explains: then a bias, a cap, a scale
    or a norm is not where it was looked for, and every target would be wrong.
    """
    head = engine.head
    hidden, own = engine.hidden_states(samples), engine.logits(samples)
    tolerance = 1e-3 if head.weight.dtype in (torch.float32, torch.float64) else 5e-2
    errors = []
    for candidate in (head, replace(head, softcap=None)):
        worst = 0.0
        for states, theirs in zip(hidden, own, strict=True):
            ours = candidate.logits(states)
            wanted = theirs[:, : head.vocab_size].to(ours.device).float()
            worst = max(worst, float((ours - wanted).abs().max() / wanted.std()))
        if worst <= tolerance:
            return candidate
        errors.append(worst)
    raise KdcacheError(
        f"the teacher's hidden states and head do not give its own logits (off by {min(errors):.2g} of their "
        "spread): this architecture's head is not understood, and nothing was captured"
    )


def release_memory() -> None:
    """Gives back what a deleted engine or a failed batch held."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
