"""Relation records for display."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache_schema.format.records import Relation

Float64 = NDArray[np.float64]


def principal_factor(relation: Relation, rank: int) -> Float64:
    """(P, r) factor of the record with at most `rank` columns, strongest first, each up to sign."""
    if relation.factor is None:
        assert relation.gram is not None
        values, vectors = np.linalg.eigh(relation.gram.astype(np.float64))
        strongest = np.argsort(values)[::-1][:rank]
        return np.asarray(vectors[:, strongest] * np.sqrt(np.maximum(values[strongest], 0.0)))
    factor = relation.factor.astype(np.float64)
    # U^T U is only (r, r): its eigenvectors turn the columns of U into the principal ones.
    values, vectors = np.linalg.eigh(factor.T @ factor)
    return np.asarray(factor @ vectors[:, np.argsort(values)[::-1][:rank]])


def similarity(factor: Float64) -> Float64:
    """(P, P) cosine of the tokens' logits, in [-1, 1], with their mean over the image removed; otherwise all
    pairs look alike, since the first eigenvalue of R holds nearly all of its energy."""
    rows = factor - factor.mean(axis=0)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return np.asarray(np.clip(unit @ unit.T, -1.0, 1.0))


def pooled(matrix: Float64, rows: int, columns: int) -> Float64:
    """The matrix averaged down to at most rows x columns."""
    for axis, size in ((0, rows), (1, columns)):
        if matrix.shape[axis] > size:
            matrix = np.stack(
                [part.mean(axis=axis) for part in np.array_split(matrix, size, axis=axis)], axis=axis
            )
    return matrix
