"""The contract between teacher and student: what a cache holds and how it is stored.

Names are loaded when they are first used, so that `kdcache --help` and the error types need no numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache_schema.errors import CacheDamaged, IdentityMismatch, KdcacheError, RowRejected, StoppedEarly
    from cache_schema.format.cache import Cache, CacheIndex, open_cache
    from cache_schema.format.records import (
        CapturedImage,
        CapturedSample,
        ImageRecord,
        QuarantinedRow,
        Relation,
        Sample,
        TopK,
    )
    from cache_schema.format.spec import TargetSpec
    from cache_schema.format.writer import CacheWriter

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

_HOMES = {
    "format.cache": ("Cache", "CacheIndex", "open_cache"),
    "errors": ("CacheDamaged", "IdentityMismatch", "KdcacheError", "RowRejected", "StoppedEarly"),
    "format.records": (
        *("CapturedImage", "CapturedSample", "ImageRecord", "QuarantinedRow", "Relation", "Sample", "TopK"),
    ),
    "format.spec": ("TargetSpec",),
    "format.writer": ("CacheWriter",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"cache_schema.{module}"), name)
    raise AttributeError(f"module 'cache_schema' has no attribute {name!r}")
