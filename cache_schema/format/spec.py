"""The target spec: which targets are stored, and how precisely."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from cache_schema.errors import WrongUsage
from cache_schema.settings import Help, Later, Written, at_least, check, document_of, positive, within

Kind = Literal["response", "visual", "prompt"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The kinds of positions. A position may be of two: the last visual token before an answer is a response
position too."""

Target = Literal[Kind, "relation"]
HiddenKind = Literal["response", "visual"]
Captured = Literal[Target, "hidden"]
"""What can be captured: what losses read, and hidden states, from which it can be made."""

Precision = Literal["compact", "full"]
RelationForm = Literal["factor", "exact"]
Field = Literal["logsumexp", "entropy"]

TARGETS: tuple[Target, ...] = get_args(Target)
HIDDEN_KINDS: tuple[HiddenKind, ...] = get_args(HiddenKind)
HIDDEN_CODEC = "int8"
"""The name of the only codec of hidden states: see cache_schema.format.codecs.hidden."""

_PANEL = "Targets"

TOP_K = 32
"""Entries per position of a kind for which nothing is said."""

_LEAST = re.compile(r"(?:(\w+)\s*:)?\s*p\s*>=\s*(\S+)")


def read_top_k(text: str) -> int | dict[Kind, int]:
    """`32`, or `response=16,visual=64`. ValueError for anything else; an unknown kind is left to the spec."""
    if "=" not in text:
        return int(text)
    pairs = [word.split("=") for word in text.split(",")]
    return _by_kind([(name.strip(), int(number)) for name, number in pairs])


def write_top_k(value: int | Mapping[Kind, int]) -> str:
    """The inverse of `read_top_k`."""
    if isinstance(value, int):
        return str(value)
    return ",".join(f"{kind}={number}" for kind, number in value.items())


def read_entries(text: str) -> dict[Kind, float]:
    """`p>=0.003` for all kinds, or `response:p>=0.003,visual:p>=0.01`; empty: none. ValueError for anything
    else; an unknown kind is left to the spec."""
    found: list[tuple[str, float]] = []
    for word in filter(None, map(str.strip, text.split(","))):
        match = _LEAST.fullmatch(word)
        if match is None:
            raise ValueError(word)
        kinds = KINDS if match[1] is None else (match[1],)
        found += [(kind, float(match[2])) for kind in kinds]
    return _by_kind(found)


def write_entries(value: Mapping[Kind, float]) -> str:
    """The inverse of `read_entries`."""
    return ",".join(f"{kind}:p>={least:g}" for kind, least in value.items())


