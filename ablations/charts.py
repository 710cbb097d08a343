"""Charts as SVG without a background, in colours and grays that are readable on white and on black."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablations.statistics import half_interval, spread

INK = "#808488"
COLORS = ("#3d8fd1", "#d9713c", "#3fa35c", "#a274c4", "#b59a2c", "#c9537f", "#4aa8a8")

Runs = Sequence[Mapping[str, Any]]


def draw_bars(tables: Mapping[str, Mapping[str, Runs]], out: Path) -> None:
    """Mean accuracy of arms with their 95% confidence intervals, one panel a set; arms without a run are left
    out."""
    pyplot = _pyplot()
    tallest = max((len(arms) for arms in tables.values()), default=1)
    figure, axes = pyplot.subplots(
        1, len(tables), figsize=(5.2 * len(tables), 0.9 + 0.36 * tallest), squeeze=False, layout="constrained"
    )
    for axis, (title, arms) in zip(axes[0], tables.items(), strict=True):
        shown = {name: [100 * run["test"]["mean"] for run in runs] for name, runs in arms.items() if runs}
        for place, values in enumerate(shown.values()):
            reach = half_interval(values) if len(values) > 1 else 0.0
            bar = {"color": COLORS[0], "alpha": 0.55, "height": 0.65}
            axis.barh(place, spread(values)[0], xerr=reach, ecolor=INK, capsize=3, **bar)
            axis.plot(values, [place] * len(values), ".", color=COLORS[1], markersize=4)
        axis.set_yticks(range(len(shown)), list(shown))
        axis.invert_yaxis()
        axis.set_title(title)
        axis.set_xlabel("accuracy in %, mean of the kinds of questions")
        _plain(axis)
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)


def draw_curves(sets: Mapping[str, Mapping[str, Runs]], out: Path) -> None:
    """Accuracy against conversations seen, mean over seeds with the 95% confidence band, one panel a set."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        1, len(sets), figsize=(5.2 * len(sets), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (title, arms) in zip(axes[0], sets.items(), strict=True):
        for (name, runs), color in zip(arms.items(), COLORS, strict=False):
            curves = [run["curve"] for run in runs]
            if not curves:
                continue
            points = min(len(curve) for curve in curves)
            seen = [spread([curve[point][0] for curve in curves])[0] for point in range(points)]
            values = [[100 * curve[point][1] for curve in curves] for point in range(points)]
            means = [spread(each)[0] for each in values]
            axis.plot(seen, means, color=color, label=name, linewidth=1.8)
            if len(curves) > 1:
                reach = [half_interval(each) for each in values]
                low = [mean - each for mean, each in zip(means, reach, strict=True)]
                high = [mean + each for mean, each in zip(means, reach, strict=True)]
                axis.fill_between(seen, low, high, color=color, alpha=0.18, linewidth=0)
        axis.set_title(title)
        axis.set_xlabel("conversations seen")
        axis.set_ylabel("accuracy in %")
        axis.legend(frameon=False, fontsize=8, labelcolor=INK)
        _plain(axis)
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = (
        "text.color",
        "axes.labelcolor",
        "axes.edgecolor",
        "xtick.color",
        "ytick.color",
        "axes.titlecolor",
    )
    pyplot.rcParams.update(dict.fromkeys(names, INK))
    # Text as text, and the same bytes for the same numbers.
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kdcache", "font.size": 9})
    return pyplot


def _plain(axis: Any) -> None:
    axis.grid(alpha=0.25, color=INK)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
