"""Speed of a student on a device: frozen parts in the compute dtype, no masks where none is needed, compiled
layers, an estimate of the memory of a step, and its floating-point operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.compiled import compile_layers
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


def compile_language_model(model: Any, step: Callable[[], Tensor], *, narrow: bool = False) -> str | None:
    """Compiles the layers of the language model. step: runs the model on a batch and returns its states,
    which must be the same before and after. Returns why the layers stay as they are, None where they are
    compiled.

    narrow: under autocast the states also pass from layer to layer in its dtype, as they do in a model that
    is wholly of that dtype; the root of the mean square of their change must be at most 5% of their spread.
    """
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    layers = [
        module
        for name, module in model.named_modules()
        if type(module).__name__ in kinds and part_of(f"{name}.") == "language_model"
    ]
    if not layers:
        return f"{type(model).__name__} does not say what its layers are"
    with torch.no_grad():
        plain = step()
    stream = model.get_input_embeddings().register_forward_hook(_to_autocast) if narrow else None

    def check() -> str | None:
        step().float().sum().backward()
        with torch.no_grad():
            change = (step() - plain).float()
        size = change.square().mean().sqrt() if narrow else change.abs().max()
        difference = size / plain.float().std()
        return None if difference <= 0.05 else f"its states differ by {float(difference):.1e} of their spread"

    problem = compile_layers(layers, check)
    if problem is not None and stream is not None:
        stream.remove()
    model.zero_grad()
    return problem


def _to_autocast(_module: nn.Module, _inputs: Any, embeddings: Tensor) -> Tensor:
    device = embeddings.device.type
    if not torch.is_autocast_enabled(device):
        return embeddings
    return embeddings.to(torch.get_autocast_dtype(device))


def activations_fit(
    model: Any, device: torch.device, *, tokens: int, images: int, further: int = 0
) -> tuple[bool, str]:
    """Whether a step of `tokens` and `images` keeps all activations in the free memory of an accelerator, and
    the estimate as text.

    Trained weights take 16 bytes a number (weight, gradient, two moments), frozen ones 2; further: trained
    numbers outside of the model. A layer keeps about 34 D + 8 I bytes per token under autocast, D its width
    and I that of its feed-forward part (57 kB measured at D = 1,024, I = 2,816): those of the language model,
    and those of a trained vision tower, of one tile per image. The losses take up to 2 GB.
    """
    trained = further + sum(each.numel() for each in model.parameters() if each.requires_grad)
    frozen = sum(each.numel() for each in model.parameters() if not each.requires_grad)
    kept = tokens * _kept_per_token(model.config.get_text_config())
    if any(each.requires_grad and part_of(name) == "vision_tower" for name, each in model.named_parameters()):
        vision = model.config.vision_config
        side = getattr(vision, "image_size", None)
        if not isinstance(side, int) or not hasattr(vision, "num_hidden_layers"):
            return False, f"what a trained {vision.model_type} keeps is not known"
        kept += images * (side // vision.patch_size) ** 2 * _kept_per_token(vision)
    needed = 16 * trained + 2 * frozen + 1.1 * kept + 2e9
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    text = f"a step keeps about {needed / 1e9:.1f} GB without recomputation, {free / 1e9:.1f} GB are free"
    return needed < 0.9 * free, text


def _kept_per_token(config: Any) -> int:
    """Bytes that all layers keep of a token."""
    inner = getattr(config, "intermediate_size", 4 * config.hidden_size)
    return int(config.num_hidden_layers * (34 * config.hidden_size + 8 * inner))


class StepFlops:
    """Floating-point operations of a forward and backward pass without recomputation, the usual estimate.

    Each weight costs 2 operations for every token that meets it, 2 more where a gradient passes through it,
    and 2 more where it is trained. Attention counts half, as it is causal.
    """

    def __init__(self, model: Any) -> None:
        embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
        head = {id(parameter): parameter for parameter in model.get_output_embeddings().parameters()}
        counted: dict[tuple[Part, bool], int] = {}
        for name, parameter in model.named_parameters():
            if id(parameter) not in embeddings | head.keys():
                key = part_of(name), parameter.requires_grad
                counted[key] = counted.get(key, 0) + parameter.numel()
        learns = {part for part, trained in counted if trained}
        passes = {
            "vision_tower": "vision_tower" in learns,
            "projector": bool(learns & {"projector", "vision_tower"}),
            "language_model": bool(learns),
        }
        self._per_patch = self._per_token = 0.0
        for (part, trained), size in counted.items():
            flops = 2.0 * size * (1 + passes[part] + trained)
            if part == "vision_tower":
                self._per_patch += flops
            else:
                self._per_token += flops
        self._per_row: float = sum(
            2.0 * parameter.numel() * (1 + bool(learns) + parameter.requires_grad)
            for parameter in head.values()
        )
        config = model.config.get_text_config()
        self._per_pair = 2.0 * config.num_hidden_layers * config.hidden_size * (3 if learns else 1)
        vision = getattr(model.config, "vision_config", None)
        self._patch_size = getattr(vision, "patch_size", None) or 14

    def __call__(self, inputs: Inputs, rows: int) -> float:
        """Of a batch with inputs as `Batch.inputs`, on any device, whose logits are made at `rows`
        positions."""
        samples, length = inputs["input_ids"].shape
        pixels = inputs["pixel_values"].numel() if "pixel_values" in inputs else 0
        patches = pixels / (3 * self._patch_size**2)
        tokens = samples * length
        weights = self._per_token * tokens + self._per_patch * patches + self._per_row * rows
        return float(weights + self._per_pair * tokens * length)
