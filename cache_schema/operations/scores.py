"""Scores of a sample from its response targets: the teacher's confidence and its agreement with the
labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cache_schema.format.records import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """confidence: mean probability of the most likely token over R response positions; disagreement: the
    share of them whose label is not that token; log_likelihood: the mean log-probability of the labels, and
    perplexity its exp(-log_likelihood). All NaN where there is no response position.
    """

    confidence: float
    disagreement: float
    log_likelihood: float
    perplexity: float


def scores_of(sample: Sample) -> Scores:
    """Scores of a sample whose response targets were read. ValueError when they were not."""
    response = sample.response
    if response is None or response.label_logprob is None:
        raise ValueError(f"row {sample.row} has no response targets")
    if not len(response):
        return Scores(confidence=np.nan, disagreement=np.nan, log_likelihood=np.nan, perplexity=np.nan)
    labels = sample.labels[sample.response_positions + 1]
    log_likelihood = response.label_logprob.astype(np.float64).mean()
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(-log_likelihood))
    return Scores(
        confidence=float(np.exp(response.logprobs[:, 0].astype(np.float64)).mean()),
        disagreement=float((response.token_ids[:, 0] != labels).mean()),
        log_likelihood=float(log_likelihood),
        perplexity=perplexity,
    )
