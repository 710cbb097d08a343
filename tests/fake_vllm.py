"""A stand-in for the package vllm: the calls that the engine makes of it, answered by transformers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

MODULES = (
    "vllm",
    "vllm.config",
    "vllm.platforms",
    "vllm.model_executor",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.model_executor.layers",
    "vllm.model_executor.layers.logits_processor",
)


class LogitsProcessor(torch.nn.Module):
    """Where vLLM keeps how many columns of the head count."""

    org_vocab_size = 1 << 30


@dataclass
class FakeLLM:
    """A vllm.LLM of a tiny Llava. shift: added to hidden states; refused, other_ids: prompt lengths."""

    options: dict[str, Any]
    shift: float = 0.0
    refused: tuple[int, ...] = ()
    other_ids: tuple[int, ...] = ()
    broken: bool = False

    def __post_init__(self) -> None:
        folder = Path(self.options["model"])
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.cut = LogitsProcessor()
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(dtype=torch.float32), has_unfinished_requests=lambda: self.broken
        )

    def apply_model(self, work: Any) -> list[Any]:
        return [work(torch.nn.Sequential(self.cut))]

    def encode(self, prompts: Sequence[Any], params: Any, *, pooling_task: str, use_tqdm: bool) -> list[Any]:
        assert pooling_task == params.task == "token_embed"
        found = []
        for prompt in prompts:
            ids, hidden, _ = self._forward(prompt)
            found.append(SimpleNamespace(prompt_token_ids=ids, outputs=SimpleNamespace(data=hidden)))
        return found

    def generate(self, prompts: Sequence[Any], params: Any, *, use_tqdm: bool) -> list[Any]:
        found = []
        for prompt in prompts:
            ids, _, logits = self._forward(prompt)
            logprobs = logits[:, : self.cut.org_vocab_size].log_softmax(dim=1)
            values, likeliest = logprobs.topk(params.prompt_logprobs, dim=1)
            follows = torch.tensor([*ids[1:], int(likeliest[-1, 0])])[:, None]
            every = torch.cat([follows, likeliest], dim=1)
            numbers = torch.cat([logprobs.gather(1, follows), values], dim=1)
            parts = [
                SimpleNamespace(
                    token_ids=every[rows].flatten().tolist(), logprobs=numbers[rows].flatten().tolist()
                )
                for rows in (slice(0, -1), slice(-1, None))
            ]
            last = SimpleNamespace(logprobs=parts[1])
            found.append(SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=parts[0], outputs=[last]))
        return found

    def _forward(self, prompt: Any) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """Expanded ids (T,), hidden states (T, D), logits (T, V) of a prompt."""
        images = prompt.get("multi_modal_data", {}).get("image", [])
        image_id, tokens = self.model.config.image_token_id, self.model.config.image_seq_length
        given = prompt["prompt_token_ids"]
        assert given.count(image_id) == len(images), "the ids were expanded already"
        if len(given) in self.refused:
            raise ValueError("this prompt is refused\nand more lines")
        ids = [i for token in given for i in [token] * (tokens if token == image_id else 1)]
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if images:
            made = self.processor.image_processor(images=images, return_tensors="pt")
            inputs["pixel_values"] = made["pixel_values"]
        with torch.inference_mode():
            hidden = self.model.base_model(**inputs).last_hidden_state[0] + self.shift
            logits = self.model.lm_head(hidden)
        return ids + [0] * (len(given) in self.other_ids), hidden, logits


def install(monkeypatch: pytest.MonkeyPatch, **faults: Any) -> list[FakeLLM]:
    """Makes `vllm` importable; the engines that are then started, in order."""
    started: list[FakeLLM] = []

    def start(**options: Any) -> FakeLLM:
        started.append(FakeLLM(options, **faults))
        return started[-1]

    modules = {name: ModuleType(name) for name in MODULES}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    contents: dict[str, dict[str, Any]] = {
        "vllm": {
            "LLM": start,
            "SamplingParams": SimpleNamespace,
            "PoolingParams": SimpleNamespace,
            "__version__": "0",
        },
        "vllm.config": {
            "PoolerConfig": SimpleNamespace,
            "MultiModalConfig": SimpleNamespace(mm_device_do_normalize=True),
        },
        "vllm.platforms": {"current_platform": SimpleNamespace(get_device_name=lambda: "")},
        "vllm.model_executor.model_loader": {"register_model_loader": lambda name: lambda kind: kind},
        "vllm.model_executor.model_loader.default_loader": {"DefaultModelLoader": object},
        "vllm.model_executor.layers.logits_processor": {"LogitsProcessor": LogitsProcessor},
    }
    for name, values in contents.items():
        for key, value in values.items():
            setattr(modules[name], key, value)
    return started
