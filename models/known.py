"""Inputs of a model that the host knows: placeholders of images by their places, masks by their sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only

from models.inputs import pad

_EQUAL = (Tensor.__eq__, Tensor.eq, torch.eq)
_SUMS = (Tensor.sum, torch.sum)
_ALL = (Tensor.all, torch.all)
_MOVES = (Tensor.to, Tensor.pin_memory)
_SAME_ELEMENTS = (*_MOVES, Tensor.bool, Tensor.unsqueeze, torch.unsqueeze)
_PUTS = (Tensor.masked_scatter, torch.masked_scatter)


class _Known(Tensor):
    """A tensor around the `plain` one, which takes its place in every operation."""

    plain: Tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own is a function of the C library
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _by_plain(func, args, kwargs)


Known = TypeVar("Known", bound=_Known)


def _around(kind: type[Known], plain: Tensor) -> Known:
    made: Known = Tensor._make_wrapper_subclass(
        kind, plain.shape, strides=plain.stride(), dtype=plain.dtype, device=plain.device
    )
    made.plain = plain
    return made


def _by_plain(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    args, kwargs = tree_map_only(_Known, lambda known: known.plain, (args, kwargs or {}))
    return func(*args, **kwargs)


class PlacedIds(_Known):
    """Token ids (B, T) with the places of one token among the flattened ids.

    The models of transformers compare their ids with the image token, count the mask, and put features where
    it is set. By a plain mask the count and the backward pass wait for the device; the mask of these ids is a
    `KnownMask`. Values and gradients are the same, and a wrong number of features raises as before. Whatever
    else is done with the ids gives plain tensors.
    """

    token: int
    places: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        ids, kwargs = args[0], kwargs or {}
        made = _by_plain(func, args, kwargs)
        if isinstance(ids, PlacedIds):
            if func in _EQUAL and isinstance(args[1], int) and args[1] == ids.token:
                return known_mask(made, len(ids.places), ids.places)
            if func in _MOVES and made.dtype == ids.plain.dtype:
                return placed_ids(made, ids.token, func(ids.places, *args[1:], **kwargs))
            if func is Tensor.record_stream:
                func(ids.places, *args[1:])
        return made


class KnownMask(_Known):
    """A mask (B, T) or (B, T, 1), of zeros and ones, whose sum is known; `sum()` and `all()` are of Python.

    places: where it is set among the flattened B * T, if that is known too: then `masked_scatter` and
    indexing by the mask go by this table. Whatever else is done with the mask gives plain tensors.
    """

    count: int
    places: Tensor | None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        first, kwargs = args[0], kwargs or {}
        if isinstance(first, KnownMask):
            if func in _SUMS and len(args) == 1 and not kwargs:
                return first.count
            if func in _ALL and len(args) == 1 and not kwargs:
                return first.count == first.plain.numel()
            made = _by_plain(func, args, kwargs)
            same = func in _SAME_ELEMENTS or (func is Tensor.__getitem__ and args[1] == (..., 0))
            return known_mask(made, first.count, first.places) if same else made
        mask = args[1][0] if isinstance(args[1], tuple) else args[1]
        if isinstance(mask, KnownMask) and mask.places is not None:
            rows = first.flatten(0, 1)  # (B * T, D)
            if func in _PUTS:
                return rows.index_copy(0, mask.places, args[2].reshape(-1, *rows.shape[1:])).view_as(first)
            if func is Tensor.__getitem__:
                return rows.index_select(0, mask.places)
            if func is Tensor.__setitem__ and isinstance(args[2], Tensor) and args[2].dim():
                first.view(-1, *rows.shape[1:]).index_copy_(0, mask.places, args[2])
                return None
        return _by_plain(func, args, kwargs)


def text_inputs(
    rows: Sequence[NDArray[Any]], length: int, pad_token_id: int, image_token_id: int
) -> dict[str, Tensor]:
    """input_ids and attention_mask (B, length) int64 of rows of ids (T,), right-padded."""
    ids = pad(rows, length, pad_token_id, np.int64)
    mask = pad([np.ones_like(row) for row in rows], length, 0, np.int64)
    places = torch.from_numpy(np.flatnonzero(ids.numpy() == image_token_id))
    return {
        "input_ids": placed_ids(ids, image_token_id, places),
        "attention_mask": known_mask(mask, sum(map(len, rows))),
    }


def placed_ids(ids: Tensor, token: int, places: Tensor) -> PlacedIds:
    """ids (B, T) with the places (P,) of `token` among them when they are flattened, ascending."""
    made = _around(PlacedIds, ids)
    made.token, made.places = token, places
    return made


def known_mask(mask: Tensor, count: int, places: Tensor | None = None) -> KnownMask:
    """mask (B, T) of zeros and ones, of which `count` are ones, at `places` of the flattened mask."""
    made = _around(KnownMask, mask)
    made.count, made.places = count, places
    return made
