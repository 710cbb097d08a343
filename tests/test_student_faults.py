"""What goes wrong around a training run: data, disks, checkpoints, held-out caches, other runs there."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors import SafetensorError
from safetensors.torch import load_file

from cache_schema import KdcacheError, open_cache
from cache_schema.datasets import image_roots
from cache_schema.errors import IdentityMismatch, WrongUsage
from cache_schema.file_cache import FileCacheConfig
from cache_schema.runs import read_metrics
from student.checkpoint import Checkpoints
from student.run_folder import locked
from student.run_state import RunState
from student.train import train
from tests.student_caches import fake_capture, make_world
from tests.student_driver import ROOT
from tests.test_student_train import Said, settings
from tests.tiny_models import tiny_llava


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def model_of(out):
    tensors = load_file(out / "model/model.safetensors")
    return {name: tensor.clone() for name, tensor in tensors.items()}


def equal(one, other):
    first, second = model_of(one), model_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def held_out_lines(out):
    return [line for line in read_metrics(out) if line["group"] == "held-out"]


# ---- the held-out cache ----


def test_a_held_out_cache_is_checked_before_the_first_step(world, tmp_path):
    other = fake_capture(
        tmp_path / "other", tiny_llava(tmp_path / "student", words=330), world.image_root, rows=6
    )
    for name, message in ((other, "tokenizer"), (tmp_path / "none", "none")):
        with pytest.raises(KdcacheError, match=message):
            train(settings(world, tmp_path / "run", eval_cache=str(name)), Said())
        assert not (tmp_path / "run/metrics.jsonl").exists()


def test_with_other_visual_tokens_the_response_terms_are_measured(world, tmp_path):
    cache = fake_capture(tmp_path / "cache", world.student, world.image_root, rows=6, image_tokens=9)
    train(settings(world, tmp_path / "run", eval_cache=str(cache)), Said())
    measured = held_out_lines(tmp_path / "run")[-1]
    assert {"ce", "response_kl", "response_top1", "loss"} <= measured.keys()
    assert not {"visual_kl", "visual_top1", "relation", "prompt_kl"} & measured.keys()


@pytest.mark.parametrize("micro", [3, 8])
def test_the_number_of_held_out_samples_does_not_depend_on_the_micro_batch(world, tmp_path, micro):
    config = settings(world, tmp_path, eval_cache=str(world.cache), eval_samples=10, micro_batch=micro)
    train(config, Said())
    measured, cache = held_out_lines(tmp_path)[-1], open_cache(world.cache)
    assert measured["samples"] == 10
    assert measured["tokens"] == sum(int((cache[i].labels[1:] != -100).sum()) for i in range(10))


def test_another_held_out_cache_forgets_what_was_best(world, tmp_path):
    other = fake_capture(tmp_path / "other", world.student, world.image_root, rows=6)
    config = settings(
        world, tmp_path / "run", save_every=2, eval_cache=str(world.cache), eval_every=1, early_stop=9
    )
    stopping = Said(3, lambda: (_ for _ in ()).throw(KdcacheError("stop")))
    with pytest.raises(KdcacheError, match="stop"):
        train(config, stopping)
    result = train(replace(config, resume=True, eval_cache=str(other)), Said())
    assert result["model_step"] in (3, 4), "steps 1 and 2 were measured on another cache"
    assert result["evaluation"]["samples"] == 6


def test_a_held_out_root_that_vanishes_costs_no_step(world, tmp_path):
    shutil.copytree(world.image_root, tmp_path / "images")
    config = settings(
        world,
        tmp_path / "run",
        save_every=0,
        eval_cache=str(world.cache),
        eval_image_root=tmp_path / "images",
    )
    said = Said(4, lambda: (tmp_path / "images").rename(tmp_path / "away"))
    with pytest.raises(KdcacheError, match=r"cannot be read under .*saved in .*step-00000004.*--resume"):
        train(config, said)
    train(settings(world, tmp_path / "whole"), Said())
    assert equal(tmp_path / "run", tmp_path / "whole"), "the model is there"
    (tmp_path / "away").rename(tmp_path / "images")
    result = train(replace(config, resume=True), Said())
    assert result["evaluation"]["samples"] == 24
    assert len(held_out_lines(tmp_path / "run")) == 1


# ---- one run in a folder ----


class OneRank:
    main = True

    def agree(self, error):
        return error


def test_two_runs_in_one_folder_are_refused(world, tmp_path):
    with (
        locked(tmp_path / "run", OneRank()),
        pytest.raises(KdcacheError, match=r"another process trains in .*run now"),
    ):
        train(settings(world, tmp_path / "run"), Said())
    train(settings(world, tmp_path / "run"), Said())  # a lock that nobody holds any more


# ---- data ----


def test_an_image_that_vanishes_saves_before_it_ends(world, tmp_path):
    shutil.copytree(world.image_root, tmp_path / "images")
    moved = replace(world, image_root=tmp_path / "images")
    config = settings(moved, tmp_path / "run", save_every=100, workers=0, max_steps=5)
    said = Said(2, lambda: (tmp_path / "images/pictures").rename(tmp_path / "away"))
    with pytest.raises(
        KdcacheError, match=r"image pictures/\S+ of the cache \(row \d+\) cannot .*saved in .*step-00000002"
    ):
        train(config, said)
    (tmp_path / "away").rename(tmp_path / "images/pictures")
    train(replace(config, resume=True), Said())
    train(replace(config, out=tmp_path / "whole"), Said())
    assert equal(tmp_path / "run", tmp_path / "whole")


def upload(folder, url):
    for path in folder.rglob("*.png"):
        fsspec.filesystem("memory").pipe_file(f"{url}/{path.relative_to(folder)}", path.read_bytes())


def test_an_image_that_vanishes_from_a_url_saves_before_it_ends(world, tmp_path):
    store = fsspec.filesystem("memory")
    upload(world.image_root, "memory://trained/images")
    files = FileCacheConfig(file_cache=tmp_path / "kept", file_cache_gib=1e-9)  # keeps nothing for long
    moved = replace(world, image_root="memory://trained/images")
    config = settings(moved, tmp_path / "run", save_every=100, workers=0, max_steps=5, files=files)
    said = Said(2, lambda: store.rm("memory://trained/images/pictures", recursive=True))
    told = (
        r"image pictures/\S+ of the cache \(row \d+\) cannot be read under memory://trained/images .*is not "
        r"a file.*saved in .*step-00000002"
    )
    with pytest.raises(KdcacheError, match=told):
        train(config, said)
    upload(world.image_root, "memory://trained/images")
    train(replace(config, resume=True), Said())
    train(settings(world, tmp_path / "whole", workers=0, max_steps=5), Said())
    assert equal(tmp_path / "run", tmp_path / "whole")


def test_a_server_that_stays_away_saves_before_it_ends(world, tmp_path, monkeypatch):
    upload(world.image_root, "memory://away/images")
    files = FileCacheConfig(file_cache=tmp_path / "kept", file_cache_gib=1e-9)
    moved = replace(world, image_root="memory://away/images")
    config = settings(moved, tmp_path / "run", save_every=100, workers=0, max_steps=5, files=files)

    def fails(*_, **__):
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(image_roots.open_root, "__kwdefaults__", {"patience": 0.1})
    said = Said(2, lambda: monkeypatch.setattr(MemoryFileSystem, "cat_file", fails))
    told = r"image pictures/\S+ of the cache \(row \d+\) .*reset by peer.*saved in .*step-00000002"
    with pytest.raises(KdcacheError, match=told):
        train(config, said)


def test_a_cache_that_is_still_being_built_is_named(world, tmp_path):
    shutil.copytree(world.cache, tmp_path / "cache")
    commits = sorted((tmp_path / "cache/commits").iterdir())
    commits[1].unlink()
    said = Said()
    train(settings(world, tmp_path / "run", cache=tmp_path / "cache"), said)
    warning = f"is not complete: 1 of {len(commits)} shards are missing (1)"
    assert sum(warning in line for line in said.lines) == 1


# ---- the disk ----


def test_a_full_disk_at_the_end_keeps_the_weights(world, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    config = settings(world, tmp_path / "run", save_every=0)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        with pytest.raises(
            KdcacheError, match=r"cannot be written: .*No space left.*the weights are in .*step-00000004"
        ):
            train(config, Said())
        assert {path.name for path in (tmp_path / "run").iterdir()} == {
            "recipe.yaml",
            "metrics.jsonl",
            "checkpoints",
        }
        patch.setattr("student.checkpoint.save_file", full)
        with pytest.raises(KdcacheError, match=r"No space left.*nothing more fits"):
            train(replace(config, out=tmp_path / "none"), Said())
        assert not list((tmp_path / "none/checkpoints").iterdir())
    train(replace(config, resume=True), Said())
    with monkeypatch.context() as patch:
        patch.setattr("student.checkpoint.save_file", full)
        said = Said()
        train(replace(config, out=tmp_path / "small", save_every=4), said)
        assert any("step-00000004 cannot be written" in line for line in said.lines)
    assert equal(tmp_path / "run", tmp_path / "small")


def test_weights_that_are_not_finite_are_no_model(world, tmp_path, monkeypatch):
    monkeypatch.setattr("student.optimize.Optimization.step", poison)
    with pytest.raises(KdcacheError, match="of the trained weights are not finite"):
        train(settings(world, tmp_path, max_steps=1), Said())
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "result.json").exists()


def poison(self, learning_rate):
    with torch.no_grad():
        next(p for p in self.student.parameters() if p.requires_grad).fill_(float("nan"))


# ---- what a resumed run must find ----


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_finished_run_without_its_model_writes_it_again(world, tmp_path, damage):
    config = settings(world, tmp_path / "run")
    train(config, Said())
    expected, file = model_of(tmp_path / "run"), tmp_path / "run/model/model.safetensors"
    if damage == "missing":
        shutil.rmtree(tmp_path / "run/model")
    else:
        file.write_bytes(file.read_bytes()[:-9])
    said = Said()
    assert train(config, said)["already_done"]
    assert "written again from the checkpoint of step 4" in said.lines[-1]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(file).items())
    shutil.rmtree(tmp_path / "run/model")
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(KdcacheError, match=r"no checkpoint of step 4 is left; remove .*result.json"):
        train(config, Said())


def test_another_tokenizer_file_of_the_student_is_another_run(world, tmp_path):
    shutil.copytree(world.student, tmp_path / "student")
    config = settings(world, tmp_path / "run", student=tmp_path / "student")
    train(config, Said())
    file = tmp_path / "student/processor_config.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document, indent=7))
    with pytest.raises(IdentityMismatch, match="processor is"):
        train(config, Said())


def test_resume_where_there_is_nothing_says_so(world, tmp_path):
    said = Said()
    train(settings(world, tmp_path, resume=True, max_steps=1), said)
    assert any("holds no checkpoint to resume: the stage begins at step 0" in line for line in said.lines)


def test_the_progress_of_an_old_checkpoint_is_read(world, tmp_path):
    """As version 0.1 wrote it, and its identity without the processor's digest."""
    old = {"best": 3.5, "best_step": 2, "waited": 1, "evaluation": {"loss": 4.0}, "scaler": None}
    old |= {"best_evaluation": {"loss": 3.5}, "samples": 24, "seconds": {"forward": 1.5}}
    state = RunState.from_json(3, old)
    expected = {"step": 3, "samples": 24, "seconds": {"forward": 1.5}, "evaluated": 3, "waited": 1}
    expected |= {"best_step": 2, "best_evaluation": {"loss": 3.5}, "evaluation": {"loss": 4.0}}
    assert {name: value for name, value in asdict(state).items() if value is not None} == expected
    assert RunState.from_json(3, state.to_json()) == state
    with pytest.raises(KeyError):
        RunState.from_json(3, {"samples": 3})

    config = settings(world, tmp_path, save_every=2, max_steps=4)
    stopping = Said(3, lambda: (_ for _ in ()).throw(KdcacheError("stop")))
    with pytest.raises(KdcacheError, match="stop"):
        train(config, stopping)
    file = tmp_path / "checkpoints/step-00000002/state.json"
    document = json.loads(file.read_text())
    del document["identity"]["processor"]
    document["progress"] = {**old, "best_step": None, "evaluation": None, "best_evaluation": None}
    file.write_text(json.dumps(document))
    assert train(replace(config, resume=True), Said())["samples"] == 24 + 16


