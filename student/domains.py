"""DDK: the shares of a mixture's domains follow the student's distance to the teacher on held-out samples.

The formulas are those of "DDK: Distilling Domain Knowledge for Efficient Large Language Models" (arXiv
2407.16154, eq. 1 and 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_schema.errors import KdcacheError, WrongUsage
from cache_schema.format.cache import Cache
from cache_schema.operations.condition import parse
from cache_schema.operations.select import columns_of
from student.collate import Collator
from student.heldout import measure_samples
from student.mixture import MixedStream, Weighting
from student.model import DistilledStudent
from student.order import Catalogue, Int64
from student.ranks import Ranks
from student.sources import REST, Mixture

_DIGITS = 6
"""Of the shares."""

_CE_DIGITS = 3
"""Of the student's cross entropies, in nats. Rounding that differs between numbers of processes (about 1e-6)
rarely changes one then, so that shares and order of the samples are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """A part of the samples. samples: those to learn from, held_out: those to measure on; numbers in the
    catalogue, ascending."""

    name: str
    samples: Int64
    held_out: Int64


def domains_of(mixture: Mixture, caches: Sequence[Cache], catalogue: Catalogue, seed: int) -> list[Domain]:
    """The domains of a mixture: its caches, or the samples that meet its conditions.

    Under ddk a seeded draw of each is held out. WrongUsage for a domain without enough samples.
    """
    if mixture.domains:
        parts = _by_condition(mixture.domains, caches, catalogue)
    else:
        parts = {
            name: catalogue.samples_of(source)
            for source, name in enumerate(_names([cache.url for cache in caches]))
        }
    made = []
    for place, (name, samples) in enumerate(parts.items()):
        count = min(mixture.held_out, max(1, len(samples) // 10)) if mixture.rule == "ddk" else 0
        if len(samples) <= count:
            raise WrongUsage(
                f"domain {name} of the mixture has {len(samples)} samples: it needs {count + 1} at least"
            )
        drawn = np.random.default_rng([seed, place, 3]).choice(samples, size=count, replace=False)
        made.append(Domain(name=name, samples=np.setdiff1d(samples, drawn), held_out=np.sort(drawn)))
    return made


def _names(urls: Sequence[str]) -> list[str]:
    """Short names of caches, distinct."""
    short = [Path(url).name for url in urls]
    return [name if short.count(name) == 1 else url for name, url in zip(short, urls, strict=True)]


def _by_condition(
    conditions: Mapping[str, str], caches: Sequence[Cache], catalogue: Catalogue
) -> dict[str, Int64]:
    """The samples of each domain: the first whose condition they meet, else REST where there are any."""
    parsed = {}
    for name, text in conditions.items():
        try:
            parsed[name] = parse(text)
        except WrongUsage as error:
            raise WrongUsage(f"domain {name} of the mixture: {error}") from error
        if parsed[name].quantiles:
            raise WrongUsage(f"domain {name} of the mixture: quantile() is for `kdcache select`")
    fields = frozenset().union(*(condition.fields for condition in parsed.values()))
    place = np.full(len(catalogue.tokens), len(parsed))
    at = 0
    for cache in caches:
        for shard in cache.shards:
            count = cache.shard_length(shard)
            columns = columns_of(cache, shard, fields)
            for number, condition in reversed(list(enumerate(parsed.values()))):
                place[at : at + count][condition.mask(columns)] = number
            at += count
    found = {name: np.flatnonzero(place == number) for number, name in enumerate([*parsed, REST])}
    if not len(found[REST]):
        del found[REST]
    return found


def discrepancy(
    student: Sequence[float], teacher: Sequence[float], before: Sequence[float] | None, smoothing: float
) -> list[float]:
    """Shares of domains from cross entropies in nats per token, of student and teacher.

    With l = exp(cross entropy): the first are softmax(l_S / l_T); later ones are smoothing * psi / sum(psi) +
    (1 - smoothing) / N with psi = before * exp(l_S / l_T).
    """
    with np.errstate(over="ignore"):
        ratio = np.minimum(np.exp(np.asarray(student) - np.asarray(teacher)), 1e6)
    score = ratio if before is None else np.log(np.asarray(before)) + ratio
    shares = np.exp(score - score.max())
    shares /= shares.sum()
    if before is not None:
        shares = smoothing * shares + (1 - smoothing) / len(shares)
    return [round(max(float(share), 10.0**-_DIGITS), _DIGITS) for share in shares]


class Reweighing:
    """Measures the student on the held-out samples of every domain, and sets the shares of a stream.

    state: None at the start of a run, later what `state` was at a checkpoint.
    """

    def __init__(
        self,
        mixture: Mixture,
        domains: Sequence[Domain],
        caches: Sequence[Cache],
        catalogue: Catalogue,
        stream: MixedStream,
        state: Mapping[str, Any] | None,
    ) -> None:
        if without := [cache.url for cache in caches if "response" not in cache.spec.targets]:
            raise WrongUsage(
                f"mixture ddk compares with the teacher's probability of the labels, and "
                f"{', '.join(without)} has no response targets"
            )
        self._mixture, self._domains = mixture, domains
        self._catalogue, self._stream = catalogue, stream
        self._measured: int | None = None
        self._teacher: list[float] | None = None
        if state is not None:
            self._measured = state["measured"]
            weighting = Weighting(
                start=state["start"], shares=tuple(state["shares"]), drawn=tuple(state["drawn"])
            )
            stream.order.restore(weighting)

    @property
    def state(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self._stream.order.weighting), "measured": self._measured}

    def due(self, step: int) -> bool:
        """Whether the shares are to be measured before this step."""
        return step % self._mixture.every == 0 and self._measured != step

    def next_after(self, step: int) -> int:
        """The step at which they are to be measured next."""
        return (step // self._mixture.every + 1) * self._mixture.every

    def measure(
        self,
        student: DistilledStudent,
        collator: Collator,
        ranks: Ranks,
        device: torch.device,
        *,
        step: int,
        micro_batch: int,
        workers: int | None,
    ) -> dict[str, float]:
        """Sets the shares from `step` on; returns what is to be written of it. KdcacheError when held-out
        samples cannot be read."""
        if self._teacher is None:
            self._teacher = [self._cross_entropy(domain) for domain in self._domains]
        alone = replace(collator, targets=())
        measured = [
            measure_samples(
                student,
                self._catalogue,
                domain.held_out,
                alone,
                device=device,
                micro_batch=micro_batch,
                workers=workers,
                rank=ranks.rank,
                world_size=ranks.count,
                add_up=ranks.add_up,
            )["ce"]
            for domain in self._domains
        ]
        found = [round(each, _CE_DIGITS) for each in measured]
        before = None if self._measured is None else self._stream.order.weighting.shares
        shares = discrepancy(found, self._teacher, before, self._mixture.smoothing)
        self._stream.order.reweigh(step, shares)
        self._measured = step
        written: dict[str, float] = {}
        settled = self._stream.order.weighting.shares
        for domain, share, ours, theirs in zip(self._domains, settled, found, self._teacher, strict=True):
            written |= {
                f"share {domain.name}": share,
                f"ce {domain.name}": ours,
                f"teacher ce {domain.name}": theirs,
            }
        return written

    def _cross_entropy(self, domain: Domain) -> float:
        """The teacher's on the labels of a domain's held-out samples, nats per token."""
        total, tokens = 0.0, 0
        shards = self._catalogue.shard[domain.held_out]
        for place in np.unique(shards):
            block = self._catalogue.load(int(place), ("response",))
            for number in domain.held_out[shards == place]:
                response = block.sample(int(number - self._catalogue.starts[place])).response
                if response is not None and response.label_logprob is not None:
                    total -= float(response.label_logprob.astype(np.float64).sum())
                    tokens += len(response)
        if not tokens:
            raise KdcacheError(
                f"mixture ddk: no held-out sample of domain {domain.name} has a supervised token; "
                "hold out more samples (held_out)"
            )
        return total / tokens
