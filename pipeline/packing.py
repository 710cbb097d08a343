"""Packs: conversations about one image as one sequence, their common beginning computed once.

A pack is [prefix, rest of sample 1, rest of sample 2, ...]. A rest attends to the prefix and itself, and its
positions continue from the prefix's end, so its hidden states are those of the sample alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.format.spec import Kind, TargetSpec
from pipeline.samples import PreparedSample

_LONGEST = 3  # a pack is at most so many times its prefix: beyond, attention over other rests costs more


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The requests for one sample: the positions whose records are wanted, by kind.

    keys: the prefix key of every image, None where images are not shared. owned: for every image whether this
    sample has its visual and relation records.
    """

    keys: tuple[str | None, ...]
    owned: tuple[bool, ...]
    response: NDArray[np.int32] | None
    prompt: NDArray[np.int32] | None

    def positions(self, sample: PreparedSample, spec: TargetSpec) -> list[NDArray[np.int32]]:
        """Position arrays in the order response, prompt, each owned image."""
        parts = [part for part in (self.response, self.prompt) if part is not None]
        if "visual" in spec.targets:
            images = zip(sample.images, self.owned, strict=True)
            parts += [image.positions for image, owned in images if owned]
        return parts

    def kinds(self, spec: TargetSpec) -> list[Kind]:
        """The kind of each of these arrays."""
        kinds: list[Kind] = ["response"] if self.response is not None else []
        kinds += ["prompt"] if self.prompt is not None else []
        return kinds + (["visual"] * sum(self.owned) if "visual" in spec.targets else [])


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Samples whose first `prefix` ids, and all of whose images, are the same; of one sample prefix is 0.

    wanted: the requests for each sample; empty where nothing is captured.
    """

    samples: tuple[PreparedSample, ...]
    prefix: int = 0
    wanted: tuple[Wanted, ...] = ()

    def __len__(self) -> int:
        """Tokens of the packed sequence L."""
        return self.prefix + sum(len(sample) - self.prefix for sample in self.samples)

    @property
    def first(self) -> PreparedSample:
        """The sample whose prefix and pixels are used."""
        return self.samples[0]

    def __add__(self, other: Pack) -> Pack:
        """The pack of both, which share all images; the prefix is as long as all their ids agree."""
        agreed = [pack.prefix if len(pack.samples) > 1 else len(pack) for pack in (self, other)]
        shortest = min(agreed)
        differs = self.first.input_ids[:shortest] != other.first.input_ids[:shortest]
        return Pack(
            samples=self.samples + other.samples,
            prefix=int(np.argmax(differs)) if differs.any() else shortest,
            wanted=self.wanted + other.wanted,
        )

    def apart(self) -> list[Pack]:
        """Each sample as a pack of its own."""
        return [
            replace(self, samples=(sample,), prefix=0, wanted=self.wanted[place : place + 1])
            for place, sample in enumerate(self.samples)
        ]

    def join(self, values: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
        """Per-sample arrays (..., T) as one (..., L): the prefix of the first, then every rest."""
        rests = [value[..., self.prefix :] for value in values]
        return np.concatenate([values[0][..., : self.prefix], *rests], axis=-1)

    def split(self, hidden: Tensor) -> list[Tensor]:
        """(L, D) of the packed sequence as one (T, D) per sample."""
        if len(self.samples) == 1:
            return [hidden[: len(self)]]
        found, start = [], self.prefix
        for sample in self.samples:
            end = start + len(sample) - self.prefix
            found.append(torch.cat([hidden[: self.prefix], hidden[start:end]]))
            start = end
        return found

    def visible(self, length: int) -> NDArray[np.bool_]:
        """(length, length): whether query i attends to key j; padding attends only to itself."""
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


def make_pack(samples: Iterable[PreparedSample]) -> Pack:
    """The pack of samples that share all images."""
    first, *others = (Pack(samples=(sample,)) for sample in samples)
    for other in others:
        first += other
    return first


def pack_samples(samples: Sequence[Pack], keys: Sequence[str | None], limit: int) -> list[Pack]:
    """Packs of at most `limit` tokens, made of packs of one sample each.

    keys: what two samples must share to be packed (the key of the last image: it holds every earlier
    image and the ids between); None: never packed. A pack takes the place of its first sample.
    """
    open_packs: dict[str, int] = {}  # key -> its newest pack
    found: list[Pack] = []
    for single, key in zip(samples, keys, strict=True):
        if key is not None and key in open_packs:
            pack = found[open_packs[key]] + single
            if len(pack) <= min(limit, _LONGEST * pack.prefix):
                found[open_packs[key]] = pack
                continue
        if key is not None:
            open_packs[key] = len(found)
        found.append(single)
    return found


def batches(packs: Sequence[Pack], batch_tokens: int) -> list[list[int]]:
    """Indices of packs, cut into batches of similar length, longest first, at most batch_tokens padded.

    A pack over the budget is a batch of its own. Samples with and without images do not mix, nor do packs
    of one and of several samples. Depends on the samples alone: every worker forms the same batches.
    """

    def kind(pack: Pack) -> tuple[bool, bool]:
        return (not pack.first.images, len(pack.samples) == 1)

    found: list[list[int]] = []
    for index in sorted(range(len(packs)), key=lambda i: (kind(packs[i]), -len(packs[i]), i)):
        if found:
            longest = packs[found[-1][0]]
            fits = len(longest) * (len(found[-1]) + 1) <= batch_tokens
            if fits and kind(longest) == kind(packs[index]):
                found[-1].append(index)
                continue
        found.append([index])
    return found
