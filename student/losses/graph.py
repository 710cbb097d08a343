"""The token relationship graph of an image's visual tokens (TRG, arXiv 2306.12442; our reading)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    """
    count, length = student.shape[:2]
    tokens = student.new_ones(count, length) if real is None else real.to(student.dtype)
    pairs = tokens[:, :, None] * tokens[:, None, :]
    pairs = pairs.masked_fill(torch.eye(length, dtype=torch.bool, device=student.device), 0.0)
    absent = pairs == 0
    theirs = _cosines(teacher).mul_(SHARPNESS).masked_fill_(absent, _FAR)
    edges = theirs.topk(min(neighbours, max(1, length - 1)), dim=2).indices
    each = tokens / tokens.sum(dim=1, keepdim=True)  # (I, P): of the mean over tokens
    with torch.set_grad_enabled(slopes is not None):
        given = student.detach().requires_grad_(slopes is not None)
        ours = (_cosines(given) * SHARPNESS).masked_fill(absent, _FAR)
        value = _divergence(theirs.gather(2, edges), ours.gather(2, edges), each)
        value = value + _divergence(theirs, ours, each)
        if slopes is None:
            return value, None
        (pulled,) = torch.autograd.grad((value * factors).sum(), given)
    # Rows begin on 16 bytes, without which matrix units cannot load them.
    gradient = pulled.new_empty(count, length, -(-length // 8) * 8, dtype=slopes)[:, :, :length]
    return value.detach(), gradient.copy_((pulled + pulled.transpose(1, 2)).div_(2))


def _cosines(gram: Tensor) -> Tensor:
    """R_ij / sqrt(R_ii R_jj) (I, P, P); 0 where a token has no length."""
    squares = gram.diagonal(dim1=1, dim2=2)
    inverse = torch.where(squares > 0, squares, torch.ones_like(squares)).rsqrt() * (squares > 0)
    return gram * inverse[:, :, None] * inverse[:, None, :]


def _divergence(theirs: Tensor, ours: Tensor, each: Tensor) -> Tensor:
    """The mean (I,) over tokens, weighted by `each` (I, P), of KL between softmaxes of rows (I, P, n)."""
    log_p, log_q = theirs.log_softmax(2), ours.log_softmax(2)
    return (F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(2) * each).sum(1)
