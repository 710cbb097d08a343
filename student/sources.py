"""What a stage learns from: one cache, or a mixture of several with weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from cache_schema.errors import WrongUsage
from cache_schema.settings import Help, at_least, check, positive, settings_of, within

REST = "rest"
"""The domain of the samples that meet no condition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A cache to learn from, and where its images are."""

    cache: Annotated[str, Help("A folder or an fsspec URL.")]
    image_root: Annotated[str | None, Help("Its image root. Default: that of the stage.")] = None
    weight: Annotated[
        float | None, positive, Help("Its share of the samples, against the other weights.")
    ] = None

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Several caches, or parts of them, of which every step takes samples by their shares."""

    sources: Annotated[
        tuple[Source, ...], Help("The caches; empty: the stage's one cache, for its domains.")
    ] = ()
    rule: Annotated[
        Literal["fixed", "ddk"],
        Help(
            "fixed: shares are the weights, without weights the sizes; ddk: shares follow the student's "
            "distance to the teacher on held-out samples of each domain."
        ),
    ] = "fixed"
    every: Annotated[int, at_least(1), Help("ddk: steps between two measurements.")] = 1000
    held_out: Annotated[
        int, at_least(1), Help("ddk: samples of each domain to measure on, a tenth of it at most.")
    ] = 500
    smoothing: Annotated[
        float, within(0.0, 1.0, "(]"), Help("ddk: of the new shares; the rest is spread evenly.")
    ] = 0.5
    domains: Annotated[
        Mapping[str, str],
        Help("ddk: conditions of `select --where` by name, the first that holds; none: the caches."),
    ] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weighted = [source.weight is not None for source in self.sources]
        names = [source.cache for source in self.sources]
        check(
            self,
            {
                "either all caches have a weight or none": any(weighted) and not all(weighted),
                f"each cache must be named once, not {names}": len(set(names)) < len(names),
                "weights are for rule fixed: ddk measures the shares": any(weighted) and self.rule == "ddk",
                "domains need rule ddk": bool(self.domains) and self.rule != "ddk",
                f"a domain may not be named {REST}": REST in self.domains,
            },
        )

    @property
    def shares(self) -> tuple[float, ...] | None:
        """The weights of the sources; None: in proportion to their sizes."""
        weights = tuple(source.weight for source in self.sources if source.weight is not None)
        return weights or None

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON values."""
        values = asdict(self)
        sources = list(values.pop("sources"))
        return {"caches": sources, "mixture": {**values, "domains": dict(self.domains)}}


def mixture_from(caches: Any, rule: Any, where: str) -> Mixture:
    """The mixture that `caches` and `mixture` of a recipe's stage describe: a list of caches, each a path or
    a mapping of the fields of Source; the name of a rule, or a mapping of the other fields of Mixture.
    WrongUsage for what is not one."""
    if caches is not None and not (isinstance(caches, list) and caches):
        raise WrongUsage(f"{where}: caches must be a list of caches, not {caches!r}")
    values = {"rule": rule} if isinstance(rule, str) else rule
    known = [name for name in settings_of(Mixture) if name != "sources"]
    if not isinstance(values, Mapping) or not isinstance(values.get("domains", {}), Mapping):
        raise WrongUsage(f"{where}: mixture must be a rule or a mapping of {', '.join(known)}, not {rule!r}")
    if unknown := sorted(set(values) - set(known)):
        raise WrongUsage(f"{where}: unknown keys {unknown} of mixture; known are {', '.join(known)}")
    try:
        return Mixture(sources=tuple(_source_from(entry) for entry in caches or ()), **values)
    except WrongUsage as error:
        raise WrongUsage(f"{where}: {error}") from error


def _source_from(entry: Any) -> Source:
    if isinstance(entry, str):
        return Source(cache=entry)
    known = settings_of(Source)
    if not isinstance(entry, Mapping) or "cache" not in entry:
        raise WrongUsage(f"a cache of a mixture is a path or a mapping of {', '.join(known)}, not {entry!r}")
    if unknown := sorted(set(entry) - set(known)):
        raise WrongUsage(f"unknown keys {unknown} of a cache; known are {', '.join(known)}")
    return Source(**entry)
