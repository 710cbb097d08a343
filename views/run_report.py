"""A page about a training run: final values, curves of every term, held-out measurements, time"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from cache_schema.errors import KdcacheError
from cache_schema.output import require_file, write_text, writing
from cache_schema.runs import read_metrics, read_result
from views.run_curves import Lines, StageRun, draw_curves

_NAMES = {
    "loss": "loss",
    "ce": "cross entropy",
    "response_kl": "KL, response",
    "visual_kl": "KL, visual",
    "prompt_kl": "KL, prompt",
    "relation": "relation, 1 - cos",
    "response_top1": "most likely token is the teacher's, response",
    "visual_top1": "most likely token is the teacher's, visual",
}
OF_THE_RUN = 3
"""Lines at the top of the final table, without a heading."""

_STYLE = """
:root{color-scheme:light dark;--paper:light-dark(#fbfaf7,#16181b);--ink:light-dark(#1d2126,#e6e4df);
--faint:light-dark(#5d656e,#a2a8ae);--line:light-dark(#dcd9d2,#363b41);--card:light-dark(#fff,#1e2125)}
body{font:16px/1.5 system-ui,sans-serif;max-width:76rem;margin:0 auto;
padding:1.5rem clamp(.8rem,3vw,2.5rem) 4rem;background:var(--paper);color:var(--ink)}
h1{font-size:1.6rem;margin:0;overflow-wrap:anywhere}h1 span{font-size:1rem;font-weight:400}
h2{font-size:1.2rem;margin:2rem 0 .5rem}
.faint{color:var(--faint)}.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;
padding:.6rem 1rem;overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{border-top:1px solid var(--line);padding:.2rem 1.6rem .2rem 0;text-align:left;vertical-align:top}
tr:first-child>*{border-top:0}th{font-weight:600}th[scope=row]{font-weight:400;color:var(--faint)}
td{overflow-wrap:anywhere}td.number,th.number{text-align:right;white-space:nowrap}
tr.part th{padding-top:.7rem;font-weight:600;color:var(--ink)}
img{max-width:100%;display:block}
@media (prefers-color-scheme:dark){img{filter:invert(.9) hue-rotate(180deg)}}
"""


def report(run: Path, out: Path | None = None) -> Path:
    """Writes the report of a run, or of a recipe's folder of runs, and returns its path.

    out: a `.png` holds the curves and below them the final table, anything else is one self-contained HTML
    page, which also lists each stage's settings; default: report.html in the run. It also works while the run
    is in progress. KdcacheError when there is no run, or `out` cannot be written.
    """
    stages = _stages(run)
    target = out or run / "report.html"
    require_file(target)
    figure = draw_curves(stages)
    if target.suffix == ".png":
        _add_table(figure, stages)
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(target, format="png", dpi=110)
    else:
        write_text(target, _page(run, stages, figure))
    return target


def _stages(run: Path) -> list[StageRun]:
    folders = [run] if (run / "metrics.jsonl").is_file() else []
    if run.is_dir() and not folders:
        folders = sorted((path for path in run.iterdir() if (path / "metrics.jsonl").is_file()), key=_place)
    if not folders:
        raise KdcacheError(
            f"{run} holds no training run: no metrics.jsonl in it; give the --out of `kdcache train`"
        )
    return [_stage(folder) for folder in folders]


def _place(folder: Path) -> tuple[bool, float, str]:
    """By the number that a recipe gives a stage's folder, else by when the stage began."""
    number, recipe = folder.name.split("-")[0], folder / "recipe.yaml"
    if number.isdecimal():
        return False, int(number), folder.name
    return True, recipe.stat().st_mtime if recipe.is_file() else 0.0, folder.name


def _stage(folder: Path) -> StageRun:
    lines = read_metrics(folder)
    settings = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    return StageRun(
        name=settings["stage"]["name"],
        settings=settings,
        train=[line for line in lines if line["group"] == "train"],
        held_out=[line for line in lines if line["group"] == "held-out"],
        mixture=[line for line in lines if line["group"] == "mixture"],
        result=read_result(folder) or {},
    )


def final_table(stages: Sequence[StageRun]) -> list[tuple[str, list[str]]]:
    """The final values: one name and one text per stage in every line; a line without texts is a heading."""
    lines: list[tuple[str, list[str]]] = [
        ("state", ["finished" if stage.result else "not finished" for stage in stages]),
        ("steps", [f"{_last(stage.train).get('step', 0):,}" for stage in stages]),
        (
            "samples per second",
            [_figure(_last(stage.train).get("samples_per_second"), ".1f") for stage in stages],
        ),
    ]
    for heading, ends in (
        ("training, mean since the previous line", [_terms_in_use(stage.train) for stage in stages]),
        ("held out", [_last(stage.held_out) for stage in stages]),
    ):
        found = [(title, [_figure(end.get(name), ".4f") for end in ends]) for name, title in _NAMES.items()]
        present = [(name, texts) for name, texts in found if set(texts) != {"-"}]
        lines += [(heading, []), *present] if present else []
    lines += _watched(stages)
    mixed = [_last(stage.mixture) for stage in stages]
    names = dict.fromkeys(name for end in mixed for name in end if name not in ("step", "group"))
    rows = [(name, [_figure(end.get(name), ".4f") for end in mixed]) for name in names]
    return [*lines, ("mixture, at the last measurement", []), *rows] if rows else lines


def _watched(stages: Sequence[StageRun]) -> list[tuple[str, list[str]]]:
    """Whether the student has begun to learn the teacher's faults; empty where too little was measured."""
    found = [stage.watch for stage in stages]
    if not any(found):
        return []
    rows: list[tuple[str, list[str]]] = [("teacher hacking", [])]
    for title, text in (
        ("early law of the training KL, exponent", lambda one: f"{one.proxy.exponent:.3f}"),
        ("early law of the held-out labels, exponent", lambda one: f"{one.golden.exponent:.3f}"),
        ("held-out labels above their law", lambda one: f"{one.above:.1%}"),
        ("training KL and held-out labels part at step", lambda one: _step(one.parted)),
    ):
        rows.append((title, ["-" if one is None else text(one) for one in found]))
    return rows


def _step(step: float | None) -> str:
    return "none" if step is None else f"{step:.0f}"


def _last(lines: Lines) -> Mapping[str, Any]:
    return lines[-1] if lines else {}


def _terms_in_use(lines: Lines) -> dict[str, Any]:
    """The last line without the terms that are 0 in it: they are not in the stage's loss."""
    return {name: value for name, value in _last(lines).items() if value}


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _add_table(figure: Figure, stages: Sequence[StageRun]) -> None:
    """The final table as text below the curves."""
    lines = final_table(stages)
    width, height = figure.get_size_inches()
    room = 0.22 * (len(lines) + 2)
    figure.set_size_inches(width, height + room)
    top = room / (height + room)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0, top, 1, 1 - top))  # type: ignore[call-arg]
    lines = [
        (name if not texts or n < OF_THE_RUN else f"  {name}", texts) for n, (name, texts) in enumerate(lines)
    ]
    names = max(len(name) for name, _ in lines) + 2
    columns = [max(len(texts[n]) for _, texts in lines if texts) for n in range(len(stages))]
    columns = [max(width, len(stage.name)) + 2 for width, stage in zip(columns, stages, strict=True)]
    head = " " * names + "".join(s.name.rjust(wide) for s, wide in zip(stages, columns, strict=True))
    rows = [head] + [
        name.ljust(names) + "".join(text.rjust(wide) for text, wide in zip(texts, columns, strict=False))
        for name, texts in lines
    ]
    figure.text(0.02, top - 0.01, "\n".join(rows), family="monospace", fontsize=9, va="top", linespacing=1.35)


def _page(run: Path, stages: Sequence[StageRun], figure: Figure) -> str:
    image = io.BytesIO()
    figure.savefig(image, format="svg", transparent=True)
    picture = base64.b64encode(image.getvalue()).decode()
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(run.name)} - kdcache</title><style>{_STYLE}</style></head><body>",
        f'<h1>{html.escape(run.name)} <span class="faint">a kdcache training run</span></h1>',
        f"<h2>At the end</h2>{_final(stages)}",
        '<h2>Curves</h2><div class="card">',
        f'<img alt="Curves of the run" src="data:image/svg+xml;base64,{picture}"></div>',
    ]
    for stage in stages:
        parts += [f"<h2>{html.escape(stage.name)}</h2>", _table(_settings(stage))]
    return "\n".join(parts) + "\n</body></html>\n"


