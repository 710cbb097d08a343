"""Relation records of a batch of images, rounded to steps on the device that made their Gram matrices.

There are two factors of R (P, P); the one that takes fewer bits is stored. Leading columns, by
orthogonal iteration with Cholesky factors of small Gram matrices (Halko, Martinsson and Tropp, 2011) and
Nystrom's formula; and the Cholesky factor of R, which needs no rank and whose half is zero, for spectra so
flat that hundreds of columns would be needed. What both become follows cache_schema.format.codecs.relation.

R counts with its norm alone: an error E of it moves 1 - cos by at most (|E| / |R|)^2 / 2, so float32 (1e-6
of the norm) leaves 1e-12 where the bound is 1e-5. Cholesky factors are in float64, where no shift that
matters is needed to keep them from breaking down. The residual is that of what is stored, taken from
differences of normalised matrices, since 1 - cos as such has no digits left under 1e-7.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_COLUMNS = 256
"""Leading columns at most; a Cholesky factor of 729 tokens takes fewer bytes from there on."""

OVERSAMPLING = 16
TRIES = 6
"""Levels tried until the residual is as asked."""

_ROUNDS = 3
_JITTER = 1e-3  # of the squared error that the bound allows, spent on keeping R positive definite
_MOST_STEPS = 32767.0
_ENTROPY = 2.85  # 2 pi e / 6: steps of a normal number of variance v take about log2(1 + 2 pi e v) / 2 bits


def quantised(
    gram: Tensor, tokens: Tensor, norm: Tensor, *, bound: float, max_rank: int
) -> dict[str, Tensor]:
    """The stored factors of gram (B, P, P) float32 and norm (B,), zero beyond the first `tokens` (B,) rows of
    each.

    Of each image: `columns` (B, C, P) int16, the bits of uint16 steps, sorted so that the `rank` (B,) first
    ones are those that count; `scales` (B, C); `residual` (B,), 1 - cos(R, U U^T) of U as stored. It is at
    most `bound` unless max_rank or the 16 bits of a step forbid it. Nothing waits for the device: off the
    CPU every image goes through all of it. Only with a max_rank under P one batched eigenproblem does.
    """
    unit = torch.where(norm > 0, norm, 1.0)[:, None, None]
    whole = gram / unit.float()
    found = steps_of(whole, *factors_of(whole, tokens, bound, max_rank), tokens, bound)
    found["scales"] = found["scales"] * unit.sqrt()[:, 0].float()
    return found


def norm_of(gram: Tensor) -> Tensor:
    """The norm (B,) float64 of gram (B, P, P), from those of its rows in its dtype: no copy in float64."""
    rows = torch.linalg.vector_norm(gram, dim=2)
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norm


def leading(whole: Tensor, columns: int) -> Tensor:
    """U (B, P, columns) with U U^T near the best of its rank for `whole` (B, P, P) of norm 1 (or 0).

    The columns are nearly orthogonal and fall in norm about as the eigenvalues do. From a fixed start, so
    that equal images get equal records.
    """
    basis = start_of(whole.shape[1], columns, whole.device).expand(len(whole), -1, -1)
    for _ in range(_ROUNDS):
        basis = orthonormal(whole @ basis)
    pushed = (whole @ basis).double()
    inner = basis.double().mT @ pushed
    root = _cholesky((inner + inner.mT) / 2, 1e-7)
    factor: Tensor = torch.linalg.solve_triangular(root.mT, pushed, upper=True, left=False)
    return factor.float()


def turned(factor: Tensor) -> Tensor:
    """U Q (B, P, C) with orthogonal columns that fall in norm, Q orthogonal, of U (B, P, C)."""
    wide = factor.double()
    turn: Tensor = torch.linalg.eigh(wide.mT @ wide).eigenvectors
    return (wide @ turn.flip(2)).float()


def residual_of(whole: Tensor, factor: Tensor) -> Tensor:
    """1 - cos(R, U U^T) (B,) float64 of whole (B, P, P) of norm 1 and factor (B, P, C); 0 if both are 0."""
    made = factor @ factor.mT
    size = torch.linalg.vector_norm(made, dim=(1, 2), keepdim=True)
    made.div_(torch.where(size > 0, size, 1.0)).sub_(whole)
    apart: Tensor = torch.linalg.vector_norm(made, dim=(1, 2))
    return apart.double().square() / 2


def factors_of(whole: Tensor, tokens: Tensor, bound: float, max_rank: int) -> tuple[Tensor, Tensor]:
    """The factor (B, P, C) of each image that takes fewer bits, and whether that is Cholesky's (B,)."""
    width = whole.shape[1]
    columns = min(MOST_COLUMNS, width, max_rank)
    factor = leading(whole, min(columns + OVERSAMPLING, width))
    if max_rank < width:
        return turned(factor)[:, :, :columns], torch.zeros(len(whole), dtype=torch.bool, device=whole.device)
    factor = factor[:, :, :columns]
    missing = residual_of(whole, factor)
    places = torch.arange(width, device=whole.device)
    real = places < tokens[:, None]  # (B, P)
    jitter = (2 * bound * _JITTER / width) ** 0.5
    triangle = _cholesky(whole.double(), jitter).float() * real[:, None, :] * real[:, :, None]
    factor = torch.nn.functional.pad(factor, (0, width - columns))
    bits = []
    for one, cut in ((factor, False), (triangle, True)):
        triangular = torch.full_like(missing, cut, dtype=torch.bool)
        entries = _entries(tokens, triangular, width)
        energy = one.square().sum(dim=1).double()
        left = torch.full_like(missing, bound) if cut else (bound - missing).clamp(min=0.01 * bound)
        level = level_of(energy, entries, tokens, triangular, 2 * left)
        ratio = energy.square() * tokens[:, None] / (entries.clamp(min=1) * level[:, None])
        bits.append((entries * torch.log2(1 + _ENTROPY * ratio)).sum(dim=1))
    triangular = ((missing > 0.9 * bound) | (bits[1] < bits[0])) & (whole.amax(dim=(1, 2)) > 0)
    return torch.where(triangular[:, None, None], triangle, factor), triangular


