"""What a cache holds of the teacher, as numpy records.

Shapes: B batch, T sequence, V vocabulary, K kept entries, D hidden, P visual tokens of an image,
R response positions, N positions. The target at position t is the teacher's distribution of token
t + 1 given tokens 0..t.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.format.spec import Kind

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

IGNORE_INDEX = -100
"""Label of a token that is not supervised, as in PyTorch's cross entropy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The teacher's distribution at N positions: up to K entries and the tail outside them.

    token_ids (N, K) int32, most likely first; logprobs (N, K) float32, natural log of the full softmax
    at temperature 1, non-increasing along K. counts (N,) int32: the entries of each position, 1 to K, where
    the spec gives no fixed number; what follows them is filled up with id 0 and log-probability -inf. None:
    all have K. tail_logprob (N, n_T) float32: the log of the mass outside
    the K entries of the distribution at each of `temperatures` (n_T,) float32, -inf where there is none.
    logsumexp (N,) float32 of the raw logits. entropy (N,) float32 in nats, temperature 1; both None in a
    cache whose spec is `without` them.
    label_logprob (N,) float32: the log-probability of the token that follows; None where that token is
    not text (visual positions). sampled_ids, sampled_counts (N, M) int32: draws from the tail at
    `sample_temperature`; unused slots have count 0; None when not captured.
    """

    token_ids: Int32
    logprobs: Float32
    tail_logprob: Float32
    temperatures: Float32
    logsumexp: Float32 | None
    entropy: Float32 | None
    label_logprob: Float32 | None = None
    sampled_ids: Int32 | None = None
    sampled_counts: Int32 | None = None
    counts: Int32 | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def there(self) -> NDArray[np.bool_]:
        """(N, K): which entries are there."""
        if self.counts is None:
            return np.ones(self.token_ids.shape, np.bool_)
        return np.arange(self.token_ids.shape[1]) < self.counts[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenStates:
    """The teacher's final hidden states at N positions, after the last norm, in 8 bits.

    values (N, D) int8, scales (N,) float32, channels (C, 2, D) float32: C tables of a mean and a unit per
    channel; channel_of (N,) int32: the table of each position. See `cache_schema.format.codecs.hidden`.
    """

    values: NDArray[np.int8]
    scales: Float32
    channels: Float32
    channel_of: Int32

    def __len__(self) -> int:
        return len(self.values)

    def decode(self) -> Float32:
        """(N, D) float32."""
        made = self.values * self.scales[:, None]
        for table in np.unique(self.channel_of):
            mean, unit = self.channels[table]
            rows = self.channel_of == table
            made[rows] = made[rows] * unit + mean
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """The Gram matrix R = Z Z^T (P, P) of an image's raw logits Z (P, V) (LLaVA-KD eq. 4).

    Exactly one of `factor` (P, r) float32 with R ~= factor factor^T, and `gram` (P, P) float32, is set.
    residual: 1 - cos(R, factor factor^T) as stored; norm: the Frobenius norm of R.
    """

    residual: float
    norm: float
    factor: Float32 | None = None
    gram: Float32 | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRelation:
    """One image as stored: `columns` (r, P) uint16, or float32 where nothing is rounded, with `scales`
    (r,) float32; or, with r = 0, `triangle` (P (P + 1) / 2,) float16 or float32 with one scale. See
    `cache_schema.format.codecs.relation`.
    """

    tokens: int
    residual: float
    norm: float
    scales: NDArray[np.float32]
    columns: NDArray[Any]
    triangle: NDArray[Any]

    @property
    def rank(self) -> int:
        """Columns of the factor; 0 for a triangle."""
        return len(self.columns)

    @property
    def in_steps(self) -> bool:
        """Whether the columns are numbers of steps."""
        return self.rank > 0 and self.columns.dtype == np.uint16

    def steps(self, into: NDArray[np.int16] | None = None) -> NDArray[np.int16]:
        """The columns (r, P) as numbers of steps, of a record that has them. into: an array for them."""
        steps = np.empty(self.columns.shape, np.int16) if into is None else into
        np.right_shift(self.columns, 1, out=steps.view(np.uint16))
        sign = self.columns & 1
        steps ^= np.negative(sign, out=sign).view(np.int16)
        return steps

    def decode(self) -> Relation:
        """The relation, its factor (P, r) or gram (P, P) in float32."""
        with np.errstate(all="ignore"):
            if self.rank == 0:
                gram = np.zeros((self.tokens, self.tokens), np.float32)
                gram[np.triu_indices(self.tokens)] = self.triangle.astype(np.float32) * self.scales[0]
                return Relation(residual=self.residual, norm=self.norm, gram=gram + np.triu(gram, 1).T)
            columns = self.steps() if self.in_steps else self.columns
            factor = np.ascontiguousarray(columns.T).astype(np.float32)  # turned while it is 16 bits
            factor *= self.scales
            return Relation(residual=self.residual, norm=self.norm, factor=factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """One image of a sample: its source and its placeholder tokens.

    path: relative to the image root, with forward slashes; sha256: hex digest of the file's bytes;
    width, height: pixels after decoding (EXIF applied). positions (P,) int32: every placeholder token of
    this image in the sequence, ascending, not necessarily contiguous. content: the file's bytes where they
    are at hand: in captures for a cache that embeds its images, and where such images are read.
    """

    path: str
    sha256: str
    width: int
    height: int
    positions: Int32
    content: bytes | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedImage:
    """An image as the capture passes it to the writer.

    prefix_key: hex digest of everything that decides the targets of a shared visual prefix, None when
    prefixes are not shared. `visual`, `hidden` (of the visual positions) and `relation` may be None although
    asked for when an earlier sample of the same shard has the same prefix_key: the writer then points at that
    record.
    """

    record: ImageRecord
    prefix_key: str | None = None
    visual: TopK | None = None
    hidden: HiddenStates | None = None
    relation: Relation | StoredRelation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedSample:
    """One sample as the capture passes it to the writer.

    row: its number in the dataset (its identity); sample_id: the dataset's label, may repeat.
    input_ids (T,) int32; label_spans (S, 2) int32: half-open token ranges that are supervised.
    hidden: of the response positions.
    model_inputs: all other model inputs derived from the ids (token types, ...), keyed by the model's
    argument name, arrays without a batch dimension. answers_cut: answers removed from the end because the
    sample was too long; only counted. seconds: time spent on reading and preparing it, 0 if unknown;
    informative only.
    """

    row: int
    sample_id: str
    input_ids: Int32
    label_spans: Int32
    images: tuple[CapturedImage, ...] = ()
    response: TopK | None = None
    prompt: TopK | None = None
    hidden: HiddenStates | None = None
    model_inputs: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    answers_cut: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantinedRow:
    """A dataset row that could not be captured. reason: a short code; detail: a sentence."""

    row: int
    sample_id: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample of a cache. Parts that were not captured are None or empty.

    input_ids, labels (T,) int32 (labels: IGNORE_INDEX where not supervised). positions: of every kind int32,
    ascending; visual ones of all images, in order. records: by kind, in the order of those positions.
    relation_records: one per image, as they are at hand. hidden_states: by kind, of those positions, as
    stored; what is stored may share memory with all of its shard. source: of samples from several caches, the
    place of this one's cache among them.
    """

    row: int
    sample_id: str
    input_ids: Int32
    labels: Int32
    positions: Mapping[Kind, Int32]
    images: tuple[ImageRecord, ...]
    records: Mapping[Kind, TopK | None]
    relation_records: Sequence[Relation | StoredRelation]
    model_inputs: Mapping[str, NDArray[np.generic]]
    hidden_states: Mapping[Kind, HiddenStates] = field(default_factory=dict)
    source: int = 0

    @property
    def response_positions(self) -> Int32:
        """(R,) int32."""
        return self.positions["response"]

    @property
    def visual_positions(self) -> Int32:
        """(sum of P,) int32."""
        return self.positions["visual"]

    @property
    def prompt_positions(self) -> Int32:
        """(N,) int32."""
        return self.positions["prompt"]

    @property
    def relations(self) -> list[Relation]:
        """One per image, decoded anew at every call."""
        return [each if isinstance(each, Relation) else each.decode() for each in self.relation_records]

    @property
    def hidden(self) -> dict[Kind, Float32]:
        """The hidden states by kind, each (N, D) float32."""
        return {kind: states.decode() for kind, states in self.hidden_states.items()}

    @property
    def response(self) -> TopK | None:
        """The records at response positions."""
        return self.records["response"]

    @property
    def visual(self) -> TopK | None:
        """The records at visual positions."""
        return self.records["visual"]

    @property
    def prompt(self) -> TopK | None:
        """The records at prompt positions."""
        return self.records["prompt"]


def labels_of(input_ids: Int32, label_spans: Int32) -> Int32:
    """labels (T,) of input_ids (T,): only the half-open `label_spans` (S, 2) are supervised."""
    labels = np.full(len(input_ids), IGNORE_INDEX, dtype=np.int32)
    for start, end in label_spans:
        labels[start:end] = input_ids[start:end]
    return labels


def positions_by_kind(labels: Int32, images: Iterable[Int32]) -> dict[Kind, Int32]:
    """The positions of each kind in a sample with labels (T,) and the visual tokens (P,) of its images.

    response: every t whose label t + 1 is supervised; visual: the images' tokens, image after image; prompt:
    every position that is neither.
    """
    response = np.flatnonzero(labels[1:] != IGNORE_INDEX).astype(np.int32)
    visual = np.concatenate([np.zeros(0, np.int32), *images])
    rest = np.ones(len(labels), dtype=bool)
    rest[response] = False
    rest[visual] = False
    prompt = np.flatnonzero(rest).astype(np.int32)
    return {"response": response, "visual": visual, "prompt": prompt}
