"""The curves of a training run as one figure: one row per quantity, one column per stage"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from views.hacking import Watch, watch

TRAINING, HELD_OUT = "#1b6ca8", "#c8553d"
SECOND = "#3a7d44"
WATCHED = "#7a4fa3"
WIDTH, HEIGHT = 4.6, 2.1
"""Inches of a panel."""

BESIDE = 3
"""Panels side by side for one stage."""

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRun:
    """One stage of a run: its lines in metrics.jsonl by group, its settings in recipe.yaml, its result (empty
    while it runs)."""

    name: str
    train: Lines
    held_out: Lines
    mixture: Lines = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)

    @property
    def watch(self) -> Watch | None:
        """The teacher-hacking watch over it; None where too little was measured."""
        return watch(_curve(self.train, "response_kl"), _curve(self.held_out, "ce"))


@dataclass(frozen=True, slots=True)
class Quantity:
    """What a row of panels shows: its names in the training lines and in the held-out ones, the beginning
    of its names in those of a mixture, and which curve of the teacher-hacking watch is among them."""

    title: str
    train: str | None
    held_out: tuple[str, ...] = ()
    mixture: str = ""
    watched: Literal["proxy", "golden"] | None = None


QUANTITIES = (
    Quantity("loss", "loss", ("loss",)),
    Quantity("cross entropy, nats per token", "ce", ("ce",), watched="golden"),
    Quantity("KL at response positions, nats", "response_kl", ("response_kl",), watched="proxy"),
    Quantity("KL at visual positions, nats", "visual_kl", ("visual_kl",)),
    Quantity("KL at prompt positions, nats", "prompt_kl", ("prompt_kl",)),
    Quantity("relation, 1 - cos", "relation", ("relation",)),
    Quantity("most likely token is the teacher's", None, ("response_top1", "visual_top1")),
    Quantity("pairs whose chosen answer has the larger reward", "reward_accuracy"),
    Quantity("reward of chosen less that of rejected answers", "reward_margin"),
    Quantity("teacher's share in the target of TAID", "teacher_share"),
    Quantity("fusion ratio, mean of the samples", "fusion_ratio"),
    Quantity("shares of the mixture", None, mixture="share "),
    Quantity("learning rate", "lr"),
    Quantity("gradient norm", "grad_norm"),
)


def draw_curves(stages: Sequence[StageRun]) -> Figure:
    """The figure: for several stages one row per quantity, for one stage three panels per row. Quantities
    that no stage has are omitted."""
    shown = [quantity for quantity in QUANTITIES if any(_has(quantity, stage) for stage in stages)]
    columns = len(stages) if len(stages) > 1 else min(BESIDE, max(len(shown), 1))
    cells = [(quantity, stage) for quantity in shown for stage in stages]
    rows = max(-(-len(cells) // columns), 1)
    figure = Figure(figsize=(WIDTH * columns + 0.6, HEIGHT * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex="col" if len(stages) > 1 else "all")
    for place, axes in enumerate(panels.flat):
        if place >= len(cells):
            axes.set_axis_off()
            continue
        quantity, stage = cells[place]
        _panel(axes, quantity, stage)
        if len(stages) == 1 or place % columns == 0:
            axes.set_title(quantity.title, loc="left", fontsize=10)
        if place < columns and len(stages) > 1:
            head = {"ha": "center", "fontsize": 12, "fontweight": "bold"}
            axes.annotate(stage.name, (0.5, 1.18), xycoords="axes fraction", **head)
        if place + columns >= len(cells):
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)
    if not cells:
        panels[0][0].text(0.5, 0.5, "nothing measured yet", ha="center", transform=panels[0][0].transAxes)
    return figure


def _curve(lines: Lines, name: str | None) -> list[tuple[float, float]]:
    """(step, value) of the lines with this name."""
    return [(line["step"], line[name]) for line in lines if name and line.get(name) is not None]


def _trained(quantity: Quantity, stage: StageRun) -> list[tuple[float, float]]:
    """The curve of the training lines; none for a term that is always 0, which is not in the stage's loss."""
    found = _curve(stage.train, quantity.train)
    return found if any(value for _, value in found) else []


def _mixed(quantity: Quantity, stage: StageRun) -> list[str]:
    """Its names in the lines of a mixture."""
    names = dict.fromkeys(name for line in stage.mixture for name in line)
    return [name for name in names if quantity.mixture and name.startswith(quantity.mixture)]


def _has(quantity: Quantity, stage: StageRun) -> bool:
    held_out = any(_curve(stage.held_out, name) for name in quantity.held_out)
    return held_out or bool(_trained(quantity, stage) or _mixed(quantity, stage))


def _panel(axes: Axes, quantity: Quantity, stage: StageRun) -> None:
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    trained = _trained(quantity, stage)
    if trained:
        axes.plot(*zip(*trained, strict=True), color=TRAINING, linewidth=1.6, label="training")
    for name, colour in zip(quantity.held_out, (HELD_OUT, SECOND), strict=False):
        measured = _curve(stage.held_out, name)
        label = "held out" if len(quantity.held_out) == 1 else f"held out, {name.partition('_')[0]}"
        if measured:
            style: dict[str, Any] = {"linestyle": "--", "marker": "o", "markersize": 4}
            gid = f"{stage.name} {quantity.watched} held out" if quantity.watched else None
            axes.plot(*zip(*measured, strict=True), color=colour, label=label, gid=gid, **style)
    for name in _mixed(quantity, stage):
        label = name.removeprefix(quantity.mixture)
        axes.plot(*zip(*_curve(stage.mixture, name), strict=True), drawstyle="steps-post", label=label)
    if quantity.watched and (found := stage.watch):
        _draw_watch(axes, found, quantity.watched, stage)
    if len(axes.lines) > 1 or any("held" in str(line.get_label()) for line in axes.lines):
        axes.legend(fontsize=8, framealpha=0.6)
    if not axes.lines:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="0.5")


def _draw_watch(axes: Axes, found: Watch, curve: Literal["proxy", "golden"], stage: StageRun) -> None:
    """The early law of a watched curve, and a mark at the step where the two curves part."""
    law = found.proxy if curve == "proxy" else found.golden
    steps = [line["step"] for line in stage.held_out if line["step"] > 0]
    values = [law.at(step) for step in steps]
    name = f"early law, to step {law.until:.0f}"
    axes.plot(steps, values, color=WATCHED, linestyle=":", label=name, gid=f"{stage.name} {curve} law")
    if found.parted is not None:
        name = f"KL and labels part, step {found.parted:.0f}"
        axes.axvline(found.parted, color=WATCHED, linewidth=1, label=name, gid=f"{stage.name} {curve} parted")
