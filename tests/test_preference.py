"""LLaVA-MoD's preference distillation: its loss against a twin, its pairs, and a stage from two caches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from cache_schema import open_cache
from cache_schema.errors import IdentityMismatch, KdcacheError, StoppedEarly, WrongUsage
from cache_schema.progress import Silent
from cache_schema.runs import read_metrics
from models.folder import load_model
from models.head import Head
from student.export import export
from student.losses import Denominators, PreferenceLoss, PreferenceTargets
from student.order import StreamConfig
from student.pairs import PairStream, partners
from student.recipe import train_recipe
from student.settings import TrainConfig
from student.stages import DFT, PD, Stage, open_recipe, stage_from
from student.train import train
from tests.student_caches import fake_capture, make_world
from views.run_curves import StageRun, draw_curves

BETA = 0.3


def problem(*, samples=6, length=9, width=5, vocabulary=13, seed=0):
    """hidden (B, T, D), weight (V, D), labels (B, T) of different lengths, reference (B,), all float64."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(samples, length, width, generator=random, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=random, dtype=torch.float64)
    labels = torch.randint(vocabulary, (samples, length), generator=random)
    labels[torch.rand(samples, length, generator=random) < 0.4] = -100
    reference = -5.0 * torch.rand(samples, generator=random, dtype=torch.float64)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, reference


def twin(hidden, weight, labels, reference, beta=BETA):
    """(mean loss, accuracy, margin) over the pairs, from dense logits."""
    logq = torch.log_softmax(hidden @ weight.T, dim=-1)
    rewards = []
    for sample in range(len(labels)):
        places = [t for t in range(labels.shape[1] - 1) if labels[sample, t + 1] != -100]
        total = sum(
            (logq[sample, t, labels[sample, t + 1]] for t in places), torch.zeros((), dtype=torch.float64)
        )
        rewards.append(beta * (total - reference[sample]))
    margins = torch.stack([rewards[i] - rewards[i + 1] for i in range(0, len(rewards), 2)])
    return -torch.log(torch.sigmoid(margins)).mean(), (margins > 0).double().mean(), margins.mean()


def ours(hidden, weight, labels, reference, *, pairs=None, budget=2**20, beta=BETA):
    counts = Denominators(samples=2.0 * (pairs or len(labels) / 2))
    loss = PreferenceLoss(beta, memory_budget=budget)
    return loss(hidden, labels, PreferenceTargets.of(labels, reference), Head(weight=weight), counts)


@pytest.mark.parametrize("budget", [1, 2**20])
def test_value_gradients_and_measures_are_those_of_the_twin(budget):
    hidden, weight, labels, reference = problem()
    parts = ours(hidden, weight, labels, reference, budget=budget)
    expected, accuracy, margin = twin(hidden, weight, labels, reference)
    assert parts.total.item() == pytest.approx(expected.item(), abs=1e-9)
    assert parts.measures["reward_accuracy"].item() == pytest.approx(accuracy.item(), abs=1e-12)
    assert parts.measures["reward_margin"].item() == pytest.approx(margin.item(), abs=1e-9)
    found = torch.autograd.grad(parts.total, [hidden, weight])
    for mine, theirs in zip(found, torch.autograd.grad(expected, [hidden, weight]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
        assert mine.abs().max() > 1e-3


def test_gradcheck():
    hidden, weight, labels, reference = problem(samples=4, length=5, width=3, vocabulary=6)
    assert torch.autograd.gradcheck(
        lambda states, matrix: ours(states, matrix, labels, reference).total,
        (hidden, weight),
        check_undefined_grad=False,
    )


def test_micro_batches_and_an_idle_one_add_up_to_the_whole():
    hidden, weight, labels, reference = problem()
    whole = ours(hidden, weight, labels, reference)
    parts = [
        ours(hidden[i : i + 2], weight, labels[i : i + 2], reference[i : i + 2], pairs=3) for i in (0, 2, 4)
    ]
    idle = PreferenceLoss(BETA)(
        hidden[:1, :1], torch.full((1, 1), -100), None, Head(weight=weight), Denominators(samples=6.0)
    )
    assert idle.total.item() == 0.0
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), abs=1e-12)
    for name, value in whole.measures.items():
        assert sum(part.measures[name].item() for part in parts) == pytest.approx(value.item(), abs=1e-12)


def test_far_apart_likelihoods_are_finite_and_a_pair_without_answers_counts_log_two():
    hidden, weight, labels, reference = problem(samples=2)
    reference = torch.tensor([4000.0, -4000.0], dtype=torch.float64)
    parts = ours(hidden, weight, labels, reference)
    assert parts.total.item() == pytest.approx(-parts.measures["reward_margin"].item(), rel=1e-9)
    assert torch.isfinite(torch.autograd.grad(parts.total, hidden)[0]).all()
    silent = ours(hidden, weight, torch.full_like(labels, -100), torch.zeros(2, dtype=torch.float64))
    assert silent.total.item() == pytest.approx(math.log(2.0), abs=1e-12)


