"""`kdcache plan` from end to end: its figures against the models' own logits and a real build."""

import json
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from cache_schema import open_cache
from cache_schema.datasets.json_rows import JsonSource
from cache_schema.errors import KdcacheError
from cache_schema.format.spec import TargetSpec
from cache_schema.operations.summary import summarise
from cache_schema.progress import Silent
from models.pixels import look_up
from pipeline.capture import build
from pipeline.forecast.advice import ForecastConfig, forecast
from pipeline.forecast.choice import build_arguments, write_command
from pipeline.job import open_job
from pipeline.settings import BuildConfig
from tests.test_cli import run
from tests.test_forecast_measures import dense_agreement
from tests.tiny_models import TinyDataset, tiny_dataset, tiny_llava, tiny_rows, write_png

ROOT = Path(__file__).resolve().parent.parent
ROWS = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A teacher, a student of the same tokens with another width, and a dataset; names with blanks."""
    folder = tmp_path_factory.mktemp("a world")
    data = tiny_dataset(folder / "the data", rows=ROWS)
    return SimpleNamespace(
        folder=folder,
        teacher=tiny_llava(folder / "the teacher", words=340),
        student=tiny_llava(folder / "student", words=340, hidden=16, seed=9),
        data=data.data,
        images=data.image_root,
    )


def config_of(world: SimpleNamespace, **rest: Any) -> ForecastConfig:
    named = {name: rest.pop(name) for name in tuple(rest) if name in BuildConfig.__dataclass_fields__}
    build = BuildConfig(
        **{
            "teacher": world.teacher,
            "data": world.data,
            "image_root": world.images,
            "out": str(world.folder / "the cache"),
            "dtype": "float32",
            "device": "cpu",
            "shard_size": 16,
            **named,
        }
    )
    grid: dict[str, Any] = {"samples": ROWS, "top_ks": (4, 16, 64), "least": (0.02,)}
    grid["relations"] = (1e-2, 1e-4, "exact")
    return ForecastConfig(build=build, **{**grid, **rest})


def forecast_words(world: SimpleNamespace, *more: Any) -> list[Any]:
    return [
        *("plan", "--teacher", world.teacher, "--data", world.data, "--image-root", world.images),
        *("--out", world.folder / "the cache", "--dtype", "float32", "--device", "cpu", "--shard-size", 16),
        *("--samples", ROWS, "--top-k", "4,16,64", "--entries", "0.02", "--relation", "1e-2,1e-4", *more),
    ]


@pytest.fixture(scope="module")
def answer(world: SimpleNamespace) -> dict[str, Any]:
    """The forecast of the world with its student, every row and every position of it measured."""
    targets = TargetSpec(targets=("response", "visual", "relation", "prompt"))
    return forecast(config_of(world, student=world.student, positions=100_000, spec=targets), Silent())


def own_logits(folder: Path, job: Any) -> dict[int, Tensor]:
    """Row -> (T, V) log-probabilities in float64, of the model as transformers runs it on one row."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for row in range(ROWS):
        sample = job.preparer.prepare(job.dataset[row])
        inputs = {
            "input_ids": torch.from_numpy(sample.input_ids.astype(np.int64))[None],
            **{name: look_up(levels, sample.pixel_table) for name, levels in sample.pixel_inputs.items()},
        }
        with torch.no_grad():
            logits = model(**inputs).logits[0, :, : job.vocab_size]
        found[row] = logits.double().log_softmax(dim=1)
    return found


