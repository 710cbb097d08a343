"""Relation records: per image a factor of chosen rank and precision, or the triangle of the Gram matrix.

A factor's column c is scale[c] * stored[:, c]; the first `wide` columns (they hold nearly all of the
norm) are stored as float16 (float32 where `precision` is full), the others as int8. The residual is that
of what is stored, quantisation included.

For R = F F^T + E with E orthogonal to F F^T (a truncated eigendecomposition; E = 0 for an exact factor)
and stored columns U in the span of F: <R, U U^T> = ||F^T U||^2, so that

    cos(R, U U^T) = ||F^T U||^2 / (||R|| ||U^T U||)

needs only (r, r) matrices. They are formed in float64 after scaling by the largest entry, so nothing
overflows for any finite float32 factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.codecs.topk import Arrays
from cache_schema.records import Relation
from cache_schema.spec import TargetSpec

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRelation:
    """One image as stored: `wide` (w, P) and `narrow` (r - w, P) columns with `scales` (r,) float32, or
    `triangle` (P (P + 1) / 2,) with one scale."""

    tokens: int
    residual: float
    norm: float
    scales: NDArray[np.float32]
    wide: NDArray[Any]
    narrow: NDArray[np.int8]
    triangle: NDArray[Any]


def encode_relation(relation: Relation, spec: TargetSpec) -> StoredRelation:
    """Store a factor (P, r) whose columns are orthogonal and fall in norm, or a Gram matrix (P, P).

    relation `factor`: the fewest bytes (over rank and number of wide columns) whose residual as stored
    is at most spec.relation_bound; where no rank up to spec.relation_max_rank reaches it, the largest
    with all columns wide, and the residual tells. relation `exact`: the triangle.
    """
    wide_type = np.float16 if spec.precision == "compact" else np.float32
    if spec.relation == "exact":
        return _encode_triangle(relation, wide_type)
    factor, unit = _scaled(_factor_of(relation)[:, : spec.relation_max_rank])
    wide, wide_scale = _quantise(factor, wide_type)
    narrow, narrow_scale = _quantise(factor, np.int8)
    rank, width, residual = _choose(
        factor,
        wide * wide_scale,
        wide * wide_scale if spec.precision == "full" else narrow * narrow_scale,
        norm=relation.norm / unit / unit,
        bound=spec.relation_bound,
    )
    if spec.precision == "full":
        width = rank
    return StoredRelation(
        tokens=len(factor),
        residual=residual,
        norm=relation.norm,
        scales=(np.concatenate([wide_scale[:width], narrow_scale[width:rank]]) * unit).astype(np.float32),
        wide=np.ascontiguousarray(wide[:, :width].T, wide_type),
        narrow=np.ascontiguousarray(narrow[:, width:rank].T, np.int8),
        triangle=np.zeros(0, wide_type),
    )


def _choose(
    factor: Float64, wide: Float64, narrow: Float64, *, norm: float, bound: float
) -> tuple[int, int, float]:
    """(rank, number of wide columns, residual) of the fewest bytes within `bound`."""
    if norm == 0.0:
        return 1, 1, 0.0
    energy = np.cumsum(np.square(np.square(factor).sum(axis=0)))
    enough = int(np.searchsorted(np.sqrt(energy), (1.0 - bound) * norm)) + 1
    most = min(factor.shape[1], enough + enough // 2 + 8)
    wide, narrow = wide[:, :most], narrow[:, :most]
    gain_wide = np.cumsum(np.square(factor.T @ wide).sum(axis=0))
    gain_narrow = np.cumsum(np.square(factor.T @ narrow).sum(axis=0))
    ranks = np.arange(1, most + 1)

    def residuals(width: int) -> Float64:
        """of the ranks width..most with `width` wide columns."""
        columns = np.concatenate([wide[:, :width], narrow[:, width:]], axis=1)
        square = np.square(columns.T @ columns)
        overlap = np.cumsum(np.cumsum(square, axis=0), axis=1).diagonal()
        gain = gain_narrow - gain_narrow[width - 1] + gain_wide[width - 1]
        gain[:width] = gain_wide[:width]
        cosine = gain[width - 1 :] / (norm * np.sqrt(overlap[width - 1 :]))
        found: Float64 = np.maximum(1.0 - cosine, 0.0)
        return found

    best = (most, most, float(residuals(most)[-1]))
    target = max(bound, 1.01 * best[2])
    for width in (1, 2, 4, 8, 16, 32, 64, 128):
        if width > most:
            break
        found = residuals(width)
        within = np.flatnonzero(found <= target)
        if len(within) and ranks[width - 1 + within[0]] + width < best[0] + best[1]:
            best = (int(ranks[width - 1 + within[0]]), width, float(found[within[0]]))
    return best


def _encode_triangle(relation: Relation, dtype: type[np.floating[Any]]) -> StoredRelation:
    if relation.gram is not None:
        gram, unit = _scaled(relation.gram)
    else:
        factor, root = _scaled(_factor_of(relation))
        gram, again = _scaled(factor @ factor.T)
        unit = root * root * again
    stored = gram.astype(dtype)
    kept = stored.astype(np.float64)
    size = float(np.linalg.norm(gram) * np.linalg.norm(kept))
    return StoredRelation(
        tokens=len(gram),
        residual=max(1.0 - float((gram * kept).sum()) / size, 0.0) if size else 0.0,
        norm=relation.norm,
        scales=np.array([unit], np.float32),
        wide=np.zeros((0, len(gram)), dtype),
        narrow=np.zeros((0, len(gram)), np.int8),
        triangle=stored[np.triu_indices(len(gram))],
    )


def _factor_of(relation: Relation) -> NDArray[Any]:
    """The factor (P, r), from the Gram matrix's eigenvectors where only that is given."""
    if relation.factor is not None:
        return relation.factor
    assert relation.gram is not None
    gram, unit = _scaled(relation.gram)
    values, vectors = np.linalg.eigh(gram)
    kept = values[::-1] > 0.0
    factor: NDArray[Any] = vectors[:, ::-1][:, kept] * np.sqrt(values[::-1][kept] * unit)
    return factor


