"""One Triton kernel: the entropy of rows of logits, each read once.

Importing this file needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from student.losses.kernels import LAUNCH, Launch
from student.losses.triton_rows import _LOG2E, _NONE, _logit


@triton.jit
def _fold(top, total, moment, x):
    """total = sum e^(x - top) and moment = sum (x - top) e^(x - top) so far, with one more logit x each."""
    ahead = x - top
    grown = ahead > 0
    small = tl.exp2(-tl.abs(ahead) * _LOG2E)
    raised = (moment - ahead * total) * small
    added = moment + tl.where(small > 0, ahead * small, 0.0)
    moment = tl.where(grown, tl.where(total > 0, raised, 0.0), added)
    total = tl.where(grown, total * small + 1.0, total + small)
    return tl.maximum(top, x), total, moment


@triton.jit
def _entropy_kernel(
    logits,
    bias,
    out,
    count,
    columns,
    stride,
    scale,
    cap,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    for number in range(tl.program_id(0), count, tl.num_programs(0)):
        row = logits + tl.cast(number, tl.int64) * stride
        top = tl.full((BLOCK,), _NONE, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        moment = tl.zeros((BLOCK,), tl.float32)
        place = tl.arange(0, BLOCK)
        # Whole blocks are loaded without a mask, whose edge may make loads narrow.
        whole = columns // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            at = tl.multiple_of(start, BLOCK) + place
            offset = tl.load(bias + at) if HAS_BIAS else 0.0
            x = _logit(tl.load(row + at).to(tl.float32), offset, scale, cap, HAS_BIAS, CAPPED)
            top, total, moment = _fold(top, total, moment, x)
        if whole < columns:
            at = whole + place
            raw = tl.load(row + at, mask=at < columns, other=-float("inf")).to(tl.float32)
            offset = tl.load(bias + at, mask=at < columns, other=0.0) if HAS_BIAS else 0.0
            x = _logit(raw, offset, scale, cap, HAS_BIAS, CAPPED)
            top, total, moment = _fold(top, total, moment, x)
        most = tl.max(top, axis=0)
        lower = top - most
        small = tl.exp2(lower * _LOG2E)
        all_total = tl.sum(total * small, axis=0)
        all_moment = tl.sum(tl.where(small > 0, (moment + lower * total) * small, 0.0), axis=0)
        tl.store(out + number, tl.log(all_total) - all_moment / all_total)


def kernel_entropy(
    products: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    out: Tensor | None = None,
    launch: Launch = LAUNCH,
) -> Tensor:
    """(n,) `row_entropy` of the logits that products (n, V) = hidden weight^T become, in one launch.

    products: float32 or bfloat16, rows of stride >= V; they stay as they are. out: (n,) float32, to be
    filled.
    """
    count, columns = products.shape
    if out is None:
        out = torch.empty(count, dtype=torch.float32, device=products.device)
    if count == 0:
        return out
    _entropy_kernel[launch.grid(count, products.device)](
        products,
        products if bias is None else bias,
        out,
        count,
        columns,
        products.stride(0),
        scale,
        1.0 if softcap is None else softcap,
        BLOCK=min(launch.block, triton.next_power_of_2(columns)),
        HAS_BIAS=bias is not None,
        CAPPED=softcap is not None,
        num_warps=launch.warps(products.device),
    )
    return out