def test_mass_kl_and_angles_are_those_of_the_models_own_logits(
    world: SimpleNamespace, answer: dict[str, Any]
) -> None:
    job = open_job(config_of(world).build, Silent())
    teacher, student = own_logits(world.teacher, job), own_logits(world.student, job)
    places: dict[str, list[tuple[int, int]]] = {"response": [], "visual": [], "prompt": []}
    seen: set[str] = set()
    for row in job.plan.order.tolist():
        sample = job.preparer.prepare(job.dataset[row])
        answers = {t - 1 for start, end in sample.label_spans for t in range(max(start, 1), end)}
        images = {int(t) for image in sample.images for t in image.positions}
        places["response"] += [(row, t) for t in sorted(answers)]
        if not {image.sha256 for image in sample.images} <= seen:  # it is stored once, so it counts once
            places["visual"] += [(row, t) for t in sorted(images)]
        seen |= {image.sha256 for image in sample.images}
        places["prompt"] += [(row, t) for t in range(len(sample)) if t not in answers | images]
    for kind, where in places.items():
        log_p, log_q = (torch.stack([own[row][t] for row, t in where]) for own in (teacher, student))
        assert answer["samples"]["positions"][kind] == len(where)
        mean_kl = float((log_p.exp() * (log_p - log_q)).sum() / len(where))
        assert answer["student"]["kl"][kind] == pytest.approx(mean_kl, rel=1e-4)
        rows = [row for row in answer["positions"] if row["target"] == kind]
        assert [(row["rule"], row["precision"]) for row in rows] == [
            (rule, precision) for rule in ("4", "16", "64", "p>=0.02") for precision in ("compact", "full")
        ]
        for row in rows:
            fixed = row["rule"].isdecimal()
            values, ids = log_p.topk(int(row["rule"]) if fixed else 50, dim=1)
            counts = torch.full_like(ids[:, 0], len(ids[0]))
            if not fixed:
                counts = (values.exp() >= 0.02).sum(dim=1).clamp(min=1)
                values = values.masked_fill(torch.arange(50) >= counts[:, None], -torch.inf)
            assert row["entries"] == pytest.approx(float(counts.double().mean()), rel=1e-6)
            assert row["mass"] == pytest.approx(float(values.exp().sum(dim=1).mean()), abs=1e-5)
            if row["precision"] == "full":
                outside = torch.zeros_like(log_p).scatter_add_(1, ids, values.exp()) == 0
                tail = log_p.masked_fill(~outside, -torch.inf).logsumexp(dim=1)
                record = SimpleNamespace(
                    token_ids=ids.numpy(),
                    logprobs=values.numpy(),
                    tail_logprob=tail.numpy()[:, None],
                    counts=counts.numpy(),
                )
                wanted = dense_agreement(log_p, log_q, record)  # type: ignore[arg-type]
                assert row["angle"] == pytest.approx(wanted.angle, abs=0.01)
                assert row["unseen_kl"] == pytest.approx(wanted.unseen_kl, rel=1e-3)
                assert row["kl"] == pytest.approx(0.0, abs=1e-12)
            else:
                assert 0.0 < row["kl"] < 1e-4


def test_relations_lose_what_their_bound_allows(answer: dict[str, Any]) -> None:
    assert answer["samples"]["compared_images"] > 10
    for row in answer["relations"]:
        if row["relation"] != "exact":
            assert row["residual_max"] <= row["relation"] * 1.001
    angles = {(row["relation"], row["precision"]): row["angle"] for row in answer["relations"]}
    assert angles[1e-2, "compact"] > 3 * angles[1e-4, "compact"] > 0
    assert angles["exact", "full"] < 0.05


