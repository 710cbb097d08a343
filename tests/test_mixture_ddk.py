"""The rule `ddk`: domains, their held-out samples, their shares over time, and that all of it is restored."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cache_schema import open_cache
from cache_schema.errors import WrongUsage
from cache_schema.progress import Silent
from cache_schema.runs import read_metrics
from student.domains import discrepancy, domains_of
from student.order import Catalogue
from student.settings import TrainConfig
from student.sources import Mixture, Source
from student.stages import DFT, open_recipe
from student.train import train
from tests.student_caches import SPEC, fake_capture, make_world
from tests.student_driver import recorded, run
from views.run_report import report


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    made = make_world(folder)
    fake_capture(folder / "second", folder / "teacher", folder / "images", seed=7, rows=20, shard_size=4)
    return made


def mixture_of(world, **settings):
    sources = (Source(cache=str(world.cache)), Source(cache=str(world.cache.parent / "second")))
    return Mixture(**{"sources": sources, "rule": "ddk", "every": 2, "held_out": 2, **settings})


def config_of(world, out, mixture=None, **changes):
    return TrainConfig(
        student=world.student,
        cache=None,
        mixture=mixture or mixture_of(world),
        image_root=str(world.image_root),
        out=out,
        **{
            "stage": replace(DFT, global_batch=6, max_steps=5, learning_rate=3e-3),
            "log_every": 1,
            "trackers": (),
            "workers": 1,
            "save_every": 1,
            "keep": 9,
            "device": "cpu",
            **changes,
        },
    )


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A finished run, with a checkpoint of every step."""
    config = config_of(world, tmp_path_factory.mktemp("whole"))
    train(config, Silent())
    return config


def mixture_lines(out):
    return [line for line in read_metrics(out) if line["group"] == "mixture"]


def test_shares_are_those_of_the_paper():
    student, teacher = [2.0, 1.0, 1.5], [1.0, 1.0, 0.5]
    ratio = [math.exp(s) / math.exp(t) for s, t in zip(student, teacher, strict=True)]
    first = [math.exp(r) / sum(map(math.exp, ratio)) for r in ratio]
    assert discrepancy(student, teacher, None, 0.5) == pytest.approx(first, abs=1e-6)
    psi = [before * math.exp(r) for before, r in zip([0.2, 0.5, 0.3], ratio, strict=True)]
    later = [0.5 * each / sum(psi) + 0.5 / 3 for each in psi]
    assert discrepancy(student, teacher, [0.2, 0.5, 0.3], 0.5) == pytest.approx(later, abs=1e-6)


@pytest.mark.parametrize("before", [None, [0.5, 0.5]])
def test_shares_stay_finite_and_positive_for_a_student_that_knows_nothing(before):
    shares = discrepancy([800.0, 3.0], [0.1, 0.1], before, 1.0)
    assert all(share > 0 for share in shares)
    assert shares[0] == pytest.approx(1.0, abs=1e-5)


def test_domains_share_out_all_samples_and_hold_some_out(world):
    caches = [open_cache(world.cache), open_cache(world.cache.parent / "second")]
    catalogue = Catalogue(caches)
    mixture = mixture_of(world, domains={"text": "images == 0", "short": "tokens < 30"}, held_out=1)
    made = domains_of(mixture, caches, catalogue, seed=3)
    assert [domain.name for domain in made] == ["text", "short", "rest"]
    together = np.concatenate([np.concatenate([domain.samples, domain.held_out]) for domain in made])
    assert sorted(together.tolist()) == list(range(44))
    assert [len(domain.held_out) for domain in made] == [1, 1, 1]
    text, short, rest = made
    assert not catalogue.with_image[text.samples].any()
    assert (catalogue.tokens[short.samples] < 30).all()
    assert catalogue.with_image[short.samples].all()
    assert (catalogue.tokens[rest.samples] >= 30).all()
    assert catalogue.with_image[rest.samples].all()
    again = domains_of(mixture, caches, catalogue, seed=3)
    assert all(np.array_equal(a.held_out, b.held_out) for a, b in zip(made, again, strict=True))
    with pytest.raises(WrongUsage, match="domain nothing of the mixture has 0 samples"):
        domains_of(replace(mixture, domains={"nothing": "tokens > 9999"}), caches, catalogue, seed=3)
    with pytest.raises(WrongUsage, match=r"domain odd of the mixture: .*no field 'token'"):
        domains_of(replace(mixture, domains={"odd": "token > 9"}), caches, catalogue, seed=3)
    with pytest.raises(WrongUsage, match=r"domain odd of the mixture: quantile\(\) is for `kdcache select`"):
        domains_of(replace(mixture, domains={"odd": "tokens > quantile(0.5)"}), caches, catalogue, seed=3)


