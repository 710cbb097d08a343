"""Bytes of targets as the codecs write them, extrapolated to larger shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cache_schema.format.archive import pack
from cache_schema.format.codecs.hidden import hidden_arrays, hidden_at
from cache_schema.format.codecs.relation import pack_relations
from cache_schema.format.codecs.topk import Arrays, encode_topk, topk_at
from cache_schema.format.groups import write_groups
from cache_schema.format.records import CapturedSample, HiddenStates, StoredRelation, TopK
from cache_schema.format.shard import encode_shard
from cache_schema.format.spec import Precision, TargetSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of a group of targets in a shard, as a line through those of half and of all that was encoded.

    items: positions, images or samples that were encoded. each: bytes that one more of them takes, which is
    less than the mean: compression improves with size, and array metadata is written once. fixed: bytes of a
    shard independent of its content. vocabulary: bytes of the dictionary of ids, which grows with the items
    to the power `growth` (measured: how many more ids the second half brought) until it holds every id, at
    `limit` bytes.
    """

    items: int
    each: float
    fixed: float
    vocabulary: int = 0
    growth: float = 0.0
    limit: float = 0.0

    def total(self, items: float, shards: int) -> float:
        """Bytes of `items` in `shards` equal shards; 0 if there are none."""
        if not self.items or items <= 0.0:
            return 0.0
        dictionary = min(self.vocabulary * float(items / shards / self.items) ** self.growth, self.limit)
        return float(self.each * items + shards * (self.fixed + dictionary))


def topk_footprint(record: TopK, precision: Precision, vocab_size: int) -> Footprint:
    """The footprint of records as one group of a shard, every field counted."""

    def sizes(count: int) -> tuple[int, int, int]:
        return _sizes(encode_topk(topk_at(record, slice(count)), precision))

    whole = _line(len(record), sizes)
    if not whole.vocabulary or len(record) < 2:
        return replace(whole, limit=float(whole.vocabulary))
    half, ids = (len(np.unique(record.token_ids[:count])) for count in (len(record) // 2, len(record)))
    growth = float(np.clip(np.log2(ids / half), 0.0, 1.0))
    return replace(whole, growth=growth, limit=whole.vocabulary * vocab_size / ids)


def relation_footprint(stored: Sequence[StoredRelation]) -> Footprint:
    """The footprint of the relation records of some images."""
    return _line(len(stored), lambda count: _sizes(pack_relations(stored[:count])))


def hidden_footprint(states: HiddenStates, tables: float) -> Footprint:
    """The footprint of hidden states that were rounded together, with `tables` of channels in a shard."""

    def sizes(count: int) -> tuple[int, int, int]:
        return _sizes(hidden_arrays(hidden_at(states, slice(count))))

    whole = _line(len(states), sizes)
    return replace(whole, fixed=whole.fixed + max(tables - 1.0, 0.0) * states.channels[0].nbytes)


def table_footprint(samples: Sequence[CapturedSample], spec: TargetSpec, *, sharing: bool) -> Footprint:
    """The footprint of a shard's tables (ids, spans, images) and of what else a shard without targets has.

    sharing: whether images carry the key of their prefix.
    """
    bare = []
    for sample in samples:
        images = [
            replace(image, visual=None, relation=None, prefix_key=image.record.sha256 if sharing else None)
            for image in sample.images  # a key is a digest: its length, and incompressible
        ]
        bare.append(replace(sample, response=None, prompt=None, images=tuple(images)))
    empty = _file_bytes([], spec)

    def sizes(count: int) -> tuple[int, int, int]:
        return _file_bytes(bare[:count], spec) - empty, empty, 0

    return _line(len(bare), sizes)


def _line(items: int, sizes: Callable[[int], tuple[int, int, int]]) -> Footprint:
    """sizes: count -> bytes of the first `count` items: their values, metadata, and dictionary of ids."""
    data, fixed, vocabulary = sizes(items)
    half = items // 2
    each = (data - sizes(half)[0]) / (items - half) if half else data / max(items, 1)
    each = min(max(each, 0.0), data / max(items, 1))
    return Footprint(
        items=items,
        each=each,
        fixed=fixed + data - each * items,
        vocabulary=vocabulary,
    )


def _file_bytes(samples: Sequence[CapturedSample], spec: TargetSpec) -> int:
    shard = encode_shard("", samples, [], spec)
    return sum(map(len, shard.tables.values())) + len(pack(shard.arrays)[0])


def _sizes(arrays: Arrays) -> tuple[int, int, int]:
    """Bytes of the values, of the metadata, and of the dictionary of ids."""
    data = vocabulary = 0
    files = write_groups({"targets": arrays}, {})
    for path, content in files.items():
        if path.startswith("targets/vocabulary/c/"):
            vocabulary += len(content)
        elif not path.endswith("zarr.json"):
            data += len(content)
    start, end, listed = pack(files)[1]["targets"]  # the root of a shard is counted with its tables
    return data, end - start + listed - data - vocabulary, vocabulary
