"""Relation records on a CPU, image after image: of each as few products as it needs.

Where 64 columns are enough, they are found by orthogonal iteration in a few more columns than the record
will have, with the best factor in them (Rayleigh and Ritz; Saad, Numerical Methods for Large Eigenvalue
Problems, 2011, chapter 5). Their steps are tried by products of (C, C) instead of (P, P): what rounding
adds to the error of an orthogonal factor F, |F D^T + D F^T + D D^T|^2 for U = F + D, needs F^T D and D^T D
alone. What is stored is then compared with R as on a device. Other images take the device's way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.relation_batch import (
    OVERSAMPLING,
    TRIES,
    as_stored,
    factors_of,
    level_of,
    orthonormal,
    rounded,
    start_of,
    steps_of,
)

_FEW_COLUMNS = 64
_SLACK = 0.25  # columns must leave room for the rounding of what is stored
_ROUNDS = 4
_HOPELESS = 4.0  # more columns are needed where so few cannot come nearer than this many bounds
_BLOCK = 192  # rows or columns of a block of a symmetric or triangular product


def gram_of(exact: Tensor) -> Tensor:
    """G G^T (B, P, P) of exact (B, P, D); one half is multiplied, the other is its mirror image."""
    gram = exact.new_empty(len(exact), exact.shape[1], exact.shape[1])
    for one, made in zip(exact, gram, strict=True):
        for start, end in _blocks(len(one)):
            torch.mm(one[start:], one[start:end].T, out=made[start:, start:end])
            made[start:end, end:] = made[end:, start:end].T
    return gram


def times_lower(inputs: Tensor, lower: Tensor) -> Tensor:
    """inputs (B, P, D) times a lower triangular matrix (D, D), whose blocks of zeros are skipped."""
    rows = inputs.flatten(0, 1)
    found = torch.empty_like(rows)
    for start, end in _blocks(len(lower)):
        torch.mm(rows[:, start:], lower[start:, start:end], out=found[:, start:end])
    return found.view(inputs.shape)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + _BLOCK, length)) for start in range(0, length, _BLOCK)]


def quantised_by_need(
    gram: Tensor, tokens: Tensor, norm: Tensor, *, bound: float, max_rank: int
) -> dict[str, Tensor]:
    """As relation_batch.quantised, on a CPU."""
    found = []
    for one, count, size in zip(gram, tokens.tolist(), norm.tolist(), strict=True):
        whole = one[None, :count, :count] / (size or 1.0)
        record = _few_steps(whole, bound) if min(count, max_rank) > _FEW_COLUMNS else None
        if record is None:
            given = torch.tensor([count])
            factored = factors_of(whole, given, bound, max_rank)
            record = steps_of(whole, *factored, given, bound, look=True)
        found.append(record | {"scales": record["scales"] * size**0.5 if size else record["scales"]})
    columns = max(record["scales"].shape[1] for record in found)
    every = {name: torch.cat([record[name] for record in found]) for name in ("rank", "residual")}
    every["columns"] = torch.zeros(len(gram), columns, gram.shape[1], dtype=torch.int16)
    every["scales"] = torch.ones(len(gram), columns)
    for place, record in enumerate(found):
        _, rank, count = record["columns"].shape
        every["columns"][place, :rank, :count] = record["columns"][0]
        every["scales"][place, :rank] = record["scales"][0]
    return every


def _few_columns(whole: Tensor, bound: float) -> tuple[Tensor, float] | None:
    """F (1, P, C) of whole (1, P, P), with orthogonal columns that fall in norm, and 1 - cos(R, F F^T) to
    about 1e-8; None unless 64 columns leave room for rounding.

    The difference of R and its part in a basis is orthogonal to that part, so that the norms say how much
    is missing.
    """
    basis = orthonormal(whole @ start_of(whole.shape[1], _FEW_COLUMNS + OVERSAMPLING, whole.device))
    for _ in range(_ROUNDS):
        pushed = whole @ basis
        inner = (basis.mT @ pushed).double()
        values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
        values, vectors = values[0].flip(0).clamp(min=0.0), vectors.flip(2).float()
        missing = (1 - values.square().cumsum(0)) / 2
        needed = int((missing > _SLACK * bound).sum()) + 1
        if needed <= min(_FEW_COLUMNS, len(values)):
            kept = min(_FEW_COLUMNS, len(values))
            factor = (basis @ vectors[:, :, :kept]) * values[:kept].sqrt().float()
            return factor, max(float(missing[kept - 1]), 0.0)
        if missing[-1] > _HOPELESS * bound:
            return None
        basis = orthonormal(pushed @ vectors[:, :, : needed + OVERSAMPLING])
    return None


def _few_steps(whole: Tensor, bound: float) -> dict[str, Tensor] | None:
    """The record of whole (1, P, P) of norm 1 in at most 64 columns; None if these do not meet the bound."""
    found = _few_columns(whole, bound)
    if found is None:
        return None
    factor, missing = found
    energy = factor.square().sum(dim=1).double()
    tokens, triangular = torch.tensor([whole.shape[1]]), torch.zeros(1, dtype=torch.bool)
    entries = torch.full_like(energy, whole.shape[1])
    allowed = torch.tensor([2 * (bound - missing)], dtype=torch.float64)
    level = level_of(energy, entries, tokens, triangular, allowed)
    kept = int((energy.square() > level / 16).sum())  # the level will not fall by so much
    missing += float(energy[0, kept:].square().sum()) / 2
    factor, energy = factor[:, :, :kept].contiguous(), energy[:, :kept]
    best = None
    for _ in range(2 * TRIES):
        steps, scales = rounded(factor, energy, tokens, triangular, level)
        stored = steps * scales[:, None, :]
        residual = missing + _added(factor[0], energy[0], stored[0]) / 2
        if residual <= bound:
            told = _residual_of(whole, stored)
            missing += float(told) - residual  # what the products of (C, C) do not see
            residual = float(told)
            if residual <= bound:
                best = as_stored(steps, scales, told)
                if residual >= 0.97 * bound:
                    break
        level = level * min(max(0.99 * bound / max(residual, 1e-300), 0.25), 2.0)
    return best


def _residual_of(whole: Tensor, stored: Tensor) -> Tensor:
    """As relation_batch.residual_of of one image; from U^T U, and one half of what is symmetric."""
    columns = stored[0]
    other = columns.T / torch.linalg.vector_norm(columns.T @ columns)
    apart = 0.0
    for start, end in _blocks(len(columns)):
        block = torch.addmm(whole[0, start:, start:end], columns[start:], other[:, start:end], beta=-1.0)
        sizes = torch.linalg.vector_norm(block, dim=1).double().square()
        apart += float(2 * sizes.sum() - sizes[: end - start].sum())
    return torch.tensor([apart / 2], dtype=torch.float64)


def _added(factor: Tensor, energy: Tensor, stored: Tensor) -> float:
    """|F F^T - U U^T|^2 of F (P, C) with orthogonal columns of squared norms `energy` (C,), and U (P, C)."""
    moved = stored - factor
    across, own = (factor.T @ moved).double(), (moved.T @ moved).double()
    both = energy @ own.diagonal() + (across * across.T).sum() + 2 * (across * own).sum()
    return float(2 * both + own.square().sum())
