"""The default engine: any AutoModelForImageTextToText of transformers."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.errors import KdcacheError, RowRejected
from models.compiled import compile_layers
from models.device import choose_device, device_name
from models.folder import load_model
from models.head import Head, verified_head
from models.inputs import join, pad
from models.pixels import look_up
from pipeline.engine import same_states
from pipeline.pack_attention import attention_by_parts
from pipeline.packing import Pack
from pipeline.samples import PreparedSample

_BUCKET = 64  # lengths of compiled batches
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TransformersEngine:
    """Runs the base model of a transformers model on right-padded batches."""

    def __init__(self, model: Any, *, vocab_size: int, pad_token_id: int) -> None:
        self._model = model.eval().requires_grad_(False)
        self._pad_token_id = pad_token_id
        self._base = model.base_model
        if self._base is model:
            raise KdcacheError(
                f"{type(model).__name__} has no base model below its head; it cannot be a teacher"
            )
        self._head = Head.of(model, vocab_size)
        self._compiled = False

    @property
    def head(self) -> Head:
        """See Engine."""
        return self._head

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self._model

    @property
    def description(self) -> dict[str, str]:
        """See Engine."""
        return {
            "engine": "transformers",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": device_name(self._base.device),
            "dtype": str(self._base.dtype).removeprefix("torch."),
            "attention": str(self._model.config._attn_implementation),
        }

    def hidden_states(self, samples: Sequence[PreparedSample]) -> list[Tensor]:
        """See Engine."""
        hidden = self._run(self._inputs(_single(samples)))
        return [hidden[index, : len(sample)] for index, sample in enumerate(samples)]

    @property
    def can_pack(self) -> bool:
        """See Engine: only where every layer attends to all earlier positions."""
        kinds = set(getattr(self._model.config.get_text_config(), "layer_types", None) or ["full_attention"])
        known = self._model.config._attn_implementation in ("sdpa", "eager")
        return known and kinds == {"full_attention"} and not self._compiled

    def packed_hidden_states(self, packs: Sequence[Pack]) -> list[list[Tensor]]:
        """See Engine."""
        length = max(len(pack) for pack in packs)
        inputs = self._inputs(packs)
        by_parts = self._model.config._attn_implementation == "sdpa"
        if by_parts:  # its attention knows the packs: a mask of four dimensions is taken as it is, unread
            mask = torch.ones(len(packs), 1, 1, 1, dtype=torch.bool)
        else:  # added to the scores
            visible = torch.from_numpy(np.stack([pack.visible(length) for pack in packs]))[:, None]
            dtype = self._base.dtype
            mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
        positions = [pack.join([self._positions(sample) for sample in pack.samples]) for pack in packs]
        padded = [np.pad(row, [(0, 0)] * (row.ndim - 1) + [(0, length - row.shape[-1])]) for row in positions]
        inputs["attention_mask"] = mask.to(self._base.device)
        inputs["position_ids"] = torch.from_numpy(np.stack(padded, axis=-2)).to(self._base.device)
        config = self._model.config.get_text_config()
        with attention_by_parts(config, packs) if by_parts else nullcontext():
            hidden = self._run(inputs)
        if not by_parts and not hidden.isfinite().all():  # it spreads through scores that are masked
            raise RowRejected("not_finite", "a hidden state of its pack is not a finite number")
        return [pack.split(hidden[index]) for index, pack in enumerate(packs)]

    def compile(self, sample: PreparedSample) -> str | None:
        """Compiles the layers of the language model; batches then have lengths in steps of 64, and nothing is
        packed. Returns why it cannot be, or that it gives other hidden states of `sample`: then nothing has
        changed."""
        text = getattr(self._base, "language_model", self._base)
        layers = list(getattr(text, "layers", ()))
        if not layers:
            return f"{type(text).__name__} has no list of layers"
        (reference,) = self.hidden_states([sample])

        def check() -> str | None:
            (hidden,) = self.hidden_states([sample])
            return None if same_states(hidden, reference) else "compiled, it gives other hidden states"

        self._compiled = True
        problem = compile_layers(layers, check)
        self._compiled = problem is None
        return problem

    def _positions(self, sample: PreparedSample) -> NDArray[np.int64]:
        """Position ids (T,), or (3, T) where the model has its own for images (M-RoPE)."""
        if not hasattr(self._base, "get_rope_index"):
            return np.arange(len(sample))
        wanted = set(inspect.signature(self._base.get_rope_index).parameters) - {"attention_mask"}
        inputs = {name: value for name, value in self._inputs(_single([sample])).items() if name in wanted}
        positions: NDArray[np.int64] = self._base.get_rope_index(**inputs)[0][:, 0].cpu().numpy()
        return positions

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        """Final hidden states (B, T, D)."""
        with torch.inference_mode():
            output = self._base(**inputs, use_cache=False, return_dict=True)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def logits(self, samples: Sequence[PreparedSample]) -> list[Tensor]:
        """The model's own logits (T, rows), one tensor per sample, for checks only."""
        with torch.inference_mode():
            logits = self._model(**self._inputs(_single(samples)), use_cache=False, return_dict=True).logits
        return [logits[index, : len(sample)] for index, sample in enumerate(samples)]

    def verified_head(self, samples: Sequence[PreparedSample]) -> Head:
        """The head, verified on `samples`. See models.head.verified_head."""
        hidden, own = self.hidden_states(samples), self.logits(samples)
        return verified_head(self._head, hidden, own, model=type(self._model).__name__)

    def _inputs(self, packs: Sequence[Pack]) -> dict[str, Tensor]:
        made = collate(packs, pad_token_id=self._pad_token_id, multiple=_BUCKET if self._compiled else 1)
        placed = {name: self._placed(value) for name, value in made.items()}
        tables = (pack.first.pixel_table for pack in packs if pack.first.pixel_inputs)
        if (table := next((each for each in tables if each is not None), None)) is not None:
            placed["pixel_values"] = look_up(placed["pixel_values"], self._placed(table))
        return placed

    def _placed(self, value: Tensor) -> Tensor:
        """On the model's device, floating point in the model's dtype, as the processors' callers do. Nothing
        waits for the copy on CUDA, where it is cast."""
        device, dtype = self._base.device, self._base.dtype if value.is_floating_point() else None
        if device.type == "cuda":
            value = value.pin_memory().to(device, non_blocking=True)
        return value.to(device, dtype)


