"""The documents of a cache key by key: what readers rely on, whoever wrote them."""

from __future__ import annotations

import base64
import zlib
from typing import Annotated, Any, NotRequired, TypedDict, TypeVar

import msgspec
from msgspec import Meta

from cache_schema.errors import CacheDamaged, KdcacheError, shown
from cache_schema.format.sealed import unseal
from cache_schema.format.statistics import MASS_EDGES, RANK_EDGES

FORMAT_VERSION = 2
"""Of new caches."""

VERSIONS = (1, 2)
"""The versions that are read, and in which a cache that was begun is continued. 1: targets are a folder of
files; 2: one zip per shard."""

Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Number = Annotated[float, Meta(ge=-1e300, le=1e300)]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Meta(pattern=r"^\w[\w.-]*$", max_length=255)]
"""Of a file in a folder: no path, and not hidden."""
ShardPath = Annotated[
    str, Meta(pattern=r"^(samples|targets|quarantine|images)(/\w[\w.-]*)+$", max_length=1024)
]
"""Of a file of a shard, from the cache's root. It leads nowhere else: none of its parts begins with a dot."""
Moment = Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)$")]
Pair = Annotated[list[Count | Number], Meta(min_length=2, max_length=2)]
Masses = Annotated[list[Count], Meta(min_length=len(MASS_EDGES) - 1, max_length=len(MASS_EDGES) - 1)]
Ranks = Annotated[list[Count], Meta(min_length=len(RANK_EDGES) - 1, max_length=len(RANK_EDGES) - 1)]

_PACKED, _TIMES = 1 << 20, 64
"""Bytes that any packed text may stand for, and those per character: orders of rows pack 2 to 10 times."""

_T = TypeVar("_T")


class PlanDocument(TypedDict):
    """`plan` of a manifest."""

    rows: Annotated[int, Meta(ge=1, le=1 << 53)]
    shard_size: Annotated[int, Meta(ge=1, le=1 << 53)]
    order: str
    ends: NotRequired[str]


class FingerprintDocument(TypedDict):
    """`fingerprint` of a manifest."""

    capture: dict[str, Any]
    training: dict[str, Any]
    recorded: dict[str, Any]


class AssetDocument(TypedDict):
    """One of the `assets` of a manifest."""

    sha256: Digest
    data: str


class HeadDocument(TypedDict):
    """`head` of a manifest."""

    sha256: Digest
    size: Count
    rows: Count
    width: Count
    dtype: str
    bias: bool
    softcap: Number | None
    logit_scale: Number


class ManifestDocument(TypedDict):
    """`manifest.json`."""

    format_version: int
    created: Moment
    kdcache_version: NotRequired[str]
    fingerprint: FingerprintDocument
    spec: dict[str, Any]
    head: NotRequired[HeadDocument]
    dataset: dict[str, Any]
    plan: PlanDocument
    assets: dict[Name, AssetDocument]


class PartDocument(TypedDict):
    """A group in a file of targets."""

    start: Count
    end: Count
    sha256: Digest


class FileDocument(TypedDict):
    """One of the `files` of a commit record."""

    path: ShardPath
    bytes: Count
    sha256: Digest
    parts: NotRequired[dict[Name, PartDocument]]


class Counts(TypedDict):
    """`counts` of a commit record."""

    samples: Count
    quarantined: Count
    tokens: Count
    images: Count
    shared_images: Count
    response_positions: Count
    visual_positions: Count
    prompt_positions: Count
    relations: Count


class KindStatistics(TypedDict):
    """`statistics` of a kind of positions."""

    positions: Count
    covered_mass: NotRequired[Masses]
    sum_tail_mass: NotRequired[Number]
    sum_entries: NotRequired[Count]
    sum_entropy: NotRequired[Number]
    labels: NotRequired[Count]
    sum_label_logprob: NotRequired[Number]
    label_is_first: NotRequired[Count]


class RelationStatistics(TypedDict):
    """`statistics` of the relations."""

    relations: Count
    ranks: Ranks
    sum_rank: Count
    max_residual: Number
    sum_residual: Number


class Statistics(TypedDict):
    """`statistics` of a commit record."""

    longest: list[Pair]
    slowest: NotRequired[list[Pair]]
    supervised_tokens: Count
    cut: NotRequired[Count]
    quarantined: dict[str, Count]
    response: KindStatistics
    visual: KindStatistics
    prompt: KindStatistics
    relation: RelationStatistics
    bytes: dict[Name, Count]


class CommitDocument(TypedDict):
    """`commits/NNNNN.json`."""

    format_version: int
    cache: Digest
    shard: Annotated[int, Meta(ge=0, le=1 << 40)]
    attempt: Name
    created: Moment
    kdcache_version: NotRequired[str]
    seconds: Annotated[float, Meta(ge=0, le=1e12)]
    engine: dict[str, Any]
    counts: Counts
    statistics: Statistics
    files: list[FileDocument]


def read(data: bytes, kind: type[_T], form: str, where: str) -> _T:
    """The document of this kind sealed in `data`, whose key `format` is `form`, without keys that it does not
    name. CacheDamaged when its bytes are altered or it is no such document, KdcacheError for another version.
    """
    document = unseal(data, where)
    if document.get("format") != form:
        raise CacheDamaged(f"{where}: its format is not {form!r}; give another directory")
    if document.get("format_version") not in VERSIONS:
        raise KdcacheError(
            f"{where}: format version {shown(str(document.get('format_version')))}, this kdcache reads "
            f"{' and '.join(map(str, VERSIONS))}; install a kdcache that reads it"
        )
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise CacheDamaged(f"{where}: not as the format says: {shown(str(error))}") from error


def pack(data: bytes) -> str:
    """Base64 of zlib."""
    return base64.b64encode(zlib.compress(data, 6)).decode()


def unpack(text: str, what: str) -> bytes:
    """The inverse of `pack`. ValueError when it is not, or stands for more than text of its length can."""
    unpacker, most = zlib.decompressobj(), _PACKED + _TIMES * len(text)
    try:
        data = unpacker.decompress(base64.b64decode(text, validate=True), most)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"{what} is not base64 of zlib ({error})") from error
    if not unpacker.eof:
        raise ValueError(f"{what} is cut off, or more than {most:,} bytes in {len(text):,} characters")
    return data
