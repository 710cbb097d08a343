"""The documents of a cache: the manifest (what it is) and the commit records (which shards exist)."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.errors import UNDECODABLE, CacheDamaged, first_line
from cache_schema.format.documents import (
    FORMAT_VERSION,
    CommitDocument,
    FileDocument,
    ManifestDocument,
    PlanDocument,
    pack,
    read,
    unpack,
)
from cache_schema.format.identity import Fingerprint, digest_of
from cache_schema.format.sealed import seal
from cache_schema.format.spec import TargetSpec
from cache_schema.format.store import Range
from cache_schema.format.stored_head import StoredHead
from cache_schema.version import VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which dataset rows are in which shard, the same for every number of workers.

    rows: the number of planned rows. shard_size: rows per shard; the last shard may hold fewer. order (rows,)
    int64: plan position -> dataset row, each at most once (all of them in a build, some in a selection).
    Shard i is order[i * shard_size : (i + 1) * shard_size], or order[ends[i - 1] : ends[i]] where `ends`
    (shards,) is given: a cache made of others takes over whole shards of any size. digest: of all of that,
    computed once, since every commit record is compared with it.
    """

    rows: int
    shard_size: int
    order: NDArray[np.int64]
    ends: NDArray[np.int64] | None = None
    digest: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.rows < 1 or self.shard_size < 1:
            raise ValueError(f"plan: rows {self.rows} and shard_size {self.shard_size} must be at least 1")
        ascending = np.sort(self.order)
        if len(ascending) != self.rows or ascending[0] < 0 or (ascending[1:] == ascending[:-1]).any():
            raise ValueError(f"plan: order must hold {self.rows} distinct row numbers")
        if self.ends is not None:
            sizes = np.diff(self.ends, prepend=0)
            if self.ends[-1] != self.rows or (sizes < 1).any():
                raise ValueError(f"plan: ends must divide the {self.rows} rows into shards")
        parts = [self.order] if self.ends is None else [self.order, self.ends]
        digests = [hashlib.sha256(np.ascontiguousarray(part, "<i8").data).hexdigest() for part in parts]
        object.__setattr__(self, "digest", digest_of([self.rows, self.shard_size, *digests]))

    @property
    def shards(self) -> int:
        """The number of shards of the complete cache."""
        return -(-self.rows // self.shard_size) if self.ends is None else len(self.ends)

    def rows_of(self, shard: int) -> NDArray[np.int64]:
        """The dataset rows of a shard, in order."""
        if not 0 <= shard < self.shards:
            raise ValueError(f"plan: no shard {shard} among {self.shards}")
        if self.ends is None:
            return self.order[shard * self.shard_size : (shard + 1) * self.shard_size]
        return self.order[self.ends[shard - 1] if shard else 0 : self.ends[shard]]

    def shard_at(self, place: int) -> int:
        """The shard of a place in `order`."""
        if self.ends is None:
            return place // self.shard_size
        return int(np.searchsorted(self.ends, place, side="right"))

    def to_json(self) -> dict[str, Any]:
        """rows, shard_size, and `order` (and `ends`) as base64 of zlib of little-endian int64."""
        arrays = {"order": self.order} if self.ends is None else {"order": self.order, "ends": self.ends}
        packed = {name: pack(array.astype("<i8").tobytes()) for name, array in arrays.items()}
        return {"rows": self.rows, "shard_size": self.shard_size, **packed}

    @classmethod
    def from_json(cls, document: PlanDocument) -> Plan:
        """The plan of a manifest. ValueError when it is none."""
        order, ends = (
            np.frombuffer(unpack(packed, f"plan: {name}"), dtype="<i8").astype(np.int64, copy=False)
            if packed
            else None
            for name, packed in (("order", document["order"]), ("ends", document.get("ends")))
        )
        if order is None or (ends is not None and not len(ends)):
            raise ValueError("plan: it has no order")
        return cls(rows=document["rows"], shard_size=document["shard_size"], order=order, ends=ends)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a cache is. Written once.

    assets: the teacher's tokenizer and processor files, name -> bytes. created: ISO 8601, UTC. dataset:
    informative only (name, path as given, image root as given, ...). kdcache_version: of the program that
    began it; empty where it was not recorded. head: the teacher's, of a cache with hidden states; it follows
    from the fingerprint, so it is no part of the identity.
    """

    fingerprint: Fingerprint
    spec: TargetSpec
    plan: Plan
    created: str
    assets: dict[str, bytes] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    kdcache_version: str = VERSION
    head: StoredHead | None = None

    @property
    def identity(self) -> str:
        """Digest of fingerprint, spec and plan: builds with equal identity share a cache."""
        return digest_of([self.fingerprint.digest, self.spec.to_json(), self.plan_digest])

    @property
    def vocab_size(self) -> int:
        """Tokens of the teacher's tokenizer: all token ids are below it."""
        known = self.fingerprint.training.get("vocab_size")
        return known if isinstance(known, int) else 1 << 31

    @property
    def plan_digest(self) -> str:
        """Digest of the plan: rows, shard size, order, and where the shards end if they are uneven."""
        return self.plan.digest

    def to_bytes(self) -> bytes:
        """The content of `manifest.json`."""
        return seal(
            {
                "format": "kdcache",
                "format_version": self.format_version,
                "created": self.created,
                "kdcache_version": self.kdcache_version,
                "identity": self.identity,
                "fingerprint": self.fingerprint.to_json() | {"digest_of_both": self.fingerprint.digest},
                "spec": self.spec.to_json(),
                **({} if self.head is None else {"head": self.head.to_json()}),
                "dataset": self.dataset,
                "plan": self.plan.to_json(),
                "assets": {
                    name: {
                        "bytes": len(data),
                        "sha256": hashlib.sha256(data).hexdigest(),
                        "data": pack(data),
                    }
                    for name, data in sorted(self.assets.items())
                },
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "manifest.json") -> Manifest:
        """The manifest of `manifest.json`. CacheDamaged when altered, KdcacheError for another format."""
        document = read(data, ManifestDocument, "kdcache", where)
        try:
            assets = {
                name: unpack(asset["data"], f"asset {name}") for name, asset in document["assets"].items()
            }
            plan, fingerprint = (
                Plan.from_json(document["plan"]),
                Fingerprint.from_json(document["fingerprint"]),
            )
            made = cls(
                fingerprint=fingerprint,
                spec=TargetSpec.from_json(document["spec"]),
                plan=plan,
                created=document["created"],
                assets=assets,
                dataset=document["dataset"],
                format_version=document["format_version"],
                kdcache_version=document.get("kdcache_version", ""),
                head=StoredHead.from_json(document["head"]) if "head" in document else None,
            )
        except UNDECODABLE as error:
            raise CacheDamaged(f"{where}: not as the format says ({first_line(error)})") from error
        for name, asset in document["assets"].items():
            if hashlib.sha256(assets[name]).hexdigest() != asset["sha256"]:
                raise CacheDamaged(f"{where}: asset {name} does not match its digest")
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file of a shard: path from the cache's root, size in bytes, SHA-256 in hex.

    parts: of the targets in version 2, the bytes of each group: (start, end, SHA-256).
    """

    path: str
    bytes: int
    sha256: str
    parts: Mapping[str, tuple[int, int, str]] = field(default_factory=dict)

    @property
    def whole(self) -> dict[Range, str]:
        """All its bytes, and their SHA-256."""
        return {Range(self.path, 0, self.bytes): self.sha256}

    def some(self, groups: Collection[str]) -> dict[Range, str]:
        """The bytes of these groups, each with its SHA-256; the whole file when it has no others."""
        if groups == self.parts.keys():
            return self.whole
        return {Range(self.path, *self.parts[name][:2], whole=False): self.parts[name][2] for name in groups}

    def to_json(self) -> dict[str, Any]:
        """As in a commit record."""
        document: dict[str, Any] = {"path": self.path, "bytes": self.bytes, "sha256": self.sha256}
        if self.parts:
            document["parts"] = {
                name: {"start": start, "end": end, "sha256": digest}
                for name, (start, end, digest) in self.parts.items()
            }
        return document

    @classmethod
    def from_json(cls, document: FileDocument) -> StoredFile:
        """The file of a commit record."""
        parts = {
            name: (part["start"], part["end"], part["sha256"])
            for name, part in document.get("parts", {}).items()
        }
        return cls(path=document["path"], bytes=document["bytes"], sha256=document["sha256"], parts=parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord:
    """The proof that a shard exists.

    cache: the manifest's identity. attempt: the id in the names of its files. counts: samples,
    quarantined, tokens, images, shared_images, response_positions, visual_positions, prompt_positions,
    relations. statistics: see `cache_schema.format.statistics`. seconds: of capture. created: ISO 8601, UTC.
    kdcache_version: of the program that wrote the shard; empty where it was not recorded.
    """

    cache: str
    shard: int
    attempt: str
    counts: dict[str, int]
    statistics: dict[str, Any]
    files: tuple[StoredFile, ...]
    engine: dict[str, str]
    seconds: float
    created: str
    kdcache_version: str = VERSION
    format_version: int = FORMAT_VERSION

    @property
    def name(self) -> str:
        """What the names of its files begin with."""
        return f"{self.shard:05d}-{self.attempt}"

    @property
    def targets(self) -> str:
        """The path of its targets from the cache's root: a folder in version 1, a file in version 2."""
        return targets_path(self.name, self.format_version)

    def extents(self, kind: str) -> dict[Range, str]:
        """All bytes of the files below the folder `kind`, with their SHA-256."""
        found: dict[Range, str] = {}
        for file in self.files:
            if file.path.startswith(f"{kind}/"):
                found |= file.whole
        return found

    def target_extents(self, targets: Collection[str]) -> dict[Range, str]:
        """The bytes that hold the groups of these targets, with their SHA-256."""
        found: dict[Range, str] = {}
        for file in self.files:
            if file.path == self.targets:
                found |= file.some({name for name in file.parts if name.split("_")[0] in targets})
            elif file.path.removeprefix(f"{self.targets}/").split("/")[0] in (*targets, "zarr.json"):
                found |= file.whole
        return found

    @property
    def path(self) -> str:
        """The record's path from the cache's root."""
        return commit_path(self.shard)

    def to_bytes(self) -> bytes:
        """The content of `commits/<shard>.json`."""
        return seal(
            {
                "format": "kdcache-commit",
                "format_version": self.format_version,
                "cache": self.cache,
                "shard": self.shard,
                "attempt": self.attempt,
                "created": self.created,
                "kdcache_version": self.kdcache_version,
                "seconds": self.seconds,
                "engine": self.engine,
                "counts": self.counts,
                "statistics": self.statistics,
                "files": [file.to_json() for file in self.files],
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> CommitRecord:
        """The record in `data`. CacheDamaged when altered."""
        document = read(data, CommitDocument, "kdcache-commit", where)
        files = tuple(map(StoredFile.from_json, document["files"]))
        return cls(**({"kdcache_version": ""} | document | {"files": files}))  # type: ignore[arg-type]


def commit_path(shard: int) -> str:
    """Path of a shard's commit record from the cache's root."""
    return f"commits/{shard:05d}.json"


def targets_path(name: str, version: int) -> str:
    """Path of the targets of the shard `name` ("00000-<attempt>") from the cache's root."""
    return f"targets/{name}.zarr{'.zip' if version > 1 else ''}"
