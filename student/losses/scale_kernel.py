"""One Triton kernel: a gradient times a number on the device, left as it is where that number is 1.

Importing this file needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _scale_kernel(values, factor, count, BLOCK: tl.constexpr):
    number = tl.load(factor)
    if number != 1.0:  # programs that need not work end here: nothing of the values is read
        for start in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
            at = tl.cast(start, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            found = tl.load(values + at, mask=at < count)
            made = (found.to(tl.float32) * number).to(values.dtype.element_ty)
            tl.store(values + at, made, mask=at < count)


def scale_in_place(values: Tensor, factor: Tensor) -> None:
    """values, contiguous, times factor () float32."""
    count = values.numel()
    programs = triton.cdiv(count, _BLOCK)
    if values.device.type == "cuda":
        programs = min(programs, 8 * torch.cuda.get_device_properties(values.device).multi_processor_count)
    if count:
        _scale_kernel[(programs,)](values, factor, count, BLOCK=_BLOCK)
