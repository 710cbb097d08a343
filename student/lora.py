"""Low-rank adapters on the language model, by peft (an extra), and their merging into plain weights."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from cache_schema.errors import KdcacheError
from models.parts import part_of


def add_adapters(model: Any, *, rank: int, alpha: float, dropout: float, seed: int) -> None:
    """Adds a LoRA adapter to every linear layer of the language model except the head, in place.

    A layer's weight becomes W + (alpha / rank) B A with A (rank, in) drawn from `seed` and B (out, rank)
    zero. KdcacheError when peft is not installed.
    """
    peft = _peft()
    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and part_of(name) == "language_model"
    ]
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model)


def merge_adapters(model: Any) -> None:
    """Merges every adapter into its weight and removes it, in place."""
    adapted = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    for name, module in list(model.named_modules()):
        if isinstance(module, adapted):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ModuleNotFoundError as error:
        raise KdcacheError(
            "lora_rank needs peft, which is not installed: pip install 'kdcache[lora]'"
        ) from error
