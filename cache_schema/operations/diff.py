"""Compares two caches: identity, samples, and the distance between their targets."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cache_schema.format.cache import Cache
from cache_schema.format.identity import compare
from cache_schema.format.records import Sample
from cache_schema.format.spec import KINDS, Kind
from cache_schema.operations.divergence import hidden_distance, kl, relation_cosine
from cache_schema.operations.settings import DiffConfig
from cache_schema.progress import Progress, Silent, task

LISTED = 10


@dataclass(slots=True, kw_only=True)
class KindDifference:
    """KL(a || b) in nats over the positions of one kind; worst_row: the row with the greatest mean KL."""

    positions: int
    mean: float
    p99: float
    max: float
    top1_agreement: float
    worst_row: int
    worst_row_mean: float


@dataclass(slots=True, kw_only=True)
class HiddenDifference:
    """|a - b| / |a| of the hidden states at the positions of one kind; worst_row: the row with the greatest
    mean."""

    positions: int
    mean: float
    p99: float
    max: float
    worst_row: int
    worst_row_mean: float


@dataclass(slots=True, kw_only=True)
class DiffReport:
    """The differences. identity: of fingerprint and spec, each as key, a, b, blocks; `blocks` is "nothing"
    for recorded values and "allowed" for those that the caller allows to differ. engines: those that wrote
    the shards of a and of b, if they differ. only_in_*: row numbers.

    other_inputs: rows whose token ids, labels or image positions differ, so that their targets were not
    compared. kl, hidden: by kind. relation: images, mean and least cosine, worst row.
    """

    identity: list[dict[str, Any]] = field(default_factory=list)
    engines: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    samples: int = 0
    only_in_a: list[int] = field(default_factory=list)
    only_in_b: list[int] = field(default_factory=list)
    other_inputs: list[int] = field(default_factory=list)
    kl: dict[str, KindDifference] = field(default_factory=dict)
    hidden: dict[str, HiddenDifference] = field(default_factory=dict)
    relation: dict[str, Any] | None = None
    kl_bound: float
    relation_bound: float
    hidden_bound: float

    @property
    def same_samples(self) -> bool:
        """The same rows with the same inputs."""
        return not (self.only_in_a or self.only_in_b or self.other_inputs)

    @property
    def same_identity(self) -> bool:
        """No difference in anything that decides the meaning of a target."""
        return all(difference["blocks"] in ("nothing", "allowed") for difference in self.identity)

    @property
    def targets_agree(self) -> bool:
        """The mean KL and the mean distance of hidden states of every kind, and the mean 1 - cosine of the
        relations, are within the bounds."""
        near = all(kind.mean <= self.kl_bound for kind in self.kl.values())
        near = near and all(kind.mean <= self.hidden_bound for kind in self.hidden.values())
        return near and (self.relation is None or 1.0 - self.relation["mean_cosine"] <= self.relation_bound)

    @property
    def same(self) -> bool:
        """Identity, samples and targets agree."""
        return self.same_identity and self.same_samples and self.targets_agree

    def to_json(self) -> dict[str, Any]:
        """A JSON object; long lists of rows are given by their length and first ten."""
        document = asdict(self)
        for name in ("only_in_a", "only_in_b", "other_inputs"):
            rows = document[name]
            document[name] = {"count": len(rows), "first": rows[:LISTED]}
        verdicts = ("same", "same_identity", "same_samples", "targets_agree")
        return {name: getattr(self, name) for name in verdicts} | document


def diff(
    a: Cache, b: Cache, progress: Progress | None = None, config: DiffConfig | None = None
) -> DiffReport:
    """Compare two caches row by row; shards and order may differ. Targets that only one of them has are not
    compared.

    KL is over the entries that both keep and one event for the rest (`divergence.kl`), so a different top_k
    alone is no difference. Engines and versions never count.
    """
    progress, config = progress or Silent(), config or DiffConfig()
    report = DiffReport(
        kl_bound=config.kl_bound,
        relation_bound=config.relation_bound,
        hidden_bound=config.hidden_bound,
        identity=_identity(a, b, config.may_differ),
    )
    engines = {"a": _engines(a), "b": _engines(b)}
    report.engines = engines if engines["a"] != engines["b"] else {}
    rows_a, rows_b = a.index().row, b.index().row
    report.only_in_a = np.setdiff1d(rows_a, rows_b).tolist()
    report.only_in_b = np.setdiff1d(rows_b, rows_a).tolist()
    found = _Found()
    with task(progress, "comparing", len(rows_a) - len(report.only_in_a)):
        for left, right in _pairs(a, b):
            report.samples += 1
            if _same_inputs(left, right):
                found.add(left, right)
            else:
                report.other_inputs.append(left.row)
            progress.update(report.samples)
    report.kl = {kind: found.kind(kind) for kind in KINDS if found.kl.values[kind]}
    report.hidden = {
        kind: HiddenDifference(**found.hidden.of(kind)) for kind in KINDS if found.hidden.values[kind]
    }
    report.relation = found.relation()
    return report


def _engines(cache: Cache) -> list[dict[str, str]]:
    """The engines that wrote the shards, each with its versions, once."""
    found = {tuple(sorted(record.engine.items())) for record in cache.commits.values()}
    return [dict(engine) for engine in sorted(found)]


def _identity(a: Cache, b: Cache, may_differ: Collection[str]) -> list[dict[str, Any]]:
    found = [
        {"key": d.key, "a": d.ours, "b": d.theirs, "blocks": d.blocks}
        for d in compare(a.manifest.fingerprint, b.manifest.fingerprint)
    ]
    told = {entry["key"] for entry in found}
    found += [
        {"key": f"spec.{key}", "a": ours, "b": theirs, "blocks": "resume"}
        for key, (ours, theirs) in a.spec.differences(b.spec).items()
        if not any(f"{name}.".startswith(f"spec.{key}.") for name in told)
    ]
    for entry in found:
        if any(entry["key"] == key or entry["key"].startswith(f"{key}.") for key in may_differ):
            entry["blocks"] = "allowed"
    return found


def _pairs(a: Cache, b: Cache) -> Iterator[tuple[Sample, Sample]]:
    """The samples of the rows that both have, shard by shard of `a`, in `b`'s order inside a shard."""
    place = {row: index for index, row in enumerate(b.index().row.tolist())}
    for shard in a.shards:
        block = a.read_shard(shard)
        samples = [block.sample(j) for j in range(len(block))]
        there = sorted((s for s in samples if s.row in place), key=lambda s: place[s.row])
        for sample in there:
            yield sample, b[place[sample.row]]


