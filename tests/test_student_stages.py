"""Stages and recipes as data."""

import math
from itertools import pairwise

import pytest

from cache_schema import KdcacheError
from student.losses import LossWeights
from student.stages import DFT, DPT, PT, SFT, open_recipe, stage_from


def test_the_stages_have_the_settings_of_the_paper():
    assert (DPT.learning_rate, DPT.global_batch, DPT.trainable) == (1e-3, 256, ("projector",))
    assert (SFT.learning_rate, SFT.global_batch) == (2e-5, 128)
    assert SFT.trainable == DFT.trainable == ("projector", "language_model")
    assert DPT.losses == DFT.losses == LossWeights(ce=1, response=1, visual=1, relation=0.5, prompt=0)
    assert SFT.targets == PT.targets == ()
    assert DFT.targets == ("response", "visual", "relation")
    assert all(stage.warmup_ratio == 0.03 and stage.epochs == 1 for stage in (DPT, SFT, DFT))


def test_the_learning_rate_rises_then_follows_its_schedule():
    stage = stage_from({"base": "dft", "learning_rate": 1.0, "warmup_ratio": 0.1})
    rates = [stage.learning_rate_at(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.001
    linear = stage_from({"base": "dft", "learning_rate": 1.0, "warmup_ratio": 0.0, "schedule": "linear"})
    assert linear.learning_rate_at(25, 100) == pytest.approx(0.75)
    constant = stage_from({"base": "dft", "learning_rate": 1.0, "warmup_ratio": 0.0, "schedule": "constant"})
    assert constant.learning_rate_at(99, 100) == 1.0


def test_steps_are_epochs_unless_a_number_is_given():
    assert stage_from({"base": "sft", "epochs": 1.5}).total_steps(7) == math.ceil(10.5)
    assert stage_from({"base": "sft", "epochs": 1.5, "max_steps": 3}).total_steps(7) == 3


def test_a_stage_survives_its_own_json():
    document = DFT.to_json()
    assert stage_from(document) == DFT


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"base": "dpt", "learning_rat": 1}, r"unknown keys \['learning_rat'\]"),
        ({"base": "dpt", "losses": {"vision": 1}}, r"unknown losses \['vision'\]"),
        ({"base": "dpt", "losses": {"visual": "much"}}, "losses: visual must be a number, not 'much'"),
        ({"base": "dpt", "losses": {"visual": -1}}, "losses: visual must be at least 0, not -1"),
        ({"base": "ppt"}, "base 'ppt' is not one of"),
        ({"base": "dpt", "trainable": ["head"]}, "trainable must be some of"),
        ({"base": "dpt", "schedule": "step"}, "schedule must be one of"),
        ({"base": "dpt", "learning_rate": 0}, "learning_rate must be positive"),
        ({"base": "dpt", "learning_rate": True}, "learning_rate must be a number, not True"),
        ({"base": "dpt", "global_batch": 0}, "global_batch must be at least 1"),
        ({"base": "dpt", "global_batch": 1.5}, "global_batch must be a whole number"),
        ({"base": "dpt", "epochs": -1}, "epochs must be positive"),
        ({"base": "dpt", "max_steps": 0}, "max_steps must be at least 1"),
        ({"base": "dpt", "warmup_ratio": 1}, "warmup_ratio must lie"),
        ({"base": "dpt", "max_grad_norm": math.nan}, "max_grad_norm must be a finite number"),
        ({"base": "dpt", "losses": {"response": math.nan}}, "losses: response must be a finite number"),
        ({"base": "dpt", "epochs": None}, "epochs must be a number, not None"),
        ({"base": "dpt", "learning_rate": "fast"}, "learning_rate must be a number, not 'fast'"),
        ({"base": "dpt", "global_batch": True}, "global_batch must be a whole number, not True"),
        ({"base": "dpt", "losses": {"ce": False}}, "ce must be a number, not False"),
        ({"base": "sft", "losses": {"ce": 0}}, "all its losses are off"),
        ({"base": "dpt", "name": "a/b"}, "its name must be letters, digits"),
        ({"base": "dpt", "name": ".."}, "its name must be letters, digits"),
        ({"base": "dpt", "name": None}, "its name must be letters, digits"),
        ({"name": "own"}, "needs global_batch, learning_rate, trainable"),
    ],
)
def test_a_wrong_stage_is_refused(document, message):
    with pytest.raises(ValueError, match=message):
        stage_from(document)


