"""The relation target of an image: R = Z Z^T of its raw logits, without ever forming Z where it is linear.

For a linear head Z = s [H, 1] [W, b]^T, so R = s^2 [H, 1] (A^T A) [H, 1]^T with A = [W, b]. With
C^T C = A^T A, the matrix G = s [H, 1] C^T (P, D) is an exact factor: R = G G^T. Its leading singular
vectors, found by subspace iteration (Halko, Martinsson and Tropp, 2011, alg. 4.4), give the best factor
of a rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cache_schema.format.records import Relation
from cache_schema.format.spec import TargetSpec
from models.head import Head

_COLUMNS = 8192  # vocabulary entries a chunk where the logits are needed
_FIRST_RANK = 64
_OVERSAMPLING = 16
_ROUNDS = 4  # with these the residual is within 5% of the best rank's on spectra as flat as i^-0.25
_SLACK = 0.25  # the encoder rounds what it stores, so it is given a factor well within the bound


class RelationMaker:
    """Makes Relation records; holds C (D, D) float32 for a linear head."""

    def __init__(self, head: Head, spec: TargetSpec) -> None:
        self._head = head
        self._spec = spec
        self._root = None if head.softcap is not None else root_of(head)

    def __call__(self, hidden: Tensor) -> Relation:
        """The record of one image's hidden (P, D).

        relation `factor`: columns orthogonal and falling in norm, of the smallest tried rank (64, doubled
        up to relation_max_rank) within a quarter of the bound. `exact`: the Gram matrix.
        """
        with torch.inference_mode():
            if self._root is None:
                return self._from_gram(_chunked_gram(self._head, hidden))
            exact = self._exact_factor(hidden)
            if self._spec.relation == "exact":
                return self._from_gram(exact.double() @ exact.double().T)
            factor, residual, norm = truncate(
                exact, bound=_SLACK * self._spec.relation_bound, max_rank=self._spec.relation_max_rank
            )
            return Relation(residual=residual, norm=norm, factor=factor.cpu().numpy())

    def _exact_factor(self, hidden: Tensor) -> Tensor:
        """G (P, D) float32 with R = G G^T."""
        assert self._root is not None
        inputs = hidden.to(self._root.device).float()
        if self._head.bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
        exact: Tensor = inputs @ self._root
        return exact

    def _from_gram(self, gram: Tensor) -> Relation:
        """The record of R (P, P) float64 itself."""
        norm = float(gram.norm())
        if self._spec.relation == "exact":
            return Relation(residual=0.0, norm=norm, gram=gram.float().cpu().numpy())
        values, vectors = torch.linalg.eigh(gram)
        values = values.flip(0)[: self._spec.relation_max_rank].clamp(min=0.0)
        factor = vectors.flip(1)[:, : len(values)] * values.sqrt()
        residual = _residual(values, norm * norm)
        return Relation(residual=residual, norm=norm, factor=factor.float().cpu().numpy())


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


def truncate(exact: Tensor, *, bound: float, max_rank: int) -> tuple[Tensor, float, float]:
    """The leading part U (P, r) of an exact factor G (P, D), 1 - cos(G G^T, U U^T), and the norm of G G^T.

    Columns of U are orthogonal and fall in norm. r grows from 64 until the residual is within `bound`, or
    to max_rank. Residual and norm are right to about 1e-7, the rounding of float32 products.
    """
    tokens, width = exact.shape
    small = exact @ exact.T if tokens <= width else exact.T @ exact
    energy = _sum_of_squares(small)
    limit = min(tokens, width, max_rank)
    rank = min(_FIRST_RANK, limit)
    while True:
        factor, sizes = _leading(exact, small, rank)
        residual = _residual(sizes.square(), energy)
        if residual <= bound or rank == limit:
            return factor, residual, energy**0.5
        rank = min(2 * rank, limit)


def _leading(exact: Tensor, small: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (P, rank) and its column norms, by subspace iteration with G's smaller Gram matrix.

    From a fixed start, so that equal images get equal records.
    """
    columns = min(rank + _OVERSAMPLING, len(small))
    if 2 * columns >= len(small):
        values, vectors = torch.linalg.eigh(small)
        sizes, basis = values.flip(0)[:rank].clamp(min=0.0).sqrt(), vectors.flip(1)[:, :rank]
        return (basis * sizes if len(small) == len(exact) else exact @ basis), sizes
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(small), columns, generator=generator).to(exact.device)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(small @ basis).Q
    if len(small) == len(exact):
        left, sizes, _ = torch.linalg.svd(basis.T @ exact, full_matrices=False)
        left = basis @ left
    else:
        left, sizes, _ = torch.linalg.svd(exact @ basis, full_matrices=False)
    return (left * sizes)[:, :rank], sizes[:rank]


def _sum_of_squares(matrix: Tensor) -> float:
    """Summed in double precision, which not every device has."""
    return float((matrix.cpu() if matrix.device.type == "mps" else matrix).double().square().sum())


def _residual(values: Tensor, energy: float) -> float:
    """1 - cos(R, its part with eigenvalues `values`) where the squared norm of R is `energy`."""
    if energy == 0.0:
        return 0.0
    cosine: float = (sum(value * value for value in values.tolist()) / energy) ** 0.5
    return max(0.0, 1.0 - cosine)


def _chunked_gram(head: Head, hidden: Tensor) -> Tensor:
    """R (P, P) float64 of a head that is not linear, from chunks of its logits."""
    device = torch.device("cpu") if hidden.device.type == "mps" else hidden.device
    gram = torch.zeros(len(hidden), len(hidden), dtype=torch.float64, device=device)
    for start in range(0, head.columns, _COLUMNS):
        end = min(start + _COLUMNS, head.columns)
        piece = Head(
            weight=head.weight[start:end],
            vocab_size=end - start,
            bias=None if head.bias is None else head.bias[start:end],
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        )
        logits = piece.logits(hidden)
        gram += (logits @ logits.T).to(device)
    return gram
