"""The weights of the training objective's terms, and how the terms are formed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from cache_schema.format.spec import KINDS, Kind, Target
from cache_schema.settings import Help, Later, at_least, check, positive, within
from student.divergences import APART, FORWARD, OF_LOGITS, Divergence, by_kind

Tail = Literal["bucket", "renormalize", "drop", "sampled", "dense"]
Reduction = Literal["sample_mean", "token_mean"]

TERMS = ("ce", *(f"{kind}_kl" for kind in KINDS), "relation")
"""The terms of the objective, as training and evaluation report them."""

_Weight = Annotated[float, at_least(0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """L = ce * L_CE + response * L_res + visual * L_vis + relation * L_rel + prompt * L_prompt.

    The defaults are LLaVA-KD's (alpha 1, beta 1, gamma 0.5); supervised fine-tuning has every weight 0 but
    `ce`. A term of weight 0 is not computed.
    """

    ce: Annotated[_Weight, Help("Weight of the cross entropy.")] = 1.0
    response: Annotated[_Weight, Help("Weight of the KL at response positions.")] = 1.0
    visual: Annotated[_Weight, Help("Weight of the KL at visual positions.")] = 1.0
    relation: Annotated[_Weight, Help("Weight of the relation loss.")] = 0.5
    relation_neighbours: Annotated[
        int,
        at_least(0),
        Help(
            "The relation loss compares each visual token's similarities with this many nearest ones, and "
            "with all others, in place of the cosine of the Gram matrices (TRG). 0: the cosine."
        ),
        Later(),
    ] = 0
    fusion_every: Annotated[
        int,
        at_least(0),
        Help(
            "Learn for each sample how much cross entropy and distillation count (TGeo-KD), with an update "
            "on held-out samples every so many steps. 0: equally."
        ),
        Later(),
    ] = 0
    prompt: Annotated[_Weight, Help("Weight of the KL at prompt positions.")] = 0.0
    temperature: Annotated[float, positive, Help("Temperature of the KL, as in `sparse_kl`.")] = 1.0
    tail: Annotated[
        Tail,
        Help(
            "The mass outside the stored entries, as in `sparse_kl`; dense: the whole distribution instead, "
            "made of the cache's hidden states and the teacher's head."
        ),
    ] = "bucket"
    divergence: Annotated[
        str,
        Help(
            "What takes the place of the KL: a name, with its parameter as in jsd:0.5, or one for each kind "
            "of position as in response=reverse_kl,visual=jsd:0.5."
        ),
        Later(),
    ] = "forward_kl"
    reduction: Annotated[
        Reduction,
        Help(
            "sample_mean: the mean over all samples, also those without the term, of the token means within "
            "each (image means for the relation); token_mean: the mean over all tokens (images)."
        ),
    ] = "sample_mean"
    kl_share: Annotated[
        float,
        within(0.0, 1.0, "(]"),
        Help(
            "Share of a sample's positions of each kind at which the KL is trained: those of the student's "
            "highest entropy. Their mean stands for that of all positions."
        ),
        Later(),
    ] = 1.0
    dual_head: Annotated[
        bool,
        Help(
            "The terms from the cache go through a second output head, which begins as a copy of the model's "
            "and is dropped at the end; the cross entropy alone goes through the model's own."
        ),
        Later(),
    ] = False

    def __post_init__(self) -> None:
        others = [each.name for each in self.divergences.values() if each != FORWARD]
        faults: dict[str, object] = {
            f"divergence {each} needs tail `bucket` or `dense`": self.tail not in ("bucket", "dense")
            for each in others
        }
        apart = next((each.name for each in self.divergences.values() if each.name in APART), None)
        reason = "tail `dense`" if self.tail == "dense" else f"divergence {apart}"
        faults[f"kl_share below 1 does not go with {reason}"] = bool(self.apart) and self.kl_share < 1.0
        faults["divergence binary_kl needs tail `dense`: it compares logits"] = self.tail != "dense" and any(
            each.name in OF_LOGITS for each in self.divergences.values()
        )
        starts = {each.value for each in self.divergences.values() if each.name == "taid"}
        faults["divergence taid needs one t for all kinds"] = len(starts) > 1
        both = self.ce > 0 and any(self.by_target.values())
        faults["dual_head needs the cross entropy and a term from the cache"] = self.dual_head and not both
        plain = self.reduction == "sample_mean" and not self.apart and self.kl_share == 1.0
        faults[
            "fusion_every needs reduction sample_mean, kl_share 1, no dual_head, tail dense, taid, sinkhorn"
        ] = self.fusion_every > 0 and not (plain and not self.dual_head)
        check(self, faults)

    @property
    def divergences(self) -> dict[Kind, Divergence]:
        """The divergence of each kind of position."""
        return by_kind(self.divergence)

    @property
    def by_head(self) -> tuple[LossWeights, LossWeights]:
        """With `dual_head`: the objective of the second head, and that of the model's own."""
        return (
            replace(self, ce=0.0, dual_head=False),
            LossWeights(ce=self.ce, response=0.0, visual=0.0, relation=0.0, reduction=self.reduction),
        )

    @property
    def apart(self) -> tuple[Kind, ...]:
        """The kinds of position whose logits are made apart from those of the other terms: those that are
        compared with all of the teacher's tokens."""
        return tuple(
            kind for kind, each in self.divergences.items() if self.tail == "dense" or each.name in APART
        )

    @property
    def uncalibrated(self) -> tuple[Kind, ...]:
        """The kinds of position that learn by FIRST at a temperature still to be found."""
        return tuple(kind for kind, each in self.divergences.items() if each == Divergence("first"))

    def calibrated(self, temperature: float) -> LossWeights:
        """The same with that temperature for them."""
        found = {**self.divergences, **dict.fromkeys(self.uncalibrated, Divergence("first", temperature))}
        return replace(self, divergence=",".join(f"{kind}={each.text}" for kind, each in found.items()))

    @property
    def interpolated(self) -> tuple[Kind, ...]:
        """The kinds of position that learn by TAID."""
        return tuple(kind for kind in self.apart if self.divergences[kind].name == "taid")

    @property
    def interpolates_from(self) -> float | None:
        """The t at which TAID begins; None without it."""
        return self.divergences[self.interpolated[0]].value if self.interpolated else None

    @property
    def by_target(self) -> dict[Target, float]:
        """The weights of what is learnt from the cache."""
        return {
            "response": self.response,
            "visual": self.visual,
            "prompt": self.prompt,
            "relation": self.relation,
        }

    @property
    def by_term(self) -> dict[str, float]:
        """The weight of each of TERMS."""
        return dict(zip(TERMS, (self.ce, *self.by_target.values()), strict=True))