def steps_of(
    whole: Tensor,
    factor: Tensor,
    triangular: Tensor,
    tokens: Tensor,
    bound: float,
    *,
    look: bool = False,
) -> dict[str, Tensor]:
    """The factor in steps as coarse as the bound allows. look: to end as soon as they are, a wait."""
    energy = factor.square().sum(dim=1).double()  # (B, C), the e_c
    places = torch.arange(factor.shape[2], device=whole.device)
    order = torch.where(triangular[:, None], -places.double(), energy).argsort(
        dim=1, descending=True, stable=True
    )
    energy = energy.gather(1, order)
    factor = factor.gather(2, order[:, None, :].expand(-1, factor.shape[1], -1))
    entries = _entries(tokens, triangular, factor.shape[2])
    missing = residual_of(whole, factor)
    target = (1.02 * missing).clamp(min=bound)
    level = level_of(energy, entries, tokens, triangular, 2 * (target - missing))

    def at(level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Steps (B, P, C), scales (B, C) and the residual (B,)."""
        steps, scales = rounded(factor, energy, tokens, triangular, level)
        return steps, scales, residual_of(whole, steps * scales[:, None, :])

    best = torch.zeros_like(level)
    for _ in range(TRIES):  # exact for noise of many steps; coarse columns need a correction
        steps, scales, residual = at(level)
        good = residual <= target
        best = torch.where(good, torch.maximum(best, level), best)
        if look and bool((good & (residual >= 0.97 * target)).all()):
            return as_stored(steps, scales, residual)
        level = level * (0.985 * target / residual.clamp(min=1e-300)).clamp(0.25, 2.0)
    return as_stored(*at(torch.where(best > 0, best, level)))


def rounded(
    factor: Tensor, energy: Tensor, tokens: Tensor, triangular: Tensor, level: Tensor
) -> tuple[Tensor, Tensor]:
    """Steps (B, P, C) and scales (B, C): each column has the squared error `level` (B,), or is zero."""
    kept = (energy.square() > level[:, None]) | triangular[:, None]
    scales = (6 * level[:, None] / (tokens[:, None] * energy.clamp(min=1e-300))).sqrt()
    scales = torch.maximum(scales.clamp(max=1e30).float(), factor.abs().amax(dim=1) / _MOST_STEPS)
    scales = torch.where(scales > 0, scales, 1.0)
    return torch.round(factor / scales[:, None, :]) * kept[:, None, :], scales


def as_stored(steps: Tensor, scales: Tensor, residual: Tensor) -> dict[str, Tensor]:
    """The fields of `quantised` of steps (B, P, C) whose scales are (B, C) and whose residual is (B,)."""
    places = torch.arange(steps.shape[2], device=steps.device)
    rank = ((steps.abs().amax(dim=1) > 0) * (places + 1)).amax(dim=1).clamp(min=1)
    whole = steps.to(torch.int16)
    zigzag = (whole << 1) ^ (whole >> 15)
    return {"columns": zigzag.mT.contiguous(), "scales": scales, "rank": rank, "residual": residual}


def level_of(energy: Tensor, entries: Tensor, tokens: Tensor, triangular: Tensor, allowed: Tensor) -> Tensor:
    """The squared error (B,) that each column may have for all to have `allowed`, those left out included.

    energy, entries (B, C): e_c and the entries of each column that are not zero by form. Columns of a
    triangle are all kept: they are not orthogonal, and those worth nothing round to zero by themselves.
    """
    square = energy.square()
    share = (entries / tokens.clamp(min=1)[:, None]).cumsum(dim=1)
    dropped = square.flip(1).cumsum(dim=1).flip(1) - square
    each = (allowed[:, None] - dropped) / share
    return torch.where(triangular, allowed / share[:, -1], each.amax(dim=1))


def _entries(tokens: Tensor, triangular: Tensor, columns: int) -> Tensor:
    """Entries (B, C) of each column that are not zero by form, float64."""
    places = torch.arange(columns, device=tokens.device)
    rest = (tokens[:, None] - places).clamp(min=0)
    return torch.where(triangular[:, None], rest, tokens[:, None]).double()


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis (B, P, C) of what `columns` span, as far as they span anything."""
    wide = columns.double()
    wide = wide / torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp(min=1e-300)
    root = _cholesky(wide.mT @ wide, 1e-12)
    basis: Tensor = torch.linalg.solve_triangular(root.mT, wide, upper=True, left=False)
    return basis.float()


def _cholesky(matrix: Tensor, shift: float) -> Tensor:
    """The lower Cholesky factor of matrix (B, N, N) + shift I."""
    matrix.diagonal(dim1=1, dim2=2).add_(shift)
    root: Tensor = torch.linalg.cholesky_ex(matrix).L
    return root


_starts: dict[tuple[int, torch.device], Tensor] = {}


def start_of(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows, columns) standard normal numbers, the first rows of the same always, kept on the device."""
    known = _starts.get((columns, device))
    if known is None or len(known) < rows:
        generator = torch.Generator().manual_seed(0)
        known = torch.randn(1 << max(rows - 1, 511).bit_length(), columns, generator=generator).to(device)
        _starts[columns, device] = known
    return known[:rows]
