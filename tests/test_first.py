"""FIRST: the teacher is calibrated on held-out labels, then learnt from; its temperature is part of a run."""

import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from cache_schema.errors import WrongUsage
from cache_schema.format.records import IGNORE_INDEX
from cache_schema.progress import Silent
from student.calibration import calibrate, calibrated, calibration_error
from student.divergences import Divergence
from student.loss_weights import LossWeights
from student.losses import sparse_kl
from student.run_state import RunState
from student.settings import TrainConfig
from student.stages import DFT, stage_from
from tests.dense_twins import sparse_record
from tests.student_caches import make_world
from tests.student_driver import run


class Held:
    """A cache of samples whose teacher has logits `sharpness` times those that the labels were drawn from."""

    url = "held-out"

    def __init__(self, sharpness: float, samples: int = 40, positions: int = 100, kept: int = 6):
        generator = np.random.default_rng(0)
        self.samples = []
        for _ in range(samples):
            logits = generator.normal(size=(positions, 6)) * 2
            logits[:, 0] += 3
            odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            labels = np.array([generator.choice(6, p=each) for each in odds])
            sharp = logits * sharpness
            logprobs = sharp - np.log(np.exp(sharp).sum(axis=1, keepdims=True))
            order = np.argsort(-logprobs, axis=1)[:, :kept]
            record = SimpleNamespace(
                token_ids=order,
                logprobs=np.take_along_axis(logprobs, order, axis=1),
                there=np.ones((positions, kept), dtype=bool),
            )
            self.samples.append(
                SimpleNamespace(
                    response=type(
                        "Record", (SimpleNamespace,), {"__len__": lambda self: len(self.token_ids)}
                    )(**vars(record)),
                    labels=np.concatenate([[IGNORE_INDEX], labels]),
                    response_positions=np.arange(positions),
                )
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int):
        return self.samples[number]


def test_calibration_error_by_hand():
    """Two bins: three positions at 0.9 of which two are right, one at 0.4 that is right."""
    confidence, right = np.array([0.9, 0.9, 0.9, 0.4]), np.array([1.0, 1.0, 0.0, 1.0])
    assert calibration_error(confidence, right) == pytest.approx((3 * abs(0.9 - 2 / 3) + abs(0.4 - 1)) / 4)
    assert calibration_error(np.array([1.0]), np.array([1.0])) == 0.0


@pytest.mark.parametrize("sharpness", [0.6, 1.0, 2.0, 3.0])
def test_the_temperature_undoes_a_teacher_too_sure_or_not_sure_enough(sharpness):
    found = calibrate(Held(sharpness))
    assert found.temperature == pytest.approx(sharpness, rel=0.15)
    assert found.after < 0.02
    assert found.positions == 4000
    if sharpness != 1.0:
        assert found.before > 3 * found.after
    assert calibrate(Held(sharpness), samples=3).positions == 300


def test_fewer_than_five_entries_and_none():
    assert 0.25 <= calibrate(Held(1.0, kept=2)).temperature <= 8
    empty = Held(1.0, samples=1)
    empty.samples[0].response = None
    with pytest.raises(WrongUsage, match="no response position"):
        calibrate(empty)


def test_only_the_five_most_likely_tokens_count():
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
    weight = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)).double()
    teacher = torch.randn(3, 12, generator=torch.Generator().manual_seed(2)).double()
    wide, narrow = sparse_record(teacher, 10), sparse_record(teacher, 5)
    values = [sparse_kl(hidden, weight, each, divergence="first:1.4").item() for each in (wide, narrow)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    top = teacher.topk(5, dim=1)
    p = (top.values / 1.4).softmax(1)
    q = (hidden @ weight.T).gather(1, top.indices).log_softmax(1)
    assert values[0] == pytest.approx((p * (p.log() - q)).sum(1).mean().item(), rel=1e-12)


def test_the_temperature_takes_its_place_in_the_settings(tmp_path):
    stage = stage_from(
        {"base": "dft", "losses": {"divergence": "response=first,visual=jsd:0.3,prompt=dbild"}}
    )
    assert stage.losses.uncalibrated == ("response",)
    losses = stage.losses.calibrated(1.0625)
    assert losses.divergences == {
        "response": Divergence("first", 1.0625),
        "visual": Divergence("jsd", 0.3),
        "prompt": Divergence("dbild"),
    }
    config = TrainConfig(stage=stage, student=tmp_path, cache="c", out=tmp_path)
    with pytest.raises(WrongUsage, match="give --eval-cache, or a temperature"):
        calibrated(config, RunState(), Silent())
    known = calibrated(config, RunState(teacher_temperature=1.0625), Silent())
    assert known.resolved_stage.losses == losses
    plain = TrainConfig(stage=DFT, student=tmp_path, cache="c", out=tmp_path)
    assert calibrated(plain, RunState(), Silent()) is plain
    with pytest.raises(WrongUsage, match="needs its temperature here"):
        sparse_kl(
            torch.zeros(1, 2), torch.zeros(3, 2), sparse_record(torch.zeros(1, 3), 2), divergence="first"
        )
    assert LossWeights(divergence="first:1.5").uncalibrated == ()


def test_a_killed_run_keeps_its_temperature(tmp_path):
    world = make_world(tmp_path / "world")
    common = {
        "base": "dft",
        "stage": {
            "global_batch": 8,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "losses": {"divergence": "response=first"},
        },
        "student": world.student,
        "cache": str(world.cache),
        "eval_cache": str(world.cache),
        "image_root": world.image_root,
        "micro_batch": 4,
        "save_every": 1,
        "device": "cpu",
    }
    again = {**common, "out": tmp_path / "again", "resume": True}
    codes = run(
        tmp_path / "runs.json", [{**common, "out": tmp_path / "whole"}, {**again, "kill": ("step", 2)}, again]
    )
    assert codes == [0, -signal.SIGKILL, 0]
    whole, resumed = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    said = [yaml.safe_load((tmp_path / name / "recipe.yaml").read_text()) for name in ("whole", "again")]
    texts = [each["stage"]["losses"]["divergence"] for each in said]
    assert texts[0] == texts[1]
    assert texts[0].startswith("response=first:")
    assert said[0]["identity"]["stage"]["losses"]["divergence"] == "response=first"
