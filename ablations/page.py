"""The page of results, made of the runs that are there: tables, tests, charts and the commands."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablations.arms import (
    DISTILLED,
    PLAIN,
    SEARCHED_AS,
    SIZES,
    SOURCES,
    STAGES,
    STRATEGIES,
    TARGETS,
    Arm,
    sized,
    with_images,
)
from ablations.charts import draw_bars, draw_curves
from ablations.statistics import paired, spread
from ablations.study import SEARCH_SEED, Study
from cache_schema.output import write_text

TITLES = {"easy-vqa": "easy-VQA", "mosaics": "mosaics of Fashion-MNIST"}
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def write_page(study: Study, page: Path) -> None:
    """Writes charts beside `page` and the results between its marks; what is written by hand around them is
    kept. A page that does not exist is made of the results alone."""
    charts = page.parent / "charts"
    charts.mkdir(parents=True, exist_ok=True)
    main = {set_name: _runs(study, set_name, _main()) for set_name in study.sets}
    draw_bars({TITLES[name]: arms for name, arms in main.items()}, charts / "accuracy.svg")
    shown = {TITLES[name]: {arm.name: main[name].get(arm.name, []) for arm in STAGES} for name in study.sets}
    draw_curves(shown, charts / "curves.svg")
    made = re.sub(r"\n{3,}", "\n\n", "\n".join(_sections(study)))
    before, after = "# Results\n\n", "\n"
    if page.exists():
        text = page.read_text(encoding="utf-8")
        if BEGIN in text and END in text:
            before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(page, f"{before}{BEGIN}\n\n{made}\n{END}{after}")


def _main() -> Sequence[Arm]:
    return tuple(dict.fromkeys((*STAGES, *STRATEGIES, *TARGETS)))


def _runs(study: Study, set_name: str, arms: Sequence[Arm]) -> dict[str, list[dict[str, Any]]]:
    return {arm.name: list(study.results(set_name, arm).values()) for arm in arms}


def _sections(study: Study) -> list[str]:
    lines = ["## Teachers", "", *_teachers(study)]
    tables: list[tuple[str, str, Sequence[Arm], Arm]] = [
        ("Which stages", "Table 2", STAGES, PLAIN),
        ("Logits, relation, or both", "Table 3", STRATEGIES, PLAIN),
        ("Which positions", "Table 4", TARGETS, PLAIN),
    ]
    for title, paper, arms, against in tables:
        lines += ["", f"## {title} (the paper's {paper})", ""]
        for set_name in study.sets:
            lines += [*_table(study, set_name, arms, against), ""]
    lines += [
        "![Accuracy of every arm, with 95% confidence intervals](charts/accuracy.svg)",
        "",
        "## Learning curves",
        "",
        "![Accuracy against conversations seen](charts/curves.svg)",
        "",
        "Accuracy on the first test images while the conversations are learnt, mean and 95% confidence band.",
    ]
    if study.settings.live:
        lines += ["", "## From a cache or with the teacher live", ""]
        for arm, (live, *cached) in SOURCES.items():
            lines += [*_table(study, study.settings.live, (live, arm, *cached), live), ""]
    if study.settings.sizes:
        for title, groups in (
            ("Student sizes", dict.fromkeys(study.sets, _sizes())),
            ("Number of training images", _counts(study)),
        ):
            lines += ["", f"## {title}", ""]
            for set_name in study.sets:
                lines += [*_pairs(study, set_name, groups[set_name]), ""]
    lines += ["## Learning rates", "", *_rates(study)]
    return lines


def _teachers(study: Study) -> list[str]:
    lines = ["| set | teacher's accuracy, by kind | its calibration error |", "|---|---|---|"]
    for set_name in study.sets:
        file = study.out / set_name / "teacher.json"
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            kinds = ", ".join(f"{kind} {100 * value:.1f}" for kind, value in found["accuracy"].items())
            lines.append(f"| {TITLES[set_name]} | {kinds} | {100 * found['calibration']:.1f} |")
    return lines


def _table(study: Study, set_name: str, arms: Sequence[Arm], against: Arm) -> list[str]:
    """Arms of a set against one of them, over the seeds that both have."""
    base = study.results(set_name, against)
    kinds = _kinds(base)
    head = ["arm", "n", "accuracy", "difference", "p", *kinds, "agreement", "ECE"]
    lines = [f"**{TITLES[set_name]}**, differences from {against.name}:", "", *_head(head)]
    for arm in arms:
        results = study.results(set_name, arm)
        if not results:
            lines.append(_row([arm.name, "0", "not run yet", *[""] * (len(head) - 3)]))
            continue
        runs = list(results.values())
        cells = [arm.name, str(len(runs)), _mean([run["test"]["mean"] for run in runs])]
        cells += ["", ""] if arm is against else _tested(results, base)
        cells += [_mean([run["test"][kind] for run in runs]) for kind in kinds]
        cells += [_mean([run[name] for run in runs]) for name in ("agreement", "calibration")]
        lines.append(_row(cells))
    return lines


def _pairs(study: Study, set_name: str, pairs: Mapping[str, tuple[Arm, Arm]]) -> list[str]:
    head = ["", "n", "plain", "distilled", "difference", "p"]
    lines = [f"**{TITLES[set_name]}**:", "", *_head(head)]
    for name, (plain, distilled) in pairs.items():
        base, ours = study.results(set_name, plain), study.results(set_name, distilled)
        both = sorted(base.keys() & ours.keys())
        if not both:
            lines.append(_row([name, "0", "not run yet", "", "", ""]))
            continue
        means = [_mean([runs[seed]["test"]["mean"] for seed in both]) for runs in (base, ours)]
        lines.append(_row([name, str(len(both)), *means, *_tested(ours, base)]))
    return lines


def _sizes() -> dict[str, tuple[Arm, Arm]]:
    pairs = {"small": sized("small"), "medium": (PLAIN, DISTILLED), "large": sized("large")}
    words = {size: f"{size}: {width} x {layers}" for size, (width, layers, _) in SIZES.items()}
    return {words[size]: pair for size, pair in pairs.items()}  # type: ignore[index]


def _counts(study: Study) -> dict[str, dict[str, tuple[Arm, Arm]]]:
    found = {}
    for set_name, budget in study.settings.budgets.items():
        fewer = {f"{images} images": with_images(images) for images in sorted(budget.fewer)}
        found[set_name] = {**fewer, f"{budget.images} images": (PLAIN, DISTILLED)}
    return found


def _rates(study: Study) -> list[str]:
    lines = _head(["set", "arm", "validation accuracy by factor", "chosen"])
    for set_name in study.sets:
        for arm in (arm for group in study.arms(set_name) for arm in group if arm not in SEARCHED_AS):
            chosen = study.factor(set_name, arm)
            if chosen is None:
                continue
            tried = {
                factor: study.place(set_name, arm).result(SEARCH_SEED, factor) or {}
                for factor in study.settings.budgets[set_name].factors
            }
            values = [f"x {factor:g}: {100 * run['validation']:.1f}" for factor, run in tried.items()]
            lines.append(_row([TITLES[set_name], arm.name, ", ".join(values), f"x {chosen:g}"]))
    return lines


def _tested(ours: Mapping[int, Any], theirs: Mapping[int, Any]) -> list[str]:
    """Difference and p of the seeds that both have."""
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return ["", ""]
    values = [[runs[seed]["test"]["mean"] for seed in both] for runs in (ours, theirs)]
    test = paired(*values)
    p = "" if math.isnan(test.p) else "< 0.001" if test.p < 0.001 else f"{test.p:.3f}"
    return [f"{100 * test.difference:+.1f}", p]


def _kinds(results: Mapping[int, Mapping[str, Any]]) -> list[str]:
    return [kind for run in list(results.values())[:1] for kind in run["test"] if kind != "mean"]


def _mean(shares: Sequence[float]) -> str:
    mean, deviation = spread([100 * share for share in shares])
    return f"{mean:.1f}" if len(shares) == 1 else f"{mean:.1f} ± {deviation:.1f}"


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "|---" * len(cells) + "|"]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