def test_a_batch_that_does_not_fit_is_refused_as_in_every_objective():
    hidden, weight, labels, reference = problem(samples=2)
    labels[0, 3] = len(weight)
    with pytest.raises(ValueError, match="label 13 is not a token: the head has 13 tokens"):
        ours(hidden, weight, labels, reference)
    labels[0, 3] = 1
    with pytest.raises(ValueError, match=r"hidden must be \(B, T, D\) and labels \(B, T\)"):
        ours(hidden[:, :-1], weight, labels, reference)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A student, its images, and caches of chosen and rejected answers to the same prompts."""
    folder = tmp_path_factory.mktemp("pairs")
    made = make_world(folder)
    rejected = fake_capture(
        folder / "rejected", folder / "teacher", made.image_root, seed=5, teacher_name="tiny-0"
    )
    return made, rejected, folder / "teacher"


def settings(world, out, **changes):
    made, rejected, _ = world
    stage = {"global_batch": 4, "max_steps": 4, "learning_rate": 2e-3}
    stage |= {name: changes.pop(name) for name in list(changes) if name in stage}
    given = {"rejected": str(rejected), "stage": replace(PD, **stage), "cache": str(made.cache)}
    return TrainConfig(
        student=made.student,
        image_root=made.image_root,
        out=out,
        **{**given, "log_every": 1, "trackers": (), "workers": 1, "micro_batch": 4, **changes},
    )


def weights_of(folder):
    return {name: value.clone() for name, value in load_model(folder, torch.float32).named_parameters()}


def lines_of(out):
    return [line for line in read_metrics(out) if line["group"] == "train"]


def test_a_stage_learns_to_prefer_and_its_first_loss_is_that_of_both_models(world, tmp_path):
    made, rejected, teacher = world
    config = settings(world, tmp_path / "run", max_steps=18, global_batch=8, learning_rate=5e-3)
    train(config, Silent())
    lines = lines_of(tmp_path / "run")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"], [line["loss"] for line in lines]
    assert lines[-1]["reward_margin"] > lines[0]["reward_margin"] + 0.3
    assert lines[-1]["reward_accuracy"] == 1.0
    first = PairStream(
        [open_cache(made.cache), open_cache(rejected)], StreamConfig(global_batch=8), micro_batch=16
    )
    step = next(first.read(0, 1))
    likelihoods = {}
    for name, folder in (("student", made.student), ("teacher", teacher)):
        model = load_model(folder, torch.float32)
        likelihoods[name] = [
            likelihood(model, located.sample(), made, None if name == "student" else 340)
            for located in step.micro_batches[0]
        ]
    rewards = 0.1 * (np.array(likelihoods["student"]) - np.array(likelihoods["teacher"]))
    margins = rewards[::2] - rewards[1::2]
    assert lines[0]["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-5)
    assert lines[0]["reward_margin"] == pytest.approx(margins.mean(), abs=1e-5)
    assert export(tmp_path / "run", tmp_path / "exported", Silent())["stages"] == ["pd"]


@torch.no_grad()
def likelihood(model, sample, made, tokens):
    """The log-likelihood of a sample's labels, by the first `tokens` of the model's own logits."""
    from transformers import AutoProcessor

    from cache_schema.datasets.images import open_image

    inputs = {"input_ids": torch.tensor(sample.input_ids)[None].long()}
    if sample.images:
        processor = AutoProcessor.from_pretrained(made.student)
        images = [open_image(made.image_root, image.path).image for image in sample.images]
        inputs |= dict(processor.image_processor(images=images, return_tensors="pt"))
    logq = torch.log_softmax(model(**inputs).logits[0, :, :tokens].double(), dim=-1)
    labels = torch.tensor(sample.labels)
    return sum(logq[t, labels[t + 1]].item() for t in range(len(labels) - 1) if labels[t + 1] != -100)


def test_stopped_and_resumed_a_stage_has_the_same_bits(world, tmp_path, monkeypatch):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(settings(world, whole), Silent())

    class Once:
        def __enter__(self):
            self.steps = 0
            return self

        def __exit__(self, *_):
            return None

        @property
        def asked(self):
            self.steps += 1
            return self.steps > 2

    with monkeypatch.context() as patch:
        patch.setattr("student.train.Interrupt", Once)
        with pytest.raises(StoppedEarly):
            train(settings(world, parted), Silent())
    train(settings(world, parted, resume=True), Silent())
    ours, theirs = weights_of(whole / "model"), weights_of(parted / "model")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for one, other in zip(lines_of(whole), lines_of(parted), strict=True):
        assert [one[name] for name in ("loss", "reward_margin")] == [
            other[name] for name in ("loss", "reward_margin")
        ]


def test_pairs_stay_together_for_every_world_size_and_micro_batch(world):
    made, rejected, _ = world
    caches = [open_cache(made.cache), open_cache(rejected)]
    config = StreamConfig(seed=3, global_batch=5)

    def read(**how):
        stream = PairStream(caches, config, **how)
        return [
            [(located.source, located.sample().sample_id) for part in step.micro_batches for located in part]
            for step in stream.read(0, stream.steps_per_epoch)
        ]

    alone = read(micro_batch=3)
    assert sorted(each for step in alone for _, each in step[::2]) == sorted(caches[0].sample_ids())
    for step in alone:
        assert [source for source, _ in step] == [0, 1] * (len(step) // 2)
        assert [each for _, each in step[::2]] == [each for _, each in step[1::2]]
    two = [read(micro_batch=2, rank=rank, world_size=2) for rank in range(2)]
    for whole, first, second in zip(alone, *two, strict=True):
        assert sorted(whole) == sorted(first + second)


def test_samples_without_partner_are_told_and_too_many_are_refused(world, tmp_path, capsys):
    made, _, teacher = world
    few = fake_capture(tmp_path / "few", teacher, made.image_root, rows=22, seed=5, teacher_name="tiny-0")
    mine, theirs = partners(open_cache(made.cache), open_cache(few))
    assert len(mine) == len(theirs) == 22

    class Told(Silent):
        def __init__(self):
            self.lines = []

        def message(self, text):
            self.lines.append(text)

    told = Told()
    train(settings(world, tmp_path / "run", rejected=str(few), max_steps=1), told)
    assert "2 of 24 chosen samples have no partner and are left out" in told.lines
    fewer = fake_capture(tmp_path / "fewer", teacher, made.image_root, rows=12, seed=5, teacher_name="tiny-0")
    with pytest.raises(KdcacheError, match=r"12 of 24 samples of .* have no partner in .*fewer"):
        train(settings(world, tmp_path / "none", rejected=str(fewer)), Silent())
    assert not (tmp_path / "none" / "model").exists()


def test_a_held_out_cache_is_measured_without_a_loss_of_pairs_and_the_labels_choose(world, tmp_path):
    eval_cache = str(world[0].cache)
    config = settings(world, tmp_path, eval_cache=eval_cache, eval_every=1, early_stop=9, watch="ce")
    evaluation = train(config, Silent())["evaluation"]
    held_out = [line for line in read_metrics(tmp_path) if line["group"] == "held-out"]
    assert len(held_out) == 4
    assert not any("loss" in line for line in held_out)
    assert evaluation["ce"] == min(line["ce"] for line in held_out)
    assert "reward of chosen less that of rejected answers" in {
        axes.get_title(loc="left")
        for axes in draw_curves([StageRun(name="pd", train=lines_of(tmp_path), held_out=held_out)]).axes
    }


def test_what_are_no_pairs_is_refused(world, tmp_path):
    made, _, teacher = world
    with pytest.raises(WrongUsage, match="give --rejected"):
        train(settings(world, tmp_path / "a", rejected=None), Silent())
    with pytest.raises(WrongUsage, match="take stage pd"):
        train(replace(settings(world, tmp_path / "b"), stage=DFT), Silent())
    watched = {"early_stop": 1, "eval_cache": str(made.cache), "eval_every": 1}
    with pytest.raises(WrongUsage, match="--watch ce"):
        train(settings(world, tmp_path / "c", **watched), Silent())
    with pytest.raises(WrongUsage, match="preference does not go with other losses"):
        replace(DFT, preference=0.1)
    with pytest.raises(WrongUsage, match="nor with settings of theirs"):
        replace(PD, losses=replace(PD.losses, divergence="reverse_kl"))
    other = fake_capture(tmp_path / "other", teacher, made.image_root, seed=5)
    with pytest.raises(IdentityMismatch, match="two teachers"):
        train(settings(world, tmp_path / "d", rejected=str(other)), Silent())
    moved = fake_capture(tmp_path / "moved", teacher, made.image_root, text_only=3, teacher_name="tiny-0")
    with pytest.raises(KdcacheError, match="answer different prompts"):
        train(settings(world, tmp_path / "e", rejected=str(moved)), Silent())


def test_a_recipe_asks_for_it_after_another_stage(world, tmp_path):
    made, rejected, _ = world
    recipe = tmp_path / "recipe.yaml"
    short = {"max_steps": 1, "global_batch": 4, "cache": str(made.cache)}
    stages = [{"base": "dft", **short}, {"base": "pd", "rejected": str(rejected), "preference": 0.2, **short}]
    recipe.write_text(yaml.safe_dump({"name": "mod", "stages": stages}))
    result = train_recipe(
        open_recipe(str(recipe)), settings(world, tmp_path / "run", rejected=None, stage=DFT), Silent()
    )
    assert [each["stage"] for each in result["stages"]] == ["dft", "pd"]
    assert result["stages"][1]["identity"]["stage"]["preference"] == 0.2
    assert "rejected" in result["stages"][1]["identity"]
    assert "reward_accuracy" in result["stages"][1]["train"]
    assert "preference" not in DFT.to_json()
    assert isinstance(stage_from({"base": "pd"}), Stage)
