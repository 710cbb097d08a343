"""The loop: what trains, that batches add up, and what a run leaves behind."""

import json
import re
import shutil
import signal
from dataclasses import replace

import fsspec
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file

from cache_schema import KdcacheError, StoppedEarly, open_cache
from cache_schema.datasets.image_roots import open_root
from cache_schema.progress import Silent
from cache_schema.runs import read_metrics
from models.folder import load_model, load_processor
from models.parts import part_of
from student.collate import Collator
from student.export import export
from student.heldout import HeldOut, measure_samples
from student.losses import LossWeights
from student.model import DistilledStudent
from student.pixels import PixelInputs
from student.settings import TrainConfig
from student.stages import CE_ONLY, DFT, DPT, PT, SFT
from student.train import train
from tests.student_caches import make_world
from tests.student_driver import run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def settings(world, out, stage=DFT, **changes):
    """A short run on the CPU; stage settings and run settings by name."""
    of_stage = {name: changes.pop(name) for name in list(changes) if name in type(stage).__dataclass_fields__}
    given = {"global_batch": 8, "max_steps": 4, "learning_rate": 1e-3, **of_stage}
    return TrainConfig(
        stage=replace(stage, **given),
        student=changes.pop("student", world.student),
        cache=str(changes.pop("cache", world.cache)),
        image_root=world.image_root,
        out=out,
        **{"log_every": 1, "trackers": (), "workers": 1, **changes},
    )


def weights_of(folder):
    model = load_model(folder, torch.float32)
    return {name: tensor.clone() for name, tensor in model.named_parameters()}


def losses_of(out, term="loss"):
    return [line[term] for line in read_metrics(out) if line["group"] == "train"]


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        (DPT, {"projector"}),
        (PT, {"projector"}),
        (SFT, {"projector", "language_model"}),
        (DFT, {"projector", "language_model"}),
        (replace(DFT, name="own", trainable=("language_model",)), {"language_model"}),
        (replace(DFT, name="all", trainable=("vision_tower", "projector")), {"vision_tower", "projector"}),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_stage_trains_its_parts_and_nothing_else(world, tmp_path, stage, parts):
    before = weights_of(world.student)
    train(settings(world, tmp_path, stage), Silent())
    after = weights_of(tmp_path / "model")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # The tower's last layer and norm lie behind the features that are taken (layer -2).
    unused = ("vision_tower.encoder.layers.1.", "vision_tower.post_layernorm")
    expected = {
        name for name in before if part_of(name) in parts and not any(unseen in name for unseen in unused)
    }
    assert moved == expected


def test_the_frozen_tower_is_in_eval_mode_and_keeps_no_gradient(world):
    student = DistilledStudent(
        load_model(world.student), LossWeights(), vocab_size=340, trainable=DFT.trainable
    ).train()
    modes = {part_of(f"{name}."): module.training for name, module in student.model.named_modules() if name}
    assert modes == {"vision_tower": False, "projector": True, "language_model": True}
    features = student.model.model.vision_tower(torch.zeros(1, 3, 32, 32)).last_hidden_state
    assert not features.requires_grad


def test_a_trained_tower_is_in_training_mode_down_to_modules_without_parameters(world):
    student = DistilledStudent(
        load_model(world.student), LossWeights(), vocab_size=340, trainable=("vision_tower",)
    ).train()
    modes = {name: module.training for name, module in student.model.named_modules() if "vision" in name}
    assert any("activation" in name for name in modes)
    assert all(modes.values())


@pytest.mark.parametrize("stage", [DPT, DFT], ids=lambda stage: stage.name)
@pytest.mark.parametrize("reduction", ["sample_mean", "token_mean"])
def test_one_batch_is_its_micro_batches_accumulated(world, tmp_path, stage, reduction):
    stage = replace(stage, losses=replace(stage.losses, reduction=reduction))
    for micro in (1, 3, 8):
        train(settings(world, tmp_path / str(micro), stage, micro_batch=micro), Silent())
    whole = weights_of(tmp_path / "8/model")
    for micro in (1, 3):
        assert losses_of(tmp_path / str(micro)) == pytest.approx(losses_of(tmp_path / "8"), rel=1e-4)
        for name, tensor in weights_of(tmp_path / f"{micro}/model").items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=2e-4)


class Said(Silent):
    """Keeps the messages, and does something after a step."""

    def __init__(self, at=None, do=lambda: None):
        self.lines, self.at, self.do = [], at, do

    def message(self, line):
        self.lines.append(line)

    def update(self, done, **fields):
        if done == self.at and fields:
            self.at = None
            self.do()


