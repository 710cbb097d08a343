"""Products with the head's matrix, block by block of its rows, never as a whole (N, V) array."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from student.losses.head import Head

BLOCK_BYTES = 32 * 2**20
"""How much of a low-precision matrix is held converted at a time."""


class HeadProducts:
    """The products that the losses need of one head. Everything comes out in `dtype`.

    dtype: float64 when hidden or weight are float64, else float32. Low-precision operands are converted
    before they are multiplied, so that sums are formed and handed out in `dtype`.
    """

    def __init__(self, head: Head, hidden_dtype: torch.dtype) -> None:
        self.columns = head.columns
        self.weight = head.weight.detach()[: self.columns]  # (V, D) without padding
        self.bias = None if head.bias is None else head.bias.detach()[: self.columns]
        double = torch.float64 in (hidden_dtype, self.weight.dtype)
        self.dtype = torch.float64 if double else torch.float32
        if self.bias is not None:
            self.bias = self.bias.to(self.dtype)

    def blocks(self, most: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Row ranges of the matrix, at most `most` rows each, and those rows (v, D) in `dtype`."""
        rows = self.columns if most is None else min(most, self.columns)
        if self.weight.dtype != self.dtype:
            rows = min(rows, max(1, BLOCK_BYTES // (self.weight.shape[1] * self.dtype.itemsize)))
        for start in range(0, self.columns, rows):
            block = slice(start, min(start + rows, self.columns))
            yield block, self.weight[block].to(self.dtype)

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """out (n, V) = hidden (n, D) weight^T + bias."""
        for block, weight in self.blocks():
            if self.bias is None:
                torch.mm(hidden, weight.t(), out=out[:, block])
            else:
                torch.addmm(self.bias[block], hidden, weight.t(), out=out[:, block])

    def hidden_gradient(self, grad: Tensor) -> Tensor:
        """(n, D) = grad (n, V) weight."""
        total = grad.new_zeros(grad.shape[0], self.weight.shape[1])
        for block, weight in self.blocks():
            total.addmm_(grad[:, block], weight)
        return total


class WeightGradient:
    """The gradient of the head's matrix (V_rows, D), summed up over chunks of positions."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.total = torch.zeros(weight.shape, dtype=dtype, device=weight.device)

    def add(self, rows: slice, left: Tensor, right: Tensor) -> None:
        """Add left (v, n) right (n, D) to the given rows."""
        self.total[rows].addmm_(left, right)

    def result(self, dtype: torch.dtype) -> Tensor:
        """The sum, in the dtype of the parameter."""
        return self.total.to(dtype)
