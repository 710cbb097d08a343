"""The ablations: their statistics, their mosaics, and the whole study on tiny settings."""

import gzip
import json
import math
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from ablations import mosaics
from ablations.arms import DISTILLED, PLAIN, SEARCHED_AS, SOURCES, STAGES, Budget
from ablations.measure import Answers
from ablations.mosaics import CELLS, ITEMS, NUMBERS, draw_mosaics, load_items, question_kind
from ablations.page import BEGIN, END, write_page
from ablations.statistics import half_interval, paired, spread
from ablations.study import SEARCH_SEED, Study, StudySettings, run_study
from cache_schema.errors import KdcacheError
from cache_schema.progress import Silent


def write_items(folder, count):
    """Files as Debian's, with as many images of noise in the training as in the test split."""
    rng = np.random.default_rng(0)
    for name in ("train", "t10k"):
        pixels = rng.integers(0, 256, (count, 28, 28), np.uint8).tobytes()
        labels = (np.arange(count) % len(ITEMS)).astype(np.uint8).tobytes()
        head = struct.pack(">4i", 2051, count, 28, 28), struct.pack(">2i", 2049, count)
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head[0] + pixels))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head[1] + labels))
    return folder


@pytest.mark.parametrize(
    ("gaps", "p"),
    # t = mean / (s / sqrt n); p of Student's table: t(4) = 2.776 at 0.05, t(1) = 12.706 at 0.05
    [([1.0, 2.0, 3.0, 4.0, 5.0], 0.0132), ([1.0, -1.0, 1.0, -1.0], 1.0), ([0.1, 0.3], 0.2952)],
)
def test_the_paired_test_gives_the_values_of_students_table(gaps, p):
    found = paired([10 + gap for gap in gaps], [10.0] * len(gaps))
    assert found.p == pytest.approx(p, abs=2e-4)
    assert found.difference == pytest.approx(sum(gaps) / len(gaps))
    assert found.n == len(gaps)


def test_intervals_follow_students_table():
    assert half_interval([1, 2, 3, 4, 5]) == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-4)
    assert math.isnan(half_interval([1.0]))
    assert spread([2.0]) == (2.0, 0.0)


def test_calibration_and_agreement_of_known_answers():
    answers = Answers(
        kinds=np.array(["a", "a", "a", "b"]),
        right=np.array([True, False, True, True]),
        confidence=np.array([0.95, 0.95, 0.55, 1.0], np.float32),
        first=np.array([1, 2, 3, 4]),
    )
    assert answers.accuracy() == {"a": pytest.approx(2 / 3), "b": 1.0, "mean": pytest.approx(5 / 6)}
    # bins: {0.95, 0.95, 1.0} right in 2 of 3 at 0.9667 on average; {0.55} right at 0.55
    expected = 3 / 4 * abs(2 / 3 - 2.9 / 3) + 1 / 4 * 0.45
    assert answers.calibration_error() == pytest.approx(expected, abs=1e-6)
    other = replace(answers, first=np.array([1, 2, 9, 4]))
    assert answers.agreement(other) == pytest.approx((2 / 3 + 1) / 2)


def test_the_answers_about_a_mosaic_are_those_of_its_cells(tmp_path):
    items = load_items("train", write_items(tmp_path, 200))
    drawn = draw_mosaics(items, 60, "x")
    assert drawn == draw_mosaics(items, 60, "x") != draw_mosaics(items, 60, "y")
    said = set()
    for mosaic in drawn:
        assert [items.labels[number] for number in mosaic.photographs] == list(mosaic.labels)
        names = dict(zip(CELLS, (ITEMS[label] for label in mosaic.labels), strict=True))
        assert mosaic.captions[0] == "{} {} above {} {}".format(*names.values())
        for question, answer in mosaic.questions:
            kind = question_kind(question)
            words = question.rstrip("?")
            if kind == "where":
                expected = names[words.removeprefix("what is ")]
            elif kind == "count":
                item = words.removeprefix("how many items are a ")
                expected = NUMBERS[list(names.values()).count(item)]
            elif kind == "present":
                expected = "yes" if words.removeprefix("is there a ") in names.values() else "no"
            else:
                a, b = words.removeprefix("are ").removesuffix(" the same").split(" and ")
                expected = "same" if names[a] == names[b] else "different"
            assert answer == expected, question
            said.add((kind, answer))
        pixels = mosaic.pixels(items)
        assert pixels.shape == (64, 64, 3)
        assert (pixels[34:62, 2:30, 0] == items.pixels[mosaic.photographs[2]]).all()
    assert {("present", "yes"), ("present", "no"), ("same", "same"), ("same", "different")} <= said
    with pytest.raises(ValueError, match="no question about a mosaic"):
        question_kind("who is it?")


