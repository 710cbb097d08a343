"""Log-likelihoods of the labels under a small reference model, beside a cache: one sealed file per shard."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.errors import CacheDamaged, KdcacheError
from cache_schema.format.cache import Cache
from cache_schema.format.sealed import seal, unseal

SCORES = "scores/"
"""The folder of the files, from the cache's root."""

Float64 = NDArray[np.float64]


def score_path(cache: Cache, shard: int) -> str:
    """The file of a shard; of another attempt at the shard it is another file."""
    return f"{SCORES}{shard:05d}-{cache.commits[shard].attempt}.json"


def write_scores(cache: Cache, shard: int, model: str, log_likelihood: Float64, tokens: Float64) -> None:
    """Writes those of a shard whole or not at all: log_likelihood (N,) sums over the supervised tokens of
    each sample, tokens (N,) their numbers; model: the digest of the reference model."""
    document = {
        "cache": cache.manifest.identity,
        "shard": shard,
        "attempt": cache.commits[shard].attempt,
        "model": model,
        "log_likelihood": log_likelihood.tolist(),
        "tokens": [int(count) for count in tokens],
    }
    cache.store.put(score_path(cache, shard), seal(document))


def read_scores(cache: Cache, shard: int) -> tuple[Float64, Float64, str]:
    """log_likelihood (N,) and tokens (N,) of a shard, and the model's digest. KdcacheError where it has none,
    CacheDamaged when the file is altered or not of this shard."""
    path = score_path(cache, shard)
    try:
        data = cache.store.read(path)
    except FileNotFoundError as error:
        raise KdcacheError(
            f"{cache.url}: shard {shard} has no scores of a reference model; run `kdcache score` on the cache"
        ) from error
    document = unseal(data, f"{cache.url}/{path}")
    return *_values(document, cache, shard, path), str(document["model"])


def _values(document: dict[str, Any], cache: Cache, shard: int, path: str) -> tuple[Float64, Float64]:
    try:
        values, tokens = (
            np.array(document[name], dtype=np.float64).reshape(cache.shard_length(shard))
            for name in ("log_likelihood", "tokens")
        )
    except (KeyError, ValueError, TypeError):
        values = None
    same = (document.get("cache"), document.get("shard")) == (cache.manifest.identity, shard)
    if values is None or not same or not isinstance(document.get("model"), str):
        raise CacheDamaged(
            f"{cache.url}/{path}: not the scores of this shard; remove it, then run `kdcache score` again"
        )
    return values, tokens


def unscored(cache: Cache, model: str) -> list[int]:
    """The committed shards without whole scores of this model. KdcacheError when one has those of another."""
    missing = []
    present = cache.store.list("scores")
    for shard in cache.shards:
        if score_path(cache, shard) not in present:
            missing.append(shard)
            continue
        try:
            theirs = read_scores(cache, shard)[2]
        except CacheDamaged:
            missing.append(shard)
            continue
        if theirs != model:
            raise KdcacheError(
                f"{cache.url} has the scores of another reference model ({theirs[:12]}, this is "
                f"{model[:12]}): remove the folder {SCORES} of the cache to score it anew"
            )
    return missing
