"""The training curves of the demo: distilled and plain student side by side, one panel per stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cache_schema.runs import read_metrics

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


def draw_curves(runs: Mapping[str, Path], out: Path, stages: Sequence[str] = STAGES) -> None:
    """A PNG of the loss terms against the step: solid lines distilled, dashed lines plain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(stages), figsize=(5 * len(stages), 4), constrained_layout=True)
    styles = dict(zip(runs, ("-", "--", ":"), strict=False))
    for axis, stage in zip(axes, stages, strict=True):
        for kind, folder in runs.items():
            lines = [line for line in read_metrics(folder / stage) if line["group"] == "train"]
            steps = [line["step"] for line in lines]
            for name, title in TERMS.items():
                series = [line.get(name) or 0.0 for line in lines]
                if any(series):
                    label = f"{title}, {kind}"
                    axis.plot(steps, series, styles[kind], color=COLORS[name], label=label, linewidth=1.5)
        axis.set_title(TITLES[stage], fontsize=10)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("loss (nats; relation: 1 - cos)")
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