def _final(stages: Sequence[StageRun]) -> str:
    head = "".join(f"<th class=number>{html.escape(stage.name)}</th>" for stage in stages)
    rows = [f"<tr><td></td>{head}</tr>"]
    for name, texts in final_table(stages):
        if not texts:
            rows.append(f"<tr class=part><th colspan={len(stages) + 1}>{html.escape(name)}</th></tr>")
            continue
        cells = "".join(f"<td class=number>{html.escape(text)}</td>" for text in texts)
        rows.append(f"<tr><th scope=row>{html.escape(name)}</th>{cells}</tr>")
    return f'<div class="card"><table>{"".join(rows)}</table></div>'


def _settings(stage: StageRun) -> list[tuple[str, str]]:
    settings = stage.settings["stage"]
    latest = _last(stage.train)
    rows = [
        ("trained parts", ", ".join(settings["trainable"])),
        ("losses", ", ".join(f"{name} {value}" for name, value in settings["losses"].items())),
        ("batch, learning rate", f"{settings['global_batch']}, {settings['learning_rate']}"),
        ("student", str(stage.settings["student"])),
        ("cache", _caches(stage.settings)),
        ("held-out cache", str(stage.settings.get("eval_cache") or "none")),
        ("versions", ", ".join(f"{name} {value}" for name, value in stage.settings["versions"].items())),
    ]
    laps = [f"{name[5:]} {share:.0%}" for name, share in latest.items() if name.startswith("time ")]
    return [*rows, ("time", ", ".join(laps))] if laps else rows


def _caches(settings: Mapping[str, Any]) -> str:
    """The caches of a stage with their identities."""
    identity = settings["identity"]
    if "cache" in identity:
        return f"{settings['cache']} ({identity['cache']['identity'][:12]})"
    names = [source["cache"] for source in settings["caches"]] or [settings["cache"]]
    found = zip(names, identity["caches"].values(), strict=True)
    return ", ".join(f"{name} ({each['identity'][:12]})" for name, each in found)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(
        f"<tr><th scope=row>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f'<div class="card"><table>{body}</table></div>'