def _scaled(matrix: NDArray[Any]) -> tuple[Float64, float]:
    """`matrix` over a power of two that brings its largest entry into (0.5, 1], and that power."""
    unit = 2.0 ** float(np.ceil(np.log2(np.abs(matrix).max(initial=0.0) or 1.0)))
    return matrix.astype(np.float64) / unit, unit


def _quantise(factor: Float64, dtype: Any) -> tuple[Float64, Float64]:
    """Columns as `dtype` holds them (as float64), and the scale of each: scale * column ~= factor."""
    largest = np.abs(factor).max(axis=0)
    largest = np.where(largest > 0.0, largest, 1.0)
    if dtype is np.int8:
        scale = (largest / 127).astype(np.float32).astype(np.float64)
        return np.clip(np.rint(factor / scale), -127, 127), scale
    scale = 2.0 ** np.ceil(np.log2(largest))
    return (factor / scale).astype(dtype).astype(np.float64), scale


def pack_relations(records: Sequence[StoredRelation]) -> Arrays:
    """The arrays of a block of images, flattened one image after the other."""
    return {
        "tokens": np.array([r.tokens for r in records], np.int32),
        "rank": np.array([len(r.wide) + len(r.narrow) for r in records], np.int32),
        "wide": np.array([len(r.wide) for r in records], np.int32),
        "residual": np.array([r.residual for r in records], np.float64),
        "norm": np.array([r.norm for r in records], np.float64),
        "scales": np.concatenate([r.scales for r in records]),
        "wide_columns": np.concatenate([r.wide.ravel() for r in records]),
        "narrow_columns": np.concatenate([r.narrow.ravel() for r in records]),
        "triangles": np.concatenate([r.triangle for r in records]),
    }


class RelationBlock:
    """The images of a block, decoded one at a time. `arrays` as `pack_relations` makes them."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._arrays = arrays
        tokens, rank, wide = (arrays[name].astype(np.int64) for name in ("tokens", "rank", "wide"))
        triangle = np.where(rank == 0, tokens * (tokens + 1) // 2, 0)
        sizes = {
            "scales": np.maximum(rank, 1),
            "wide_columns": tokens * wide,
            "narrow_columns": tokens * (rank - wide),
            "triangles": triangle,
        }
        self._ends = {name: np.cumsum(size) for name, size in sizes.items()}
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._arrays["tokens"])

    def __getitem__(self, image: int) -> Relation:
        """The relation of one image of the block, factor (P, r) or gram (P, P) in float32."""
        tokens = int(self._arrays["tokens"][image])
        residual, norm = float(self._arrays["residual"][image]), float(self._arrays["norm"][image])
        scales = self._part("scales", image)
        if self._arrays["rank"][image] == 0:
            gram = np.zeros((tokens, tokens), np.float32)
            gram[np.triu_indices(tokens)] = self._part("triangles", image).astype(np.float32) * scales[0]
            return Relation(residual=residual, norm=norm, gram=gram + np.triu(gram, 1).T)
        wide = self._part("wide_columns", image).reshape(-1, tokens)
        narrow = self._part("narrow_columns", image).reshape(-1, tokens)
        factor = np.concatenate([wide, narrow]).astype(np.float32) * scales[:, None]
        return Relation(residual=residual, norm=norm, factor=np.ascontiguousarray(factor.T))

    def stored(self, image: int) -> StoredRelation:
        """The record of one image as it is stored, so that it can pass into another block unchanged."""
        tokens = int(self._arrays["tokens"][image])
        return StoredRelation(
            tokens=tokens,
            residual=float(self._arrays["residual"][image]),
            norm=float(self._arrays["norm"][image]),
            scales=self._part("scales", image),
            wide=self._part("wide_columns", image).reshape(-1, tokens),
            narrow=self._part("narrow_columns", image).reshape(-1, tokens),
            triangle=self._part("triangles", image),
        )

    def __iter__(self) -> Iterator[Relation]:
        return (self[image] for image in range(len(self)))

    def _part(self, name: str, image: int) -> NDArray[Any]:
        end = int(self._ends[name][image])
        return self._arrays[name][end - int(self._sizes[name][image]) : end]
