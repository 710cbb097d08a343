"""All losses of a step as one differentiable function of hidden states and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student.losses.head import Head
from student.losses.positions import Gradients, PositionWork, run_positions
from student.losses.products import HeadProducts, WeightGradient
from student.losses.relation import RelationWork, gram_of, run_relations, takes_gram
from student.losses.targets import RelationTargets

MEMORY_BUDGET = 128 * 2**20
"""Bytes of logits in flight, unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """What one call computes. positions or relations may be None."""

    positions: PositionWork | None
    images: tuple[RelationTargets, ...] = ()
    image_weights: tuple[float, ...] = ()
    memory_budget: int = MEMORY_BUDGET


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Values:
    """total: the weighted sum, differentiable. The rest is detached and unweighted: kl (layers, n) and
    ce (n,) as `PositionWork` numbers them, relation (I,)."""

    total: Tensor
    kl: Tensor
    ce: Tensor
    relation: Tensor


def run(hidden: Tensor, head: Head, work: Work) -> Values:
    """The losses of `work` at hidden (N, D). Gradients reach hidden and the head's weight and bias."""
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(f"hidden must be (N, {head.weight.shape[1]}), not {tuple(hidden.shape)}")
    tracked = torch.is_grad_enabled()
    wanted = tuple(
        tracked and tensor is not None and tensor.requires_grad for tensor in (hidden, head.weight, head.bias)
    )
    total, kl, ce, relation = _HeadLosses.apply(hidden, head.weight, head.bias, head, work, wanted)
    return Values(total=total, kl=kl, ce=ce, relation=relation)


class _HeadLosses(torch.autograd.Function):
    """Gradients are formed in the forward pass, chunk by chunk, and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        work: Work,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            return _forward(ctx, hidden, weight, bias, head, work, wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        keep_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        scaled: list[Tensor | None] = []
        for saved in ctx.saved_tensors:
            if saved is None:
                scaled.append(None)
            else:
                scale = grad_total.to(saved.dtype)
                scaled.append(saved * scale if keep_graph else saved.mul_(scale))
        return (*scaled, None, None, None)


def _forward(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Head,
    work: Work,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    products = HeadProducts(head, hidden.dtype)
    dtype = products.dtype
    gradients = Gradients(
        hidden=torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if wanted[0] else None,
        weight=WeightGradient(weight, dtype) if wanted[1] else None,
        bias=torch.zeros(bias.shape, dtype=dtype, device=bias.device)
        if bias is not None and wanted[2]
        else None,
    )
    head_form = {
        "softcap": head.softcap,
        "logit_scale": head.logit_scale,
        "memory_budget": work.memory_budget,
    }
    total = torch.zeros((), dtype=dtype, device=hidden.device)
    kl, ce, relation = total.new_zeros((1, 0)), total.new_zeros(0), total.new_zeros(0)
    if work.positions is not None:
        kl, ce = run_positions(hidden, work.positions, products, gradients, **head_form)
        for layer, values in zip(work.positions.layers, kl, strict=True):
            total = total + _weighted(layer.weights, values)
        total = total + _weighted(work.positions.layers[0].label_weights, ce)
    if work.images:
        gram = gram_of(head, products) if takes_gram(head, work.images) else None
        asked = RelationWork(images=work.images, weights=work.image_weights, gram=gram)
        relation = run_relations(hidden, asked, products, gradients, **head_form)
        total = total + _weighted(relation.new_tensor(work.image_weights), relation)
    ctx.save_for_backward(
        None if gradients.hidden is None else gradients.hidden.to(hidden.dtype),
        None if gradients.weight is None else gradients.weight.result(weight.dtype),
        None if gradients.bias is None or bias is None else gradients.bias.to(bias.dtype),
    )
    ctx.mark_non_differentiable(kl, ce, relation)
    return total, kl, ce, relation


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """The weighted sum; a weight of 0 takes no part, whatever the value."""
    return torch.where(weights != 0, weights * values, 0.0).sum()
