"""The teacher's head beside its hidden states: what the manifest says of its file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cache_schema.errors import CacheDamaged

HEAD_FOLDER = "head"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredHead:
    """A safetensors file with `weight` (rows, width) and, where there is one, `bias` (rows,), as the teacher
    has them: logits = softcap * tanh(z / softcap), z = logit_scale * (hidden weight^T + bias).

    sha256, size in bytes: of the file. rows: the tokenizer's length; dtype: of the weight. softcap None: z
    itself.
    """

    sha256: str
    size: int
    rows: int
    width: int
    dtype: str
    bias: bool
    softcap: float | None
    logit_scale: float

    @property
    def path(self) -> str:
        """The file's path from the cache's root."""
        return f"{HEAD_FOLDER}/{self.sha256}.safetensors"

    def check(self, data: bytes, where: str) -> None:
        """CacheDamaged when `data` is not the file."""
        if len(data) != self.size or hashlib.sha256(data).hexdigest() != self.sha256:
            raise CacheDamaged(
                f"{where}/{self.path}: truncated or altered; run `kdcache verify --repair` on it, then "
                "the same `kdcache build` again"
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal one."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> StoredHead:
        """That of a manifest; unknown keys are ignored."""
        return cls(**{name: document[name] for name in cls.__dataclass_fields__})