YAML = """
name: mine
stages:
  - base: dpt
    cache: captions
    image_root: images
    learning_rate: 1e-3
  - name: own
    trainable: language_model
    learning_rate: 5.0e-6
    global_batch: 64
    losses: {response: 2, tail: renormalize}
    cache: chats
"""
TOML = """
name = "mine"
[[stages]]
base = "dpt"
cache = "captions"
image_root = "images"
learning_rate = 1e-3
[[stages]]
name = "own"
trainable = ["language_model"]
learning_rate = 5.0e-6
global_batch = 64
losses = {response = 2, tail = "renormalize"}
cache = "chats"
"""


def test_yaml_and_toml_say_the_same(tmp_path):
    (tmp_path / "recipe.yaml").write_text(YAML)
    (tmp_path / "recipe.toml").write_text(TOML)
    recipe = open_recipe(str(tmp_path / "recipe.yaml"))
    assert recipe == open_recipe(str(tmp_path / "recipe.toml"))
    first, second = recipe.stages
    assert (first.stage, first.cache, first.image_root) == (DPT, "captions", "images")
    assert second.stage.losses == LossWeights(response=2.0, tail="renormalize")
    assert second.stage.trainable == ("language_model",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: 3", "must hold a list `stages`"),
        ("[", "recipe"),
        ("stages: [{base: dpt, cahce: x}]", "unknown keys"),
        ("stages: [{base: dpt}, {base: dpt}]", "must be distinct"),
        ("stages: []", "must be distinct"),
        ("stages: [{base: dpt}]\nseed: 1", r"unknown keys \['seed'\]"),
        ("stages: [dpt]", "must be a mapping"),
        ("stages: [{base: dft, cache: null, max_steps: 1}]", "stage 1: cache must be a path, not None"),
        ("stages: [{base: dft, image_root: 3}]", "stage 1: image_root must be a path, not 3"),
        ("stages: [{base: dft, losses: {response: .nan}, max_steps: 1}]", "response must be a finite number"),
        ("stages: [{base: dft, group_by_modality: 3}]", "group_by_modality must be true or false, not 3"),
        ("stages: [{base: dft, trainable: 5}]", "stage 1: trainable must be a list of parts, not 5"),
        ("stages: [{base: [dft]}]", r"stage 1: base \['dft'\] is not one of dpt"),
        ("name: {a: b}\nstages: [{base: dft}]", "name must be a text, not {'a': 'b'}"),
        ("stages: [{base: dft, epochs: null}]", "epochs must be a number, not None"),
        ("stages: [{base: dft, learning_rate: fast}]", "learning_rate must be a number, not 'fast'"),
    ],
)
def test_a_wrong_recipe_is_one_line_with_its_file(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(KdcacheError, match=message) as caught:
        open_recipe(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_recipe_of_the_paper_is_built_in():
    assert [entry.stage for entry in open_recipe("llava-kd").stages] == [DPT, SFT, DFT]
    with pytest.raises(KdcacheError, match="neither a file nor one of llava-kd"):
        open_recipe("llava-kt")


def test_targets_can_be_narrowed():
    assert DFT.only(("response",)).targets == ("response",)
    assert DFT.only(("response", "visual")).losses.relation == 0
    assert DPT.only(()).losses == PT.losses
    with pytest.raises(ValueError, match="targets must be some of"):
        DFT.only(("sight",))
    with pytest.raises(ValueError, match="stage sft has no loss on response"):
        SFT.only(("response",))