def test_shares_are_measured_every_n_steps_and_reported(whole, tmp_path):
    lines = mixture_lines(whole.out)
    assert [line["step"] for line in lines] == [0, 2, 4]
    before = None
    for line in lines:
        pairs = [(line[f"ce {name}"], line[f"teacher ce {name}"]) for name in ("cache", "second")]
        expected = discrepancy(*zip(*pairs, strict=True), before, 0.5)
        before = [line["share cache"], line["share second"]]
        assert before == pytest.approx(expected, abs=2e-6)
    assert lines[0]["ce cache"] != lines[1]["ce cache"]
    assert lines[0]["teacher ce cache"] == lines[1]["teacher ce cache"]
    page = report(whole.out, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "mixture, at the last measurement" in page
    assert f"{lines[-1]['share second']:.4f}" in page
    assert report(whole.out, tmp_path / "report.png").stat().st_size > 10_000


def test_a_run_that_goes_on_from_any_step_ends_with_the_same_bits_and_lines(whole, tmp_path):
    expected = load_file(whole.out / "model/model.safetensors")
    for step in range(1, 5):
        out = tmp_path / str(step)
        shutil.copytree(whole.out / f"checkpoints/step-{step:08d}", out / f"checkpoints/step-{step:08d}")
        shutil.copy(whole.out / "metrics.jsonl", out)  # of a killed run, further on
        train(replace(whole, out=out, resume=True), Silent())
        found = load_file(out / "model/model.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected), step
        assert mixture_lines(out) == mixture_lines(whole.out)


def test_killed_between_measurement_and_step_it_goes_on_exactly(world, tmp_path):
    common = {
        "base": "dft",
        "stage": {"global_batch": 6, "max_steps": 3, "learning_rate": 3e-3},
        "student": world.student,
        "cache": None,
        "mixture": mixture_of(world).to_json(),
        "image_root": world.image_root,
        "save_every": 1,
        "log_every": 1,
        "device": "cpu",
    }
    runs = [{**common, "out": tmp_path / "whole"}]
    moments = [("step", 3), ("rename", 2)]
    for number, moment in enumerate(moments):
        out = {**common, "out": tmp_path / str(number), "resume": True}
        runs += [{**out, "kill": moment}, out]
    codes = run(tmp_path / "runs.json", runs)
    assert codes[0] == 0
    assert codes[2::2] == [0] * len(moments)
    assert all(code != 0 for code in codes[1::2])
    expected = load_file(tmp_path / "whole/model/model.safetensors")
    for number in range(len(moments)):
        found = load_file(tmp_path / f"{number}/model/model.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert mixture_lines(tmp_path / str(number)) == mixture_lines(tmp_path / "whole")


def seen(out):
    """The samples of every step, whichever process had them."""
    found = {}
    for file in sorted(out.glob("seen-*.jsonl")):
        for line in file.read_text().splitlines():
            step, samples, *_ = json.loads(line)
            found.setdefault(step, []).extend(map(tuple, samples))
    return {step: sorted(samples) for step, samples in found.items()}


def test_two_processes_take_the_samples_and_shares_of_one_and_go_on_exactly(world, tmp_path):
    stage = {"global_batch": 6, "max_steps": 7, "learning_rate": 3e-3}
    alone, pair, stopped = (tmp_path / name for name in ("alone", "pair", "stopped"))
    config = config_of(world, alone, stage=replace(DFT, **stage), micro_batch=2)
    with recorded(alone):
        train(config, Silent())
    common = {
        "base": "dft",
        "stage": stage,
        "student": world.student,
        "cache": None,
        "mixture": config.mixture.to_json(),
        "image_root": world.image_root,
        "micro_batch": 2,
        "workers": 1,
        "save_every": 0,
        "log_every": 1,
        "device": "cpu",
        "record": True,
    }
    again = {**common, "out": stopped, "resume": True}
    run(tmp_path / "runs.json", [{**common, "out": pair}, {**again, "stop": 3}, again], ranks=2)
    assert (stopped / "checkpoints/step-00000003").is_dir()
    assert sorted(seen(alone)) == list(range(7))
    assert [len(samples) for samples in seen(alone).values()] == [6] * 7
    expected = load_file(pair / "model/model.safetensors")
    found = load_file(stopped / "model/model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for out in (pair, stopped):
        assert seen(out) == seen(alone)
        assert mixture_lines(out) == mixture_lines(alone)


def test_one_cache_is_shared_out_by_conditions(world, tmp_path):
    mixture = Mixture(rule="ddk", every=3, held_out=1, domains={"text": "images == 0"})
    config = replace(config_of(world, tmp_path), mixture=mixture, cache=str(world.cache))
    result = train(config, Silent())
    assert sorted(mixture_lines(tmp_path)[0]) == sorted(
        ["step", "group"]
        + [f"{value} {name}" for value in ("share", "ce", "teacher ce") for name in ("text", "rest")]
    )
    assert json.loads((tmp_path / "result.json").read_text())["identity"] == result["identity"]
    assert result["identity"]["mixture"]["domains"] == {"text": "images == 0"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixture: doremi", "rule must be one of fixed, ddk"),
        ("mixture: [ddk]", "must be a rule or a mapping"),
        ("mixture: {rule: ddk, interval: 5}", r"unknown keys \['interval'\]"),
        ("mixture: {rule: ddk, every: 0}", "every must"),
        ("mixture: {domains: {text: images == 0}}", "domains need rule ddk"),
        ("mixture: {rule: ddk, domains: {rest: images == 0}}", "may not be named rest"),
        ("caches: [{cache: a, weight: 1}]\n    mixture: ddk", "weights are for rule fixed"),
    ],
)
def test_what_is_no_rule_is_refused(tmp_path, text, message):
    file = tmp_path / "mixed.yaml"
    file.write_text(f"stages:\n  - base: dft\n    {text}\n")
    with pytest.raises(WrongUsage, match=message):
        open_recipe(str(file))


def test_ddk_refuses_mega_batches(world, tmp_path):
    config = config_of(world, tmp_path)
    stage = replace(config.stage, mega_batch=4)
    with pytest.raises(WrongUsage, match="mega_batch above 1 does not go with mixture ddk"):
        replace(config, stage=stage)


def test_ddk_refuses_a_cache_without_the_teachers_labels(world, tmp_path):
    spec = replace(SPEC, targets=("visual",))
    bare = fake_capture(
        tmp_path / "bare", world.cache.parent / "teacher", world.image_root, rows=6, spec=spec
    )
    config = config_of(world, tmp_path / "run")
    stage = config.stage.only(("visual",))
    mixture = replace(config.mixture, sources=(Source(cache=str(bare)),))
    with pytest.raises(WrongUsage, match=rf"{bare} has no response targets"):
        train(replace(config, stage=stage, mixture=mixture), Silent())
