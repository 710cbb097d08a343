"""From log-probabilities alone to records: what a teacher without logits can say of a position."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache_schema.format.records import TopK

Float32 = NDArray[np.float32]


def record_of(
    token_ids: NDArray[np.int32], logprobs: Float32, label_logprob: Float32, *, vocab_size: int
) -> TopK:
    """The record of N positions at temperature 1.

    token_ids, logprobs (N, K), most likely first. label_logprob (N,): 0 where no token follows. The tail
    is 1 minus the entries' mass, which float32 knows to about 1e-6 of the whole, but never more than the
    tokens outside can hold at the last entry's probability each: -inf means too little to be seen. There
    is no log-sum-exp and no entropy.
    """
    mass = np.exp(logprobs.astype(np.float64))
    most = (vocab_size - logprobs.shape[1]) * mass[:, -1]
    outside = np.clip(1.0 - mass.sum(axis=1), 0.0, most)
    with np.errstate(divide="ignore"):
        tail = np.log(outside)
    return TopK(
        token_ids=token_ids,
        logprobs=logprobs,
        tail_logprob=tail[:, None].astype(np.float32),
        temperatures=np.ones(1, dtype=np.float32),
        logsumexp=None,
        entropy=None,
        label_logprob=label_logprob,
    )
