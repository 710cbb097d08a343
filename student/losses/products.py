"""Products with the head's matrix, accumulated and returned in float32 (float64) for any input dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from models.head import Head

_PIECE_BYTES = 64 * 2**20
_PANEL = 256
"""Columns of W^T W made at a time: its lower triangle is copied, not computed."""


def in_blocks(device: torch.device) -> bool:
    """Whether products there are made in blocks that a cache holds, not in as few launches as can be."""
    return device.type == "cpu"


def block_rows(matrix: Tensor, itemsize: int) -> int:
    """Rows of a (V, D) matrix to work on at a time: what a CPU's cache holds, or what fills a GPU."""
    block_bytes = 4 * 2**20 if in_blocks(matrix.device) else 64 * 2**20
    return max(1, block_bytes // (matrix.shape[1] * itemsize))


def multiplies_wide(device: torch.device) -> bool:
    """Whether torch.mm there takes bfloat16 factors and returns float32."""
    return device.type == "cuda"


def multiply_wide(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left (a, b) right (b, c) of bfloat16, in float32."""
    if out is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (a, c) += left (a, b) right (b, c); a float32 total takes bfloat16 factors on CUDA."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


class KeptMatrix:
    """The head's matrix as products take it, made once for the micro-batches of a step.

    Nothing looks for changes of the weight: it must not change while the matrix is kept.
    """

    def __init__(self) -> None:
        self._keeps = False
        self._made: Tensor | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps what is made first in here, to the end."""
        self._keeps = True
        try:
            yield
        finally:
            self._keeps, self._made = False, None

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """weight (V, D) in `dtype`."""
        if self._made is not None and (self._made.shape, self._made.dtype) == (weight.shape, dtype):
            return self._made
        made = weight.to(dtype)
        # Never the weight itself: FSDP gives its memory back between micro-batches.
        self._made = made if self._keeps and made.dtype != weight.dtype else None
        return made


class HeadProducts:
    """The products that the losses need of one head with matrix (V, D).

    columns: how many of its V rows are tokens; the rest are padding. dtype: float64 when hidden states or
    matrix are float64, else float32: of all sums and results. compute: the dtype of a mixed-precision step;
    that of the hidden states when None. operand: what factors are brought to before they are multiplied:
    bfloat16 when `compute` is and the device multiplies it into float32 (CUDA), else `dtype`. matrix: keeps
    what the head's becomes in bfloat16.
    """

    def __init__(
        self,
        head: Head,
        hidden_dtype: torch.dtype,
        compute: torch.dtype | None = None,
        matrix: KeptMatrix | None = None,
    ) -> None:
        self.columns = head.columns
        self.weight = head.weight.detach()
        self.dtype = wide_dtype(hidden_dtype, self.weight.dtype)
        self.bias = None if head.bias is None else head.bias.detach().to(self.dtype)
        self.softcap, self.logit_scale = head.softcap, head.logit_scale
        self.narrow = hidden_dtype == self.weight.dtype == torch.bfloat16
        low = (compute or hidden_dtype) == torch.bfloat16 and self.dtype == torch.float32
        self.operand = torch.bfloat16 if low and multiplies_wide(self.weight.device) else self.dtype
        if self.operand == torch.bfloat16:
            self.weight = (matrix or KeptMatrix()).of(self.weight, torch.bfloat16)  # not block by block

    def blocks(self, end: int, most: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Row ranges of the matrix up to `end`, of at most `most` rows, and those rows (v, D) as operand."""
        whole = not in_blocks(self.weight.device) and self.weight.dtype == self.operand
        rows = min(end if whole else block_rows(self.weight, self.operand.itemsize), most or end)
        for start in range(0, end, rows):
            block = slice(start, min(start + rows, end))
            yield block, self.weight[block].to(self.operand)

    def operand_matrix(self) -> Tensor:
        """All rows of the matrix (V, D) as operand."""
        return self.weight.to(self.operand)

    def product(self, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        """left (a, b) right (b, c) in `dtype`, in `out` where given."""
        left, right = left.to(self.operand), right.to(self.operand)
        if self.operand == self.dtype:
            return torch.mm(left, right, out=out)
        return multiply_wide(left, right, out)

    def narrowed(self, factor: Tensor) -> Tensor:
        """A factor as it is, or as operand where that takes less memory."""
        return factor.to(self.operand) if self.operand.itemsize < factor.dtype.itemsize else factor

    def batched(self, left: Tensor, right: Tensor) -> Tensor:
        """left (I, a, b) right (I, b, c) in `dtype`."""
        left, right = left.to(self.operand), right.to(self.operand)
        if self.operand == self.dtype:
            return torch.bmm(left, right)
        return torch.bmm(left, right, out_dtype=self.dtype)

    def logits(self, hidden: Tensor, block: slice, matrix: Tensor, out: Tensor) -> Tensor | None:
        """out (n, v) = the logits of hidden (n, D) in one of `blocks`.

        Returns their slope (n, v) in hidden matrix^T + bias where the head is not linear.
        """
        self.product(hidden, matrix.t(), out)
        if self.bias is not None:
            out += self.bias[block]
        if self.logit_scale != 1.0:
            out *= self.logit_scale
        if self.softcap is None:
            return None
        out.div_(self.softcap).tanh_()
        slope = out.square().neg_().add_(1.0).mul_(self.logit_scale)
        out *= self.softcap
        return slope

    def unscale(self, grad: Tensor, slope: Tensor | None) -> Tensor:
        """The gradient (n, v) in logits turned, in place, to that in hidden matrix^T + bias."""
        if slope is not None:
            return grad.mul_(slope)
        return grad if self.logit_scale == 1.0 else grad.mul_(self.logit_scale)

    def hidden_gradient(self, grad: Tensor) -> Tensor:
        """(n, D) = grad (n, V) weight.

        With bfloat16 states and matrix the logits' gradient is rounded to bfloat16, and so is the result on
        devices that cannot return float32: it is the gradient of a bfloat16 tensor, complete.
        """
        if self.narrow and self.operand != torch.bfloat16:
            return (grad.to(torch.bfloat16) @ self.weight).to(self.dtype)
        if self.weight.dtype == self.operand:
            return self.product(grad, self.weight)
        total = grad.new_zeros(grad.shape[0], self.weight.shape[1])
        for block, matrix in self.blocks(len(self.weight)):
            total += self.product(grad[:, block], matrix)
        return total

    def gram(self) -> Tensor:
        """W~^T W~ (D + b, D + b) with W~ = [W, bias] of the tokens, b = 1 where there is a bias, else 0."""
        width = self.weight.shape[1]
        if self.bias is None and not in_blocks(self.weight.device):
            matrix = self.weight[: self.columns].to(self.operand)
            return self.product(matrix.t(), matrix)
        size = width + (self.bias is not None)
        gram = torch.zeros((size, size), dtype=self.dtype, device=self.weight.device)
        # Panels save half of the work, and cost launches.
        step = _PANEL if in_blocks(self.weight.device) else width
        for block, matrix in self.blocks(self.columns):
            for start in range(0, width, step):
                panel = slice(start, min(start + step, width))
                gram[panel, start:width] += self.product(matrix[:, panel].t(), matrix[:, start:])
            if self.bias is not None:
                gram[:width, width] += matrix.to(self.dtype).t() @ self.bias[block]
        if self.bias is not None:
            gram[width, width] = self.bias[: self.columns].square().sum()
        return gram.triu() + gram.triu(1).t()


class WeightGradient:
    """The gradient of the head's matrix (V_rows, D), summed in the products' dtype over chunks of positions.

    The sum for a float32 matrix is its gradient. That for a narrower one is held in pieces, each of which is
    given back as soon as it is rounded into the gradient.
    """

    def __init__(self, weight: Tensor, products: HeadProducts) -> None:
        self._products = products
        self._shape, self._dtype = weight.shape, weight.dtype
        self._size = len(weight)
        if weight.dtype != products.dtype:
            self._size = max(1, _PIECE_BYTES // (weight.shape[1] * products.dtype.itemsize))
        rows = weight.split(self._size)
        self._pieces = [torch.empty(r.shape, dtype=products.dtype, device=weight.device) for r in rows]
        self._begun = [False] * len(rows)

    def add(self, rows: slice, left: Tensor, right: Tensor) -> None:
        """Add left (v, n) right (n, D) to these rows."""
        for number in range(rows.start // self._size, -(-rows.stop // self._size)):
            begin = number * self._size
            first, last = max(rows.start, begin), min(rows.stop, begin + self._size)
            factor = left[first - rows.start : last - rows.start]
            if not self._begun[number] and last - first == len(self._pieces[number]):
                self._products.product(factor, right, self._pieces[number])
            else:
                total = self._piece(number)[first - begin : last - begin]
                add_product(total, factor.to(self._products.operand), right.to(self._products.operand))
            self._begun[number] = True

    def result(self) -> Tensor:
        """The gradient, in the dtype of the matrix. The last call to make."""
        if len(self._pieces) == 1:
            return self._piece(0).to(self._dtype)
        gradient = torch.empty(self._shape, dtype=self._dtype, device=self._pieces[0].device)
        for number, rows in reversed(list(enumerate(gradient.split(self._size)))):
            rows.copy_(self._piece(number))
            self._pieces.pop()
        return gradient

    def _piece(self, number: int) -> Tensor:
        """The sum so far: 0 before the first product."""
        return self._pieces[number] if self._begun[number] else self._pieces[number].zero_()


class Gradients:
    """Where the gradients of a step are summed; None where not wanted. hidden (N, D), bias (V,)."""

    def __init__(
        self, hidden: Tensor, head: Head, products: HeadProducts, wanted: tuple[bool, bool, bool]
    ) -> None:
        self.hidden: Tensor | None = None
        self.weight: WeightGradient | None = None
        self.bias: Tensor | None = None
        if wanted[0]:
            self.hidden = torch.zeros(hidden.shape, dtype=products.dtype, device=hidden.device)
        if wanted[1]:
            self.weight = WeightGradient(head.weight, products)
        if head.bias is not None and wanted[2]:
            self.bias = torch.zeros(head.bias.shape, dtype=products.dtype, device=head.bias.device)
        self.wanted = any(wanted)

    def add(self, products: HeadProducts, grad: Tensor, index: Tensor, states: Tensor) -> None:
        """Add what grad (n, V), in the products before bias and scale, gives at positions index (n,) with
        states (n, D)."""
        if self.bias is not None:
            self.bias += grad.sum(dim=0)
        grad = products.narrowed(grad)  # once for both products
        if self.hidden is not None:
            self.hidden.index_add_(0, index, products.hidden_gradient(grad))
        if self.weight is not None:
            self.weight.add(slice(0, grad.shape[1]), grad.t(), states)


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 where anything is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
