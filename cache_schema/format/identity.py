"""The fingerprint: the identity of everything that decides a target's meaning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Blocks = Literal["resume", "training", "nothing"]

ADDED_LATER = ("tokenizer_parts",)
"""Values that caches of older versions do not hold: where one side lacks them, they cannot be compared."""


def digest_of(document: Any) -> str:
    """SHA-256 in hex of `document` as canonical JSON (keys sorted, no spaces, UTF-8, no NaN)."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_digest(vocab: Mapping[str, int], special: Mapping[str, Any]) -> str:
    """Digest of a tokenizer's vocabulary (token -> id) and its special tokens (role -> token or None)."""
    return digest_of({"vocab": sorted(vocab.items()), "special": dict(special)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Identity in three classes, JSON values only.

    capture: what must be equal to resume (teacher weights and config, dtype, tokenizer, chat template,
    image processor, dataset rows, target spec). training: what must be equal to train from the cache.
    recorded: recorded only, differences never block (engine, library versions, device).
    """

    capture: dict[str, Any]
    training: dict[str, Any]
    recorded: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Digest of `capture` and `training`."""
        return digest_of({"capture": self.capture, "training": self.training})

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal fingerprint."""
        return {"capture": self.capture, "training": self.training, "recorded": self.recorded}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Fingerprint:
        """The fingerprint of a manifest."""
        return cls(capture=document["capture"], training=document["training"], recorded=document["recorded"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One value that differs between two fingerprints, and what the difference blocks. `str` gives a readable
    clause."""

    key: str
    ours: Any
    theirs: Any
    blocks: Blocks

    def __str__(self) -> str:
        return f"{self.key}: here {_shorten(self.ours)}, in the cache {_shorten(self.theirs)}"


def compare(ours: Fingerprint, theirs: Fingerprint) -> list[Difference]:
    """Every difference between two fingerprints, nested values by dotted key, blocking ones first.

    What only one side holds because the other is of an older version (ADDED_LATER) blocks nothing.
    """
    classes: tuple[tuple[Blocks, dict[str, Any], dict[str, Any]], ...] = (
        ("resume", ours.capture, theirs.capture),
        ("training", ours.training, theirs.training),
        ("nothing", ours.recorded, theirs.recorded),
    )
    found = []
    for blocks, left, right in classes:
        alone = [key for key in ADDED_LATER if (key in left) != (key in right)]
        found += [
            Difference(key=key, ours=left.get(key), theirs=right.get(key), blocks="nothing") for key in alone
        ]
        a, b = (
            dict(_flatten({key: value for key, value in side.items() if key not in alone}))
            for side in (left, right)
        )
        found += [
            Difference(key=key, ours=a.get(key), theirs=b.get(key), blocks=blocks)
            for key in sorted(a.keys() | b.keys())
            if a.get(key) != b.get(key)
        ]
    return found


def _flatten(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shorten(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"
