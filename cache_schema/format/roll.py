"""All commit records of a finished cache in one file: a hint that saves an object store a request per shard.

A record counts only where the store's own listing shows its very bytes, by their MD5 (the ETag of S3), so a
roll that is old or wrong costs requests, never a wrong answer.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping

from cache_schema.errors import CacheDamaged
from cache_schema.format.sealed import seal, unseal
from cache_schema.format.store import Listed, Store, document

ROLL = "commits/.roll.json"

FEW = 16
"""Shards for which no roll is made."""


def write_roll(store: Store, shards: int) -> None:
    """Write the roll of a cache of `shards` shards where all are committed, unless the store fails."""
    with contextlib.suppress(OSError):
        listed = store.listed("commits")
        paths = [path for path in listed if not path.startswith("commits/.")]
        if FEW < shards == len(paths):
            records = store.read_many([document(store, path, listed[path].bytes) for path in paths])
            texts = dict(zip(paths, map(bytes.decode, records), strict=True))
            store.put(ROLL, seal({"format": "kdcache-roll", "records": texts}))


def rolled(store: Store, listed: Mapping[str, Listed]) -> dict[str, bytes]:
    """Of the listed commit records, those that the roll holds as they are."""
    if ROLL not in listed or all(file.md5 is None for path, file in listed.items() if path != ROLL):
        return {}
    try:
        records = unseal(store.read(ROLL), ROLL)["records"]
        found = {path: text.encode() for path, text in records.items() if path in listed}
    except (CacheDamaged, OSError, ValueError, LookupError, AttributeError):
        return {}
    digests = {path: hashlib.md5(data, usedforsecurity=False).hexdigest() for path, data in found.items()}
    return {path: data for path, data in found.items() if digests[path] == listed[path].md5}
