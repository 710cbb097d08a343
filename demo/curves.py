"""The training curves of the demo: distilled and plain student side by side, one panel per stage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

STAGES = ("dpt", "sft", "dft")
TITLES = {
    "dpt": "pre-training (distilled: DPT)",
    "sft": "fine-tuning (both: SFT)",
    "dft": "last stage (DFT, or more SFT)",
}
TERMS = {
    "ce": "cross entropy",
    "response_kl": "KL, response",
    "visual_kl": "KL, visual",
    "relation": "relation",
}
COLORS = {"ce": "#1b6ca8", "response_kl": "#c8553d", "visual_kl": "#3a7d44", "relation": "#8e5ea2"}


def read_terms(run: Path) -> tuple[list[int], dict[str, list[float]]]:
    """Steps and loss terms of a stage's metrics.jsonl."""
    steps: list[int] = []
    terms: dict[str, list[float]] = {name: [] for name in TERMS}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if values["group"] != "train":
            continue
        steps.append(values["step"])
        for name, series in terms.items():
            old_name = name.removesuffix("_kl")  # of runs up to version 0.1
            series.append(float(values.get(name) or values.get(old_name) or 0.0))
    return steps, terms


def draw_curves(runs: Mapping[str, Path], out: Path, stages: Sequence[str] = STAGES) -> None:
    """A PNG of the loss terms against the step: solid lines distilled, dashed lines plain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(stages), figsize=(5 * len(stages), 4), constrained_layout=True)
    styles = dict(zip(runs, ("-", "--", ":"), strict=False))
    for axis, stage in zip(axes, stages, strict=True):
        for kind, folder in runs.items():
            steps, terms = read_terms(folder / stage)
            for name, series in terms.items():
                if any(series):
                    label = f"{TERMS[name]}, {kind}"
                    axis.plot(steps, series, styles[kind], color=COLORS[name], label=label, linewidth=1.5)
        axis.set_title(TITLES[stage], fontsize=10)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("loss (nats; relation: 1 - cos)")
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
