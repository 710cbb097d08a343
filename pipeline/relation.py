"""The relation target of an image: R = Z Z^T of its raw logits, without forming Z for a linear head.

For a linear head Z = s [H, 1] [W, b]^T, so R = s^2 [H, 1] (A^T A) [H, 1]^T with A = [W, b]. With
C^T C = A^T A, the matrix G = s [H, 1] C^T (P, D) is an exact factor: R = G G^T. For the use of R see
pipeline.relation_batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.format.codecs.relation import encode_relation
from cache_schema.format.records import Relation, StoredRelation
from cache_schema.format.spec import TargetSpec
from models.head import Head
from pipeline.relation_batch import (
    MOST_COLUMNS,
    OVERSAMPLING,
    leading,
    norm_of,
    quantised,
    residual_of,
    turned,
)
from pipeline.relation_by_need import gram_of, quantised_by_need, times_lower

_COLUMNS = 8192  # vocabulary entries per chunk where the logits are needed
_RANKS = (64, MOST_COLUMNS)  # of the factor of one image; then all
_ALIKE = 128  # images whose numbers of tokens differ by less are processed together
_ENTRIES = 1 << 26  # of the Gram matrices processed together


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Images processed together: their numbers in the batch, and their tokens."""

    images: NDArray[np.int64]
    tokens: NDArray[np.int64]


