"""The head of a teacher read from the safetensors in its folder, without building the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cache_schema.errors import KdcacheError
from pipeline.engine import Head, head_from


def read_head(folder: Path, config: Any, *, vocab_size: int, dtype: torch.dtype, device: str) -> Head:
    """The head of the teacher in `folder`: its lm_head, or the embeddings where they are tied to it.

    config: the whole model's, of transformers. KdcacheError where no such weight, or more than one, is there.
    """
    places = _places(folder)
    names = _ending_with(places, "lm_head.weight") or _ending_with(places, "embed_tokens.weight")
    if len(names) != 1:
        raise KdcacheError(
            f"{len(names)} weights in the safetensors of {folder} can be the head ({', '.join(names)}); one "
            "lm_head.weight or, tied, one embed_tokens.weight is needed: take --engine transformers"
        )
    (name,) = names
    bias = name.removesuffix("weight") + "bias"
    return head_from(
        config.get_text_config(),
        _read(places[name], name).to(device, dtype),
        _read(places[bias], bias).to(device, dtype) if bias in places else None,
        vocab_size,
    )


def _places(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), path)
    return places


def _ending_with(places: dict[str, Path], name: str) -> list[str]:
    return [key for key in places if key == name or key.endswith(f".{name}")]


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor
