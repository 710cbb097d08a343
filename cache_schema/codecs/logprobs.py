"""Log-probabilities of the K kept entries in 8 bits each, relative to the largest.

The entries stand most likely first, so each position is a falling curve. It is stored as the downward
step from entry to entry in units of scale = (drop from first to last entry) / 255:

    level[k] = steps[0] + ... + steps[k - 1]                       (0..255, level[0] = 0)
    drop[k]  = scale * level[k]                                    (nats below the first entry)
    log p[k] = log(1 - exp(tail)) - log sum_j exp(-drop[j]) - drop[k]

The last line places the curve by the stored tail: K entries and tail sum to 1 as they must, which
takes away most of the quantisation error and spares storing the first entry.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float16 = NDArray[np.float16]
Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]

LEVELS = 255
_SMALLEST = np.float32(2.0**-24)  # the smallest positive float16


def encode_tail(tail_logprob: Float32) -> Float16:
    """Log of a tail's mass as float16, -inf kept, anything else kept finite and below 0."""
    limit = np.float32(np.finfo(np.float16).max)
    finite = np.clip(tail_logprob, -limit, -_SMALLEST)
    return np.where(np.isneginf(tail_logprob), tail_logprob, finite).astype(np.float16)


def encode_logprobs(logprobs: Float32) -> tuple[UInt8, Float16]:
    """`steps` (K - 1, N) uint8 and `scale` (N,) float16, in nats, of logprobs (N, K), falling along K."""
    drop = logprobs[:, :1] - logprobs
    scale = (drop[:, -1] / LEVELS).astype(np.float16)
    unit = np.where(scale > 0, scale, np.float16(1)).astype(np.float32)
    level = np.minimum(np.rint(drop / unit[:, None]), LEVELS).astype(np.uint8)
    return np.ascontiguousarray(np.diff(level, axis=1).T), scale


def decode_logprobs(steps: UInt8, scale: Float16, tail_logprob: Float16) -> Float32:
    """logprobs (N, K) float32 from steps (K - 1, N), scale (N,) and the tail (N,) at temperature 1."""
    level = np.zeros((len(scale), len(steps) + 1), np.uint8)
    np.cumsum(steps.T, axis=1, dtype=np.uint8, out=level[:, 1:])
    relative = level * -scale.astype(np.float32)[:, None]
    inside = np.log(-np.expm1(tail_logprob.astype(np.float32)))
    relative += (inside - np.log(np.exp(relative).sum(axis=1)))[:, None]
    return relative