class RelationMaker:
    """Makes Relation records; holds C (D, D) float32 for a linear head."""

    def __init__(self, head: Head, spec: TargetSpec) -> None:
        self._head = head
        self._spec = spec
        self._root = None if head.softcap is not None else root_of(head)
        root = self._root
        self._lower = root is not None and by_need(root.device) and not bool(root.triu(1).any())

    def __call__(self, hidden: Tensor) -> Relation:
        """The record of one image's hidden (P, D), not yet rounded.

        relation `factor`: columns orthogonal and falling in norm, 64 of them, 256 or all (at most
        relation_max_rank), the fewest of these within a quarter of the bound. `exact`: the Gram matrix.
        """
        with torch.inference_mode():
            gram, unit = self._grams(hidden[None], hidden.new_ones((1, len(hidden)), dtype=torch.bool))
            scale = float(unit) ** 2
            if self._spec.relation == "exact":
                norm = scale * float(norm_of(gram))
                return Relation(residual=0.0, norm=norm, gram=(gram[0] * scale).cpu().numpy())
            factor, residual, norm = truncate(
                gram[0], bound=self._spec.relation_bound / 4, max_rank=self._spec.relation_max_rank
            )
            factor *= float(unit)
            return Relation(residual=residual, norm=scale * norm, factor=factor.cpu().numpy())

    def batch(
        self, states: Tensor, images: Sequence[NDArray[np.integer]]
    ) -> list[tuple[Group, dict[str, Tensor]]]:
        """The records of a batch's images as tensors on the device, group by group; see `records`.

        states (M, D): hidden states of the batch; images: of each image its rows of them (P,). `finite` (B,):
        whether an image's states are finite; others count as zeros.
        """
        found = []
        with torch.inference_mode():
            for group in groups_of([len(image) for image in images]):
                index = np.zeros((len(group.images), int(group.tokens.max())), dtype=np.int64)
                for place, image in enumerate(group.images):
                    index[place, : group.tokens[place]] = images[image]
                found.append((group, self._group(states, index, group.tokens)))
        return found

    def stored(self, hidden: Tensor, spec: TargetSpec) -> StoredRelation:
        """The record of one image's hidden (P, D) as a build with another spec stores it."""
        maker = copy(self)
        maker._spec = spec
        ((group, tensors),) = maker.batch(hidden, [np.arange(len(hidden))])
        arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        ((record, _),) = maker.records(group, arrays)
        return record if isinstance(record, StoredRelation) else encode_relation(record, spec)

    def records(
        self, group: Group, arrays: Mapping[str, NDArray[np.generic]]
    ) -> list[tuple[Relation | StoredRelation, bool]]:
        """The records of a group's images, and whether each is of finite states, from the host's arrays."""
        found: list[tuple[Relation | StoredRelation, bool]] = []
        for place, tokens in enumerate(group.tokens):
            norm, finite = float(arrays["norm"][place]), bool(arrays["finite"][place])
            record: Relation | StoredRelation
            if "gram" in arrays:
                gram = arrays["gram"][place, :tokens, :tokens].astype(np.float32)
                record = Relation(residual=0.0, norm=norm, gram=gram)
            elif "factor" in arrays:
                rank = int(arrays["rank"][place])
                factor = arrays["factor"][place, :tokens, :rank].astype(np.float32)
                record = Relation(residual=float(arrays["residual"][place]), norm=norm, factor=factor)
            else:
                rank = int(arrays["rank"][place])
                record = StoredRelation(
                    tokens=int(tokens),
                    residual=float(arrays["residual"][place]),
                    norm=norm,
                    scales=arrays["scales"][place, :rank].astype(np.float32),
                    columns=arrays["columns"][place, :rank, :tokens].astype(np.uint16),
                    triangle=np.zeros(0, np.float16),
                )
            found.append((record, finite))
        return found

    def _group(
        self, states: Tensor, index: NDArray[np.int64], tokens: NDArray[np.int64]
    ) -> dict[str, Tensor]:
        """The tensors of the images whose rows of `states` are index (B, P), the first `tokens` of each."""
        count = on_device(tokens, states.device)
        real = torch.arange(index.shape[1], device=states.device) < count[:, None]
        hidden = states.index_select(0, on_device(index.ravel(), states.device)).unflatten(0, index.shape)
        finite = (_largest(hidden, 2).isfinite() | ~real).all(dim=1)
        kept = real & finite[:, None]
        if not by_need(hidden.device) or not bool(kept.all()):
            hidden = hidden.masked_fill(~kept[:, :, None], 0.0)
        gram, unit = self._grams(hidden, real)
        count, scale = count.to(gram.device), unit.double().square()
        norm = norm_of(gram)
        fields = {"finite": finite, "norm": norm * scale}
        if self._spec.relation == "exact":
            return fields | {"gram": (gram * scale[:, None, None]).float()}
        bound, most = self._spec.relation_bound, self._spec.relation_max_rank
        if self._spec.precision == "full":
            factor, rank, residual, _ = truncated(gram, bound=bound / 4, max_rank=most)
            return fields | {"factor": factor * unit[:, None, None], "rank": rank, "residual": residual}
        round_off = quantised_by_need if by_need(gram.device) else quantised
        stored = round_off(gram, count, norm, bound=bound, max_rank=most)
        stored["scales"] *= unit[:, None]
        return fields | stored

    def _grams(self, hidden: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """R / unit^2 (B, P, P) float32 of hidden (B, P, D), zero where not real (B, P), and unit (B,).

        The unit is a power of two about the size of the exact factor, so that nothing overflows.
        """
        if self._root is None:
            gram = _chunked_gram(self._head, hidden, real)
            unit = _power_of_two(_largest(gram, (1, 2)).sqrt())
            gram = (gram / unit.double().square()[:, None, None]).float()
        else:
            inputs = hidden.to(self._root.device).float()
            if self._head.bias is not None:
                inputs = torch.cat([inputs, real.to(inputs.device, inputs.dtype)[:, :, None]], dim=2)
            exact = times_lower(inputs, self._root) if self._lower else inputs @ self._root
            unit = _power_of_two(_largest(exact, (1, 2)))
            exact /= unit[:, None, None]
            gram = gram_of(exact) if by_need(exact.device) else exact @ exact.mT
        if gram.device.type == "mps":  # no float64 there
            return gram.cpu(), unit.cpu()
        return gram, unit


def by_need(device: torch.device) -> bool:
    """Whether what an image needs decides what is computed: where nothing is gained by not looking."""
    return device.type == "cpu"


def on_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy of the array on a device; nothing waits for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def groups_of(lengths: Sequence[int]) -> list[Group]:
    """Images of about the same number of tokens together, as many as their Gram matrices allow."""
    groups: list[list[int]] = []
    for image in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups:
            most = lengths[groups[-1][0]]
            fits = (len(groups[-1]) + 1) * most**2 <= _ENTRIES
            if fits and most - lengths[image] < _ALIKE:
                groups[-1].append(image)
                continue
        groups.append([image])
    return [
        Group(images=np.array(group), tokens=np.array([lengths[image] for image in group]))
        for group in groups
    ]


def root_of(head: Head) -> Tensor:
    """C^T (D, D) float32 with C^T C = s^2 A^T A, A = [W, b] over the real vocabulary; (D + 1) with a bias.

    Cholesky in float64, or the eigendecomposition where A^T A is singular (V < D).
    """
    weight = head.weight[: head.columns]
    bias = None if head.bias is None else head.bias[: head.columns]
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device  # no float64 there
    width = weight.shape[1] + (bias is not None)
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    with torch.inference_mode():
        for start in range(0, len(weight), _COLUMNS):
            piece = weight[start : start + _COLUMNS].to(device).double()
            if bias is not None:
                piece = torch.cat([piece, bias[start : start + _COLUMNS, None].to(device).double()], dim=1)
            gram.addmm_(piece.T, piece)
        gram *= head.logit_scale**2
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(gram)
        if int(failed):
            values, vectors = torch.linalg.eigh(gram)
            root = vectors * values.clamp(min=0.0).sqrt()
        return root.float().to(weight.device)


def truncate(gram: Tensor, *, bound: float, max_rank: int) -> tuple[Tensor, float, float]:
    """`truncated` of one R (P, P): U (P, r), its residual and the norm of R."""
    factor, rank, residual, norm = truncated(gram[None], bound=bound, max_rank=max_rank)
    return factor[0, :, : int(rank)], float(residual), float(norm)


def truncated(gram: Tensor, *, bound: float, max_rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each R (B, P, P) float32 the leading part U (B, P, C), zero from its `rank` (B,) on, the residual
    1 - cos(R, U U^T) (B,) and the norm of R (B,).

    Columns of U are orthogonal and fall in norm. Ranks are 64, 256 or all, at most max_rank: the first with a
    residual within `bound`. The images that need more go on together; which do is the only wait for a device.
    """
    norm = norm_of(gram)
    whole = gram / torch.where(norm > 0, norm, 1.0).float()[:, None, None]
    left = torch.arange(len(gram), device=gram.device)
    factor, rank, residual = whole[:, :, :0], torch.zeros_like(left), torch.zeros_like(norm)
    limit = min(gram.shape[1], max_rank)
    for columns in sorted({min(columns, limit) for columns in (*_RANKS, limit)}):
        part = whole[left]
        if 3 * columns < gram.shape[1]:
            found = turned(leading(part, columns + OVERSAMPLING))[:, :, :columns]
        else:
            values, vectors = torch.linalg.eigh(part)
            found = (vectors.flip(2) * values.flip(1).clamp(min=0.0).sqrt()[:, None, :])[:, :, :columns]
        factor = torch.nn.functional.pad(factor, (0, columns - factor.shape[2]))
        factor[left], rank[left], residual[left] = found, columns, residual_of(part, found)
        left = left[residual[left] > bound]
        if not len(left):
            break
    return factor * norm.sqrt().float()[:, None, None], rank, residual, norm


def _largest(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The largest magnitude over `dim`, without a copy of the magnitudes."""
    return torch.maximum(values.amax(dim=dim), -values.amin(dim=dim))


def _power_of_two(sizes: Tensor) -> Tensor:
    """The power of two (B,) float32 that brings each size into [0.5, 1); 1 for 0."""
    return torch.ldexp(torch.ones_like(sizes, dtype=torch.float32), torch.frexp(sizes).exponent)


def _chunked_gram(head: Head, hidden: Tensor, real: Tensor) -> Tensor:
    """R (B, P, P) float64 of a head that is not linear, from chunks of its logits."""
    count, tokens, width = hidden.shape
    device = torch.device("cpu") if hidden.device.type == "mps" else hidden.device
    gram = torch.zeros(count, tokens, tokens, dtype=torch.float64, device=device)
    for start in range(0, head.columns, _COLUMNS):
        end = min(start + _COLUMNS, head.columns)
        piece = Head(
            weight=head.weight[start:end],
            vocab_size=end - start,
            bias=None if head.bias is None else head.bias[start:end],
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        )
        logits = piece.logits(hidden.reshape(-1, width)).unflatten(0, (count, tokens))
        logits = logits * real.to(logits.device)[:, :, None]
        gram += (logits @ logits.mT).to(device)
    return gram
