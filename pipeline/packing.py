"""Packs: conversations about one image as one sequence, their common beginning computed once.

A pack is [prefix, rest of sample 1, rest of sample 2, ...]. A rest sees the prefix and itself, and its
positions go on from the prefix's end, so its hidden states are those of the sample on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.samples import PreparedSample

_LONGEST = 3  # a pack is at most so many times its prefix: beyond, attention over other rests costs more


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Samples whose first `prefix` ids, and all of whose images, are the same (prefix 0: one sample)."""

    samples: tuple[PreparedSample, ...]
    prefix: int = 0

    def __len__(self) -> int:
        """Tokens of the packed sequence L."""
        return self.prefix + sum(len(sample) - self.prefix for sample in self.samples)

    @property
    def first(self) -> PreparedSample:
        """The sample that brings the prefix and the pixels."""
        return self.samples[0]

    def join(self, values: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
        """Per-sample arrays (..., T) as one (..., L): the prefix of the first, then every rest."""
        rests = [value[..., self.prefix :] for value in values]
        return np.concatenate([values[0][..., : self.prefix], *rests], axis=-1)

    def split(self, hidden: Tensor) -> list[Tensor]:
        """(L, D) of the packed sequence as one (T, D) a sample."""
        if len(self.samples) == 1:
            return [hidden[: len(self)]]
        found, start = [], self.prefix
        for sample in self.samples:
            end = start + len(sample) - self.prefix
            found.append(torch.cat([hidden[: self.prefix], hidden[start:end]]))
            start = end
        return found

    def visible(self, length: int) -> NDArray[np.bool_]:
        """(length, length): whether query i sees key j; padding sees only itself."""
        part = np.zeros(length, dtype=np.int64)
        start = self.prefix
        for number, sample in enumerate(self.samples, start=1):
            part[start : start + len(sample) - self.prefix] = number
            start += len(sample) - self.prefix
        part[start:] = -1
        below: NDArray[np.bool_] = np.tri(length, dtype=bool)
        seen = (part[None, :] == part[:, None]) | (part[None, :] == 0)
        seen[start:] = False
        visible: NDArray[np.bool_] = (below & seen) | np.eye(length, dtype=bool)
        return visible


def pack_samples(
    samples: Sequence[PreparedSample], keys: Sequence[str | None], limit: int
) -> list[list[int]]:
    """Indices of samples, grouped into packs of at most `limit` tokens.

    keys: what two samples must share to be packed (the key of the last image: it holds every earlier
    image and the ids between); None: never packed.
    """
    groups: dict[str, list[list[int]]] = {}
    found: list[list[int]] = []
    for index, key in enumerate(keys):
        if key is not None and key in groups:
            members = groups[key][-1]
            pack = make_pack([samples[i] for i in [*members, index]])
            if len(pack) <= min(limit, _LONGEST * pack.prefix):
                members.append(index)
                continue
        found.append([index])
        if key is not None:
            groups.setdefault(key, []).append(found[-1])
    return found


def make_pack(samples: Sequence[PreparedSample]) -> Pack:
    """The pack of samples that share all images; the prefix is as long as their ids agree."""
    if len(samples) == 1:
        return Pack(samples=tuple(samples))
    shortest = min(len(sample) for sample in samples)
    first = samples[0].input_ids[:shortest]
    differs = np.zeros(shortest, dtype=bool)
    for sample in samples[1:]:
        differs |= sample.input_ids[:shortest] != first
    prefix = int(np.argmax(differs)) if differs.any() else shortest
    return Pack(samples=tuple(samples), prefix=prefix)