class InterruptedAt(Silent):
    """Sends this process a signal after a step."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number = step, number

    def update(self, done, **fields):
        if done == self.step:
            signal.raise_signal(self.number)


def test_two_processes_with_whole_or_sharded_weights_give_the_loss_curve_of_one_and_take_over_its_run(
    world, tmp_path
):
    changes = {"global_batch": 5, "max_steps": 6, "learning_rate": 1e-3}
    alone = settings(world, tmp_path / "1", **changes, micro_batch=5, eval_cache=str(world.cache))
    train(alone, Silent())
    with pytest.raises(StoppedEarly):
        train(replace(alone, out=tmp_path / "moved"), InterruptedAt(3))
    common = {
        "base": "dft",
        "stage": changes,
        "student": world.student,
        "cache": str(world.cache),
        "image_root": world.image_root,
        "micro_batch": 2,
        "log_every": 1,
        "save_every": 3,
        "device": "cpu",
        "eval_cache": str(world.cache),
        "resume": True,
    }
    shutil.copytree(tmp_path / "moved", tmp_path / "moved to shards")
    expected = weights_of(tmp_path / "1/model")
    for name in ("2", "moved", "shards", "moved to shards"):
        run(tmp_path / "runs.json", [{**common, "out": tmp_path / name, "shard": "shards" in name}], ranks=2)
        for term in ("loss", "ce", "response_kl", "visual_kl", "relation", "grad_norm"):
            expected_values = losses_of(tmp_path / "1", term)
            assert losses_of(tmp_path / name, term) == pytest.approx(expected_values, rel=1e-3)
        one, two = (read_metrics(tmp_path / folder)[-1] for folder in ("1", name))
        assert one.pop("group") == two.pop("group") == "held-out"
        assert two == pytest.approx(one, rel=1e-3)
        for parameter, tensor in weights_of(tmp_path / name / "model").items():
            torch.testing.assert_close(tensor, expected[parameter], rtol=1e-3, atol=2e-4)


def test_a_remote_cache_trains_to_the_same_bits(world, tmp_path, monkeypatch):
    """Of an object store that is told of as its users do: by a URL and the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    values = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}
    for name, value in values.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    try:
        store = fsspec.filesystem("s3")
        store.mkdir("training")  # its own bucket: the servers of one process share their state
        store.put(str(world.cache), "training/tiny", recursive=True)
        far = settings(world, tmp_path / "far", cache="s3://training/tiny", eval_cache="s3://training/tiny")
        train(far, Silent())
    finally:
        server.stop()
    train(settings(world, tmp_path / "near", eval_cache=str(world.cache)), Silent())
    expected, found = (load_file(tmp_path / name / "model/model.safetensors") for name in ("near", "far"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses_of(tmp_path / "far") == losses_of(tmp_path / "near")


def test_the_loss_falls(world, tmp_path):
    train(settings(world, tmp_path, max_steps=40, learning_rate=3e-3), Silent())
    losses = losses_of(tmp_path)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_run_folder_tells_all(world, tmp_path):
    config = settings(world, tmp_path, trackers=("tensorboard",), eval_cache=str(world.cache), save_every=2)
    result = train(config, Silent())
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "recipe.yaml",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "model",
        "result.json",
    }
    assert list((tmp_path / "tensorboard").rglob("events*"))
    assert result["steps"] == 4
    assert "data wait" in result["time"]
    assert set(result["seconds"]) == {"data wait", "forward", "loss", "backward", "optimizer"}
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    assert {"loss", "ce", "response_kl", "visual_kl", "relation", "lr", "grad_norm"} <= lines[0].keys()
    assert json.loads((tmp_path / "result.json").read_text())["evaluation"]["samples"] == 24


def test_a_finished_run_is_not_repeated(world, tmp_path):
    said = []
    progress = Silent()
    progress.message = said.append
    config = settings(world, tmp_path)
    assert not train(config, progress)["already_done"]
    before = (tmp_path / "model/model.safetensors").stat().st_mtime_ns
    assert train(config, progress)["already_done"]
    assert "is finished: nothing to do" in said[-1]
    assert (tmp_path / "model/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(KdcacheError, match=r"seed is 1 now and was 0"):
        train(replace(config, seed=1), Silent())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_bit_equal(world, tmp_path, number):
    config = settings(world, tmp_path / "stopped", max_steps=5, seed=3)
    with pytest.raises(StoppedEarly, match=r"stopped at step 2 of 5.*--resume"):
        train(config, InterruptedAt(2, number))
    with pytest.raises(KdcacheError, match="add --resume"):
        train(config, Silent())
    result = train(replace(config, resume=True), Silent())
    train(replace(config, out=tmp_path / "whole"), Silent())
    expected, found = (
        load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "stopped")
    )
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "whole")
    assert result["samples"] == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 5e-4}, r"stage.learning_rate is 0.0005 now and was 0.001"),
        ({"seed": 9}, r"seed is 9 now and was 0"),
        ({"student": "other"}, r"student is '\w{64}' now and was '\w{64}'"),
        ({"cache": "other"}, r"cache.identity is '\w{64}' now and was '\w{64}'"),
    ],
    ids=["recipe", "seed", "student", "cache"],
)
def test_a_checkpoint_of_another_run_is_refused(world, tmp_path, change, message):
    if "student" in change or "cache" in change:
        other = make_world(tmp_path / "other", rows=8, seed=7)
        train(settings(world, tmp_path / "moved", SFT, max_steps=1), Silent())
        change = {"student": tmp_path / "moved/model"} if "student" in change else {"cache": other.cache}

    def stop(run):
        raise StoppedEarly("here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("student.kept.Kept.finish", stop)
        with pytest.raises(StoppedEarly):
            train(settings(world, tmp_path / "run", save_every=2), Silent())
    with pytest.raises(KdcacheError, match=message):
        train(settings(world, tmp_path / "run", resume=True, **change), Silent())


def test_a_damaged_checkpoint_falls_back_to_the_one_before_it_or_is_refused(world, tmp_path):
    config = settings(world, tmp_path, save_every=1, max_steps=3)
    train(config, Silent())
    expected = load_file(tmp_path / "model/model.safetensors")
    (tmp_path / "result.json").unlink()
    file = tmp_path / "checkpoints/step-00000003/optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = Said()
    train(replace(config, resume=True), said)
    assert any(re.search(r"optimizer.pt is damaged.*: the run continues from step 2", x) for x in said.lines)
    found = load_file(tmp_path / "model/model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    (tmp_path / "result.json").unlink()
    (tmp_path / "checkpoints/step-00000003/weights.safetensors").write_bytes(b"x")
    state = tmp_path / "checkpoints/step-00000002/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "progress": {}}))
    with pytest.raises(KdcacheError, match=r"weights.safetensors is damaged.*no other is whole: remove"):
        train(replace(config, resume=True), Silent())


def test_a_loss_that_is_not_finite_names_the_samples_after_saving(world, tmp_path, monkeypatch):
    collate = Collator.__call__

    def poisoned(self, samples):
        batch = collate(self, samples)
        if 7 in batch.rows:
            batch.inputs["pixel_values"].fill_(float("nan"))
        return batch

    monkeypatch.setattr(Collator, "__call__", poisoned)
    config = settings(world, tmp_path, micro_batch=1, save_every=0, max_steps=6)
    with pytest.raises(
        KdcacheError, match=r"not finite at step (\d) for samples sample-7 \(row 7\);"
    ) as caught:
        train(config, Silent())
    step = int(str(caught.value).split("at step ")[1][0])
    assert (tmp_path / f"checkpoints/step-{step:08d}/state.json").is_file()
    monkeypatch.undo()
    train(replace(config, resume=True), Silent())
    train(replace(config, out=tmp_path / "whole"), Silent())
    expected, found = (
        load_file(folder / "model/model.safetensors") for folder in (tmp_path / "whole", tmp_path)
    )
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_newest_and_the_best_checkpoints_stay(world, tmp_path):
    values = iter([5.0, 3.0, 4.0, 6.0, 7.0, 8.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("student.train.weighted", lambda measured, weights: next(values))
        config = settings(
            world, tmp_path, max_steps=6, save_every=1, eval_cache=str(world.cache), eval_every=1
        )
        train(config, Silent())
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000005", "step-00000006"]


def test_early_stop_gives_the_best_weights(world, tmp_path):
    values = iter([5.0, 3.0, 4.0, 6.0, 1.0, 1.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("student.train.weighted", lambda measured, weights: next(values))
        config = settings(
            world, tmp_path, max_steps=6, eval_cache=str(world.cache), eval_every=1, early_stop=2
        )
        result = train(config, Silent())
    assert (result["steps"], result["model_step"]) == (4, 2)
    assert result["evaluation"]["loss"] == 3.0
    assert export(tmp_path / "model", tmp_path / "out", Silent())
    card = (tmp_path / "out/README.md").read_text()
    assert "- the weights are those of step 2, the best on the held-out cache" in card
    assert "| held out: loss | 3 |" in card
    best = load_file(tmp_path / "checkpoints/step-00000002/weights.safetensors")
    model = weights_of(tmp_path / "model")
    assert all(torch.equal(model[name], tensor) for name, tensor in best.items())


def test_gradient_checkpointing_and_bf16_change_rounding_only(world, tmp_path):
    for name, change in (
        ("plain", {}),
        ("checkpointed", {"gradient_checkpointing": True}),
        ("bf16", {"precision": "bf16"}),
    ):
        train(settings(world, tmp_path / name, max_steps=2, **change), Silent())
    plain = losses_of(tmp_path / "plain")
    assert losses_of(tmp_path / "checkpointed") == pytest.approx(plain, rel=1e-5)
    assert losses_of(tmp_path / "bf16") == pytest.approx(plain, rel=0.02)
    assert losses_of(tmp_path / "bf16") != plain


@pytest.mark.parametrize("stage", [DPT, DFT], ids=lambda stage: stage.name)
def test_bf16_measures_the_held_out_cache_up_to_rounding(world, tmp_path, stage):
    """The frozen parts are held in bfloat16, the trained ones in float32."""
    found = {
        precision: train(
            settings(
                world,
                tmp_path / precision,
                stage,
                max_steps=1,
                eval_cache=str(world.cache),
                precision=precision,
            ),
            Silent(),
        )["evaluation"]
        for precision in ("fp32", "bf16")
    }
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.02, abs=0.01)
    assert found["bf16"] != found["fp32"]


def test_sharding_on_a_cpu_is_refused_instead_of_quietly_left_out(world, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(KdcacheError, match=r"shards on accelerators only.*launch without FSDP"):
        train(settings(world, tmp_path), Silent())


def test_an_unknown_tracker_is_refused(world, tmp_path):
    with pytest.raises(KdcacheError, match=r"accelerate refuses precision fp32 with trackers paper.*choose"):
        train(settings(world, tmp_path, trackers=("paper",)), Silent())
    with pytest.raises(KdcacheError, match="tracker wandb is not installed: install it"):
        train(settings(world, tmp_path, trackers=("tensorboard", "wandb")), Silent())


def test_half_precision_goes_on_with_its_scale(world, tmp_path):
    config = settings(world, tmp_path / "run", precision="fp16")
    with pytest.raises(StoppedEarly):
        train(config, InterruptedAt(2))
    train(replace(config, resume=True), Silent())
    train(replace(config, out=tmp_path / "whole"), Silent())
    train(replace(config, out=tmp_path / "fp32", precision="fp32"), Silent())
    expected, found = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "fp32"), rel=0.02)


def test_plain_training_reads_no_target(world, tmp_path, monkeypatch):
    asked = []
    cache = open_cache(world.cache)
    read = type(cache).read_shard
    monkeypatch.setattr(
        type(cache),
        "read_shard",
        lambda self, shard, *, parts=None, **kw: (asked.append(parts), read(self, shard, parts=parts, **kw))[
            1
        ],
    )
    train(settings(world, tmp_path, replace(DFT, name="ce", losses=CE_ONLY)), Silent())
    assert asked
    assert set(asked) == {()}


def test_adapters_train_the_language_model_alone_and_are_merged(world, tmp_path):
    """Resumed in the middle, too: the checkpoint holds the adapters, the model folder plain weights."""
    config = replace(
        settings(world, tmp_path / "run", max_steps=4, lora_dropout=0.3, eval_cache=str(world.cache)),
        lora_rank=4,
    )
    assert config.resolved_stage.lora_rank == 4
    assert replace(config, stage=DPT).resolved_stage.lora_rank == 0
    with pytest.raises(StoppedEarly):
        train(config, InterruptedAt(2))
    held = load_file(tmp_path / "run/checkpoints/step-00000002/weights.safetensors")
    assert {name for name in held if ".lora_" not in name} == {
        name for name in held if part_of(name) == "projector"
    }
    result = train(replace(config, resume=True), Silent())
    train(replace(config, out=tmp_path / "whole"), Silent())
    before, after = weights_of(world.student), weights_of(tmp_path / "run/model")
    whole = weights_of(tmp_path / "whole/model")
    assert before.keys() == after.keys()
    assert all(torch.equal(whole[name], after[name]) for name in after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {name for name in before if name.endswith("_proj.weight") and part_of(name) == "language_model"}
    assert moved == layers | {name for name in before if part_of(name) == "projector"}
    merged = measure(world, tmp_path / "run/model")
    assert merged == pytest.approx({name: result["evaluation"][name] for name in merged}, rel=1e-4)


def measure(world, folder):
    processor = load_processor(folder)
    collator = Collator(
        pixels=PixelInputs(processor),
        image_root=open_root(world.image_root),
        pad_token_id=1,
        image_token_id=2,
        targets=("response", "visual", "relation"),
    )
    student = DistilledStudent(load_model(folder), LossWeights(), vocab_size=340)
    among = HeldOut(cache=open_cache(world.cache), collator=collator).samples()
    return measure_samples(student, *among, collator, device=torch.device("cpu"))


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own parts
def test_compiled_layers_are_named_and_change_nothing_but_rounding(world, tmp_path):
    said = Said()
    train(settings(world, tmp_path / "compiled", max_steps=2, compile=True), said)
    train(settings(world, tmp_path / "plain", max_steps=2), Silent())
    assert "the language model's layers are compiled" in said.lines
    compiled, plain = (losses_of(tmp_path / name) for name in ("compiled", "plain"))
    assert compiled == pytest.approx(plain, rel=1e-4)
