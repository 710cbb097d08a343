"""All losses of a step as one differentiable function of hidden states and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from models.head import Head
from student.losses.dense import DenseWork, run_dense
from student.losses.positions import PositionWork, run_positions
from student.losses.products import Gradients, HeadProducts, KeptMatrix
from student.losses.relation import RelationWork, run_relations


def memory_budget_of(device: torch.device) -> int:
    """Bytes of logits, and of what is made from them, to hold at a time, unless told otherwise.

    On a GPU every chunk reads and writes the head's float32 gradient, so that chunks must be large.
    """
    if device.type != "cuda":
        return 96 * 2**20
    return min(648 * 2**20, torch.cuda.get_device_properties(device).total_memory // 16)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Values:
    """total: the weighted sum of everything, differentiable. The rest is detached and unweighted: kl (m,)
    and ce (n,) by the rows of `PositionWork`, relation (I,), dense (M,) of all `DenseWork`, in order."""

    total: Tensor
    kl: Tensor
    ce: Tensor
    relation: Tensor
    dense: Tensor


def fused_losses(
    hidden: Tensor,
    head: Head,
    *,
    positions: PositionWork | None = None,
    relations: RelationWork | None = None,
    dense: Sequence[DenseWork] = (),
    memory_budget: int | None = None,
    compute: torch.dtype | None = None,
    matrix: KeptMatrix | None = None,
) -> Values:
    """The losses asked for at hidden (N, D). Gradients reach hidden and the head's weight and bias.

    memory_budget: bytes of logits at a time; what suits the device when None. compute, matrix: as in
    `HeadProducts`.

    Gradients are formed in the forward pass, of what requires them, and scaled in the backward pass. Not
    supported: second derivatives (create_graph raises), forward-mode derivatives, gradients in the targets.
    """
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(f"hidden must be (N, {head.weight.shape[1]}), not {tuple(hidden.shape)}")
    wanted = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, head.weight, head.bias)
    )
    # The tensors are separate arguments, since autograd does not look into the head.
    total, kl, ce, relation, whole = _FusedLosses.apply(
        hidden,
        head.weight,
        head.bias,
        head,
        positions,
        relations,
        dense,
        memory_budget_of(hidden.device) if memory_budget is None else memory_budget,
        compute,
        matrix,
        wanted,
    )
    return Values(total=total, kl=kl, ce=ce, relation=relation, dense=whole)


class _FusedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        positions: PositionWork | None,
        relations: RelationWork | None,
        dense: Sequence[DenseWork],
        memory_budget: int,
        compute: torch.dtype | None,
        matrix: KeptMatrix | None,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        # Products choose their own precision: autocast would change it.
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            products = HeadProducts(head, hidden.dtype, compute, matrix)
            gradients = Gradients(hidden, head, products, wanted)
            narrow = products.narrowed(hidden)
            total = torch.zeros((), dtype=products.dtype, device=hidden.device)
            kl, ce, relation = total.new_zeros(0), total.new_zeros(0), total.new_zeros(0)
            if positions is not None:
                kl, ce = run_positions(narrow, positions, products, gradients, memory_budget)
                total += _weighted(positions.rows.weights, kl)
                total += _weighted(positions.rows.label_weights[: len(ce)], ce)
            if relations is not None and relations.groups:
                relation = run_relations(narrow, head, relations, products, gradients, memory_budget)
                total += _weighted(relations.weights, relation)
            found = [total.new_zeros(0)]
            for work in dense:
                found.append(run_dense(hidden, work, products, gradients, memory_budget, compute))
                total += _weighted(work.weights, found[-1])
            whole = torch.cat(found)
        ctx.save_for_backward(
            None if gradients.hidden is None else gradients.hidden.to(hidden.dtype),
            None if gradients.weight is None else gradients.weight.result(),
            None if gradients.bias is None or bias is None else gradients.bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(kl, ce, relation, whole)
        return total, kl, ce, relation, whole

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the losses have no second derivatives: call backward without create_graph")
        # In place, unless the graph is retained: a second copy of the head's gradient doubles its memory.
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        kernel = scale_kernel_for(grad_total.device, grad_total.dtype)
        scaled = []
        for gradient in ctx.saved_tensors:
            if gradient is None:
                pass
            elif keep:
                gradient = gradient * grad_total.to(gradient.dtype)
            elif kernel is not None:
                kernel(gradient, grad_total)
            elif grad_total.device.type != "cpu" or float(grad_total) != 1.0:
                gradient.mul_(grad_total.to(gradient.dtype))
            scaled.append(gradient)
        return (*scaled, *(None,) * 8)


def scale_kernel_for(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor], None] | None:
    """`scale_kernel.scale_in_place` where Triton drives the device: most steps scale by 1, and the host
    cannot know it without a wait."""
    return _scale_kernel() if device.type == "cuda" and dtype == torch.float32 else None


@cache
def _scale_kernel() -> Callable[[Tensor, Tensor], None] | None:
    if find_spec("triton") is None:
        return None
    from student.losses.scale_kernel import scale_in_place

    return scale_in_place


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """The weighted sum; terms of weight 0 are excluded, whatever their value."""
    return torch.where(weights != 0, weights * values, 0.0).sum()
