"""FIRST's trustworthy maximisation: the temperature at which the teacher's confidence is its accuracy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cache_schema.errors import WrongUsage
from cache_schema.format.cache import Cache, open_cache
from cache_schema.progress import Progress
from student.divergences import CONCENTRATED
from student.run_state import RunState
from student.settings import TrainConfig

_BINS = 15
_TEMPERATURES = np.round(np.geomspace(0.25, 8.0, 161), 4)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A teacher's calibration error at temperature 1 and at `temperature`, where it is least, over some
    positions."""

    temperature: float
    before: float
    after: float
    positions: int


def calibration_error(confidence: Floats, right: Floats) -> float:
    """The expected calibration error: with the N positions in 15 bins of equal width by confidence (N,), the
    mean over positions of |mean confidence - share that is right (N,)| of their bin."""
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, confidence - right, minlength=_BINS)
    return float(np.abs(gaps).sum() / max(1, len(confidence)))


def calibrate(cache: Cache, samples: int | None = None) -> Calibration:
    """The calibration of a cache's teacher on the labels of its first `samples` samples (None: all).

    Its confidence at a response position is p^(1/T) of the most likely of its five most likely tokens,
    normalised over these; it is right where that token is the label. WrongUsage when there is no position.
    """
    found, hits = [], []
    for number in range(min(len(cache), samples or len(cache))):
        sample = cache[number]
        record = sample.response
        if record is None or not len(record):
            continue
        width = min(CONCENTRATED, record.logprobs.shape[1])
        kept = np.full((len(record), CONCENTRATED), -np.inf)
        kept[:, :width] = np.where(record.there, record.logprobs, -np.inf)[:, :width]
        found.append(kept)
        hits.append(record.token_ids[:, 0] == sample.labels[sample.response_positions + 1])
    if not found:
        raise WrongUsage(f"cache {cache.url} has no response position to calibrate the teacher on")
    logprobs, right = np.concatenate(found), np.concatenate(hits).astype(np.float64)

    def error(temperature: float) -> float:
        powers = np.exp((logprobs - logprobs[:, :1]) / temperature)
        return calibration_error(1.0 / powers.sum(axis=1), right)

    # Of equal ones that nearest to 1.
    errors = {float(each): error(each) for each in _TEMPERATURES}
    best = min(errors, key=lambda each: (errors[each], abs(np.log(each))))
    return Calibration(temperature=best, before=error(1.0), after=errors[best], positions=len(right))


def calibrated(config: TrainConfig, state: RunState, progress: Progress) -> TrainConfig:
    """The run's settings with the temperature of every `first` that has none: that of `state`, where a
    checkpoint brings it, else the one found on the held-out cache. WrongUsage without such a cache."""
    losses = config.stage.losses
    if not losses.uncalibrated:
        return config
    if state.teacher_temperature is None:
        if config.eval_cache is None:
            raise WrongUsage(
                "divergence first calibrates the teacher on held-out labels: give --eval-cache, or a "
                "temperature as in first:1.5"
            )
        found = calibrate(open_cache(config.eval_cache), config.eval_samples)
        progress.message(
            f"the teacher is calibrated at temperature {found.temperature:g}: calibration error "
            f"{found.after:.4f}, {found.before:.4f} at 1, over {found.positions} held-out positions"
        )
        state.teacher_temperature = found.temperature
    losses = losses.calibrated(state.teacher_temperature)
    return replace(config, stage=replace(config.stage, losses=losses))
