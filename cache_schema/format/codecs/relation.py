"""Relation records: per image a quantised factor of the Gram matrix, or its triangle.

With orthogonal columns f_c of squared norm e_c, R ~= sum_c f_c f_c^T. Rounding column c in steps s_c adds
about e_c P s_c^2 / 6 to the squared error of R, leaving it out adds e_c^2. The fewest bits for a given
error (reverse water filling, Cover and Thomas, Elements of Information Theory, 10.3.3) keep the columns
with e_c^2 above a level and give each the same error, that level: s_c = sqrt(6 level / (P e_c)). So rank
and precision follow from one number, chosen so that the residual meets the bound. Columns are stored as
integer multiples of the step, which are small and compress well:

    q = zigzag(n) = 2 n for n >= 0, -2 n - 1 for n < 0          (uint16)
    U[:, c] = scale[c] * n[:, c]

The residual is that of the stored record. For R = F F^T + E with E orthogonal to F F^T (a truncated
eigendecomposition; E = 0 for an exact factor) and U in the span of F, <R, U U^T> = ||F^T U||^2, so that

    cos(R, U U^T) = ||F^T U||^2 / (||R|| ||U^T U||)

needs only (r, r) matrices, formed in float64 after scaling by the largest entry: nothing overflows for
any finite float32 factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.format.codecs.topk import Arrays
from cache_schema.format.records import Relation, StoredRelation
from cache_schema.format.spec import TargetSpec

Float64 = NDArray[np.float64]

_MOST_STEPS = 32767


def encode_relation(relation: Relation, spec: TargetSpec) -> StoredRelation:
    """Store a factor (P, r) with orthogonal columns of decreasing norm, or a Gram matrix (P, P).

    relation `factor`: about the fewest bytes whose stored residual is at most spec.relation_bound; where
    spec.relation_max_rank or the given factor cannot reach it, about the residual that they reach. precision
    `full`: float32 columns, the fewest within the bound. relation `exact`: the triangle.
    """
    compact = spec.precision == "compact"
    if spec.relation == "exact":
        return _encode_triangle(relation, np.float16 if compact else np.float32)
    factor, unit = _scaled(_factor_of(relation)[:, : spec.relation_max_rank])
    norm = relation.norm / unit / unit
    encode = _encode_steps if compact else _encode_floats
    columns, scales, residual = encode(factor, norm, spec.relation_bound)
    return StoredRelation(
        tokens=len(factor),
        residual=residual,
        norm=relation.norm,
        scales=(scales * unit).astype(np.float32),
        columns=np.ascontiguousarray(columns.T),
        triangle=np.zeros(0, np.float16 if compact else np.float32),
    )


def _encode_steps(factor: Float64, norm: float, bound: float) -> tuple[NDArray[np.uint16], Float64, float]:
    """Columns (P, r) in steps, their scales and the residual."""
    energy = np.square(np.square(factor).sum(axis=0))  # (r,), the e_c^2
    target = max(bound, 1.02 * _residual(factor, factor, norm))
    ranks = np.arange(1, len(energy) + 1)
    level = float(np.max((np.cumsum(energy) - np.square((1.0 - target) * norm)) / ranks))
    steps, scales, residual = np.zeros((len(factor), 1)), np.ones(1), 0.0
    for _ in range(8):  # exact for the rounding noise of many steps; coarse columns need a correction
        kept = max(int((energy > level).sum()), 1)
        if energy[0] == 0.0 or level <= 0.0:
            break
        largest = np.abs(factor[:, :kept]).max(axis=0)
        wanted = np.sqrt(6.0 * level / len(factor) / np.sqrt(energy[:kept]))
        scales = np.maximum(wanted, largest / _MOST_STEPS).astype(np.float32).astype(np.float64)
        steps = np.rint(factor[:, :kept] / scales)
        residual = _residual(factor, steps * scales, norm)
        if residual <= target:
            break
        level *= 0.97 * target / residual
    return _zigzag(steps), scales, residual


def _encode_floats(factor: Float64, norm: float, bound: float) -> tuple[NDArray[np.float32], Float64, float]:
    energy = np.cumsum(np.square(np.square(factor).sum(axis=0)))
    kept = min(int(np.searchsorted(np.sqrt(energy), (1.0 - bound) * norm)) + 1, factor.shape[1])
    columns = factor[:, :kept].astype(np.float32)
    return columns, np.ones(kept), _residual(factor, columns.astype(np.float64), norm)


def _residual(factor: Float64, columns: Float64, norm: float) -> float:
    size = norm * float(np.linalg.norm(columns.T @ columns))
    return max(1.0 - float(np.square(factor.T @ columns).sum()) / size, 0.0) if size else 0.0


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
        columns=np.zeros((0, len(gram)), np.uint16 if dtype is np.float16 else np.float32),
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
    """`matrix` divided by the power of two that brings its largest entry into (0.5, 1], and that power."""
    unit = 2.0 ** float(np.ceil(np.log2(float(np.abs(matrix).max(initial=0.0)) or 1.0)))
    return matrix.astype(np.float64) / unit, unit


def _zigzag(steps: Float64) -> NDArray[np.uint16]:
    return np.where(steps >= 0, 2 * steps, -2 * steps - 1).astype(np.uint16)


def pack_relations(records: Sequence[StoredRelation]) -> Arrays:
    """The arrays of a block of images, flattened one image after the other."""
    return {
        "tokens": np.array([r.tokens for r in records], np.int32),
        "rank": np.array([r.rank for r in records], np.int32),
        "residual": np.array([r.residual for r in records], np.float64),
        "norm": np.array([r.norm for r in records], np.float64),
        "scales": np.concatenate([r.scales for r in records]),
        "columns": np.concatenate([r.columns.ravel() for r in records]),
        "triangles": np.concatenate([r.triangle for r in records]),
    }


class RelationBlock:
    """The images of a block, decoded one at a time. `arrays` as `pack_relations` makes them."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._arrays = arrays
        tokens, rank = arrays["tokens"].astype(np.int64), arrays["rank"].astype(np.int64)
        sizes = {
            "scales": np.maximum(rank, 1),
            "columns": tokens * rank,
            "triangles": np.where(rank == 0, tokens * (tokens + 1) // 2, 0),
        }
        for name, size in sizes.items():  # one by one, so that no sum wraps around
            present = len(arrays[name])
            if ((size < 0) | (size > present)).any() or size.sum() != present:
                raise ValueError(f"relation/{name}: {present:,} numbers, which are not those of its images")
        self._ends = {name: np.cumsum(size) for name, size in sizes.items()}
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._arrays["tokens"])

    def tokens_of(self, image: int) -> int:
        """The visual tokens P of an image."""
        return int(self._arrays["tokens"][image])

    def __getitem__(self, image: int) -> Relation:
        """The relation of one image of the block, factor (P, r) or gram (P, P) in float32."""
        return self.stored(image).decode()

    def stored(self, image: int) -> StoredRelation:
        """The record of one image as it is stored. It shares the memory of the block."""
        tokens = self.tokens_of(image)
        return StoredRelation(
            tokens=tokens,
            residual=float(self._arrays["residual"][image]),
            norm=float(self._arrays["norm"][image]),
            scales=self._part("scales", image),
            columns=self._part("columns", image).reshape(-1, tokens),
            triangle=self._part("triangles", image),
        )

    def __iter__(self) -> Iterator[Relation]:
        return (self[image] for image in range(len(self)))

    def _part(self, name: str, image: int) -> NDArray[Any]:
        end = int(self._ends[name][image])
        return self._arrays[name][end - int(self._sizes[name][image]) : end]
