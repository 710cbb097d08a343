"""The language-model head: what turns final hidden states into logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """logits (N, V) = softcap * tanh(z / softcap) with z = logit_scale * (hidden (N, D) weight^T + bias).

    weight (V, D), bias (V,) or None: the parameters themselves, so that gradients reach them; softcap
    None: no capping. Columns at or above `vocab_size` are padding of the matrix, no tokens: the losses
    never see them. None: every column is a token.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        rows = self.weight.shape[0]
        if self.weight.dim() != 2:
            raise ValueError(f"head: weight must be (V, D), not {tuple(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != (rows,):
            raise ValueError(f"head: bias must be ({rows},), not {tuple(self.bias.shape)}")
        if self.vocab_size is not None and not 1 <= self.vocab_size <= rows:
            raise ValueError(
                f"head: vocab_size must lie in 1..{rows}, the rows of weight, not {self.vocab_size}"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"head: softcap must be positive, not {self.softcap}")

    @property
    def columns(self) -> int:
        """The number of logits that are tokens."""
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    def check_labels(self, labels: Tensor) -> None:
        """ValueError when one of `labels`, which must not hold ignored ones, is no token."""
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.columns:
            worst = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
            raise ValueError(f"label {worst} is no token: the head has {self.columns} logits")

    @classmethod
    def of(cls, model: Any, vocab_size: int | None = None) -> Head:
        """The head of a transformers model.

        Reads `get_output_embeddings()` and, of the text config, `final_logit_softcapping`, `logit_scale`
        (a factor) and `logits_scaling` (a divisor). ValueError when the model has no linear head.
        """
        layer = model.get_output_embeddings()
        if layer is None or getattr(layer, "weight", None) is None:
            raise ValueError(f"{type(model).__name__} has no linear output head; the losses need one")
        config = model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(
            weight=layer.weight,
            bias=getattr(layer, "bias", None),
            softcap=getattr(config, "final_logit_softcapping", None),
            logit_scale=scale,
            vocab_size=vocab_size,
        )