def _by_kind(pairs: Sequence[tuple[str, Any]]) -> dict[Kind, Any]:
    found: dict[Any, Any] = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a kind is named twice")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryRule:
    """How many entries of a position are kept: every one with a probability of at least `least_p`, at least 1
    and at most `most`; least_p None: exactly `most`."""

    most: int
    least_p: float | None = None

    @property
    def name(self) -> str:
        """As the options of `build` say it: `32`, `p>=0.003`."""
        return str(self.most) if self.least_p is None else f"p>={self.least_p:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec:
    """What is captured. It is part of the identity of a cache: another spec is another cache."""

    targets: Annotated[
        tuple[Captured, ...],
        Help("The kinds of targets; hidden: final hidden states, for dense losses and `derive`.", _PANEL),
    ] = (
        "response",
        "visual",
        "relation",
    )
    top_k: Annotated[
        Annotated[int, at_least(1)] | Mapping[Kind, Annotated[int, at_least(1)]],
        Help("Entries stored per position, one number or one for some kinds of positions.", _PANEL),
        Written(read_top_k, write_top_k, "NUMBER or KIND=NUMBER,..."),
    ] = TOP_K
    entries: Annotated[
        Mapping[Kind, Annotated[float, within(0.0, 1.0, "()")]],
        Help(
            "Instead of a number: every entry of at least this probability, for all kinds of positions or "
            "some; at least 1, at most --max-entries.",
            _PANEL,
        ),
        Written(read_entries, write_entries, "p>=NUMBER or KIND:p>=NUMBER,..."),
        Later(),
    ] = field(default_factory=dict)
    max_entries: Annotated[
        int, within(1, 65535), Help("Most entries of a position where --entries decides.", _PANEL), Later()
    ] = 256
    temperatures: Annotated[
        tuple[Annotated[float, within(0.0, 100.0, "(]")], ...],
        Help("Temperatures whose tail mass is stored, ascending; 1 must be among them.", _PANEL),
    ] = (1.0,)
    tail_samples: Annotated[
        int,
        at_least(0),
        Help("Ids drawn from the tail per position, for `tail: sampled`; 0 for none.", _PANEL),
    ] = 0
    sample_temperature: Annotated[
        float, positive, Help("Temperature of these draws, one of --temperatures.", _PANEL)
    ] = 1.0
    hidden: Annotated[
        tuple[HiddenKind, ...],
        Help("Positions whose hidden states are stored. Default: all of these among the targets.", _PANEL),
        Later(),
    ] = ()
    precision: Annotated[
        Precision,
        Help("compact: 8-bit log-probabilities and small ids; full: float32 and int32.", _PANEL),
    ] = "compact"
    relation: Annotated[
        RelationForm,
        Help("factor: a low-rank factor whose rank is chosen per image; exact: the triangle.", _PANEL),
    ] = "factor"
    relation_bound: Annotated[
        float, within(0.0, 1.0, "()"), Help("Largest 1 - cos(R, U U^T) of a stored factor U.", _PANEL)
    ] = 1e-5
    relation_max_rank: Annotated[
        int,
        at_least(1),
        Help("Largest rank of a factor; the stored residual says what it misses.", _PANEL),
    ] = 1024
    seed: Annotated[int, at_least(0), Help("Seed of the tail draws and of the plan's order.", _PANEL)] = 0
    embed_images: Annotated[
        bool,
        Help("Keep the bytes of every image in the cache: no image root is needed then.", _PANEL),
        Later(),
    ] = False
    without: Annotated[
        tuple[Field, ...],
        Help(
            "Fields of a position's record that the teacher's engine cannot give; they are not stored, and "
            "the tail is then 1 minus the entries, known to about 1e-6 of the whole mass.",
            option="",
        ),
        Later(),
    ] = ()

    def __post_init__(self) -> None:
        ascending = list(self.temperatures) == sorted(set(self.temperatures))
        more: dict[str, object] = {
            "targets is empty: name at least one": not self.targets,
            f"temperatures must ascend and hold 1.0, not {list(self.temperatures)}": (
                1.0 not in self.temperatures or not ascending
            ),
            f"sample_temperature {self.sample_temperature} is not among the temperatures": (
                self.sample_temperature not in self.temperatures
            ),
            f"without names a field twice: {list(self.without)}": len(set(self.without)) < len(self.without),
            "visual, relation, other temperatures and tail_samples need all fields": self.without
            and (
                {"visual", "relation"} & set(self.targets) or self.temperatures != (1.0,) or self.tail_samples
            ),
        }
        check(self, more | self._hidden_faults())
        if "hidden" in self.targets and not self.hidden:
            object.__setattr__(self, "hidden", self._with_records())
        self._normalize()

    def _normalize(self) -> None:
        """Equal rules in one form, so that equal specs have equal identities. WrongUsage for a rule of a kind
        that is not among the targets."""
        asked = [kind for kind in KINDS if kind in self.targets]
        rules: dict[str, Mapping[Kind, Any]] = {"entries": self.entries}
        if isinstance(self.top_k, Mapping):
            rules["top_k"] = self.top_k
        for name, rule in rules.items():
            strange = set(rule) - set(asked)
            if strange and set(rule) != set(KINDS):
                raise WrongUsage(f"{name} names {', '.join(sorted(strange))}, not among the targets")
        entries = {kind: float(self.entries[kind]) for kind in asked if kind in self.entries}
        object.__setattr__(self, "entries", entries)
        if isinstance(self.top_k, Mapping):
            fixed = {kind: self.top_k.get(kind, TOP_K) for kind in asked if kind not in entries}
            twice = [kind for kind in entries if kind in self.top_k and set(self.top_k) != set(KINDS)]
            if twice:
                raise WrongUsage(f"top_k and entries both name {', '.join(twice)}")
            different = set(fixed.values())
            one = different.pop() if len(different) == 1 else TOP_K
            object.__setattr__(self, "top_k", fixed if different else one)

    def rule(self, kind: Kind) -> EntryRule:
        """How many entries are kept at positions of this kind."""
        if kind in self.entries:
            least = self.entries[kind]
            return EntryRule(most=min(self.max_entries, int(1.0 / least)), least_p=least)
        return EntryRule(most=self.top_k if isinstance(self.top_k, int) else self.top_k.get(kind, TOP_K))

    @property
    def entry_words(self) -> str:
        """The rules in words."""
        asked = [kind for kind in KINDS if kind in self.targets]
        words = {kind: self._words_of(self.rule(kind)) for kind in asked}
        if len(set(words.values())) == 1:
            return words[asked[0]]
        return ", ".join(f"{kind} {told}" for kind, told in words.items())

    @staticmethod
    def _words_of(rule: EntryRule) -> str:
        return f"top {rule.most}" if rule.least_p is None else f"p >= {rule.least_p:g}, at most {rule.most}"

    def _with_records(self) -> tuple[HiddenKind, ...]:
        return tuple(kind for kind in HIDDEN_KINDS if kind in self.targets)

    def _hidden_faults(self) -> dict[str, object]:
        asked = "hidden" in self.targets
        return {
            "hidden states need response or visual among the targets": asked and not self._with_records(),
            f"hidden names {list(self.hidden)}, but hidden is not among the targets": not asked
            and self.hidden,
            f"hidden names {list(self.hidden)}, of which some are named twice or not among the targets": (
                asked
                and (set(self.hidden) - set(self._with_records()) or len(set(self.hidden)) < len(self.hidden))
            ),
            "hidden states need an engine that gives them": asked and self.without,
        }

    def differences(self, other: TargetSpec) -> dict[str, tuple[Any, Any]]:
        """The fields that differ, as JSON values of both; also those that a manifest leaves out."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__}
        return {
            name: (_json_value(ours), _json_value(theirs))
            for name, (ours, theirs) in pairs.items()
            if ours != theirs
        }

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal spec."""
        document = document_of(self)
        document["targets"] = list(self.targets)
        document["temperatures"] = list(self.temperatures)
        if self.hidden:
            document["hidden"] = {"kinds": list(self.hidden), "codec": HIDDEN_CODEC}
        if self.without:
            document["without"] = list(self.without)
        return document

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> TargetSpec:
        """The spec of a manifest. WrongUsage when a key is unknown or a value is out of range."""
        unknown = set(document) - set(cls.__dataclass_fields__)
        if unknown:
            raise WrongUsage(f"target spec: unknown keys {sorted(unknown)}")
        values = dict(document)
        hidden = values.pop("hidden", {"kinds": (), "codec": HIDDEN_CODEC})
        if hidden["codec"] != HIDDEN_CODEC:
            raise WrongUsage(
                f"target spec: hidden states in codec {hidden['codec']}, this kdcache reads {HIDDEN_CODEC}"
            )
        values["hidden"] = hidden["kinds"]
        for name in ("targets", "temperatures", "without", "hidden"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value
