"""One Triton kernel: losses and gradient of a row of logits while the row is near the processor.

It computes what `logit_rows.row_losses` does, for all rows of a chunk in one launch: a pass over the row that
sums (reading 4 bytes a logit), and, where a gradient is wanted, a second one that puts it in the row's place.
A divergence other than the forward KL takes two launches: one reports the student's log-masses of the events,
from which the formula (in torch, on some tens of columns) makes slopes, and one takes these in place of p.
Importing this file needs Triton, which torch's CUDA and ROCm builds bring along.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from student.divergences import FORWARD, Divergence
from student.losses.divergences import value_and_slopes
from student.losses.triton_rows import rows_on_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How the kernel is laid out: columns at a time, threads per program (no device takes more than 1,024),
    programs per multiprocessor, and blocks under way at a time (1: none is loaded ahead)."""

    block: int = 8192
    threads: int = 1024
    programs: int = 1
    stages: int = 1

    def grid(self, count: int, device: torch.device) -> tuple[int]:
        """The programs for `count` rows."""
        if device.type != "cuda":
            return (count,)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        return (min(count, self.programs * processors),)

    def warps(self, device: torch.device) -> int:
        """The warps per program, of 64 threads on some of AMD's devices."""
        return max(self.threads // warp_size(device), 1)


def warp_size(device: torch.device) -> int:
    """Threads per warp."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


LAUNCH = Launch()


def row_kernel(
    products: Tensor,
    rows: Any,
    *,
    grads: Tensor | None,
    tokens: int,
    temperature: float,
    inside_only: bool,
    apart: bool,
    divergences: Sequence[Divergence] = (FORWARD,),
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    launch: Launch = LAUNCH,
) -> tuple[Tensor, Tensor]:
    """KL (n,) times T^2 and cross entropy (n,) of products (n, V) = hidden weight^T, and their gradient.

    products: float32, rows of stride >= V; spoilt. rows: contiguous. out: where the values go, float32.
    grads: (n, V), of any dtype, or None where none is wanted: the gradient in products + bias, of
    sum_n weights_n T^2 KL_n + label_weights_n CE_n; it may lie in the memory of `products`, each row in its
    row. apart: cross entropy is that at temperature 1.
    """
    options: dict[str, Any] = {
        "tokens": tokens,
        "temperature": temperature,
        "inside_only": inside_only,
        "apart": apart,
        "bias": bias,
        "scale": scale,
        "softcap": softcap,
        "launch": launch,
    }
    kl, ce = out or products.new_empty(2, len(products), dtype=torch.float32).unbind()
    if len(products) == 0:
        return kl, ce
    entries = rows.entries
    if tuple(divergences) == (FORWARD,):
        _launch(products, rows, entries.logprobs, entries.log_tail, kl, ce, grads=grads, **options)
        return kl, ce
    events = kl.new_empty(len(kl), entries.ids.shape[1] + 2)
    _launch(products, rows, entries.logprobs, entries.log_tail, kl, ce, events=events, **options)
    nothing = torch.full_like(entries.log_tail, -math.inf)
    teacher = torch.cat([entries.logprobs, entries.log_tail[:, None], nothing[:, None]], dim=1)
    values, slopes = value_and_slopes(divergences, rows.which, teacher, events, rows.batches)
    kl.copy_(torch.where(rows.weights != 0, values * temperature**2, 0.0))
    if grads is not None:
        inside, tail, padding = (each.contiguous() for each in slopes.neg().tensor_split((-2, -1), dim=1))
        _launch(products, rows, inside, tail, kl, ce, grads=grads, pads=padding, **options)
    return kl, ce


def _launch(
    products: Tensor,
    rows: Any,
    inside: Tensor,
    tail: Tensor,
    kl: Tensor,
    ce: Tensor,
    *,
    tokens: int,
    temperature: float,
    inside_only: bool,
    apart: bool,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    launch: Launch,
    grads: Tensor | None = None,
    events: Tensor | None = None,
    pads: Tensor | None = None,
) -> None:
    """inside (n, E), tail (n,): the teacher's log-masses; where `pads` (n,) is given all three are slopes
    with their signs turned, and `kl` is left alone. events (n, E + 2): takes log q of the entries, of the
    tail and of the padding, and the products stay as they are.
    """
    count, columns = products.shape
    width = inside.shape[1]
    target = products if grads is None else grads
    rows_on_device[launch.grid(count, products.device)](
        products,
        target,
        products if bias is None else bias,
        rows.entries.ids,
        inside,
        tail,
        tail if pads is None else pads,
        rows.weights,
        rows.labels,
        rows.label_weights,
        kl,
        ce,
        kl if events is None else events,
        count,
        tokens,
        columns,
        products.stride(0),
        target.stride(0),
        scale,
        1.0 if softcap is None else softcap,
        temperature,
        E=width,
        E_BLOCK=triton.next_power_of_2(width),
        BLOCK=min(launch.block, triton.next_power_of_2(columns)),
        STAGES=launch.stages,
        HAS_BIAS=bias is not None,
        CAPPED=softcap is not None,
        APART=apart,
        INSIDE_ONLY=inside_only,
        PADDED=tokens < columns,
        GRADIENT=grads is not None,
        REPORT=events is not None,
        GIVEN=pads is not None,
        num_warps=launch.warps(products.device),
    )
