"""`make objectives`: its rows, its table, and that what is finished is not done again."""

import json

import pytest

from ablations import objectives
from ablations.objectives import COLUMNS, OBJECTIVES, QUICK, run_objectives, table
from student.divergences import PARAMETERS
from student.stages import stage_from


def test_every_divergence_has_a_row_that_a_recipe_can_ask_for():
    stages = {name: stage_from({"base": "dft", "losses": each}) for name, each in OBJECTIVES.items()}
    asked = {stage.losses.divergences["response"].name for stage in stages.values()}
    assert asked == set(PARAMETERS)
    assert stages["none"].targets == ()
    assert stages["taid, dense"].losses.tail == "dense"


def test_the_table_has_means_and_deviations_over_seeds():
    runs = [
        {"shape": 40.0, "color": 50.0, "yesno": 60.0, **dict.fromkeys(COLUMNS, value)} for value in (0.1, 0.3)
    ]
    lines = table({"none": runs, "jsd": runs[:1]}).splitlines()
    assert lines[0].startswith("| objective | shape | color | yesno | KL(p ‖ q) | KL(q ‖ p) |")
    assert lines[2] == "| none | 40.0 ± 0.0 | 50.0 ± 0.0 | 60.0 ± 0.0 |" + " 0.200 ± 0.141 |" * 4
    assert lines[3] == "| jsd | 40.0 | 50.0 | 60.0 |" + " 0.100 |" * 4


@pytest.mark.slow
def test_a_quick_run_and_one_that_goes_on(tmp_path, monkeypatch):
    made = run_objectives(tmp_path, QUICK, 1, ["none", "first"])
    assert [line.split(" | ")[0] for line in made.splitlines()[2:]] == ["| none", "| first"]
    steps = json.loads((tmp_path / "state.json").read_text())["steps"]
    monkeypatch.setattr(objectives, "evaluate", None)  # none may be asked again
    assert run_objectives(tmp_path, QUICK, 1, ["first", "none"]).splitlines()[3] == made.splitlines()[2]
    assert json.loads((tmp_path / "state.json").read_text())["steps"] == steps
