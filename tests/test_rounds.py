"""Rounds of on-policy distillation: the commands of each round, and that finished steps are not redone."""

import json

import pytest
import yaml

import demo.story
from cache_schema.errors import KdcacheError, WrongUsage
from demo.rounds import run_rounds
from demo.settings import RoundsConfig
from tests.student_caches import make_world
from tests.tiny_models import tiny_dataset

PLAN = {
    "rounds": 2,
    "student": "S",
    "teacher": "T",
    "data": "D",
    "image_root": "I",
    "stage": {"caches": [{"cache": "C", "weight": 3}], "max_steps": 2},
    "weight": 1,
    "answers": {"temperature": 1.0},
    "build": {"top_k": 8},
    "train": {"device": "cpu", "wait": True, "compile": False},
}


def recipe(folder, **changes):
    file = folder / "rounds.yaml"
    file.write_text(yaml.safe_dump({**PLAN, **changes}))
    return RoundsConfig(recipe=file, out=folder / "out")


def test_each_round_answers_builds_and_trains_on_all_caches_so_far(tmp_path, monkeypatch):
    ran, broken = [], [True]

    def kdcache(arguments):
        if arguments[0] == "train" and "round-2" in " ".join(arguments) and broken.pop():
            raise KdcacheError("stopped")
        ran.append(arguments)
        made = {"model": f"M{len(ran)}", "stages": [{"steps": 2}]}
        return made if arguments[0] == "train" else {}

    monkeypatch.setattr(demo.story, "kdcache", kdcache)
    config = recipe(tmp_path)
    with pytest.raises(KdcacheError, match="stopped"):
        run_rounds(config)
    broken.append(False)
    result = run_rounds(config)
    assert [arguments[0] for arguments in ran] == ["answers", "build", "train"] * 2
    answers = [dict(zip(each[1::2], each[2::2], strict=True)) for each in ran if each[0] == "answers"]
    assert [each["--model"] for each in answers] == ["S", "M3"]
    assert [each["--seed"] for each in answers] == ["1", "2"]
    assert {"--wait", "--resume"} < set(ran[2])
    assert "--compile" not in ran[2]
    files = [config.out / f"round-{number}/recipe.yaml" for number in (1, 2)]
    stages = [yaml.safe_load(file.read_text())["stages"][0] for file in files]
    assert [[(each["cache"], each["weight"]) for each in stage["caches"]] for stage in stages] == [
        [("C", 3), (str(config.out / "round-1/cache"), 1)],
        [("C", 3), (str(config.out / "round-1/cache"), 1), (str(config.out / "round-2/cache"), 1)],
    ]
    assert result["model"] == "M6"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds must be"),
        ({"questions": 3}, r"unknown keys \['questions'\]"),
        ({"build": 3}, "build must be a mapping"),
        ({"stage": {"caches": ["C"]}}, "weight goes with weights"),
    ],
)
def test_what_is_no_plan_of_rounds_is_refused(tmp_path, changes, message):
    with pytest.raises(WrongUsage, match=message):
        run_rounds(recipe(tmp_path, **changes))


def test_wrong_settings_of_a_step_are_wrong_usage():
    with pytest.raises(WrongUsage, match="kdcache verify ended with exit code 2"):
        demo.story.kdcache(["verify", "cache", "--jobs", "0"])


@pytest.mark.slow
def test_two_rounds_in_one_command_with_real_models(tmp_path):
    world = make_world(tmp_path, rows=10)
    rows = tiny_dataset(tmp_path / "data", rows=6)
    config = recipe(
        tmp_path,
        student=str(world.student),
        teacher=str(tmp_path / "teacher"),
        data=str(rows.data),
        image_root=str(rows.image_root),
        stage={
            "caches": [{"cache": str(world.cache), "image_root": str(world.image_root), "weight": 3}],
            "max_steps": 2,
            "global_batch": 4,
        },
        answers={"temperature": 1.0, "max_new_tokens": 4, "device": "cpu"},
        build={"top_k": 8, "device": "cpu"},
        train={"device": "cpu", "tracker": "none"},
    )
    result = run_rounds(config)
    assert len(result["rounds"]) == 2
    identities = [sorted(each["training"]["identity"]["caches"]) for each in result["rounds"]]
    assert identities == [["0", "1"], ["0", "1", "2"]]
    assert json.loads((config.out / "round-2/run/1-dft/result.json").read_text())["steps"] == 2
