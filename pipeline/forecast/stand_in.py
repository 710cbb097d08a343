"""Students for testing records before any training: the teacher with noise, or a given model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.errors import KdcacheError
from cache_schema.format.codecs.topk import topk_at
from cache_schema.format.records import TopK
from cache_schema.format.spec import TargetSpec
from models.head import Head
from pipeline.engine import Engine
from pipeline.forecast.fidelity import Agreement, compare, noise_of_kl
from pipeline.relation import RelationMaker
from pipeline.samples import PreparedSample

_CHUNK_BYTES = 64 << 20  # logits of one model worked on at a time; the passes need four times as much
_TRIED = 256  # positions that the size of the noise is found on, before it is mended
_MENDED = 4096  # at most this many: enough for the requested mean KL


@dataclass(slots=True)
class Picked:
    """Final hidden states that were kept: by kind of position (N, D), and of whole images (P, D)."""

    positions: dict[str, Tensor]
    images: list[Tensor]


class Witness:
    """An engine that keeps some of the hidden states that pass through it.

    wanted: dataset row -> the positions of it to keep, one array a part. kept: the same, as (n, D).
    """

    def __init__(self, engine: Engine, wanted: Mapping[int, Sequence[NDArray[np.integer]]]) -> None:
        self._engine = engine
        self._wanted = wanted
        self.kept: dict[int, list[Tensor]] = {}

    @property
    def head(self) -> Head:
        """See Engine."""
        return self._engine.head

    @property
    def description(self) -> dict[str, str]:
        """See Engine."""
        return self._engine.description

    def hidden_states(self, samples: Sequence[PreparedSample]) -> list[Tensor]:
        """See Engine."""
        hidden = self._engine.hidden_states(samples)
        for sample, states in zip(samples, hidden, strict=True):
            self.kept[sample.row] = [
                states[torch.from_numpy(np.asarray(part, np.int64)).to(states.device)].clone()
                for part in self._wanted.get(sample.row, ())
            ]
        return hidden


class StandIn(Protocol):
    """A student at the picked positions."""

    head: Head

    def at(self, kind: str, rows: slice) -> Tensor:
        """Its final hidden states (n, D) at some positions of a kind."""

    def image(self, number: int) -> Tensor:
        """Its final hidden states (P, D) of one picked image."""

    def describe(self) -> dict[str, Any]:
        """What it is, as a JSON object."""


class GivenStudent:
    """A student whose hidden states were taken at the same places as the teacher's."""

    def __init__(self, head: Head, picked: Picked, name: str) -> None:
        self.head = head
        self._picked = picked
        self._name = name

    def at(self, kind: str, rows: slice) -> Tensor:
        """See StandIn."""
        return self._picked.positions[kind][rows]

    def image(self, number: int) -> Tensor:
        """See StandIn."""
        return self._picked.images[number]

    def describe(self) -> dict[str, Any]:
        """See StandIn."""
        return {"kind": "given", "student": self._name}


