"""A summary of a cache from its manifest and commit records alone: no target is read."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from cache_schema.format.cache import Cache
from cache_schema.format.manifest import CommitRecord
from cache_schema.format.spec import KINDS
from cache_schema.format.statistics import MASS_EDGES, RANK_EDGES
from cache_schema.operations.build_state import build_state

SHOWN = 5


def summarise(cache: Cache) -> dict[str, Any]:
    """The summary of `inspect`, JSON values only. Figures without any committed shard are None.

    bytes: of the files of committed shards, without manifest and commit records. Means are over
    positions. label_accuracy: share of labels that are the teacher's most likely token; perplexity: of the
    teacher on the labels. covered_mass: the probability mass within the entries. mean_entries: None
    where every position of the kind has the same number. cut: samples that a build cut short at a turn's end.
    """
    commits = [cache.commits[shard] for shard in cache.shards]
    counts: Counter[str] = Counter()
    for record in commits:
        counts.update(record.counts)
    done = counts["samples"] + counts["quarantined"]
    sizes, head = _bytes(commits), 0
    if cache.manifest.head is not None:
        head = sizes["head"] = cache.manifest.head.size
    total = sum(sizes.values())
    return {
        "cache": cache.url,
        "format_version": cache.manifest.format_version,
        "created": cache.manifest.created,
        "kdcache_version": cache.manifest.kdcache_version,
        "identity": cache.manifest.identity,
        "teacher": _teacher(cache),
        "dataset": cache.manifest.dataset,
        "spec": cache.spec.to_json(),
        "built": build_state(commits, cache.plan) | {"engines": _engines(commits)},
        "counts": {name: counts[name] for name in sorted(counts)},
        "bytes": {
            "total": total,
            "when_complete": round(head + (total - head) / done * cache.plan.rows) if done else None,
            "by_part": sizes,
            "per_sample": _ratio(total, counts["samples"]),
            "per_position": {
                part: _ratio(sizes.get(part, 0), counts[f"{part.removeprefix('hidden_')}_positions"])
                for part in (*KINDS, *(f"hidden_{kind}" for kind in cache.spec.hidden))
            },
            "per_relation": _ratio(sizes.get("relation", 0), counts["relations"]),
        },
        "sharing": _sharing(counts, sizes),
        "positions": {kind: _kind(commits, kind) for kind in KINDS if kind in cache.spec.targets},
        "relation": _relation(commits) if "relation" in cache.spec.targets else None,
        "cut": sum(record.statistics.get("cut", 0) for record in commits),
        "quarantine": dict(_added(commits, "quarantined").most_common()),
        "slowest_shards": _slowest(commits),
        "slowest_samples": [{"row": row, "seconds": spent} for spent, row in _largest(commits, "slowest")],
        "longest_samples": [{"row": row, "tokens": tokens} for tokens, row in _largest(commits, "longest")],
    }


def _teacher(cache: Cache) -> dict[str, Any]:
    """The teacher as described by the fingerprint, without the template's text."""
    fingerprint = cache.manifest.fingerprint
    capture = {key: value for key, value in fingerprint.capture.items() if key != "spec"}
    training = {key: value for key, value in fingerprint.training.items() if key != "chat_template"}
    return {"capture": capture, "training": training, "recorded": fingerprint.recorded}


def _engines(commits: Sequence[CommitRecord]) -> list[dict[str, Any]]:
    """The engines and versions that wrote shards, with the number of shards each."""
    found = Counter(json.dumps(record.engine, sort_keys=True) for record in commits)
    return [{"engine": json.loads(engine), "shards": shards} for engine, shards in found.most_common()]


def _bytes(commits: Sequence[CommitRecord]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for record in commits:
        sizes.update(record.statistics["bytes"])
    return dict(sorted(sizes.items()))


def _sharing(counts: Counter[str], sizes: dict[str, int]) -> dict[str, Any]:
    """The bytes saved by storing the targets of equal visual prefixes once, at their mean size."""
    kept = counts["images"] - counts["shared_images"]
    image_bytes = sizes.get("visual", 0) + sizes.get("relation", 0)
    return {
        "images": counts["images"],
        "shared": counts["shared_images"],
        "bytes_saved": round(image_bytes / kept * counts["shared_images"]) if kept else 0,
    }


def _kind(commits: Sequence[CommitRecord], kind: str) -> dict[str, Any]:
    sums: Counter[str] = Counter()
    histogram = np.zeros(len(MASS_EDGES) - 1, dtype=np.int64)
    for record in commits:
        statistics = record.statistics[kind]
        histogram += np.array(statistics.get("covered_mass", [0] * len(histogram)), dtype=np.int64)
        sums.update({name: value for name, value in statistics.items() if name != "covered_mass"})
    positions, labels = sums["positions"], sums["labels"]
    tail, likelihood = _ratio(sums["sum_tail_mass"], positions), _ratio(sums["sum_label_logprob"], labels)
    return {
        "positions": positions,
        "mean_entries": _ratio(sums["sum_entries"], positions) if "sum_entries" in sums else None,
        "mean_covered_mass": None if tail is None else 1.0 - tail,
        "covered_mass": {"edges": list(MASS_EDGES), "counts": histogram.tolist()},
        "mean_entropy": _ratio(sums["sum_entropy"], positions) if "sum_entropy" in sums else None,
        "labels": labels,
        "label_accuracy": _ratio(sums["label_is_first"], labels),
        "perplexity": None if likelihood is None else math.exp(min(-likelihood, 700.0)),
    }


def _relation(commits: Sequence[CommitRecord]) -> dict[str, Any]:
    found = [record.statistics["relation"] for record in commits]
    count = sum(entry["relations"] for entry in found)
    ranks = np.sum([entry["ranks"] for entry in found], axis=0) if found else np.zeros(len(RANK_EDGES) - 1)
    return {
        "relations": count,
        "mean_rank": _ratio(sum(entry["sum_rank"] for entry in found), count),
        "ranks": {"edges": list(RANK_EDGES), "counts": [int(n) for n in ranks]},
        "mean_residual": _ratio(sum(entry["sum_residual"] for entry in found), count),
        "max_residual": max((entry["max_residual"] for entry in found), default=None) if count else None,
    }


def _added(commits: Sequence[CommitRecord], name: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for record in commits:
        found.update(record.statistics[name])
    return found


def _largest(commits: Sequence[CommitRecord], name: str) -> list[tuple[float, int]]:
    """(value, row) of the samples with the largest values of a statistic of single samples."""
    found = ((value, row) for record in commits for row, value in record.statistics.get(name, []))
    return sorted(found, reverse=True)[:SHOWN]


def _slowest(commits: Sequence[CommitRecord]) -> list[dict[str, Any]]:
    """The shards with the longest time per sample."""
    timed = [record for record in commits if record.counts["samples"]]
    timed.sort(key=lambda record: record.seconds / record.counts["samples"], reverse=True)
    return [
        {
            "shard": record.shard,
            "seconds": round(record.seconds, 3),
            "samples_per_second": _ratio(record.counts["samples"], record.seconds),
        }
        for record in timed[:SHOWN]
    ]


def _ratio(amount: float, count: float) -> float | None:
    return amount / count if count else None
