"""Inputs of a model: padding, joining, and images verified against their recorded digests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from cache_schema.datasets.image_roots import ImageRoot
from cache_schema.datasets.images import open_image
from cache_schema.errors import RowRejected
from cache_schema.format.records import ImageRecord


def pad(
    rows: Sequence[NDArray[np.generic]], length: int, value: int, dtype: type[np.generic] | None = None
) -> Tensor:
    """(B, length) of `rows` (T,), right-padded with `value`; dtype: None: that of the rows."""
    padded = np.full((len(rows), length), value, dtype=dtype or rows[0].dtype)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return torch.from_numpy(padded)


def join(values: Sequence[Tensor]) -> Tensor:
    """Tensors joined along dimension 0; where others differ (patches or images per sample), they are padded
    with zeros at the end, as the processors themselves do."""
    if len(values) == 1:
        return values[0]
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [wanted - size for size, wanted in zip(value.shape[1:], shape, strict=True)]
        padding = [part for amount in reversed(missing) for part in (0, amount)]
        padded.append(functional.pad(value, padding) if any(missing) else value)
    return torch.cat(padded)


def open_recorded(root: ImageRoot | Path | str, record: ImageRecord, *, recorded: str) -> Image.Image:
    """The image of `record`, decoded. RowRejected as `open_image`, and `changed_image` when the file's digest
    is not the record's; recorded: the source of that digest, for the message."""
    opened = open_image(root, record.path, record.sha256, record.content)
    if opened.sha256 != record.sha256:
        raise RowRejected(
            "changed_image",
            f"{record.path} is not the one the teacher saw: sha256 {opened.sha256[:12]} here, "
            f"{record.sha256[:12]} {recorded}",
        )
    return opened.image
