"""Statistics of a shard in its commit record, so that `inspect` need not read targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.format.records import CapturedSample, QuarantinedRow, TopK

MASS_EDGES: tuple[float, ...] = (*(round(0.05 * i, 2) for i in range(20)), 0.99, 0.999, 1.0)
"""Bin edges of the mass within the K entries: 20 bins of 0.05, the last split at 0.99 and 0.999."""

RANK_EDGES: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1 << 30)
"""Bin edges of a relation's rank; rank 0 is a stored triangle."""


def topk_statistics(records: Sequence[TopK]) -> dict[str, Any]:
    """positions; histogram of the covered mass over MASS_EDGES; sums of the entries where positions have
    different numbers of them, of entropy (where there is one), of the tail's mass and of the label's
    log-probability (nats); labels; how many of them are the first entry.

    A label counts as first when its log-probability is that of the first entry, to float32 rounding.
    """

    def joined(name: str) -> NDArray[Any] | None:
        parts = [getattr(record, name) for record in records]
        return None if parts[0] is None else np.concatenate(parts)

    if not sum(map(len, records)):
        return {"positions": 0}
    at_one = records[0].temperatures.tolist().index(1.0)
    tail = np.exp(np.concatenate([record.tail_logprob[:, at_one] for record in records]).astype(np.float64))
    found: dict[str, Any] = {
        "positions": len(tail),
        "covered_mass": np.histogram(np.clip(1.0 - tail, 0.0, 1.0), MASS_EDGES)[0].tolist(),
        "sum_tail_mass": float(tail.sum()),
    }
    if (counts := joined("counts")) is not None:
        found["sum_entries"] = int(counts.sum())
    if (entropy := joined("entropy")) is not None:
        found["sum_entropy"] = float(entropy.sum(dtype=np.float64))
    if (label := joined("label_logprob")) is not None:
        first = label >= np.concatenate([record.logprobs[:, 0] for record in records]) - 1e-5
        found |= {
            "labels": len(label),
            "sum_label_logprob": float(label.sum(dtype=np.float64)),
            "label_is_first": int(first.sum()),
        }
    return found


def relation_statistics(ranks: Sequence[int], residuals: Sequence[float]) -> dict[str, Any]:
    """relations; histogram of the rank over RANK_EDGES; sum of ranks; largest and sum of the residuals."""
    return {
        "relations": len(ranks),
        "ranks": np.histogram(ranks, RANK_EDGES)[0].tolist(),
        "sum_rank": int(sum(ranks)),
        "max_residual": float(max(residuals, default=0.0)),
        "sum_residual": float(sum(residuals)),
    }


def sample_statistics(
    samples: Sequence[CapturedSample], quarantined: Sequence[QuarantinedRow]
) -> dict[str, Any]:
    """The five longest samples as [row, tokens], the five that took longest to prepare as [row, seconds],
    supervised tokens, the number of cut samples, quarantine reasons."""
    longest = sorted(((len(s.input_ids), s.row) for s in samples), reverse=True)[:5]
    slowest = sorted(((s.seconds, s.row) for s in samples if s.seconds > 0), reverse=True)[:5]
    return {
        "longest": [[row, tokens] for tokens, row in longest],
        "slowest": [[row, round(seconds, 4)] for seconds, row in slowest],
        "supervised_tokens": int(sum(np.diff(s.label_spans, axis=1).sum() for s in samples)),
        "cut": sum(s.answers_cut > 0 for s in samples),
        "quarantined": dict(Counter(row.reason for row in quarantined)),
    }