class NoisyTeacher:
    """The teacher with Gaussian noise on its final hidden state, of a size found for each kind of position
    at which KL(teacher || student) is `kl` nats in the mean."""

    def __init__(self, head: Head, picked: Picked, *, kl: float, seed: int) -> None:
        self.head = head
        self._picked = picked
        self._kl = kl
        self._seed = seed
        self._sizes: dict[str, float] = {}
        for kind, hidden in picked.positions.items():
            self._find_size(kind, hidden)
        if picked.images and "visual" not in self._sizes:
            self._find_size("visual", torch.cat(picked.images))

    def at(self, kind: str, rows: slice) -> Tensor:
        """See StandIn. The noise of a position does not depend on the other positions requested."""
        return self._noisy(kind, self._picked.positions[kind], rows, self._sizes[kind])

    def image(self, number: int) -> Tensor:
        """See StandIn."""
        hidden = self._picked.images[number]
        noise = torch.from_numpy(_numbers(hidden.shape, (self._seed, 0, number))).to(hidden.device)
        return hidden.float() + self._sizes["visual"] * noise

    def describe(self) -> dict[str, Any]:
        """See StandIn."""
        return {"kind": "noise", "asked_kl": self._kl, "noise": dict(self._sizes)}

    def _noisy(self, kind: str, hidden: Tensor, rows: slice, size: float) -> Tensor:
        numbers = range(*rows.indices(len(hidden)))
        noise = np.stack([_numbers(hidden.shape[1:], (self._seed, _code(kind), n)) for n in numbers])
        return hidden[rows].float() + size * torch.from_numpy(noise).to(hidden.device)

    def _find_size(self, kind: str, hidden: Tensor) -> None:
        """Finds the noise scale of a kind on some of its hidden states (N, D), and refines it on all of
        them."""
        few = hidden[:: max(1, len(hidden) // _TRIED)]

        def kl_at(states: Tensor, size: float) -> float:
            def student(rows: slice) -> Tensor:
                return self._noisy(kind, states, rows, size)

            return kl_between(self.head, states, self.head, student)

        start = float(few.float().std()) / 4 or 1.0
        start = noise_of_kl(partial(kl_at, few), self._kl, start, rounds=30)
        most = hidden[:_MENDED]
        self._sizes[kind] = noise_of_kl(partial(kl_at, most), self._kl, start, rounds=8) if start else 0.0


def kl_between(teacher: Head, hidden: Tensor, student: Head, states: Callable[[slice], Tensor]) -> float:
    """Mean KL(teacher || student) in nats over hidden (N, D); states: rows -> the student's (n, D')."""
    total = 0.0
    with torch.inference_mode():
        for rows in chunks(len(hidden), teacher.columns):
            log_p = teacher.logits(hidden[rows]).log_softmax(dim=1)
            log_q = student.logits(states(rows)).to(log_p.device).log_softmax(dim=1)
            total += float(torch.linalg.vecdot(log_p.exp(), log_p - log_q).sum())
    return total / max(len(hidden), 1)


def agreement_at(
    head: Head,
    hidden: Tensor,
    student: StandIn,
    kind: str,
    records: Mapping[Any, TopK],
    done: Callable[[int], None],
) -> dict[Any, Agreement]:
    """The agreement of every record for a kind's picked positions, hidden (N, D). done: called with numbers
    of positions."""
    sums = {key: Agreement() for key in records}
    for rows in chunks(len(hidden), head.columns):
        with torch.inference_mode():
            logits = head.logits(hidden[rows])
            theirs = student.head.logits(student.at(kind, rows)).to(logits.device)
            part = compare(logits, theirs, {key: topk_at(record, rows) for key, record in records.items()})
        for key, agreement in part.items():
            sums[key].add(agreement)
        done(rows.stop)
    return sums


def exact_relations(head: Head) -> RelationMaker:
    """Makes the Gram matrices of a head."""
    return RelationMaker(head, replace(TargetSpec(), relation="exact"))


def chunks(positions: int, vocab: int) -> Iterator[slice]:
    """Slices of positions whose float32 logits (n, V) fit into a chunk."""
    step = max(1, _CHUNK_BYTES // (4 * vocab))
    for start in range(0, positions, step):
        yield slice(start, min(start + step, positions))


def require_same_tokens(sample: PreparedSample, theirs: PreparedSample, student: str) -> None:
    """KdcacheError unless the student's processor makes the teacher's token ids."""
    if not np.array_equal(sample.input_ids, theirs.input_ids):
        raise KdcacheError(
            f"{student} does not tokenize row {sample.row} as the teacher does ({len(theirs)} tokens "
            "instead of "
            f"{len(sample)}, or other ids); give a student with the teacher's tokenizer and image tokens"
        )


def _code(kind: str) -> int:
    return int.from_bytes(kind.encode()[:4], "little")


def _numbers(shape: Sequence[int], key: Sequence[int]) -> NDArray[np.float32]:
    """Standard normal numbers of a shape, determined by the key alone."""
    return np.random.default_rng(key).standard_normal(tuple(shape), dtype=np.float32)
