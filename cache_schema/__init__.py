"""The contract between teacher and student: what a cache holds and how it lies on disk."""

from cache_schema.cache import Cache, CacheIndex, open_cache
from cache_schema.errors import CacheDamaged, IdentityMismatch, KdcacheError, RowRejected, StoppedEarly
from cache_schema.records import (
    CapturedImage,
    CapturedSample,
    ImageRecord,
    QuarantinedRow,
    Relation,
    Sample,
    TopK,
)
from cache_schema.spec import TargetSpec
from cache_schema.writer import CacheWriter

__all__ = [
    "Cache",
    "CacheDamaged",
    "CacheIndex",
    "CacheWriter",
    "CapturedImage",
    "CapturedSample",
    "IdentityMismatch",
    "ImageRecord",
    "KdcacheError",
    "QuarantinedRow",
    "Relation",
    "RowRejected",
    "Sample",
    "StoppedEarly",
    "TargetSpec",
    "TopK",
    "open_cache",
]
