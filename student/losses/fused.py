"""All losses of a step as one differentiable function of hidden states and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


@cache
def memory_budget_of(device: torch.device) -> int:
    """Bytes of logits, and of what is made from them, to hold at a time, unless told otherwise.

    On a GPU every chunk reads and writes the head's float32 gradient, so that chunks must be large: 648 MiB,
    or a sixteenth of the memory that is free when a process asks first. All its steps keep that, so that they
    add up in one order.
    """
    if device.type != "cuda":
        return 96 * 2**20
    return max(32 * 2**20, min(648 * 2**20, torch.cuda.mem_get_info(device)[0] // 16))


def fused_losses(
    hidden: Tensor,
    head: Head,
    *,
    shares: Tensor,
    positions: PositionWork | None = None,
    relations: RelationWork | None = None,
    apart: Sequence[DenseWork | PositionWork] = (),
    memory_budget: int | None = None,
    compute: torch.dtype | None = None,
    matrix: KeptMatrix | None = None,
) -> tuple[Tensor, Tensor]:
    """The losses asked for at hidden (N, D). Gradients reach hidden and the head's weight and bias.

    shares (T, S): what each of the S values (KL and cross entropy of the m rows of `positions`, the images of
    `relations`, the rows of `apart`) counts in T sums; a value is left out where that is 0, whatever it
    is. Its first row must be the weights that these works have. Returns the first sum, differentiable, and
    all of them (T,).

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
    total, sums = _FusedLosses.apply(
        hidden,
        head.weight,
        head.bias,
        head,
        shares,
        positions,
        relations,
        apart,
        memory_budget_of(hidden.device) if memory_budget is None else memory_budget,
        compute,
        matrix,
        wanted,
    )
    return total, sums


class _FusedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        shares: Tensor,
        positions: PositionWork | None,
        relations: RelationWork | None,
        apart: Sequence[DenseWork | PositionWork],
        memory_budget: int,
        compute: torch.dtype | None,
        matrix: KeptMatrix | None,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor]:
        # Products choose their own precision: autocast would change it.
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            products = HeadProducts(head, hidden.dtype, compute, matrix)
            gradients = Gradients(hidden, head, products, wanted)
            values = torch.zeros(shares.shape[1], dtype=products.dtype, device=hidden.device)
            count = 0 if relations is None else len(relations.weights)
            rows = 0 if positions is None else len(positions.layout.sources)
            kl, ce, images, whole = values.tensor_split((rows, 2 * rows, 2 * rows + count))
            if positions is not None:
                run_positions(hidden, positions, products, gradients, memory_budget, kl, ce)
            if relations is not None and relations.groups:
                narrow = products.narrowed(hidden)
                images.copy_(run_relations(narrow, head, relations, products, gradients, memory_budget))
            for work, part in zip(apart, whole.split([len(work) for work in apart]), strict=True):
                if isinstance(work, PositionWork):
                    nothing = torch.zeros_like(part)
                    run_positions(hidden, work, products, gradients, memory_budget, part, nothing)
                else:
                    part.copy_(run_dense(hidden, work, products, gradients, memory_budget, compute))
            sums = (shares * values).masked_fill_(shares == 0, 0.0).sum(dim=1)
        ctx.save_for_backward(
            None if gradients.hidden is None else gradients.hidden.to(hidden.dtype),
            None if gradients.weight is None else gradients.weight.result(),
            None if gradients.bias is None or bias is None else gradients.bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        return sums[0].clone(), sums

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
        return (*scaled, *(None,) * 9)


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