def test_no_cache_is_wrong_usage(world, tmp_path):
    with pytest.raises(WrongUsage, match="no cache to learn from"):
        train(replace(settings(world, tmp_path), cache=None), Said())


def growing(world, folder):
    """A copy of the world's cache without its last two commit records, and those records."""
    shutil.copytree(world.cache, folder)
    return sorted((folder / "commits").iterdir())[-2:]


@pytest.mark.parametrize("held_out", [False, True])
def test_a_run_waits_for_the_missing_shards_and_then_reads_them_all(world, tmp_path, monkeypatch, held_out):
    missing = growing(world, tmp_path / "cache")
    kept = {path: path.read_bytes() for path in missing}
    manifest = tmp_path / "cache/manifest.json"
    kept[manifest] = manifest.read_bytes()
    for path in kept:
        path.unlink()
    coming = [manifest, *missing]

    def build(seconds):
        coming[0].write_bytes(kept[coming.pop(0)])

    monkeypatch.setattr("student.cache_wait.time.sleep", build)
    said = Said()
    chosen = {"eval_cache" if held_out else "cache": str(tmp_path / "cache")}
    train(settings(world, tmp_path / "run", wait=True, **chosen), said)
    assert not coming
    assert "holds no cache yet: waiting" in said.lines[0]
    assert not any("is not complete" in line for line in said.lines)
    train(settings(world, tmp_path / "whole", **{name: str(world.cache) for name in chosen}), Said())
    assert equal(tmp_path / "run", tmp_path / "whole")
    assert [line["samples"] for line in held_out_lines(tmp_path / "run")] == [24] * held_out


