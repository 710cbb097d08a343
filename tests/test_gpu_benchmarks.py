"""The parts of `make bench-gpu`, tried on a CPU in tiny sizes; and that none of them loses the others."""

import json
import math
import sys

import numpy as np
import pytest

from benchmarks import gpu, gpu_capture, gpu_loss, gpu_step, gpu_targets, loader, roofline
from tests.dense_twins import imitate_wide_products


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a part as its command does; returns what it wrote."""

    def part(module, *options):
        file = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", ["benchmark", *options, "--json", str(file)])
        with np.errstate(all="ignore"):
            module.main()
        return json.loads(file.read_text())

    return part


def test_the_losses(run, monkeypatch, capsys):
    pytest.importorskip("triton", reason="Triton has no package for this system")
    imitate_wide_products(monkeypatch)
    figures = run(gpu_loss, "--device", "cpu", "--samples", "1")
    assert figures["loss, forward and backward"] > 0
    assert figures["loss, kl_share 0.5"] > 0
    assert figures["floor, bf16 out, in one"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("ok    kernel") for line in lines) == 8
    assert sum(line[6:11] == "loss " for line in lines) == 3  # at these sizes chance decides on their errors


def test_the_targets_of_a_batch(run):
    figures = run(gpu_targets, "--device", "cpu", "--small", "--images", "2")
    assert figures["failed"] == []
    assert figures["ms"]["top-k"]["top-k, ms a sample"] > 0


def test_the_steps(run):
    steps = run(gpu_step, "--device", "cpu", "--repeats", "1")["steps"]
    assert steps["SFT"]["over_sft"] == 1
    assert all(row["ms_per_sample"] > 0 for row in steps.values())
    assert "DFT with a live teacher" in steps


@pytest.mark.slow
def test_the_captures(run):
    figures = run(gpu_capture, "--device", "cpu", "--rows", "9")
    assert len(figures["builds"]) == 3
    assert all(build["wall_over_plain"] > 0 for build in figures["builds"].values())


@pytest.mark.slow
def test_the_loader(run):
    figures = run(loader, "--samples", "16", "--seconds", "0.001")
    assert figures["reach"]["data_wait"] == 0.02
    assert figures["rank 24, stored"] == 10
    assert figures["full rank, stored"] == 729


def test_a_part_that_fails_loses_neither_the_others_nor_its_own_figures(monkeypatch, tmp_path):
    program = "import json, sys; json.dump(dict(ms=1), open(sys.argv[-1], 'w')); sys.exit(%d)"
    for name, code in (("good", 0), ("bad", 3)):
        (tmp_path / f"part_{name}.py").write_text(program % code)
    (tmp_path / "part_slow.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "PARTS", {name: [f"part_{name}"] for name in ("bad", "slow", "good")})
    monkeypatch.setattr(gpu, "SECONDS", 2)
    (tmp_path / "slow.json").write_text("stale")
    results, failed = gpu.run(["bad", "slow", "good"], {}, tmp_path)
    assert results == {"bad": {"ms": 1}, "good": {"ms": 1}}
    assert failed == ["bad", "slow"]


def test_what_is_foretold_stands_beside_what_was_measured():
    names = list(gpu.FORETOLD)
    assert set(names) <= set(roofline.STEPS)
    results = {
        "loss": {"loss, forward and backward": 30.0},
        "step": {"steps": {"SFT": {"ms_per_sample": 13.0}}},
        "roofline": [{"name": "loss, DFT", "ms": 28.0}, {"name": "step, SFT", "ms": 206.0}],
    }
    assert gpu.beside(results) == [("loss, DFT", 30.0, 28.0), ("step, SFT", 13.0 * 16, 206.0)]
    assert gpu.beside({}) == []
    assert not any(math.isnan(times) for _, _, times in gpu.FORETOLD.values())
