"""Folders of training runs: one reader for trainer, reports and demo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cache_schema.errors import KdcacheError
from cache_schema.runs import read_metrics, read_result
from demo.curves import draw_curves
from views.run_report import report

ROOT = Path(__file__).resolve().parent.parent
LINES = [
    {"step": 1, "group": "train", "ce": 2.0, "response_kl": 0.5, "relation": 0.0},
    {"step": 2, "group": "train", "ce": 1.5, "response_kl": None, "relation": 0.0},
    {"step": 2, "group": "held-out", "ce": 9.0, "response_kl": 9.0},
]


def journal(run, lines, end=""):
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return run


def test_lines_of_killed_and_of_older_runs(tmp_path):
    assert read_metrics(tmp_path) == []
    assert read_metrics(journal(tmp_path / "killed", LINES, '{"step": 3, "gro')) == LINES
    old = [{name.removesuffix("_kl"): value for name, value in line.items()} for line in LINES]
    assert read_metrics(journal(tmp_path / "old", old)) == LINES


def test_a_result_is_read_or_refused(tmp_path):
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").write_text('{"steps": 2, "train": {"visual": 0.5}}')
    assert read_result(tmp_path) == {"steps": 2, "train": {"visual_kl": 0.5}}
    (tmp_path / "result.json").write_text('{"steps"')
    with pytest.raises(KdcacheError, match=r"result\.json is not JSON.*remove it to finish the run again"):
        read_result(tmp_path)


def test_the_demo_draws_the_training_lines(tmp_path):
    old = [{name.removesuffix("_kl"): value for name, value in line.items()} for line in LINES]
    other = [{**LINES[0], "response_kl": 0.25}, *LINES[1:]]
    pictures = {}
    for name, lines in (("now", LINES), ("no held-out", LINES[:2]), ("old", old), ("other", other)):
        journal(tmp_path / name / "dpt", lines)
        draw_curves({"distilled": tmp_path / name}, tmp_path / "curves.png", stages=["dpt", "dpt"])
        pictures[name] = (tmp_path / "curves.png").read_bytes()
    assert pictures["now"] == pictures["no held-out"] == pictures["old"] != pictures["other"]


def test_a_report_has_numbered_stages_first_then_others_as_they_began(tmp_path):
    names = ["sft", "dft", "10-late", "dpt", "2-early"]
    settings = {"trainable": [], "losses": {}, "global_batch": 1, "learning_rate": 1}
    rest = {"student": "s", "cache": "c", "identity": {"cache": {"identity": "0"}}, "versions": {}}
    for began, name in enumerate(names):
        recipe = journal(tmp_path / name, LINES) / "recipe.yaml"
        recipe.write_text(json.dumps({"stage": {"name": f"stage {name}", **settings}, **rest}))
        os.utime(recipe, (began, began))
    page = report(tmp_path).read_text()
    order = sorted(names, key=lambda name: page.index(f"stage {name}"))
    assert order == ["2-early", "10-late", "sft", "dft", "dpt"]


def test_reports_need_no_torch():
    code = (
        "import sys, views.run_report, demo.curves\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'zarr'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