def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(KdcacheError, match="apt-get install dataset-fashion-mnist"):
        load_items("train", tmp_path)


def test_all_arms_have_equal_steps_and_data():
    budget = Budget(images=64, fewer=())
    for arm in (*STAGES, *SEARCHED_AS):
        stages = arm.stages(budget, 0.5)
        assert stages[0][0] == "captions"
        assert sum(stage.epochs for _, stage in stages[1:]) == budget.tuning_epochs
        assert {stage.global_batch for _, stage in stages} == {budget.batch}
        assert {stage.learning_rate for _, stage in stages[1:]} == {0.5 * budget.tuning_rate}


@pytest.mark.slow
def test_a_tiny_study_is_made_once_and_its_page_written(tmp_path, monkeypatch):
    tiny = Budget(images=16, fewer=(8,), alignment_epochs=1, tuning_epochs=1, factors=(1.0,))
    settings = StudySettings(
        budgets={"easy-vqa": tiny, "mosaics": tiny},
        seeds=2,
        text_steps=1,
        validation=4,
        test=6,
        teacher={
            "tower_steps": 3,
            "mosaics": 40,
            "text_steps": 3,
            "caption_steps": 2,
            "question_steps": (2, 2),
        },
    )
    if not mosaics.FOLDER.exists():
        pytest.fail("apt-get install dataset-fashion-mnist")
    study = Study(tmp_path / "out", settings)
    run_study(study, 2, Silent())
    assert all(not batch for batch in study.missing())
    files = sorted((tmp_path / "out").rglob("seed-*.json"))
    written = {path: path.stat().st_mtime_ns for path in files}
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text(f"# Kept\n\n{BEGIN}\nstale words\n{END}\n\nkept too\n")
    write_page(study, page)
    text = page.read_text()
    assert text.startswith("# Kept\n")
    assert text.endswith("kept too\n")
    assert "stale words" not in text
    for arm in (*STAGES, *SEARCHED_AS):
        assert f"| {arm.name} | 2 |" in text
    assert "| 8 images | 2 |" in text
    assert all((page.parent / "charts" / f"{name}.svg").stat().st_size for name in ("accuracy", "curves"))
    files[0].unlink()
    run_study(study, 1, Silent())
    assert [path for path in files if path.stat().st_mtime_ns != written[path]] == files[:1]
    found = study.results("mosaics", DISTILLED)[0]
    assert found["curve"][-1][0] == 16
    assert 0 <= found["calibration"] <= 1
    assert study.place("mosaics", PLAIN).result(SEARCH_SEED, 1.0)["seed"] == SEARCH_SEED
    with pytest.raises(KdcacheError, match=r"another study|other settings \(seeds\)"):
        run_study(Study(tmp_path / "out", replace(settings, seeds=3)), 1, Silent())
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["seeds"] == 2


def test_a_live_teacher_gives_the_loss_of_a_full_cache(tmp_path):
    from ablations.arm_run import Bench, Job, run_arm
    from ablations.question_sets import Sizes, open_set, prepare

    torch.set_num_threads(1)
    budget = Budget(images=8, fewer=(), alignment_epochs=1, tuning_epochs=1)
    sizes = Sizes(validation=2, test=3)
    found = open_set("easy-vqa", tmp_path / "easy", budget, sizes)
    prepare(found, sizes, ("compact", "full"), Silent())
    bench = Bench(found, text_steps=2)
    live, full = (run_arm(bench, Job(arm=arm, seed=0, factor=1.0)) for arm in SOURCES[DISTILLED][:2])
    assert live["steps"] == full["steps"] == 2
    assert live["calibration"] == pytest.approx(full["calibration"], abs=1e-4)
    assert bench.of_teacher["test"].accuracy()["mean"] > 0.9