@pytest.mark.parametrize("precision", ["compact", "full"])
def test_a_build_with_the_recommended_flags_writes_what_was_foretold(
    world: SimpleNamespace, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = forecast_words(world, "--precision", precision, "--max-angle", "5,relation=20", "--json")
    code, out, err = run(*words, capsys=capsys)
    assert code == 0, err
    told = json.loads(out)
    command = shlex.split(told["command"])
    assert command[1:] == told["arguments"]
    assert command[0] == "kdcache"
    at = command.index("--out") + 1
    command[at] = str(tmp_path / "cache")
    code, out, err = run(*command[1:], "--json", capsys=capsys)
    assert code == 0, err
    cache = open_cache(str(tmp_path / "cache"))
    spec, best = cache.spec, told["recommended"]
    assert {kind: spec.rule(kind).name for kind in ("response", "visual")} == best["rules"]
    assert (spec.precision, spec.relation_bound) == (precision, best["relation"])
    real = summarise(cache)
    assert told["dataset"]["stored_images"] == real["counts"]["relations"]
    assert told["dataset"]["positions"]["visual"] == real["counts"]["visual_positions"]
    assert told["dataset"]["positions"]["response"] == real["counts"]["response_positions"]
    assert told["dataset"]["tokens"] == real["counts"]["tokens"]
    for part, size in best["bytes"].items():
        written = real["bytes"]["by_part"][part]
        if part == "samples":  # the forecast counts what else a shard has with its table
            written += real["bytes"]["by_part"]["quarantine"]
        assert size == pytest.approx(written, rel=0.04, abs=600), part
    assert best["total_bytes"] == pytest.approx(real["bytes"]["total"], rel=0.03)


def test_hidden_states_are_foretold_and_not_chosen(
    world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = forecast_words(world, "--targets", "response,visual,hidden", "--positions", 100_000)
    code, out, err = run(*words, "--json", capsys=capsys)
    assert code == 0, err
    told = json.loads(out)
    command = shlex.split(told["command"])
    command[command.index("--out") + 1] = str(tmp_path / "cache")
    code, out, err = run(*command[1:], "--json", capsys=capsys)
    assert code == 0, err
    cache = open_cache(str(tmp_path / "cache"))
    assert cache.spec.hidden == ("response", "visual")
    real, best = summarise(cache)["bytes"], told["recommended"]
    assert best["bytes"].keys() == real["by_part"].keys() - {"quarantine", "other"}
    for row in told["hidden"]:
        part = f"hidden_{row['target']}"
        few_tables = 6 * 8 * row["channels"]  # of channels, one a batch, of which small windows make more
        assert best["bytes"][part] == pytest.approx(real["by_part"][part], rel=0.01, abs=few_tables)
        assert row["dataset_bytes"] == best["bytes"][part]
        assert row["bytes"] == pytest.approx(real["per_position"][part], rel=0.05)
        states = np.concatenate([s.hidden[row["target"]] for s in cache if row["target"] in s.hidden])
        assert row["channels"] == states.shape[1]
        assert 0.0 < row["kl"] < 1e-3
    assert best["bytes"]["head"] == pytest.approx(real["by_part"]["head"], abs=200)
    assert best["total_bytes"] == pytest.approx(real["total"], rel=0.03)
    assert "hidden" not in best["max_angle"]


def test_a_few_rows_stand_for_all(world: SimpleNamespace) -> None:
    whole = forecast(config_of(world, top_ks=(16,), relations=(1e-4,)), Silent())
    part = forecast(config_of(world, top_ks=(16,), relations=(1e-4,), samples=12, seed=1), Silent())
    assert part["samples"]["drawn"] == 12
    off = part["recommended"]["total_bytes"] - whole["recommended"]["total_bytes"]
    assert abs(off) < max(
        4 * part["recommended"]["standard_error_bytes"], 0.02 * whole["recommended"]["total_bytes"]
    )
    assert part["recommended"]["standard_error_bytes"] > 0
    again = forecast(config_of(world, top_ks=(16,), relations=(1e-4,), samples=12, seed=1), Silent())
    for document in (part, again):
        for timed in ("speed", "break_even"):
            del document[timed]
        del document["recommended"]["capture_seconds"]
    assert part == again


def test_the_document_is_json_of_a_known_shape(answer: dict[str, Any]) -> None:
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    assert set(answer) == {
        *("samples", "teacher", "student", "positions", "relations", "hidden", "dataset", "speed"),
        *("recommended", "break_even", "arguments", "command"),
    }
    assert set(answer["positions"][0]) == {
        *("target", "rule", "entries", "precision", "mass", "bytes", "kl", "kl_max", "unseen_kl", "angle"),
        "dataset_bytes",
    }
    assert set(answer["relations"][0]) == {
        *("relation", "precision", "rank", "residual", "residual_max", "bytes", "angle", "dataset_bytes"),
    }
    model = AutoModelForImageTextToText.from_pretrained(answer["teacher"]["teacher"])
    assert answer["break_even"]["teacher_bytes"] == sum(p.nbytes for p in model.parameters())
    assert answer["student"]["kind"] == "given"


def test_the_page_fits_a_narrow_terminal_and_ends_with_the_command(
    world: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    script, picture = tmp_path / "build.sh", tmp_path / "curves.png"
    code, out, err = run(*forecast_words(world, "--write", script, "--plot", picture), capsys=capsys)
    assert code == 0, err
    *page, command = out.rstrip("\n").split("\n")
    assert all(len(line) <= 80 for line in page)
    assert "…" not in out
    assert "recommended: top" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "kdcache").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "kdcache").chmod(0o755)
    done = subprocess.run(
        [str(script), "--json"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [*shlex.split(command)[1:], "--json"]


def test_a_command_is_saved_one_argument_a_line(tmp_path: Path) -> None:
    words = ["build", "--data", "a b'c.json"]
    write_command(tmp_path / "arguments.txt", words)
    assert (tmp_path / "arguments.txt").read_text().splitlines() == words
    with pytest.raises(KdcacheError, match=r"line break"):
        write_command(tmp_path / "arguments.txt", ["a\nb"])
    with pytest.raises(KdcacheError, match=r"cannot write .*nowhere"):
        write_command(tmp_path / "nowhere" / "build.sh", words)


def test_every_setting_of_a_build_has_its_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = BuildConfig(
        teacher=tmp_path / "no teacher",
        data=tmp_path / "d.json",
        image_root=tmp_path,
        out="c",
        spec=TargetSpec(
            targets=("response", "visual"),
            temperatures=(1.0, 2.0),
            relation="exact",
            seed=3,
            tail_samples=4,
            sample_temperature=2.0,
            embed_images=True,
        ),
        compile=True,
        template="plain",
        dtype="bfloat16",
        device="cpu",
        device_map="auto",
        quantization="8bit",
        batch_tokens=100,
        shard_size=7,
        max_length=99,
        over_long="cut",
        limit=5,
        max_bad=0.5,
        rank=0,
        world_size=2,
    )
    words = build_arguments(config)
    for flag in (
        "temperatures",
        "seed",
        "tail-samples",
        "sample-temperature",
        "embed-images",
        "compile",
        "template",
        "device-map",
        "quantization",
        "over-long",
        "limit",
        "max-bad",
        "world-size",
    ):
        assert f"--{flag}" in words
    assert "--relation" not in words  # it is not among the targets
    words = build_arguments(replace(config, quantization=None))  # which needs a package of its own
    code, _, err = run(*words, capsys=capsys)
    assert code == 1, err  # every flag was understood, and only then was the teacher looked for
    assert "no teacher does not exist" in err


def test_bad_rows_are_counted_and_not_fatal(world: SimpleNamespace, tmp_path: Path) -> None:
    rows = tiny_rows(12)
    for row in rows[:4]:
        row["image"] = "nowhere.png"
    rows[4] = {"id": "odd", "conversations": []}
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    found = forecast(config_of(world, data=data, samples=12), Silent())
    assert found["samples"]["measured"] == 7
    assert found["samples"]["bad"] == {"missing_image": 4, "no_turns": 1}
    assert found["samples"]["example_of_bad"].startswith("row ")
    assert found["dataset"]["rows_captured"] == 7


def test_a_dataset_of_which_nothing_can_be_captured_is_an_error(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    rows = tiny_rows(200, images=ROWS // 2)  # the first has an image, and is what the teacher is probed with
    for row in rows[1:]:
        row.pop("image", None)
        row["conversations"] = []
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    order = open_job(config_of(world, data=data).build, Silent()).plan.order
    seed = next(
        s
        for s in range(99)
        if 0 not in order[np.random.Generator(np.random.Philox(s)).choice(200, 5, replace=False)]
    )
    with pytest.raises(KdcacheError, match=r"none of 5 rows drawn can be captured \(no_turns 5\)"):
        forecast(config_of(world, data=data, samples=5, seed=seed), Silent())


def test_text_alone_needs_no_image(world: SimpleNamespace, tmp_path: Path) -> None:
    rows = [row for row in tiny_rows(30) if "image" not in row]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    found = forecast(config_of(world, data=data, image_root=tmp_path / "none"), Silent())
    assert {row["target"] for row in found["positions"]} == {"response"}
    assert found["relations"] == []
    assert found["recommended"]["relation"] is None
    assert found["dataset"]["rows_text_only"] == len(rows)


def test_targets_that_no_sample_has_are_an_error(world: SimpleNamespace, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([row for row in tiny_rows(30) if "image" not in row]))
    spec = TargetSpec(targets=("visual", "relation"))
    with pytest.raises(KdcacheError, match=r"none of the 4 samples .* has visual or relation targets"):
        forecast(config_of(world, data=data, image_root=tmp_path, spec=spec, samples=4), Silent())


def test_relations_alone(world: SimpleNamespace) -> None:
    found = forecast(config_of(world, spec=TargetSpec(targets=("relation",)), samples=6), Silent())
    assert found["positions"] == []
    assert found["recommended"]["rules"] == {}
    assert "--relation-bound" in found["arguments"]


def test_rows_with_several_images(world: SimpleNamespace, tmp_path: Path) -> None:
    rows = []
    for number in range(6):
        for name in (f"first-{number // 2}.png", f"second-{number}.png"):
            write_png(tmp_path / name, seed=len(name) * 100 + number // 2 if "first" in name else number)
        turns = [
            {"from": "human", "value": "<image>\nand <image>\nWhat is it?"},
            {"from": "gpt", "value": "The shape is red."},
        ]
        images = [f"first-{number // 2}.png", f"second-{number}.png"]
        rows.append({"id": number, "image": images, "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    config = config_of(
        world, data=tmp_path / "data.json", image_root=tmp_path, out=str(tmp_path / "cache"), top_ks=(4,)
    )
    found = forecast(config, Silent())
    build(config.build, Silent())
    real = summarise(open_cache(str(tmp_path / "cache")))["counts"]
    assert found["dataset"]["images"] == real["images"] == 12
    assert found["dataset"]["stored_images"] == real["relations"] == 9
    assert found["dataset"]["positions"]["visual"] == real["visual_positions"]


def test_a_teacher_whose_images_see_what_follows_shares_nothing(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.teachers.prefix_is_independent", lambda engine, sample: False)
    code, out, err = run(*forecast_words(world), capsys=capsys)
    assert code == 0, err
    assert "not shared" in out
    code, out, err = run(*forecast_words(world, "--json"), capsys=capsys)
    found = json.loads(out)["dataset"]
    assert found["stored_images"] == found["images"]
    assert found["computed_tokens"] == found["tokens"]
    assert found["sharing"] == {"allowed": False, "packed": False, "share_of_equal_prefixes": None}


def test_half_precision(world: SimpleNamespace) -> None:
    found = forecast(config_of(world, dtype="bfloat16", samples=8), Silent())
    assert found["teacher"]["engine"]["dtype"] == "bfloat16"
    assert found["student"]["kl"]["response"] == pytest.approx(0.7, rel=0.05)
    assert "--dtype" in found["arguments"]


def test_a_question_before_the_image_is_not_shared(world: SimpleNamespace, tmp_path: Path) -> None:
    write_png(tmp_path / "one.png", seed=1)
    rows = []
    for number in range(6):
        turns = [
            {"from": "human", "value": f"{number} is it?\n<image>"},
            {"from": "gpt", "value": "The shape is red."},
        ]
        rows.append({"id": number, "image": "one.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    data = TinyDataset(data=tmp_path / "data.json", image_root=tmp_path, rows=rows)
    found = forecast(config_of(world, data=data.data, image_root=data.image_root), Silent())
    # The tiny template writes the image before the text, so that only the order of its parts decides.
    shared = found["dataset"]["sharing"]["share_of_equal_prefixes"]
    assert found["dataset"]["distinct_first_images"] == 1
    assert found["dataset"]["stored_images"] == round(1 + (1 - shared) * 5)


def test_rows_are_read_only_where_they_are_drawn(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps(tiny_rows(500, images=ROWS // 2)))
    reads: list[int] = []
    read = JsonSource.read

    def counted(self: JsonSource, row: int) -> Any:
        reads.append(row)
        return read(self, row)

    monkeypatch.setattr(JsonSource, "read", counted)
    found = forecast(config_of(world, data=data, samples=5, top_ks=(4,), relations=(1e-2,)), Silent())
    assert found["dataset"]["rows"] == 500
    assert reads[:64] == list(range(64))  # whether the file is one of pairs
    assert len(reads) - 64 < 5 * 3 + 5  # the sample, two for the sharing, a few for the probe


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--top-k", "0"), 2, "top_ks must be at least 1"),
        (("--top-k", "3.5"), 2, "not a comma-separated list of whole numbers"),
        (("--top-k", "inf"), 2, "not a comma-separated list of whole numbers"),
        (("--entries", "0"), 2, "least must lie in (0, 1), not 0"),
        (("--top-k", "9000"), 1, "exceeds the teacher's"),
        (("--relation", "2"), 2, "relations must lie in (0, 1), not 2"),
        (("--relation", "tight"), 2, "is not a comma-separated list of numbers"),
        (("--precision", "half"), 2, "precisions must be some of compact, full, not 'half'"),
        (("--samples", "0"), 2, "samples must be at least 1"),
        (("--noise-kl", "0"), 2, "noise_kl must be positive, not 0"),
        (("--max-angle", "0"), 2, "must lie in (0, 180]"),
        (("--max-angle", "5,voice=3"), 2, "is not a number for all targets"),
        (("--targets", "sound"), 2, "targets must be some of"),
        (("--student", "nowhere"), 1, "nowhere does not exist"),
        (("--data", "nowhere.json"), 1, "nowhere.json does not exist"),
        (("--plot", "curves.tiff9"), 2, "curves.tiff9 is not a .png"),
        (("--write", "no/such/folder/build.sh"), 2, "folder no/such/folder does not exist"),
        (("--write", "."), 1, "cannot write ."),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    world: SimpleNamespace, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, said: str
) -> None:
    found, out, err = run(*forecast_words(world, "--samples", 4, *words), capsys=capsys)
    assert found == code, err
    assert said in err
    assert out == ""
    if code == 1:
        assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
        assert "Traceback" not in err


def test_a_student_of_other_tokens_is_refused(world: SimpleNamespace, tmp_path: Path) -> None:
    other = tiny_llava(tmp_path / "other", image_size=16)
    with pytest.raises(KdcacheError, match=r"does not tokenize row \d+ as the teacher does"):
        forecast(config_of(world, student=other), Silent())


def test_an_interrupted_plan_leaves_cleanly(world: SimpleNamespace, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps(tiny_rows(3000, images=ROWS // 2)))
    words = forecast_words(world, "--samples", 3000, "--data", data)
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *map(str, words)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "capturing samples" in line:
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, "".join(said) + err
    assert "Traceback" not in err
    assert out == ""
