"""A head and hidden states as a cache holds them, and back on a device."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from cache_schema.errors import CacheDamaged, KdcacheError
from cache_schema.format.cache import Cache
from cache_schema.format.records import HiddenStates
from cache_schema.format.stored_head import StoredHead
from models.head import Head


def head_tensors(head: Head) -> dict[str, Tensor]:
    """What the file of a head holds: its tokens' rows alone, in the dtype that it has.

    KdcacheError for a matrix that is not made of plain numbers, as in a quantised layer.
    """
    weight = head.weight.detach()
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise KdcacheError(
            f"the teacher's head is in {str(weight.dtype).removeprefix('torch.')}, which cannot be stored "
            "beside its hidden states; omit --quantization, or hidden from --targets"
        )
    tensors = {"weight": weight[: head.columns]}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach()[: head.columns]
    return tensors


def head_file(head: Head) -> tuple[StoredHead, bytes]:
    """The file of a head (see `head_tensors`), and what a manifest says of it."""
    tensors = head_tensors(head)
    data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    return StoredHead(
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        rows=head.columns,
        width=tensors["weight"].shape[1],
        dtype=str(tensors["weight"].dtype).removeprefix("torch."),
        bias=head.bias is not None,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    ), data


def head_of(cache: Cache, device: torch.device | str = "cpu") -> Head:
    """The teacher's head of a cache with hidden states. KdcacheError when it has none, CacheDamaged when its
    file is missing or not as the manifest says."""
    data = cache.head_bytes()
    stored = cache.manifest.head
    assert stored is not None
    tensors = load(data)
    weight, bias = tensors["weight"], tensors.get("bias")
    if weight.shape != (stored.rows, stored.width) or (bias is not None) != stored.bias:
        raise CacheDamaged(f"{cache.url}/{stored.path}: not the head that the manifest describes")
    return Head(
        weight=weight.to(device),
        bias=None if bias is None else bias.to(device),
        softcap=stored.softcap,
        logit_scale=stored.logit_scale,
    )


def states_on(states: HiddenStates, device: torch.device | str) -> Tensor:
    """Hidden states (N, D) in float32 on a device, sent there in 8 bits."""
    return decoded_states(*(tensor.to(device) for tensor in state_tensors(states)))


def state_tensors(states: HiddenStates) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stored hidden states as tensors: values (N, D) int8, scales (N,), channels (C, 2, D), channel_of (N,)
    int64."""
    values, scales, channels, channel_of = (
        torch.from_numpy(np.array(array))
        for array in (states.values, states.scales, states.channels, states.channel_of.astype(np.int64))
    )
    return values, scales, channels, channel_of


def decoded_states(values: Tensor, scales: Tensor, channels: Tensor, channel_of: Tensor) -> Tensor:
    """(N, D) float32 of `state_tensors`."""
    made = values * scales[:, None]
    if len(channels) == 1:
        return made.mul_(channels[0, 1]).add_(channels[0, 0])
    return made.mul_(channels[channel_of, 1]).add_(channels[channel_of, 0])
