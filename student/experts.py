"""A mixture of experts from a dense language model: copies of each feed-forward layer, and their router."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from cache_schema.errors import KdcacheError

_SHARED_UNITS = 16
_LEFT_OUT = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype")


def upcycle(language: Any, *, experts: int, active: int, seed: int) -> Qwen2MoeForCausalLM:
    """The Qwen2-MoE model that computes what the Qwen2 model `language` computes, to rounding.

    Each of the `experts` of a layer starts as a copy of its dense layer. A token's output is the mean of its
    `active` experts by the router's probabilities, which are normalised over these. The router's weights are
    drawn from the seed, with the configuration's small `initializer_range`. The class also has a shared
    expert, which LLaVA-MoD has not: it gets the first 16 units of the dense layer with outputs of 0, and
    is trained from there. No loss balances the experts. KdcacheError for another kind of model.
    """
    config = language.config
    if config.model_type != "qwen2":
        raise KdcacheError(
            f"experts need a Qwen2 language model, and this is {config.model_type}; choose one, or leave out "
            "--experts"
        )
    units = config.intermediate_size
    wide = Qwen2MoeConfig(
        **{name: value for name, value in config.to_dict().items() if name not in _LEFT_OUT},
        num_experts=experts,
        num_experts_per_tok=active,
        norm_topk_prob=True,
        moe_intermediate_size=units,
        shared_expert_intermediate_size=min(_SHARED_UNITS, units),
        decoder_sparse_step=1,
        mlp_only_layers=[],
        output_router_logits=False,
    )
    with torch.random.fork_rng():  # what it draws is overwritten
        model = Qwen2MoeForCausalLM(wide).to(language.dtype)
    random = torch.Generator().manual_seed(seed)
    ours = model.state_dict()
    with torch.no_grad():
        for name, tensor in language.state_dict().items():
            if ".mlp." not in name:
                ours[name].copy_(tensor)
        for dense, sparse in zip(language.base_model.layers, model.base_model.layers, strict=True):
            gate, up, down = (getattr(dense.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
            sparse.mlp.experts.gate_up_proj.copy_(torch.cat([gate, up]).expand(experts, -1, -1))
            sparse.mlp.experts.down_proj.copy_(down.expand(experts, -1, -1))
            sparse.mlp.gate.weight.normal_(std=config.initializer_range, generator=random)
            shared = sparse.mlp.shared_expert
            shared.gate_proj.weight.copy_(gate[: len(shared.gate_proj.weight)])
            shared.up_proj.weight.copy_(up[: len(shared.up_proj.weight)])
            shared.down_proj.weight.zero_()
            sparse.mlp.shared_expert_gate.weight.zero_()
    return model.eval()
