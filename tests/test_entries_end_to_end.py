"""Rules per kind from the command to the student: build, verify, compare, select, export, inspect, train."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cache_schema import TargetSpec, open_cache
from cache_schema.operations.divergence import kl
from cache_schema.progress import Silent
from cli import app
from pipeline.capture import BuildConfig, build
from pipeline.entry_rules import cut
from student.stages import DFT
from student.train import train
from tests.test_student_train import losses_of, settings
from tests.tiny_models import tiny_dataset, tiny_llava

TARGETS = ("response", "visual", "relation", "prompt")
ALL = 340  # tokens of the teacher's tokenizer
KINDS = ("response", "visual", "prompt")


def command(*arguments: str | Path) -> Any:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A teacher, its data, and caches of it: every entry of a position, and rules per kind."""
    folder = tmp_path_factory.mktemp("world")
    teacher = tiny_llava(folder / "teacher", seed=1)
    data = tiny_dataset(folder / "data", rows=12)
    full = TargetSpec(targets=TARGETS, top_k=ALL, precision="full", temperatures=(1.0, 2.0))
    config = BuildConfig(
        teacher=teacher,
        data=data.data,
        image_root=data.image_root,
        out=str(folder / "full"),
        spec=full,
        shard_size=5,
    )
    build(config, Silent())
    build(
        replace(
            config,
            out=str(folder / "exact"),
            spec=replace(full, entries={"response": 0.004, "visual": 0.01}, top_k=9),
        ),
        Silent(),
    )
    told = command(
        *("build", "--teacher", teacher, "--data", data.data, "--image-root", data.image_root),
        *("--out", folder / "rules", "--targets", "response,visual,relation,prompt", "--shard-size", "5"),
        *("--entries", "response:p>=0.004,visual:p>=0.01", "--max-entries", "60", "--top-k", "prompt=7"),
        *("--temperatures", "1,2", "--tail-samples", "3"),
    )
    assert told["captured"] == 12
    student = tiny_llava(folder / "student", seed=2)
    return SimpleNamespace(
        folder=folder, image_root=data.image_root, student=student, cache=folder / "rules", config=config
    )


def by_row(cache: Any) -> dict[int, Any]:
    return {sample.row: sample for sample in (cache[i] for i in range(len(cache)))}


def test_the_records_are_those_of_a_full_capture_by_the_rules(world: SimpleNamespace) -> None:
    full, exact, rules = (by_row(open_cache(world.folder / name)) for name in ("full", "exact", "rules"))
    spec, coarse = open_cache(world.folder / "exact").spec, open_cache(world.cache).spec
    assert coarse.rule("prompt").most == 7
    lengths = set()
    for row, sample in full.items():
        for kind in KINDS:
            whole = sample.records[kind]
            if whole is None:
                continue
            expected, found = cut(whole, spec.rule(kind)), exact[row].records[kind]
            assert (found.counts is None) == (kind == "prompt")
            np.testing.assert_array_equal(found.there, expected.there)
            np.testing.assert_array_equal(found.token_ids, expected.token_ids)
            np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
            np.testing.assert_allclose(found.tail_logprob, expected.tail_logprob, rtol=1e-4, atol=1e-5)
            for name in ("logsumexp", "entropy", "label_logprob"):
                if (values := getattr(whole, name)) is not None:
                    np.testing.assert_allclose(getattr(found, name), values, atol=1e-5)
            stored = rules[row].records[kind]
            lengths |= set(stored.there.sum(axis=1).tolist())
            assert (kl(cut(whole, coarse.rule(kind)), stored) < 1e-3).all()
    assert len(lengths) > 5, "positions differ in their entries"


def test_rules_are_a_part_of_the_identity(world: SimpleNamespace) -> None:
    again = command(
        *("build", "--teacher", world.config.teacher, "--data", world.config.data),
        *("--image-root", world.image_root, "--out", world.cache, "--shard-size", "5"),
        *("--targets", "response,visual,relation,prompt", "--max-entries", "60", "--top-k", "prompt=7"),
        *("--entries", "visual:p>=1e-2,response:p>=4e-3", "--temperatures", "1,2", "--tail-samples", "3"),
    )
    assert again["already_done"]
    done = CliRunner().invoke(
        app,
        [
            *("build", "--teacher", str(world.config.teacher), "--data", str(world.config.data)),
            *("--image-root", str(world.image_root), "--out", str(world.cache), "--shard-size", "5"),
            *("--targets", "response,visual,relation,prompt", "--entries", "p>=0.004"),
        ],
    )
    assert done.exit_code == 1
    assert "spec.entries.visual: here 0.004, in the cache 0.01" in str(done.exception)


def test_finished_caches_of_rules_can_be_worked_with(world: SimpleNamespace, tmp_path: Path) -> None:
    assert command("verify", world.cache)["problems"] == []
    summary = command("inspect", world.cache)
    assert summary["spec"]["entries"] == {"response": 0.004, "visual": 0.01}
    assert 1 < summary["positions"]["visual"]["mean_entries"] < 60
    page = CliRunner().invoke(app, ["inspect", str(world.cache)])
    assert "response p >= 0.004, at most 60" in " ".join(page.output.replace("│", " ").split())
    shown = CliRunner().invoke(app, ["inspect", str(world.cache), "--sample", "0"])
    assert shown.exit_code == 0, shown.output

    command("select", world.cache, "--where", "row < 5", "--out", tmp_path / "few")
    command("select", world.cache, "--where", "row >= 5", "--out", tmp_path / "rest")
    command("merge", tmp_path / "few", tmp_path / "rest", "--out", tmp_path / "both")
    for name in ("few", "rest", "both"):
        assert command("verify", tmp_path / name)["problems"] == []
    rules = by_row(open_cache(world.cache))
    for row, sample in by_row(open_cache(tmp_path / "few")).items():
        for kind in KINDS:
            if sample.records[kind] is not None:
                for name in ("token_ids", "logprobs", "label_logprob", "counts", "tail_logprob"):
                    ours, theirs = (getattr(s.records[kind], name) for s in (sample, rules[row]))
                    np.testing.assert_array_equal(ours, theirs)

    command("to-arrow", world.cache, "--out", tmp_path / "arrow")
    for file in (tmp_path / "arrow/data").iterdir():
        for row in pq.read_table(file).to_pylist():
            record = rules[row["row"]].response
            assert [len(ids) for ids in row["response_token_ids"]] == record.there.sum(axis=1).tolist()
            assert row["response_token_ids"][0] == record.token_ids[0][record.there[0]].tolist()


@pytest.mark.parametrize("tail", ["bucket", "sampled"])
def test_a_student_trains_from_rules(world: SimpleNamespace, tmp_path: Path, tail: str) -> None:
    stage = replace(DFT, losses=replace(DFT.losses, prompt=0.3, tail=tail))
    train(
        settings(
            world,
            tmp_path / "run",
            stage,
            max_steps=8,
            learning_rate=3e-3,
            eval_cache=str(world.cache),
            eval_every=4,
        ),
        Silent(),
    )
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < losses[0]