def test_waiting_ends_when_nothing_was_added_for_so_long(world, tmp_path):
    for path in growing(world, tmp_path / "cache"):
        path.unlink()
    for cache, state in (
        (tmp_path / "cache", "2 of 4 shards are missing"),
        (tmp_path / "no", "no cache is there"),
    ):
        config = settings(world, tmp_path / "run", cache=cache, wait=True, wait_minutes=1e-9)
        with pytest.raises(KdcacheError, match=f"{state}, and nothing was added for 1e-09 minutes"):
            train(config, Said())
    assert not (tmp_path / "run").exists()


def test_the_other_ranks_end_quietly_when_one_cannot_read_its_data(world, tmp_path):
    """Two processes under gloo; the image of one row, which one of them reads in some step, is missing."""
    shutil.copytree(world.image_root, tmp_path / "images")
    pictures = sorted((tmp_path / "images/pictures").iterdir())
    away = pictures[len(pictures) // 2].rename(tmp_path / "away.png")
    arguments = ["train", "--stage", "dft", "--student", world.student, "--cache", world.cache]
    arguments += ["--image-root", tmp_path / "images", "--out", tmp_path / "run", "--tracker", "none"]
    arguments += ["--max-steps", 6, "--global-batch", 4, "--micro-batch", 1, "--workers", 0, "--seed", 3]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + (os.getpid() + 7) % 20000)}
    shared |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "cli", *map(str, arguments)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    errors = [line for text in told for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, told
    saved = Checkpoints(tmp_path / "run/checkpoints").steps()
    assert len(saved) == 1
    assert 0 < saved[0] < 6
    name = f"pictures/{pictures[len(pictures) // 2].name}"
    assert re.search(rf"{name} of the cache \(row \d+\).*saved in .*step-{saved[0]:08d}: run with", errors[0])
    assert not any("Traceback" in text for text in told)

    away.rename(pictures[len(pictures) // 2])
    config = settings(world, tmp_path / "run", max_steps=6, global_batch=4, learning_rate=2e-5)
    assert train(replace(config, seed=3, resume=True), Said())["steps"] == 6, "on one process too"


def without(document, *names):
    return {name: value for name, value in document.items() if name not in names}


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: without(state, "progress"),
        lambda state: {**state, "progress": 5},
        lambda state: {**state, "progress": {**state["progress"], "seconds": 3}},
        lambda state: {**state, "identity": None},
        lambda state: {**state, "step": 99},
        lambda state: {**state, "files": {}},
        lambda state: [state],
    ],
)
def test_a_checkpoint_of_a_damaged_state_is_passed_over(world, tmp_path, damage):
    config = settings(world, tmp_path, save_every=1, max_steps=3)
    said = Said(3, lambda: (_ for _ in ()).throw(KdcacheError("stop")))
    with pytest.raises(KdcacheError, match="stop"):
        train(config, said)
    file = tmp_path / "checkpoints/step-00000002/state.json"
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    said = Said()
    assert train(replace(config, resume=True), said)["steps"] == 3
    assert re.search(r"step-00000002 is damaged: .*: the run continues from step 1", "\n".join(said.lines))
