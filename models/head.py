"""The output head, which turns final hidden states into logits, and its verification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache_schema.errors import KdcacheError, WrongUsage


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """logits (N, V) = softcap * tanh(z / softcap) with z = logit_scale * (hidden (N, D) weight^T + bias).

    hidden: after the last norm. weight (rows, D), bias (rows,) or None: the parameters themselves, so that
    gradients reach them; softcap None: no capping. Columns at or above `vocab_size`, the tokenizer's length,
    are padding of the matrix, not tokens: targets never contain them, and those of the student count in its
    softmax only, where their mass is an error to reduce. None: every column is a token.
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

    @property
    def rows(self) -> int:
        """The number of logits, including padding."""
        return self.weight.shape[0]

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """(N, V) float32 logits of hidden (N, D): low-precision factors, float32 products and output.

        Without autograd. out (N, V) float32: the output buffer, for a head on a CPU. On CUDA the result is a
        view of wider rows: see `_padded_product`.
        """
        with torch.no_grad():
            if self.weight.device.type == "cuda":
                logits = _padded_product(hidden.to(self.weight.device), self.weight, self.columns)
            else:
                weight = self.weight[: self.columns].float()
                logits = torch.mm(hidden.to(weight.device).float(), weight.T, out=out)
            if self.bias is not None:
                logits += self.bias[: self.columns].float()
            if self.logit_scale != 1.0:
                logits *= self.logit_scale
            if self.softcap is not None:
                logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def check_labels(self, labels: Tensor) -> None:
        """ValueError when one of `labels`, which must not contain ignored ones, is not a token."""
        if len(labels):
            self.check_label_range(int(labels.min()), int(labels.max()))

    def check_label_range(self, least: int, greatest: int) -> None:
        """ValueError when the least or the greatest of some labels is not a token."""
        if not 0 <= least <= greatest < self.columns:
            worst = least if least < 0 else greatest
            raise ValueError(f"label {worst} is not a token: the head has {self.columns} tokens")

    @classmethod
    def of(cls, model: Any, vocab_size: int | None = None) -> Head:
        """The head of a transformers model. WrongUsage when the model has no linear head."""
        layer = model.get_output_embeddings()
        if layer is None or getattr(layer, "weight", None) is None:
            raise WrongUsage(
                f"{type(model).__name__} has no linear output head, which the targets and the losses need"
            )
        return cls.from_config(model.config, layer.weight, getattr(layer, "bias", None), vocab_size)

    @classmethod
    def from_config(
        cls, config: Any, weight: Tensor, bias: Tensor | None = None, vocab_size: int | None = None
    ) -> Head:
        """The head as described by a model's config.

        Reads, of the text config, `final_logit_softcapping`, `logit_scale` (a factor) and `logits_scaling` (a
        divisor). KdcacheError when the matrix has fewer rows than the tokenizer has tokens.
        """
        if vocab_size is not None and len(weight) < vocab_size:
            raise KdcacheError(
                f"the model's head has {len(weight)} rows but its tokenizer {vocab_size} tokens; the folder "
                "contains parts of two models"
            )
        config = config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(
            weight=weight,
            bias=bias,
            softcap=getattr(config, "final_logit_softcapping", None),
            logit_scale=scale,
            vocab_size=vocab_size,
        )


def _padded_product(hidden: Tensor, weight: Tensor, columns: int) -> Tensor:
    """hidden (N, D) @ weight (rows, D)^T, accumulated and returned in float32: its first `columns` columns.

    Every row begins at a multiple of 64 floats, and where there are weights for it the product goes on to
    there: into rows that begin anywhere cuBLAS takes kernels that are several times slower.
    """
    width = -(-columns // 64) * 64
    made = torch.empty(len(hidden), width, dtype=torch.float32, device=weight.device)
    weight = weight[:width]
    out = made[:, : len(weight)]
    if weight.dtype in (torch.bfloat16, torch.float16):
        torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32, out=out)
    else:
        torch.mm(hidden.float(), weight.float().T, out=out)
    return made[:, :columns]


def verified_head(head: Head, hidden: Sequence[Tensor], logits: Sequence[Tensor], *, model: str) -> Head:
    """The head that turns each of `hidden` (T, D) into the model's own `logits` (T, rows), as tried here.

    A soft-cap of the config is used only if the model really applies it (Gemma 3 with images does not). The
    largest difference is compared with the standard deviation of the model's own logits: a common offset
    changes no distribution, so their spread, not their magnitude, is the relevant scale. KdcacheError when it
    is more than the dtype explains: then a bias, a cap, a scale or a norm was missed, and every target and
    loss would be wrong. model: its name in the message.
    """
    tolerance = 1e-3 if head.weight.dtype in (torch.float32, torch.float64) else 5e-2
    found = []
    for candidate in (head, replace(head, softcap=None)):
        pairs = [
            (candidate.logits(states), own[:, : head.columns].to(head.weight.device).float())
            for states, own in zip(hidden, logits, strict=True)
        ]
        found.append(float(torch.stack([(ours - own).abs().max() / own.std() for ours, own in pairs]).max()))
        if found[-1] <= tolerance:
            return candidate
    raise KdcacheError(
        f"{model}: hidden states and head differ from its own logits by {min(found):.2g} of their spread: "
        "this architecture's head is not supported, so nothing was captured or trained"
    )


def read_head(folder: Path, config: Any, *, vocab_size: int, dtype: torch.dtype, device: str) -> Head:
    """The head of the model in `folder`, read from its safetensors without building the model: its lm_head,
    or the embeddings where they are tied to it.

    config: the whole model's, of transformers. KdcacheError where there is no such weight, or more than one.
    """
    from safetensors import safe_open

    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), path)
    names = _ending_with(places, "lm_head.weight") or _ending_with(places, "embed_tokens.weight")
    if len(names) != 1:
        raise KdcacheError(
            f"{len(names)} weights in the safetensors of {folder} can be the head ({', '.join(names)}); one "
            "lm_head.weight or, if tied, one embed_tokens.weight is needed: use --engine transformers"
        )

    def read(name: str) -> Tensor:
        with safe_open(places[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name).to(device, dtype)
        return tensor

    bias = names[0].removesuffix("weight") + "bias"
    return Head.from_config(config, read(names[0]), read(bias) if bias in places else None, vocab_size)


def _ending_with(places: dict[str, Path], name: str) -> list[str]:
    return [key for key in places if key == name or key.endswith(f".{name}")]
