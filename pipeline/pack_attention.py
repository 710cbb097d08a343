"""Attention over packs, part by part: parts that do not attend to each other are never multiplied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pipeline.packing import Pack

_NAME = "kdcache_packs"
_packs: ContextVar[tuple[Pack, ...]] = ContextVar("packs")


@contextmanager
def attention_by_parts(config: Any, packs: Sequence[Pack]) -> Iterator[None]:
    """Within it, layers of the text model with this `config` attend as `Pack.visible` says, for a batch of
    these packs. Not supported: masks, biases, caps or sinks beyond those of a plain decoder; the probe of
    packing detects such models."""
    AttentionInterface.register(_NAME, _attend)
    before = config._attn_implementation
    token = _packs.set(tuple(packs))
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _packs.reset(token)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """(B, L, heads, d) of query (B, heads, L, d), key and value (B, key heads, L, d). Padding gets zeros."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.device.type == "cuda":  # its fast kernels share key heads only without a mask
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        groups = 1
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    for number, pack in enumerate(_packs.get()):
        q, k, v = (states[number : number + 1] for states in (query, key, value))
        for part, seen, mask in _parts(pack, query.device):
            out[number, :, part] = scaled_dot_product_attention(
                q[:, :, part],
                k[:, :, part] if seen is None else torch.cat([k[:, :, seen], k[:, :, part]], dim=2),
                v[:, :, part] if seen is None else torch.cat([v[:, :, seen], v[:, :, part]], dim=2),
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=groups > 1,
            )[0]
    return out.transpose(1, 2).contiguous(), None


def _parts(pack: Pack, device: torch.device) -> Iterator[tuple[slice, slice | None, Tensor | None]]:
    """The prefix and every rest of a pack: its place, what it sees before itself, and the mask of both."""
    prefix = slice(0, pack.prefix)
    if pack.prefix:
        yield prefix, None, None
    start = pack.prefix
    for sample in pack.samples:
        length = len(sample) - pack.prefix
        if length:
            rest = slice(start, start + length)
            if pack.prefix:
                mask = torch.ones(length, pack.prefix + length, dtype=torch.bool, device=device)
                yield rest, prefix, mask.tril(pack.prefix)
            else:
                yield rest, None, None
        start += length
