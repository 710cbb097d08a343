"""Private spans of a text, and records there that no longer hold the private token's distribution (Swing,
arXiv 2212.08349: a temperature of their own and noise; our reading of its abstract)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.datasets.conversations import Conversation
from cache_schema.errors import RowRejected, WrongUsage
from cache_schema.format.records import TopK

Span = tuple[int, int]

_LEAST_TAIL = -30.0  # nats; a tail of less counts as that much, so that every token keeps some probability


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateSpans:
    """Where private text is, and how records there are changed.

    pattern: of a regular expression; field: of a row's key with the private texts of the row, a list of
    strings. temperature, noise: see `Veil`. tokens: of the vocabulary.
    """

    pattern: re.Pattern[str] | None
    field: str | None
    temperature: float
    noise: float
    tokens: int
    seed: int

    def found(self, conversation: Conversation, text: str) -> list[Span]:
        """The private spans of a conversation's text. RowRejected when its key does not hold texts."""
        spans = [] if self.pattern is None else [match.span() for match in self.pattern.finditer(text)]
        for phrase in self._phrases(conversation.extra.get(self.field) if self.field else None):
            spans += [match.span() for match in re.finditer(re.escape(phrase), text)]
        return [(start, end) for start, end in spans if start < end]

    def _phrases(self, given: Any) -> list[str]:
        if given is None:
            return []
        if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
            raise RowRejected("broken_row", f"{self.field} must be a list of texts, not {str(given)[:60]!r}")
        return given


@dataclass(frozen=True, slots=True, kw_only=True)
class Veil:
    """The private tokens of one sample: private (T,) bool, ids (T,) its tokens."""

    spans: PrivateSpans
    row: int
    ids: NDArray[np.int32]
    private: NDArray[np.bool_]

    @classmethod
    def of(cls, spans: PrivateSpans, row: int, ids: NDArray[np.int32], ranges: Iterable[Span]) -> Veil | None:
        """None: nothing is private."""
        private = np.zeros(len(ids), np.bool_)
        for start, end in ranges:
            private[start:end] = True
        return cls(spans=spans, row=row, ids=ids, private=private) if private.any() else None

    def over(self, record: TopK, positions: NDArray[np.integer]) -> TopK:
        """The record (N positions) with those changed whose next token is private; others keep their bits.

        There the next token's entry gives way to a token drawn from outside of the entries, at the tail's
        mean probability; all log-probabilities are divided by the temperature and get Laplace noise of the
        scale `noise`, seeded by row and position; entries and tail sum to 1 again, the tail spread evenly
        over its tokens at every temperature. label_logprob is that of any token of the tail, logsumexp 0,
        entropy that of the changed distribution.
        """
        following = np.minimum(positions + 1, len(self.ids) - 1)
        hit = np.flatnonzero(self.private[following] & (positions + 1 < len(self.ids)))
        if not len(hit):
            return record
        made = {
            name: np.array(value)
            for name in ("token_ids", "logprobs", "tail_logprob", "logsumexp", "entropy", "label_logprob")
            if (value := getattr(record, name)) is not None
        }
        at_one = int(np.flatnonzero(record.temperatures == 1.0)[0])
        for place in hit.tolist():
            count = record.token_ids.shape[1] if record.counts is None else int(record.counts[place])
            ids, logprobs = made["token_ids"][place, :count], made["logprobs"][place, :count]
            label = int(self.ids[following[place]])
            tail = float(record.tail_logprob[place, at_one])
            changed = self._changed(ids, logprobs, tail, label, int(positions[place]))
            new_ids, new_logprobs, each = changed
            made["token_ids"][place, :count], made["logprobs"][place, :count] = new_ids, new_logprobs
            others = np.log(max(1, self.spans.tokens - count))
            for number, temperature in enumerate(record.temperatures.tolist()):
                outside = each / temperature + others
                whole = np.logaddexp.reduce([*(new_logprobs / temperature), outside])
                made["tail_logprob"][place, number] = outside - whole
            values = {
                "logsumexp": 0.0,
                "label_logprob": each,
                "entropy": -(np.exp(new_logprobs) @ new_logprobs) - np.exp(each + others) * each,
            }
            for name in values.keys() & made.keys():
                made[name][place] = values[name]
        return replace(record, **made)

    def _changed(
        self, ids: NDArray[np.int32], logprobs: NDArray[np.float32], tail: float, label: int, position: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float64], float]:
        """Ids and log-probabilities of the entries, most likely first, and that of each token of the tail."""
        spans, count = self.spans, len(ids)
        random = np.random.default_rng([spans.seed, self.row, position])
        ids, found = ids.copy(), logprobs.astype(np.float64)
        others = np.log(max(1, spans.tokens - count))
        each = max(tail, _LEAST_TAIL) - others
        for place in np.flatnonzero(ids == label):
            other = label
            while count < spans.tokens and other in ids:  # where every token is an entry, there is no other
                other = int(random.integers(spans.tokens))
            ids[place], found[place] = other, each
        found = found / spans.temperature + random.laplace(0.0, spans.noise, count)
        each = each / spans.temperature + random.laplace(0.0, spans.noise)
        whole = np.logaddexp.reduce([*found, each + others])
        order = np.argsort(-found, kind="stable")
        return ids[order], found[order] - whole, float(each - whole)


def private_spans(
    pattern: str | None, field: str | None, *, temperature: float, noise: float, tokens: int, seed: int
) -> PrivateSpans | None:
    """None: nothing is private. WrongUsage when `pattern` is no regular expression."""
    if pattern is None and field is None:
        return None
    try:
        compiled = None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise WrongUsage(f"--private {pattern!r} is not a regular expression: {error}") from error
    return PrivateSpans(
        pattern=compiled, field=field, temperature=temperature, noise=noise, tokens=tokens, seed=seed
    )
