"""Inputs of a model that the host knows: placeholders of images by their places, masks by their sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_EQUAL = (Tensor.__eq__, Tensor.eq, torch.eq)
_SUMS = (Tensor.sum, torch.sum)
_ALL = (Tensor.all, torch.all)
_MOVES = (Tensor.to, Tensor.pin_memory)
_SAME_ELEMENTS = (*_MOVES, Tensor.bool, Tensor.unsqueeze, torch.unsqueeze)
_PUTS = (Tensor.masked_scatter, torch.masked_scatter)


class PlacedIds(Tensor):
    """Token ids (B, T) with the places of one token, which `placed_ids` makes.

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
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **kwargs)
            if not isinstance(ids, PlacedIds):
                return made
            if func in _EQUAL and isinstance(args[1], int) and args[1] == ids.token:
                return _mask(made, len(ids.places), ids.places)
            if func in _MOVES and made.dtype == ids.dtype:
                return _ids(made, ids.token, func(ids.places, *args[1:], **kwargs))
            if func is Tensor.record_stream:
                func(ids.places, *args[1:])
            return made


class KnownMask(Tensor):
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
        with torch._C.DisableTorchFunctionSubclass():
            if isinstance(first, KnownMask):
                if func in _SUMS and len(args) == 1 and not kwargs:
                    return first.count
                if func in _ALL and len(args) == 1 and not kwargs:
                    return first.count == first.numel()
                made = func(*args, **kwargs)
                same = func in _SAME_ELEMENTS or (func is Tensor.__getitem__ and args[1] == (..., 0))
                return _mask(made, first.count, first.places) if same else made
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
            return func(*args, **kwargs)


def placed_ids(ids: Tensor, token: int) -> PlacedIds:
    """ids (B, T), on the host, with the places of `token`."""
    return _ids(ids, token, (ids == token).flatten().nonzero()[:, 0])


def known_mask(mask: Tensor, count: int) -> KnownMask:
    """mask (B, T) of zeros and ones, of which `count` are ones."""
    return _mask(mask, count, None)


def _ids(ids: Tensor, token: int, places: Tensor) -> PlacedIds:
    made = ids.as_subclass(PlacedIds)
    made.token, made.places = token, places
    return made


def _mask(mask: Tensor, count: int, places: Tensor | None) -> KnownMask:
    made = mask.as_subclass(KnownMask)
    made.count, made.places = count, places
    return made
