"""Fusion ratios: the loss that they weigh, the slope that they learn from, and training with them."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from cache_schema import open_cache
from cache_schema.errors import WrongUsage
from cache_schema.progress import Silent
from cache_schema.runs import read_metrics
from models.folder import load_model, load_processor
from student.fusion import Fusion, RatioNetwork, fusion_of
from student.heldout import held_out
from student.loss_weights import TERMS
from student.losses import Denominators, LossWeights
from student.model import DistilledStudent
from student.settings import TrainConfig
from student.stages import DFT
from student.train import train
from tests.student_caches import fake_capture, make_world
from tests.student_driver import run

WEIGHTS = LossWeights(fusion_every=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    made = make_world(folder, rows=12)
    fake_capture(folder / "other", folder / "teacher", folder / "images", rows=6, seed=3)
    return made


@pytest.fixture
def prepared(world):
    """A student in float64, the fusion of it, and a batch of four samples."""
    model, processor = load_model(world.student).double(), load_processor(world.student)
    measured = held_out(open_cache(world.cache.parent / "other"), model, processor, world.image_root)
    student = DistilledStudent(
        model, WEIGHTS, vocab_size=len(processor.tokenizer), trainable=("projector", "language_model")
    )
    collator = replace(measured.collator, losses=WEIGHTS)
    cache = open_cache(world.cache)
    batches = [wide(collator([cache[i] for i in part])) for part in ((0, 1), (2, 3))]
    network = RatioNetwork.begun(0)
    network.values = (0.3 * torch.randn(len(network.values), dtype=torch.float64)).tolist()
    return student, Fusion(student, measured, WEIGHTS, network), batches, collator, cache


def wide(batch):
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch.inputs.items()}
    return replace(batch, inputs=inputs)


def loss_of(student, batch, count):
    return student(batch.inputs, batch.labels, batch.targets, Denominators(samples=float(count))).total


def test_the_terms_by_sample_are_those_of_each_alone(prepared):
    student, fusion, batches, collator, cache = prepared
    whole = student(batches[0].inputs, batches[0].labels, batches[0].targets, batches[0].denominators)
    terms = fusion._terms(batches[0])
    for place, name in enumerate(TERMS):
        assert terms[:, place].mean().item() == pytest.approx(whole.by_term[name].item(), abs=1e-9)
    for place in range(2):
        alone = wide(collator([cache[place]]))
        parts = student(alone.inputs, alone.labels, alone.targets, alone.denominators).by_term
        assert terms[place].tolist() == pytest.approx([parts[name].item() for name in TERMS], abs=1e-9)


def test_the_weighed_loss_is_the_sum_of_weighed_samples(prepared):
    student, fusion, batches, collator, cache = prepared
    fusion.begin(batches[:1], 0)
    fusion.weigh(batches[0])
    ours = loss_of(student, batches[0], 2)
    found = torch.autograd.grad(ours, student.model.lm_head.weight)[0]
    student.loss.weigh = None
    ratios = fusion.network.ratios(fusion._signals(fusion._terms(batches[0]), batches[0]))
    assert ratios.min() < ratios.max()
    assert fusion.mean == pytest.approx(ratios.mean().item(), abs=1e-12)
    expected = torch.zeros((), dtype=torch.float64)
    for place, ratio in enumerate(ratios.tolist()):
        for half, scale in ((True, 1 - ratio), (False, ratio)):
            weights = dict.fromkeys(("response", "visual", "relation", "prompt"), 0.0)
            chosen = replace(WEIGHTS, fusion_every=0, **(weights if half else {"ce": 0.0}))
            alone = wide(replace(collator, losses=chosen)([cache[place]]))
            student.loss.weights = chosen
            expected = expected + 2 * scale * loss_of(student, alone, 2)
    student.loss.weights = WEIGHTS
    assert ours.item() == pytest.approx(expected.item(), abs=1e-9)
    (wanted,) = torch.autograd.grad(expected, student.model.lm_head.weight)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-4)  # relation records are in float32


def test_the_slope_is_that_of_the_held_out_loss_after_a_gradient_step(prepared):
    """Against differences of the loss itself: each ratio moved forth and back, a step taken, all measured."""
    student, fusion, batches, _, _ = prepared
    rate = 1e-4
    trained = [one for one in student.model.parameters() if one.requires_grad]
    before = [one.detach().clone() for one in trained]
    fusion.begin(batches, 0)
    for batch in batches:
        fusion.weigh(batch)
        loss_of(student, batch, 4)
    signals, slopes = fusion.slopes(0, rate, torch.device("cpu"))
    assert all(torch.equal(one, old) for one, old in zip(trained, before, strict=True))
    ratios = fusion.network.ratios(signals)
    cache, collator = fusion._held_out.cache, fusion._held_out.collator
    measured = wide(collator([cache[i] for i in range(len(cache))]))

    def held_out_loss(ratios):
        for number, batch in enumerate(batches):
            part = ratios[2 * number : 2 * number + 2]
            student.loss.weigh = lambda _, part=part: torch.stack([2 * (1 - part), 2 * part])
            loss_of(student, batch, 4).backward()
        with torch.no_grad():
            for one in trained:
                if one.grad is not None:
                    one -= rate * one.grad
                    one.grad = None
        student.loss.weigh = None
        with torch.no_grad():
            hidden = student.hidden_states(measured.inputs)
            counts = Denominators(samples=float(len(cache)))
            value = fusion._loss(hidden, measured.labels, None, student.head, counts).total.item()
            for one, old in zip(trained, before, strict=True):
                one.copy_(old)
        return value

    for place in range(4):
        moved = [ratios.clone(), ratios.clone()]
        moved[0][place] += 0.05
        moved[1][place] -= 0.05
        expected = (held_out_loss(moved[0]) - held_out_loss(moved[1])) / 0.1
        assert slopes[place].item() == pytest.approx(expected, rel=2e-2, abs=1e-9)


def test_the_network_goes_down_its_slopes():
    network = RatioNetwork.begun(0)
    signals = torch.randn(6, 4, dtype=torch.float64)
    assert network.ratios(signals).tolist() == [0.5] * 6
    slopes = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    for _ in range(200):
        network.move(network.gradient(signals, slopes))
    ratios = network.ratios(signals)
    assert ratios[::2].mean() < 0.3
    assert ratios[1::2].mean() > 0.7
    assert RatioNetwork(**network.to_json()) == network


def settings(world, out, **changes):
    given = {"log_every": 1, "trackers": (), "device": "cpu", "save_every": 1, "micro_batch": 2, **changes}
    return TrainConfig(
        stage=replace(DFT, losses=WEIGHTS, global_batch=4, max_steps=6, learning_rate=1e-3),
        student=world.student,
        cache=str(world.cache),
        image_root=str(world.image_root),
        eval_cache=str(world.cache.parent / "other"),
        out=out,
        **given,
    )


def test_a_run_that_stops_goes_on_with_the_same_bits(world, tmp_path):
    train(settings(world, tmp_path / "whole"), Silent())
    ratios = [line["fusion_ratio"] for line in read_metrics(tmp_path / "whole") if line["group"] == "train"]
    assert len(set(ratios)) > 3
    assert all(0.0 < ratio < 1.0 for ratio in ratios)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for path in (tmp_path / "again" / "checkpoints").iterdir():
        if path.is_dir() and int(path.name.removeprefix("step-")) > 5:
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "again" / "model")
    (tmp_path / "again" / "result.json").unlink()
    train(settings(world, tmp_path / "again", resume=True), Silent())
    expected, found = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_update_makes_each_samples_terms_once_and_two_passes_more(prepared, monkeypatch):
    student, fusion, batches, _, _ = prepared
    seen = []
    forward = DistilledStudent.hidden_states
    monkeypatch.setattr(
        DistilledStudent,
        "hidden_states",
        lambda self, inputs: seen.append(len(inputs["input_ids"])) or forward(self, inputs),
    )
    before = RatioNetwork(**fusion.network.to_json())
    for step, passes in ((2, 2 + 1 + 2 * 2), (3, 2)):  # own, held out, forth and back; own alone
        seen.clear()
        fusion.begin(batches, step)
        for batch in batches:
            fusion.weigh(batch)
            loss_of(student, batch, 4)
        fusion.learn(step, 1e-3, torch.device("cpu"))
        assert len(seen) == passes
        assert fusion.network.updates == 1
    assert fusion.network.values != before.values


def test_two_processes_learn_the_ratios_of_one(world, tmp_path):
    """Five samples a step, in other micro-batches: of three and two by one process, of two and one by two."""
    stage = {"losses": {"fusion_every": 2}, "global_batch": 5, "max_steps": 5, "learning_rate": 1e-3}
    given = {
        "student": world.student,
        "cache": str(world.cache),
        "image_root": str(world.image_root),
        "eval_cache": str(world.cache.parent / "other"),
        "log_every": 1,
        "save_every": 5,
        "device": "cpu",
    }
    two = {"base": "dft", "stage": stage, "out": tmp_path / "two", "micro_batch": 2}
    run(tmp_path / "runs.json", [{**given, **two}], ranks=2)
    one = replace(DFT, **{**stage, "losses": WEIGHTS})
    train(TrainConfig(stage=one, out=tmp_path / "one", micro_batch=3, trackers=(), **given), Silent())
    values, weights, lines = {}, {}, {}
    for name in ("one", "two"):
        (state,) = (tmp_path / name / "checkpoints").glob("step-*/state.json")
        network = json.loads(state.read_text())["progress"]["fusion"]
        values[name] = torch.tensor(network["values"], dtype=torch.float64)
        weights[name] = load_file(tmp_path / name / "model/model.safetensors")
        lines[name] = [line for line in read_metrics(tmp_path / name) if line["group"] == "train"]
    begun = torch.tensor(RatioNetwork.begun(0).values, dtype=torch.float64)
    assert (values["one"] - begun).abs().max() > 1e-2
    torch.testing.assert_close(values["two"], values["one"], atol=1e-4, rtol=0)
    for one, two in zip(lines["one"], lines["two"], strict=True):
        assert two["fusion_ratio"] == pytest.approx(one["fusion_ratio"], abs=1e-5)
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
    for name, weight in weights["one"].items():
        torch.testing.assert_close(weights["two"][name], weight, atol=1e-4, rtol=0)


def test_where_ratios_cannot_be_learnt_it_is_said(world, prepared, tmp_path):
    with pytest.raises(WrongUsage, match="give --eval-cache"):
        train(replace(settings(world, tmp_path), eval_cache=None), Silent())
    student, fusion, *_ = prepared
    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(WrongUsage, match="fusion_every does not go with FSDP"):
        fusion_of(student, fusion._held_out, WEIGHTS, None, sharded, seed=0, add_up=None)
    with pytest.raises(WrongUsage, match="fusion_every needs reduction sample_mean"):
        LossWeights(fusion_every=1, reduction="token_mean")
