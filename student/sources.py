"""What a stage learns from: one cache, or a mixture of several with weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from cache_schema.errors import WrongUsage
from cache_schema.settings import Help, check, positive, settings_of


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
    """Several caches, of which every step takes samples by their weights; without weights by their sizes."""

    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        weighted = [source.weight is not None for source in self.sources]
        names = [source.cache for source in self.sources]
        check(
            self,
            {
                "caches must name at least one cache": not self.sources,
                "either all caches have a weight or none": any(weighted) and not all(weighted),
                f"each cache must be named once, not {names}": len(set(names)) < len(names),
            },
        )

    @property
    def shares(self) -> tuple[float, ...] | None:
        """The weights of the sources; None: in proportion to their sizes."""
        weights = tuple(source.weight for source in self.sources if source.weight is not None)
        return weights or None

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON values."""
        return {"caches": [asdict(source) for source in self.sources]}


def mixture_from(document: Any, where: str) -> Mixture:
    """The mixture that `caches` of a recipe's stage describes: a list of caches, each a path or a mapping of
    the fields of Source. WrongUsage for what is not one."""
    if not isinstance(document, list):
        raise WrongUsage(f"{where}: caches must be a list, not {document!r}")
    try:
        return Mixture(sources=tuple(_source_from(entry) for entry in document))
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
