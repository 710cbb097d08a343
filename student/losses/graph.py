"""The token relationship graph of an image's visual tokens (TRG, arXiv 2306.12442; our reading)."""

from __future__ import annotations

import torch
from torch import Tensor

SHARPNESS = 10.0
"""What cosines are multiplied by before a softmax: 1 / 0.1, our choice."""

_FAR = -1e9  # in place of a similarity that is none


def graph_distance(
    student: Tensor,
    teacher: Tensor,
    real: Tensor | None,
    neighbours: int,
    factors: Tensor,
    slopes: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """L_local + L_context (I,) of Gram matrices (I, P, P), and its gradient (I, P, P), symmetric, in the
    first, times factors (I,), in the dtype `slopes`; None: no gradient.

    C_ij = R_ij / sqrt(R_ii R_jj). N_i: the `neighbours` other tokens j of the largest teacher's C_ij, the
    edges of i in the teacher's graph. L_local: the mean over tokens i of KL(p_i || q_i), where p_i and q_i
    are the softmax of 10 C_ij over N_i of teacher and student. L_context: the same over all other tokens,
    which is the context of i within its image. The paper's loss between tokens of different images needs both
    models' token vectors, which a relation record does not have: it is left out. real (I, P): 1 at tokens, 0
    where filled up; None: nothing is.

    With G = each_i (q_ij - p_ij), summed over both, the gradient is 10 (G_ij + G_ji) / (2 sqrt(R_ii R_jj))
    off the diagonal and -sum_j (G_ij + G_ji) 10 C_ij / (2 R_ii) on it; each_i: the share of a token in the
    mean. Holds five arrays (I, P, P) at a time beside those given.
    """
    count, length = student.shape[:2]
    absent = torch.eye(length, dtype=torch.bool, device=student.device)[None]
    each = student.new_full((count, length), 1.0 / length)
    if real is not None:
        each = real.to(student.dtype)
        each = each / each.sum(dim=1, keepdim=True)
        missing = real == 0
        absent = absent | missing[:, :, None] | missing[:, None]
    theirs, _ = _similarities(teacher, absent)
    near, edges = theirs.topk(min(neighbours, max(1, length - 1)), dim=2)
    ours, inverse = _similarities(student, absent)
    value, local = _divergence(near, ours.gather(2, edges))
    context, pull = _divergence(theirs, ours)
    del theirs
    value = torch.linalg.vecdot(value.add_(context), each)
    if slopes is None:
        return value, None
    each = each * factors[:, None]
    pull.mul_(each[:, :, None]).scatter_add_(2, edges, local.mul_(each[:, :, None]))
    pull = pull + pull.transpose(1, 2)
    own = torch.linalg.vecdot(pull, ours).mul_(inverse.square()).div_(-2)
    pull.mul_(inverse[:, :, None]).mul_(inverse[:, None])
    # Rows begin on 16 bytes, without which matrix units cannot load them.
    gradient = pull.new_empty(count, length, -(-length // 8) * 8, dtype=slopes)[:, :, :length]
    torch.mul(pull, SHARPNESS / 2, out=gradient)
    gradient.diagonal(dim1=1, dim2=2).copy_(own)
    return value, gradient


def _similarities(gram: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
    """10 R_ij / sqrt(R_ii R_jj) (I, P, P), _FAR where absent, and 1 / sqrt(R_ii) (I, P), 0 where a token has
    no length."""
    squares = gram.diagonal(dim1=1, dim2=2)
    inverse = squares.rsqrt().masked_fill_(squares <= 0, 0.0)
    similar = gram * (SHARPNESS * inverse)[:, :, None]
    return similar.mul_(inverse[:, None]).masked_fill_(absent, _FAR), inverse


def _divergence(theirs: Tensor, ours: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) (I, P) of the softmaxes p and q of rows (I, P, n), and q - p (I, P, n)."""
    log_p, log_q = theirs.log_softmax(2), ours.log_softmax(2)
    p = log_p.exp()
    distance = torch.linalg.vecdot(p, log_p.sub_(log_q))
    return distance, log_q.exp_().sub_(p)
