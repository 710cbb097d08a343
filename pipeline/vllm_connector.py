"""Where vLLM leaves the hidden states that it extracts. Imported by vLLM alone."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)
from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer

KEY = "kdcache_states"
"""Of a request's kv_transfer_params: the name under which `states` has its hidden states."""


class HiddenStates(KVConnectorBase_V1, SupportsHMA):
    """Copies the hidden states of a prompt from vLLM's cache when its request ends.

    For one process and one device: scheduler and worker each have an instance, and they share `states`.
    """

    states: ClassVar[dict[str, Tensor]] = {}
    _layer: ClassVar[str] = ""
    _cache: ClassVar[Tensor]

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._layers = vllm_config.compilation_config.static_forward_context
        self._groups = kv_cache_config.kv_cache_groups

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Finds the cache (blocks, 1, block, D) of the states among those of the layers."""
        (layer,) = (name for name in kv_caches if isinstance(self._layers[name], CacheOnlyAttentionLayer))
        HiddenStates._layer, HiddenStates._cache = layer, kv_caches[layer]

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any]]:
        """See request_finished_all_groups; of a cache of one group."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any]]:
        """Keeps the states of the prompt; the blocks may be used again at once."""
        group = next(place for place, one in enumerate(self._groups) if self._layer in one.layer_names)
        cache = self._cache
        blocks = torch.tensor(block_ids[group], device=cache.device)
        tokens = len(request.prompt_token_ids)
        self.states[request.request_id] = cache[blocks, 0].flatten(0, 1)[:tokens].clone()
        return False, {KEY: request.request_id}

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        """What is wanted is in the cache when the request ends."""

    def wait_for_save(self) -> None:
        """Nothing is saved elsewhere."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Nothing is loaded."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing is loaded."""

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """Scheduler and worker have nothing to tell each other."""
        return KVConnectorMetadata()
