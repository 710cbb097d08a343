"""The teacher-hacking watch, on made-up curves and in a report."""

import pytest

from views.hacking import watch
from views.run_curves import StageRun
from views.run_report import final_table

STEPS = range(10, 110, 10)


def law(scale, exponent):
    return [(step, scale * step**-exponent) for step in STEPS]


def test_curves_that_follow_their_laws_go_together():
    found = watch(law(3.0, 0.7), law(2.0, 0.3))
    assert found.proxy == pytest.approx(0.7)
    assert found.golden == pytest.approx(0.3)
    assert found.above == pytest.approx(0.0, abs=1e-9)
    assert found.parted is None


def test_a_golden_curve_that_rises_while_the_proxy_falls_has_parted():
    golden = [(step, value * (1 + 0.01 * max(0, step - 60))) for step, value in law(2.0, 0.3)]
    found = watch(law(3.0, 0.7), golden)
    assert found.parted == 60
    assert found.above == pytest.approx(0.4)
    assert found.golden == pytest.approx(0.3)


def test_both_rising_is_no_hacking_and_few_measurements_are_no_watch():
    up = [(step, 1.0 + 0.1 * abs(step - 50)) for step in STEPS]
    assert watch(up, up).parted is None
    assert watch(law(3.0, 0.7), law(2.0, 0.3)[:3]) is None
    assert watch([], law(2.0, 0.3)) is None


def test_the_report_says_where_they_part():
    golden = [(step, value if step <= 60 else 1.5 * value) for step, value in law(2.0, 0.3)]
    stage = StageRun(
        name="dft",
        train=[{"step": step, "response_kl": value} for step, value in law(3.0, 0.7)],
        held_out=[{"step": step, "ce": value} for step, value in golden],
    )
    rows = dict(final_table([stage]))
    assert rows["training KL and held-out labels part at step"] == ["60"]
    assert rows["early law of the training KL, exponent"] == ["0.700"]
    bare = StageRun(name="sft", train=stage.train[:1], held_out=())
    assert "training KL and held-out labels part at step" not in dict(final_table([bare]))
