"""The divergences that a KL term can be formed with, by name: as settings, without their formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cache_schema.errors import WrongUsage
from cache_schema.format.spec import KINDS, Kind
from cache_schema.settings import Range, at_least, positive, within


@dataclass(frozen=True, slots=True)
class Parameter:
    """The one parameter of a divergence: its name, its default, and the values it may have."""

    name: str
    default: float
    allowed: Range


PARAMETERS: Mapping[str, Parameter | None] = {
    "forward_kl": None,
    "reverse_kl": None,
    "jsd": Parameter("beta", 0.5, within(0.0, 1.0)),
    "total_variation": None,
    "skew_kl": Parameter("alpha", 0.1, within(0.0, 1.0, "()")),
    "skew_reverse_kl": Parameter("alpha", 0.1, within(0.0, 1.0, "()")),
    "adaptive_kl": Parameter("mu", 0.5, within(0.0, 1.0, "()")),
    "balanced_kl": None,
    "dac_kl": Parameter("mu", 0.95, within(0.0, 1.0, "(]")),
    "dbild": Parameter("k", 0.0, at_least(2)),
    "first": Parameter("temperature", 0.0, positive),
    "sinkhorn": Parameter("epsilon", 0.1, positive),
    "taid": Parameter("t", 0.4, within(0.0, 1.0, "[)")),
    "binary_kl": None,
}
"""By name. `student.losses.divergences` holds the formula of each that is not of logits."""

OF_LOGITS = frozenset({"binary_kl"})
"""The divergences that compare logits, not distributions: they need the teacher's head and hidden states."""

APART = frozenset({"taid", "sinkhorn"}) | OF_LOGITS
"""The divergences of more than one position's events: their target hangs on the student's logits, there or at
other positions too, or they are of logits. `student.losses.dense` computes them."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """A divergence and the value of its parameter, 0 where it has none."""

    name: str
    value: float = 0.0

    @property
    def text(self) -> str:
        """What `parse` makes it of."""
        parameter = PARAMETERS[self.name]
        plain = parameter is None or self.value == parameter.default
        return self.name if plain else f"{self.name}:{self.value!r}"

    @classmethod
    def parse(cls, text: str) -> Divergence:
        """That of `jsd:0.3`, or of `jsd` with its default. WrongUsage for anything else."""
        name, colon, number = (part.strip() for part in text.partition(":"))
        if name not in PARAMETERS:
            raise WrongUsage(f"divergence {text.strip()!r} is not one of {', '.join(PARAMETERS)}")
        parameter = PARAMETERS[name]
        if parameter is None:
            if colon:
                raise WrongUsage(f"divergence {name} has no parameter, so {text.strip()!r} means nothing")
            return cls(name)
        if not colon:
            return cls(name, parameter.default)
        try:
            value = float(number)
        except ValueError:
            raise WrongUsage(
                f"divergence {name}: {parameter.name} must be a number, not {number!r}"
            ) from None
        if fault := parameter.allowed.fault(value):
            raise WrongUsage(f"divergence {name}: {parameter.name} must {fault}, not {value:g}")
        return cls(name, value)


FORWARD = Divergence("forward_kl")

BATCH = 16
"""The most positions of a sample that `sinkhorn` compares with each other."""

CONCENTRATED = 5
"""The most likely tokens that `first` learns from."""


def by_kind(text: str) -> dict[Kind, Divergence]:
    """The divergence of each kind of position from `reverse_kl`, for all of them, or from
    `response=jsd:0.5,visual=skew_kl`; a kind that is not named has the forward KL. WrongUsage for others."""
    if not isinstance(text, str):
        raise WrongUsage(f"divergence must be a name such as jsd:0.5, not {text!r}")
    if "=" not in text:
        return dict.fromkeys(KINDS, Divergence.parse(text))
    found: dict[Kind, Divergence] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        kind = next((kind for kind in KINDS if kind == name.strip()), None)
        if kind is None or kind in found:
            raise WrongUsage(
                f"divergence {part.strip()!r} must be KIND=NAME, each of {', '.join(KINDS)} once"
            )
        found[kind] = Divergence.parse(value)
    return {kind: found.get(kind, FORWARD) for kind in KINDS}
