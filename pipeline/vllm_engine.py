"""The engine vLLM, an extra: hidden states, pooled or extracted, or log-probabilities of the prompt alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.datasets.image_roots import ImageRoot
from cache_schema.errors import KdcacheError, RowRejected, first_line
from cache_schema.format.records import TopK
from models.head import Head
from pipeline.samples import PreparedSample
from pipeline.vllm_inputs import Prompts, Requests
from pipeline.vllm_start import CONNECTOR


class VllmHidden:
    """The engine that gives final hidden states. vLLM forms its own batches within those it is given."""

    def __init__(self, llm: Any, head: Head, requests: Requests, description: Mapping[str, str]) -> None:
        self._llm = llm
        self._head = head
        self._requests = requests
        self._description = dict(description)

    @property
    def head(self) -> Head:
        """See Engine."""
        return self._head

    @property
    def description(self) -> dict[str, str]:
        """See Engine."""
        return self._description

    def hidden_states(self, samples: Sequence[PreparedSample]) -> list[Tensor]:
        """See Engine. RowRejected when vLLM refuses one of the samples or reads other ids than ours."""
        outputs = _asked(self._llm, lambda: self._outputs(samples))
        _require_same_ids(samples, outputs)
        weight = self._head.weight
        return [self._states(output).to(weight.device, weight.dtype) for output in outputs]

    def _outputs(self, samples: Sequence[PreparedSample]) -> list[Any]:
        asked = importlib.import_module("vllm").PoolingParams(task="token_embed")
        return self._requests.run(samples, asked, ask="encode", pooling_task="token_embed")

    def _states(self, output: Any) -> Tensor:
        states: Tensor = output.outputs.data
        return states


class VllmExtracted(VllmHidden):
    """The same from vLLM's extraction of hidden states, which takes them before the output norm.

    Beginnings that prompts have in common are computed once from `share_prefixes` on: not before, since
    what is to be compared must be computed.
    """

    _sharing = False

    def __init__(self, llm: Any, head: Head, requests: Requests, description: Mapping[str, str]) -> None:
        super().__init__(llm, head, requests, description)
        (self._norm,) = llm.apply_model(_output_norm)
        self._found = importlib.import_module(CONNECTOR).HiddenStates.states

    def share_prefixes(self) -> None:
        """For teachers whose states of a beginning do not depend on what follows."""
        self._sharing = True

    def _outputs(self, samples: Sequence[PreparedSample]) -> list[Any]:
        self._found.clear()
        asked = importlib.import_module("vllm").SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, skip_reading_prefix_cache=not self._sharing
        )
        return self._requests.run(samples, asked, ask="generate")

    def _states(self, output: Any) -> Tensor:
        key = output.kv_transfer_params[importlib.import_module(CONNECTOR).KEY]
        with torch.inference_mode():
            states: Tensor = self._norm(self._found.pop(key))
        return states


def _output_norm(model: Any) -> Any:
    """The norm after the last layer. KdcacheError where a model has it elsewhere."""
    try:
        return model.get_language_model().model.norm
    except AttributeError as error:
        raise KdcacheError(
            f"vLLM's {type(model).__name__} does not say where its output norm is; use --engine-mode hidden"
        ) from error


class VllmLogprobs:
    """The engine that gives log-probabilities of the tokenizer's vocabulary, without logits."""

    def __init__(
        self, llm: Any, requests: Requests, description: Mapping[str, str], *, top_k: int, vocab_size: int
    ) -> None:
        self._llm = llm
        self._requests = requests
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
        outputs = _asked(self._llm, lambda: self._requests.run(samples, asked, ask="generate"))
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


def engine_of(
    llm: Any,
    head: Head | None,
    samples: Sequence[PreparedSample],
    *,
    mode: str,
    top_k: int,
    tokenizer: Any,
    image_root: ImageRoot,
) -> VllmHidden | VllmLogprobs:
    """The engine over a vllm.LLM of `mode`. head: of the same teacher, but for log-probabilities.

    samples: on these it is tried whether vLLM takes images as they were prepared.
    """
    requests = Requests(llm, Prompts(tokenizer, image_root))
    requests.try_prepared(samples)
    description = _description(llm, mode) | {"images": "as prepared" if requests.as_prepared else "by vLLM"}
    if head is None:
        return VllmLogprobs(llm, requests, description, top_k=top_k, vocab_size=len(tokenizer))
    return (VllmExtracted if mode == "extracted" else VllmHidden)(llm, head, requests, description)


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
