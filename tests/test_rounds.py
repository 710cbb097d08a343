"""Rounds of on-policy distillation: the commands of each round, and that finished steps are not redone."""

import json
import re

import pytest
import yaml

import cli
import demo.story
from cache_schema.errors import KdcacheError, WrongUsage
from demo.rounds import run_rounds
from demo.settings import RoundsConfig
from tests.student_caches import make_world
from tests.tiny_models import tiny_dataset
from views.outcome import run as run_command

PLAN = {
    "rounds": 2,
    "data": "D",
    "image_root": "I",
    "stage": {"max_steps": 2},
    "weight": 1,
    "answers": {"temperature": 1.0},
    "build": {"top_k": 8},
    "train": {"device": "cpu", "wait": True, "compile": False},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), rows=10)


@pytest.fixture
def recipe(tmp_path, world):
    """A plan whose student, teacher and cache are there, with changes."""

    def made(**changes):
        mixed = {"cache": str(world.cache), "image_root": str(world.image_root), "weight": 3}
        there = {"student": str(world.student), "teacher": str(world.cache.with_name("teacher"))}
        plan = {**PLAN, **there, "stage": {**PLAN["stage"], "caches": [mixed]}, **changes}
        file = tmp_path / "rounds.yaml"
        file.write_text(yaml.safe_dump(plan))
        return RoundsConfig(recipe=file, out=tmp_path / "out")

    return made


def test_each_round_answers_builds_and_trains_on_all_caches_so_far(world, recipe, monkeypatch):
    ran, broken = [], [True]

    def kdcache(arguments):
        if arguments[0] == "train" and "round-2" in " ".join(arguments) and broken.pop():
            raise KdcacheError("stopped")
        ran.append(arguments)
        made = {"model": f"M{len(ran)}", "stages": [{"steps": 2}]}
        return made if arguments[0] == "train" else {}

    monkeypatch.setattr(demo.story, "kdcache", kdcache)
    config = recipe(build={"top_k": 8, "targets": ["response", "visual"]})
    with pytest.raises(KdcacheError, match="stopped"):
        run_rounds(config, cli._check_round)
    broken.append(False)
    result = run_rounds(config, cli._check_round)
    assert [arguments[0] for arguments in ran] == ["answers", "build", "train"] * 2
    answers = [dict(zip(each[1::2], each[2::2], strict=True)) for each in ran if each[0] == "answers"]
    assert [each["--model"] for each in answers] == [str(world.student), "M3"]
    assert [each["--seed"] for each in answers] == ["1", "2"]
    assert {"--wait", "--resume"} < set(ran[2])
    assert ran[1][-4:] == ["--targets", "response,visual", "--top-k", "8"]
    assert "--compile" not in ran[2]
    files = [config.out / f"round-{number}/recipe.yaml" for number in (1, 2)]
    stages = [yaml.safe_load(file.read_text())["stages"][0] for file in files]
    assert [[(each["cache"], each["weight"]) for each in stage["caches"]] for stage in stages] == [
        [(str(world.cache), 3), (str(config.out / "round-1/cache"), 1)],
        [
            (str(world.cache), 3),
            (str(config.out / "round-1/cache"), 1),
            (str(config.out / "round-2/cache"), 1),
        ],
    ]
    assert result["model"] == "M6"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds must be"),
        ({"rounds": True}, "rounds must be a whole number from 1, not True"),
        ({"student": 3}, "student must be a path, not 3"),
        ({"questions": 3}, r"unknown keys \['questions'\]"),
        ({"build": 3}, "build must be a mapping"),
        ({"stage": {"caches": ["C"]}}, "weight goes with weights"),
        ({"stage": {"caches": "cache"}}, "caches must be a list of caches, not 'cache'"),
        ({"stage": {"cache": "C"}}, "give either cache or caches"),
        ({"stage": {"base": "dftt"}}, "base 'dftt' is not one of"),
        ({"stage": {"losses": {"divergence": "jsd:2"}}}, "divergence jsd: beta must lie in"),
        ({"stage": {"base": "pd"}}, "stage pd: preference does not go with a mixture"),
        ({"weight": -1}, "weight must be positive, not -1"),
        ({"answers": {"temprature": 1.0}}, "answers: No such option.*--temprature"),
        ({"answers": {"temperature": -1.0}}, "answers: temperature must be at least 0, not -1.0"),
        ({"answers": {"out": "rows"}}, "answers: the rounds set out themselves"),
        ({"build": {"top_k": "many"}}, "build: Invalid value for --top-k: 'many' is not NUMBER"),
        ({"build": {"help": True}}, "build: No such option.*--help"),
        ({"train": {"micro-batch": 0}}, "micro_batch must be at least 1, not 0"),
        ({"train": {"cache": "C"}}, "train: the rounds set cache themselves"),
        ({"student": "none-here"}, "student none-here is no model folder"),
        ({"teacher": "none-here"}, "teacher none-here is no model folder"),
        ({"stage": {"caches": [{"cache": "none-here", "weight": 1}]}}, "none-here: no cache here"),
    ],
)
def test_what_is_no_plan_of_rounds_is_refused_before_the_first_step(
    recipe, changes, message, monkeypatch, capsys
):
    monkeypatch.setattr("views.outcome.signal.signal", lambda *_: None)
    config = recipe(**changes)
    code = run_command(cli.app, ["rounds", "--recipe", str(config.recipe), "--out", str(config.out)])
    assert code == (1 if "none-here" in message else 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not config.out.exists()


def test_wrong_settings_of_a_step_are_wrong_usage():
    with pytest.raises(WrongUsage, match="kdcache verify ended with exit code 2"):
        demo.story.kdcache(["verify", "cache", "--jobs", "0"])


@pytest.mark.slow
def test_two_rounds_in_one_command_with_real_models(tmp_path, world, recipe):
    rows = tiny_dataset(tmp_path / "data", rows=6)
    config = recipe(
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
    result = run_rounds(config, cli._check_round)
    assert len(result["rounds"]) == 2
    identities = [sorted(each["training"]["identity"]["caches"]) for each in result["rounds"]]
    assert identities == [["0", "1"], ["0", "1", "2"]]
    assert json.loads((config.out / "round-2/run/1-dft/result.json").read_text())["steps"] == 2
