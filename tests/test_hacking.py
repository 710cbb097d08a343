"""The teacher-hacking watch: on made-up curves, in a report, and as what stops a run."""

import base64
import json
import re
from xml.etree import ElementTree

import pytest
import yaml
from typer.testing import CliRunner

from cache_schema.runs import read_metrics
from cli import app
from tests.student_caches import fake_capture, make_world
from views.hacking import watch
from views.run_curves import StageRun
from views.run_report import final_table, report

STEPS = range(10, 110, 10)


def law(scale, exponent):
    return [(step, scale * step**-exponent) for step in STEPS]


def test_curves_that_follow_their_laws_go_together():
    found = watch(law(3.0, 0.7), law(2.0, 0.3))
    assert found.proxy.exponent == pytest.approx(0.7)
    assert found.golden.exponent == pytest.approx(0.3)
    assert found.golden.at(100) == pytest.approx(2.0 * 100**-0.3)
    assert found.golden.until == 50
    assert found.above == pytest.approx(0.0, abs=1e-9)
    assert found.parted is None


def test_a_golden_curve_that_rises_while_the_proxy_falls_has_parted():
    golden = [(step, value * (1 + 0.01 * max(0, step - 60))) for step, value in law(2.0, 0.3)]
    found = watch(law(3.0, 0.7), golden)
    assert found.parted == 60
    assert found.above == pytest.approx(0.4)
    assert found.golden.exponent == pytest.approx(0.3)


def test_both_rising_is_no_hacking_and_few_measurements_are_no_watch():
    up = [(step, 1.0 + 0.1 * abs(step - 50)) for step in STEPS]
    assert watch(up, up).parted is None
    assert watch(law(3.0, 0.7), law(2.0, 0.3)[:3]) is None
    assert watch([], law(2.0, 0.3)) is None


def parting():
    """A stage whose held-out labels get worse after step 60 while the KL goes on falling."""
    golden = [(step, value if step <= 60 else 1.5 * value) for step, value in law(2.0, 0.3)]
    return StageRun(
        name="dft",
        train=[{"step": step, "response_kl": value} for step, value in law(3.0, 0.7)],
        held_out=[{"step": step, "ce": value} for step, value in golden],
    )


def test_the_report_says_where_they_part():
    stage = parting()
    rows = dict(final_table([stage]))
    assert rows["training KL and held-out labels part at step"] == ["60"]
    assert rows["early law of the training KL, exponent"] == ["0.700"]
    bare = StageRun(name="sft", train=stage.train[:1], held_out=())
    assert "training KL and held-out labels part at step" not in dict(final_table([bare]))


def paths(page):
    """The points of the named curves in the picture of a page, in its units."""
    picture = re.search(r"data:image/svg\+xml;base64,([^\"]+)", page.read_text(encoding="utf-8")).group(1)
    found = {}
    for group in ElementTree.fromstring(base64.b64decode(picture)).iter("{http://www.w3.org/2000/svg}g"):
        path = group.find("{http://www.w3.org/2000/svg}path")
        if path is not None and group.get("id"):
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", path.get("d"))]
            found[group.get("id")] = list(zip(numbers[::2], numbers[1::2], strict=True))
    return found


def test_the_page_draws_the_laws_and_marks_where_the_curves_part(tmp_path):
    stage = parting()
    settings = {"stage": {"name": "dft", "trainable": [], "losses": {}, "global_batch": 8}}
    settings["stage"]["learning_rate"] = 1e-3
    settings |= {"student": "s", "cache": "c", "versions": {}}
    settings["identity"] = {"cache": {"identity": "0" * 12}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))

    def drawn(golden):
        lines = [{**line, "group": "train"} for line in stage.train]
        lines += [{"step": step, "ce": value, "group": "held-out"} for step, value in golden]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return paths(report(tmp_path))

    found = drawn([(line["step"], line["ce"]) for line in stage.held_out])
    held_out, early = found["dft golden held out"], found["dft golden law"]
    for (x, y), (at, foretold) in list(zip(held_out, early, strict=True))[:6]:
        assert (at, foretold) == pytest.approx((x, y), abs=0.01)  # the law fits what it was fitted to
    for (x, y), (at, foretold) in list(zip(held_out, early, strict=True))[6:]:
        assert at == pytest.approx(x, abs=0.01)
        assert foretold > y + 5  # further down: the labels are above their law
    mark = found["dft golden parted"]
    assert [x for x, _ in mark] == pytest.approx([held_out[5][0]] * 2, abs=0.01)  # step 60
    assert len(found["dft proxy law"]) == 10
    assert "dft proxy parted" in found
    together = drawn(law(2.0, 0.3))
    assert "dft golden law" in together
    assert not [name for name in together if "parted" in name]
    few = drawn(law(2.0, 0.3)[:3])
    assert not [name for name in few if "law" in name]


def test_early_stop_by_the_labels_ends_a_run_that_learns_the_teachers_faults(tmp_path):
    """KL alone, from a teacher of random weights: it goes on falling while the held-out labels get worse."""
    world = make_world(tmp_path)
    held_out = fake_capture(
        tmp_path / "held-out", tmp_path / "teacher", tmp_path / "images", seed=7, rows=12, shard_size=4
    )
    (tmp_path / "recipe.yaml").write_text(
        "stages:\n- {base: dft, global_batch: 8, max_steps: 24, learning_rate: 3.0e-3, losses: {ce: 0}}\n"
    )
    common = ["train", "--recipe", tmp_path / "recipe.yaml", "--student", world.student]
    common += ["--cache", world.cache, "--image-root", world.image_root, "--eval-cache", held_out]
    common += ["--eval-every", 2, "--save-every", 0, "--log-every", 2, "--tracker", "none"]
    common += ["--device", "cpu", "--workers", 1]
    results, curves = {}, {}
    for name, more in (
        ("whole", []),
        ("loss", ["--early-stop", 2]),
        ("ce", ["--early-stop", 2, "--watch", "ce"]),
    ):
        done = CliRunner().invoke(app, [str(word) for word in [*common, "--out", tmp_path / name, *more]])
        assert done.exit_code == 0, done.output
        (run,) = (tmp_path / name).glob("*-dft")
        results[name] = json.loads((run / "result.json").read_text())
        lines = [line for line in read_metrics(run) if line["group"] == "held-out"]
        curves[name] = {value: [(line["step"], line[value]) for line in lines] for value in ("ce", "loss")}
    losses = [loss for _, loss in curves["whole"]["loss"]]
    assert losses == sorted(losses, reverse=True)
    least = min(curves["whole"]["ce"], key=lambda pair: pair[1])[0]
    assert 2 < least <= 18
    assert (results["loss"]["steps"], results["loss"]["model_step"]) == (24, 24)
    assert (results["ce"]["steps"], results["ce"]["model_step"]) == (least + 4, least)
    assert curves["ce"]["ce"] == curves["whole"]["ce"][: len(curves["ce"]["ce"])]
    assert results["ce"]["evaluation"]["ce"] == dict(curves["whole"]["ce"])[least]
    page = report(tmp_path / "whole")
    assert f"<td class=number>{least}</td>" in page.read_text(encoding="utf-8")
    assert {"dft golden parted", "dft proxy parted"} <= paths(page).keys()
