"""A page about a training run: curves of every term, what was held out, how the time went, a table."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cache_schema.errors import KdcacheError
from student.run_folder import TERMS, read_metrics, read_result, write_text
from student.timing import LAPS

_HELD_OUT = ("loss", "ce", "response_kl", "visual_kl", "prompt_kl", "relation")
_AGREEMENT = ("response_top1", "visual_top1")
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ddd;padding:.25em .8em;"
    "text-align:left;font-variant-numeric:tabular-nums}img{max-width:100%}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRun:
    """One stage of a run: its settings, its journal, its result (empty while it runs)."""

    name: str
    settings: dict[str, Any]
    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    result: dict[str, Any]


def report(run: Path, out: Path | None = None) -> Path:
    """Writes the report of a run, or of a recipe's folder of runs, and returns its path.

    out: a `.png` holds the curves only, anything else is one HTML page with nothing outside it; default:
    report.html in the run. It works while the run goes on.
    """
    stages = _stages(run)
    figure = _curves(stages)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    target = out or run / "report.html"
    if target.suffix == ".png":
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(image.getvalue())
    else:
        write_text(target, _page(run, stages, image.getvalue()))
    return target


def _stages(run: Path) -> list[StageRun]:
    folders = [run] if (run / "metrics.jsonl").is_file() else []
    if run.is_dir() and not folders:
        numbered = (path for path in run.iterdir() if (path / "metrics.jsonl").is_file())
        folders = sorted(numbered, key=lambda path: (len(path.name.split("-")[0]), path.name))
    if not folders:
        raise KdcacheError(
            f"{run} holds no training run: no metrics.jsonl in it; give the --out of `kdcache train`"
        )
    return [_stage(folder) for folder in folders]


def _stage(folder: Path) -> StageRun:
    lines = read_metrics(folder)
    settings = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    return StageRun(
        name=settings["stage"]["name"],
        settings=settings,
        train=[line for line in lines if line["group"] == "train"],
        held_out=[line for line in lines if line["group"] == "held-out"],
        result=read_result(folder) or {},
    )


def _curves(stages: Sequence[StageRun]) -> Figure:
    figure = Figure(figsize=(5.2 * len(stages) + 1.5, 13), layout="constrained")
    rows = figure.subplots(4, len(stages), squeeze=False)
    for column, stage in enumerate(stages):
        loss, held_out, agreement, rate = (rows[row][column] for row in range(4))
        loss.set_title(stage.name)
        _draw(loss, stage.train, TERMS, "training loss")
        _draw(held_out, stage.held_out, _HELD_OUT, "held-out loss", marker="o")
        _draw(agreement, stage.held_out, _AGREEMENT, "top-1 agreement with the teacher", marker="o")
        _draw(rate, stage.train, ("lr",), "learning rate")
        rate.set_xlabel("step")
    return figure


def _draw(
    axes: Axes, lines: Sequence[dict[str, Any]], names: Sequence[str], title: str, marker: str | None = None
) -> None:
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name in names:
        points = [(line["step"], line[name]) for line in lines if line.get(name)]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=name.replace("_", " "), marker=marker, markersize=3)
    if axes.lines:
        axes.legend(fontsize="small")
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color="0.5")


def _page(run: Path, stages: Sequence[StageRun], image: bytes) -> str:
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(run.name)}</title>",
        f"<style>{_STYLE}</style><h1>Training run {html.escape(run.name)}</h1>",
        f'<img alt="Curves of the run" src="data:image/png;base64,{base64.b64encode(image).decode()}">',
    ]
    for stage in stages:
        parts += [f"<h2>{html.escape(stage.name)}</h2>", _table(_summary(stage))]
    return "\n".join(parts) + "\n</html>\n"


def _summary(stage: StageRun) -> list[tuple[str, str]]:
    settings = stage.settings["stage"]
    latest = stage.train[-1] if stage.train else {}
    rows = [
        ("state", f"finished, {stage.result['steps']} steps" if stage.result else "not finished"),
        ("trained parts", ", ".join(settings["trainable"])),
        ("losses", ", ".join(f"{name} {value}" for name, value in settings["losses"].items())),
        ("batch, learning rate", f"{settings['global_batch']}, {settings['learning_rate']}"),
        ("cache", f"{stage.settings['cache']} ({stage.settings['identity']['cache']['identity'][:12]})"),
        ("step", str(latest.get("step", 0))),
    ]
    rows += [(f"training {name}", f"{latest[name]:.4f}") for name in TERMS if latest.get(name)]
    for name, value in (stage.held_out[-1] if stage.held_out else {}).items():
        if name in (*_HELD_OUT, *_AGREEMENT) and value is not None:
            rows.append((f"held-out {name.replace('_', ' ')}", f"{value:.4f}"))
    if latest:
        shares = ", ".join(f"{name} {latest.get(f'time {name}', 0.0):.0%}" for name in LAPS)
        rows += [("samples a second", f"{latest['samples_per_second']:.1f}"), ("time", shares)]
    return rows


def _table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows
    )
    return f"<table>{body}</table>"