def _same_inputs(a: Sample, b: Sample) -> bool:
    return (
        np.array_equal(a.input_ids, b.input_ids)
        and np.array_equal(a.labels, b.labels)
        and [image.sha256 for image in a.images] == [image.sha256 for image in b.images]
        and all(np.array_equal(x.positions, y.positions) for x, y in zip(a.images, b.images, strict=True))
    )


class _PerPosition:
    """A distance at every position, by kind."""

    def __init__(self) -> None:
        self.values: dict[str, list[np.ndarray[Any, np.dtype[np.float32]]]] = {kind: [] for kind in KINDS}
        self.worst = dict.fromkeys(KINDS, (-1.0, -1))

    def add(self, kind: Kind, distance: np.ndarray[Any, np.dtype[np.float64]], row: int) -> None:
        self.values[kind].append(distance.astype(np.float32))
        self.worst[kind] = max(self.worst[kind], (float(distance.mean()), row))

    def of(self, kind: Kind) -> dict[str, Any]:
        values = np.concatenate(self.values[kind]).astype(np.float64)
        mean, row = self.worst[kind]
        return {
            "positions": len(values),
            "mean": float(values.mean()),
            "p99": float(np.quantile(values, 0.99)),
            "max": float(values.max()),
            "worst_row": row,
            "worst_row_mean": mean,
        }


class _Found:
    """Running sums over the pairs of samples."""

    def __init__(self) -> None:
        self.kl = _PerPosition()
        self.hidden = _PerPosition()
        self.agree = dict.fromkeys(KINDS, 0)
        self.cosines: list[float] = []
        self.worst_relation = (2.0, -1)

    def add(self, a: Sample, b: Sample) -> None:
        for kind in KINDS:
            x, y = a.records[kind], b.records[kind]
            if x is not None and y is not None and len(x):
                self.kl.add(kind, kl(x, y), a.row)
                self.agree[kind] += int((x.token_ids[:, 0] == y.token_ids[:, 0]).sum())
            one, other = a.hidden_states.get(kind), b.hidden_states.get(kind)
            if one is not None and other is not None and len(one):
                self.hidden.add(kind, hidden_distance(one, other), a.row)
        for left, right in zip(a.relations, b.relations, strict=False):
            self.cosines.append(relation_cosine(left, right))
            self.worst_relation = min(self.worst_relation, (self.cosines[-1], a.row))

    def kind(self, kind: Kind) -> KindDifference:
        told = self.kl.of(kind)
        return KindDifference(**told, top1_agreement=self.agree[kind] / told["positions"])

    def relation(self) -> dict[str, Any] | None:
        if not self.cosines:
            return None
        cosine, row = self.worst_relation
        return {
            "images": len(self.cosines),
            "mean_cosine": float(np.mean(self.cosines)),
            "least_cosine": cosine,
            "worst_row": row,
        }
