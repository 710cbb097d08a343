"""The target spec: what of the teacher is kept, and how precisely."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from cache_schema.errors import WrongUsage

Target = Literal["response", "visual", "relation", "prompt"]
Precision = Literal["compact", "full"]
RelationForm = Literal["factor", "exact"]
Field = Literal["logsumexp", "entropy"]

TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec:
    """What is captured. It is part of the identity of a cache: another spec is another cache.

    targets: which kinds. top_k: K entries a position. temperatures: the temperatures whose tail mass is
    kept, ascending, 1.0 always among them. tail_samples: M draws from the tail a position (0: none) at
    sample_temperature (one of `temperatures`). precision: `compact` (8-bit log-probabilities, ids as
    small as they fit) or `full` (int32, float32). relation: `factor` of a rank chosen an image so that
    1 - cos(R, U U^T) <= relation_bound, or the `exact` triangle. relation_max_rank bounds the rank (the
    residual then tells). seed: of the tail draws. without: fields of a position's record that the teacher's
    engine could not give; they are not stored, and the tail is then 1 minus the entries, known to about
    1e-6 of the whole mass.
    """

    targets: tuple[Target, ...] = ("response", "visual", "relation")
    top_k: int = 32
    temperatures: tuple[float, ...] = (1.0,)
    tail_samples: int = 0
    sample_temperature: float = 1.0
    precision: Precision = "compact"
    relation: RelationForm = "factor"
    relation_bound: float = 1e-5
    relation_max_rank: int = 1024
    seed: int = 0
    without: tuple[Field, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            problems.append(f"targets must be some of {', '.join(TARGETS)}, not {list(self.targets)}")
        if self.top_k < 1:
            problems.append(f"top_k must be at least 1, not {self.top_k}")
        if 1.0 not in self.temperatures or list(self.temperatures) != sorted(set(self.temperatures)):
            problems.append(f"temperatures must ascend and hold 1.0, not {list(self.temperatures)}")
        if any(not 0.0 < t <= 100.0 for t in self.temperatures):
            problems.append(f"temperatures must lie in (0, 100], not {list(self.temperatures)}")
        if self.tail_samples < 0:
            problems.append(f"tail_samples must not be negative, not {self.tail_samples}")
        if self.sample_temperature not in self.temperatures:
            problems.append(f"sample_temperature {self.sample_temperature} is not among the temperatures")
        if self.precision not in get_args(Precision):
            problems.append(f"precision must be compact or full, not {self.precision}")
        if self.relation not in get_args(RelationForm):
            problems.append(f"relation must be factor or exact, not {self.relation}")
        if not 0.0 < self.relation_bound < 1.0:
            problems.append(f"relation_bound must lie in (0, 1), not {self.relation_bound}")
        if self.seed < 0:
            problems.append(f"seed must not be negative, not {self.seed}")
        if self.relation_max_rank < 1:
            problems.append(f"relation_max_rank must be at least 1, not {self.relation_max_rank}")
        if set(self.without) - set(get_args(Field)) or len(set(self.without)) != len(self.without):
            problems.append(f"without must be some of {', '.join(get_args(Field))}, not {list(self.without)}")
        if self.without and (
            {"visual", "relation"} & set(self.targets) or self.temperatures != (1.0,) or self.tail_samples
        ):
            problems.append("visual, relation, other temperatures and tail_samples need all fields")
        if problems:
            raise WrongUsage("target spec: " + "; ".join(problems))

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
        """The spec of a manifest. ValueError when a key is unknown or a value is out of range."""
        unknown = set(document) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"target spec: unknown keys {sorted(unknown)}")
        values = dict(document)
        for name in ("targets", "temperatures", "without"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)
