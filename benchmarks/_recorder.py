"""Records the operations of a piece of torch code on any machine: shapes, bytes, floating-point operations,
waits.

The code runs on fake tensors of a device that need not exist, so that models of any size cost nothing. What
the values of tensors decide cannot be known then: such an operation counts as a wait for the device, and a
guess stands in for its result (a number is 0, a condition holds, every element of a mask is set, all elements
are distinct).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from student.divergences import FORWARD
from student.losses.divergences import value_and_slopes

aten = torch.ops.aten

_TILE = 128
"""Rows and columns of a tile of a matrix product: a product of fewer costs as much as one of so many."""
_CROOKED = 6.0
_FACTORS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "addmm_": 1, "baddbmm_": 1, "matmul": 0}
"""Where the first factor of a product stands among the arguments."""
_FACTORISATIONS: dict[str, Callable[..., int]] = {
    "linalg_cholesky_ex": lambda matrix: matrix.numel() * matrix[-1] // 3,
    "linalg_solve_triangular": lambda matrix, other: other.numel() * matrix[-1],
}
"""Floating-point operations of what is no product, by the shapes of its arguments."""
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "set_",
}
_PICKS = {"gather", "index_select", "index", "embedding", "_unsafe_index"}
_PUTS = {"scatter", "scatter_", "scatter_add_", "index_put_", "index_put", "index_add_", "index_copy_"}
_WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "unique_dim",
    "masked_select",
    "is_nonzero",
    "equal",
    "bincount",
    "masked_scatter_backward",
}


@dataclass(frozen=True, slots=True, order=True)
class Operation:
    """One operation of the device.

    name: of aten, or of the kernel. dtype: of the factors of a product, or `factorisation`, else empty.
    flops: floating-point operations of products, tiles filled up. bytes: read plus written. launches: kernels
    that the host starts.
    waits: times that the host waits for the device.
    """

    name: str
    dtype: str = ""
    flops: int = 0
    bytes: int = 0
    launches: int = 1
    waits: int = 0


Recording = Counter[Operation]


class Recorder(TorchDispatchMode):
    """Counts the operations under it. guesses: results of operations that values decide, by name.

    operations: since `begin`; peak: the most bytes of tensors made since then that were held at a time.
    """

    def __init__(self, guesses: dict[str, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self._guesses = {**_GUESSES, **(guesses or {})}
        self.begin()

    def begin(self) -> None:
        """Forgets what was recorded; tensors that are there count no memory."""
        self.operations: Recording = Counter()
        self.peak = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def _hold(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._held.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        waits = name in _WAITS or _boolean_index(name, args)
        if name in self._guesses:
            out = self._guesses[name](*args, **kwargs)
        elif name == "index" and _boolean_index(name, args):
            out = _index_all(*args)
        else:
            out = func(*args, **kwargs)
        given = {key: value for key, value in kwargs.items() if key != "out"}
        inputs, outputs = _tensors((args, given)), _tensors(out)
        if not func.is_view:
            self._hold(inputs + _tensors(kwargs.get("out")), outputs)
        operation = _operation(func, name, args, inputs, outputs, out, waits)
        if operation is not None:
            self.operations[operation] += 1
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _operation(
    func: Any, name: str, args: Any, inputs: list[Tensor], outputs: list[Tensor], out: Any, waits: bool
) -> Operation | None:
    if func.namespace == "prim" or (not waits and (name in _FREE or _is_view(func, inputs, outputs))):
        return None
    flops, dtype = 0, ""
    count = _matmul_flops if name == "matmul" else flop_registry.get(func._overloadpacket)
    if count is not None and inputs:
        shapes = [each for each in args if not isinstance(each, torch.dtype)]
        flops = int(count(*shapes, out_val=out) * _filling(name, args))
        factor = args[_FACTORS[name]] if name in _FACTORS else inputs[-1]
        dtype = str(factor.dtype).removeprefix("torch.")
    if name in _FACTORISATIONS:
        flops, dtype = _FACTORISATIONS[name](*(tensor.shape for tensor in inputs)), "factorisation"
    return Operation(
        name=name,
        dtype=dtype,
        flops=flops,
        bytes=_bytes(name, func, inputs, outputs),
        launches=0 if name == "_local_scalar_dense" else 1,
        waits=int(waits),
    )


def _matmul_flops(left: Tensor, right: Tensor, *, out_val: Tensor) -> int:
    """Of a product that inference mode leaves whole."""
    return 2 * out_val.numel() * left.shape[-1]


def _bytes(name: str, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    written = sum(_size(tensor) for tensor in outputs)
    if name in _PICKS:
        return 2 * written + sum(_size(tensor) for tensor in inputs[1:])
    if name in _PUTS:
        return sum(_size(tensor) for tensor in inputs[1:]) + 2 * _size(inputs[-1])
    if name in {"zero_", "fill_", "zeros", "ones", "full", "arange", "new_zeros", "new_full", "zeros_like"}:
        return written
    if not outputs and func._schema.is_mutable:  # _foreach_ and fused optimizers
        return 2 * sum(_size(tensor) for tensor in inputs)
    return written + sum(_size(tensor) for tensor in inputs)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _filling(name: str, args: Any) -> float:
    """How much larger a product of matrices is with its rows and columns filled up to whole tiles, times the
    price of factors of two bytes whose rows do not begin on 16 bytes: these the matrix units cannot load."""
    place = _FACTORS.get(name)
    if place is None:
        return 1.0
    left, right = args[place], args[place + 1]
    rows, columns = left.shape[-2], right.shape[-1]
    full = [-(-size // _TILE) * _TILE for size in (rows, columns)]
    filled: float = full[0] * full[1] / max(rows * columns, 1)
    crooked = any(
        factor.element_size() == 2 and max(factor.stride()[-2:]) * factor.element_size() % 16
        for factor in (left, right)
    )
    return filled * (_CROOKED if crooked else 1.0)


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    if func.is_view:  # also of a tensor that the mode takes as a fake one, whose storage is another then
        return True
    if func._schema.is_mutable or not inputs or not outputs:
        return False
    known = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in known for tensor in outputs)


def _boolean_index(name: str, args: Any) -> bool:
    if name not in {"index", "index_put_", "index_put", "_index_put_impl_"}:
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _index_all(tensor: Tensor, indices: list[Tensor | None]) -> Tensor:
    mask = next(index for index in indices if index is not None)
    return tensor.new_empty((mask.numel(), *tensor.shape[mask.dim() :]))


def _scalar(tensor: Tensor) -> Any:
    return True if tensor.dtype == torch.bool else 0 if not tensor.is_floating_point() else 0.0


def _nonzero(mask: Tensor) -> Tensor:
    return mask.new_empty((mask.numel(), mask.dim()), dtype=torch.int64)


def _unique(tensor: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    flat = tensor.reshape(-1)
    return flat.new_empty(len(flat)), torch.empty_like(tensor), flat.new_empty(len(flat))


_GUESSES: dict[str, Callable[..., Any]] = {
    "_local_scalar_dense": _scalar,
    "nonzero": _nonzero,
    "_unique2": _unique,
    "equal": lambda *_: True,
    "bincount": lambda values, weights=None, minlength=0: values.new_empty(minlength),
}


# ---- attention, which fake tensors of an absent device would take apart ----


@torch.library.custom_op("kdcache_recorder::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("kdcache_recorder::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


@_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@torch.library.custom_op("kdcache_recorder::row_kernel", mutates_args=())
def _row_kernel(logits: Tensor, again: Tensor, grads: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    return torch.empty(2, len(logits))


@_row_kernel.register_fake
def _(logits: Tensor, again: Tensor, grads: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    return logits.new_empty(2, len(logits))


def row_kernel(
    products: Tensor, rows: Any, *, grads: Tensor | None, out: Any, divergences: Any, **_: Any
) -> tuple[Tensor, Tensor]:
    """In place of `student.losses.kernels.row_kernel`, which fake tensors cannot run: its traffic."""
    if tuple(divergences) != (FORWARD,):  # one launch more, which reads the logits for the student's masses
        events = torch.cat([rows.entries.logprobs, products[:, :2]], dim=1)
        _row_kernel(products, products[:0], products[:0], rows.entries.ids, rows.entries.logprobs)
        value_and_slopes(divergences, rows.which, events, events, rows.batches)
    # Reads the logits once for the sums and once for the gradient, which it writes.
    second = products[:0] if grads is None else products
    grads = products[:0] if grads is None else grads
    _row_kernel(products, second, grads, rows.entries.ids, rows.entries.logprobs)
    kl, ce = out
    return kl, ce


@torch.library.custom_op("kdcache_recorder::row_entropy", mutates_args=())
def _row_entropy(logits: Tensor) -> Tensor:
    return torch.empty(len(logits))


@_row_entropy.register_fake
def _(logits: Tensor) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


def row_entropy(products: Tensor, *, out: Tensor, **_: Any) -> Tensor:
    """In place of `student.losses.entropy_kernel.kernel_entropy`: the logits are read once."""
    _row_entropy(products)
    return out


@torch.library.custom_op("kdcache_recorder::scale_in_place", mutates_args=())
def _scale_in_place(factor: Tensor) -> Tensor:
    return torch.empty_like(factor)


@_scale_in_place.register_fake
def _(factor: Tensor) -> Tensor:
    return torch.empty_like(factor)


def scale_in_place(values: Tensor, factor: Tensor) -> None:
    """In place of `student.losses.scale_kernel.scale_in_place`, of a loss whose own gradient is 1: one launch
    that reads the number alone."""
    _scale_in_place(factor)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _pull(ctx: Any, grad: Tensor) -> Any:
    return _attention_backward(grad, *ctx.saved_tensors)


_attention.register_autograd(_pull, setup_context=_keep)


def _attention_flops(products: int) -> Callable[..., int]:
    def count(*args: Any, out_val: Any = None, **_: Any) -> int:
        query, key = args[-3], args[-2]
        batch, heads, tokens, width = query.shape
        return int(2 * products * batch * heads * tokens * key.shape[2] * width)

    return count


flop_registry[aten.addmm_] = flop_registry[aten.addmm]
flop_registry[aten.baddbmm_] = flop_registry[aten.baddbmm]
flop_registry[torch.ops.kdcache_recorder.attention] = _attention_flops(2)
flop_registry[torch.ops.kdcache_recorder.attention_backward] = _attention_flops(5)


class _FlashAttention(TorchFunctionMode):
    """scaled_dot_product_attention as one kernel that keeps no matrix of scores; addresses of no data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3] if len(args) > 2 else (args[0], kwargs["key"], kwargs["value"])
            if torch.is_autocast_enabled(query.device.type):
                dtype = torch.get_autocast_dtype(query.device.type)
                query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            return _attention(query, key, value)
        if func is Tensor.data_ptr:  # there are no data: what identifies them
            return args[0].untyped_storage()._cdata
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Losses and optimizer choose what they choose on CUDA, under `imagined`."""
    with (
        patch("student.losses.products.multiplies_wide", lambda device: True),
        patch("student.losses.products.in_blocks", lambda device: False),
        patch("student.losses.positions.kernel_for", lambda device, dtype: row_kernel),
        patch("student.losses.positions._entropy_kernel", lambda: row_entropy),
        patch("student.losses.fused.scale_kernel_for", lambda device, dtype: scale_in_place),
        patch("student.losses.fused.memory_budget_of", lambda device: 648 * 2**20),
        patch("student.optimize.fused", lambda device: True),
    ):
        yield


@contextmanager
def as_on_cpu() -> Iterator[None]:
    """Products cost what they multiply: no tiles are filled up, no rows are crooked."""
    with patch("benchmarks._recorder._TILE", 1), patch("benchmarks._recorder._CROOKED", 1.0):
        yield


@contextmanager
def imagined(guesses: dict[str, Callable[..., Any]] | None = None) -> Iterator[Recorder]:
    """Fake tensors, and a recorder of what is done to them. Only what it has recorded is of use: no values
    exist.

    Their device is called "cpu", since torch's autograd asks a build without CUDA for CUDA's guards; code
    that chooses by the device has to be told so by the caller. Copies to the host are therefore not seen.
    The masks of transformers are made as for tensors that have values.
    """
    recorder = Recorder(guesses)
    real = patch("transformers.masking_utils.is_tracing", lambda *_: False)
    with real, FakeTensorMode(allow_non_fake_inputs=True), _FlashAttention(), recorder:
        yield recorder