def _single(samples: Sequence[PreparedSample]) -> list[Pack]:
    return [Pack(samples=(sample,)) for sample in samples]


def collate(packs: Sequence[Pack], *, pad_token_id: int, multiple: int = 1) -> dict[str, Tensor]:
    """Model inputs of a right-padded batch: ids (B, L), mask, token inputs, and pixel inputs.

    L: of the longest, rounded up to a `multiple`. Pixel inputs are joined as `models.inputs.join` does.
    """
    length = -(-max(len(pack) for pack in packs) // multiple) * multiple
    ids = [pack.join([sample.input_ids for sample in pack.samples]).astype(np.int64) for pack in packs]
    inputs = {
        "input_ids": pad(ids, length, pad_token_id),
        "attention_mask": pad([np.ones(len(pack), dtype=np.int64) for pack in packs], length, 0),
    }
    for name in packs[0].first.token_inputs:
        rows = [pack.join([sample.token_inputs[name] for sample in pack.samples]) for pack in packs]
        inputs[name] = pad(rows, length, 0)
    pixels = [pack.first.pixel_inputs for pack in packs]
    for name in {name: None for inputs_of in pixels for name in inputs_of}:
        inputs[name] = join([inputs_of[name] for inputs_of in pixels if name in inputs_of])
    return inputs


def load_engine(
    folder: Path,
    *,
    vocab_size: int,
    pad_token_id: int,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    quantization: str | None = None,
) -> TransformersEngine:
    """Loads a teacher for inference.

    dtype: `auto` (as saved), float32, bfloat16 or float16. device: see choose_device. device_map: given to
    transformers instead. quantization: `8bit` or `4bit` through bitsandbytes. KdcacheError where the folder
    cannot be loaded.
    """
    options: dict[str, Any] = {}
    placed = device_map is not None or quantization is not None
    if placed:
        options["device_map"] = device_map or choose_device(device)
    if quantization is not None:
        bits = {"8bit": "load_in_8bit", "4bit": "load_in_4bit"}[quantization]
        options["quantization_config"] = transformers.BitsAndBytesConfig(**{bits: True})
    model = load_model(folder, DTYPES.get(dtype, dtype), role="teacher", **options)
    if not placed:
        model = model.to(choose_device(device))
    return TransformersEngine(model, vocab_size=vocab_size, pad_token_id=pad_token_id)


def require_bitsandbytes(quantization: str) -> None:
    """KdcacheError unless the package behind `quantization` is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise KdcacheError(
            f"a teacher in {quantization} needs the package bitsandbytes; install it (pip install "
            "bitsandbytes), or omit --quantization"
        )
    # one line a layer and call, for every dtype but float16
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
