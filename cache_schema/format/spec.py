"""The target spec: which targets are stored, and how precisely."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_args

from cache_schema.errors import WrongUsage
from cache_schema.settings import Help, at_least, check, positive, within

Kind = Literal["response", "visual", "prompt"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The kinds of positions. A position may be of two: the last visual token before an answer is a response
position too."""

Target = Literal[Kind, "relation"]
Precision = Literal["compact", "full"]
RelationForm = Literal["factor", "exact"]
Field = Literal["logsumexp", "entropy"]

TARGETS: tuple[Target, ...] = get_args(Target)

_PANEL = "Targets"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec:
    """What is captured. It is part of the identity of a cache: another spec is another cache."""

    targets: Annotated[tuple[Target, ...], Help("The kinds of targets.", _PANEL)] = (
        "response",
        "visual",
        "relation",
    )
    top_k: Annotated[int, at_least(1), Help("Entries stored per position.", _PANEL)] = 32
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
    without: Annotated[
        tuple[Field, ...],
        Help(
            "Fields of a position's record that the teacher's engine cannot give; they are not stored, and "
            "the tail is then 1 minus the entries, known to about 1e-6 of the whole mass.",
            option="",
        ),
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
        check(self, more)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal spec."""
        document = asdict(self)
        document["targets"] = list(self.targets)
        document["temperatures"] = list(self.temperatures)
        if self.without:
            document["without"] = list(self.without)
        else:  # as every cache before this key existed
            del document["without"]
        return document

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> TargetSpec:
        """The spec of a manifest. WrongUsage when a key is unknown or a value is out of range."""
        unknown = set(document) - set(cls.__dataclass_fields__)
        if unknown:
            raise WrongUsage(f"target spec: unknown keys {sorted(unknown)}")
        values = dict(document)
        for name in ("targets", "temperatures", "without"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)
