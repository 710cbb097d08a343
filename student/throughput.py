"""Speed of a student on a device: frozen parts in the compute dtype, no masks where none is needed, and
the floating-point operations of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.parts import Part, part_of

Inputs = Mapping[str, Tensor]


def hold_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Brings the frozen parameters to `dtype`, once instead of in every step. A vision tower that is wholly
    frozen runs in `dtype` throughout, outside of autocast, whose float32 norms and sums it does not need.

    Buffers stay as they are: positions of rotary embeddings need float32. What a run writes is not affected:
    frozen weights are read again from the student's folder.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for name, module in model.named_modules():
        if name and part_of(f"{name}.") == "vision_tower":
            if not any(parameter.requires_grad for parameter in module.parameters()):
                _run_without_autocast(module, dtype)
            return


def _run_without_autocast(module: nn.Module, dtype: torch.dtype) -> None:
    forward = module.forward

    def plain(*args: Any, **kwargs: Any) -> Any:
        def narrow(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        device = next(module.parameters()).device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return forward(*map(narrow, args), **{name: narrow(value) for name, value in kwargs.items()})

    module.forward = plain


@torch.no_grad()
def needs_mask(hidden_states: Any, inputs: Inputs) -> bool:
    """Whether the model's states at real tokens depend on the mask of a right-padded batch.

    hidden_states: a function of `inputs`, which hold input_ids and attention_mask (B, T) with padding at the
    right. Under causal attention nothing before the padding sees it, and without a mask torch takes its fused
    kernels. True where states differ by more than 2% of their spread (bidirectional attention, positions
    counted from the mask), and where no row has padding, which decides nothing.
    """
    real = inputs["attention_mask"].bool()
    if bool(real.all()) or bool((real[:, 1:] & ~real[:, :-1]).any()):
        return True
    with_mask = hidden_states(inputs)[real].float()
    without = hidden_states({name: value for name, value in inputs.items() if name != "attention_mask"})
    return bool((without[real].float() - with_mask).abs().max() > 0.02 * with_mask.std())


def step_flops(model: Any, *, tokens: int, image_tokens: int, sequence: int, rows: int) -> float:
    """Floating-point operations of a forward and backward pass without recomputation, the usual estimate.

    tokens: of all samples, padding included; image_tokens: patches that the tower sees; sequence: tokens of a
    sample, for attention; rows: positions whose logits are made. Each weight costs 2 operations for every
    token that meets it, 2 more where a gradient passes through it, and 2 more where it is trained. Attention
    counts half, as it is causal.
    """
    counted: dict[tuple[Part, bool], int] = {}
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    head = {id(p): p for p in model.get_output_embeddings().parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=True):
        if id(parameter) not in embeddings | head.keys():
            key = part_of(name), parameter.requires_grad
            counted[key] = counted.get(key, 0) + parameter.numel()
    learns = {part for part, trained in counted if trained}
    passes = {
        "vision_tower": "vision_tower" in learns,
        "projector": bool(learns & {"projector", "vision_tower"}),
        "language_model": bool(learns),
    }
    flops = 0.0
    for (part, trained), size in counted.items():
        met = image_tokens if part == "vision_tower" else tokens
        flops += 2.0 * size * met * (1 + passes[part] + trained)
    for parameter in head.values():
        flops += 2.0 * parameter.numel() * rows * (1 + bool(learns) + parameter.requires_grad)
    config = model.config.get_text_config()
    attention = 2.0 * config.num_hidden_layers * config.hidden_size * tokens * sequence
    return float(flops + attention * (3 if learns else 1))
