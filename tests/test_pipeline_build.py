"""`build` from end to end on a tiny teacher: what it captures, how it resumes, what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from cache_schema import (
    Cache,
    CacheWriter,
    IdentityMismatch,
    KdcacheError,
    StoppedEarly,
    TargetSpec,
    open_cache,
)
from cache_schema.file_cache import FileCacheConfig
from cache_schema.format.identity import tokenizer_digest
from cache_schema.operations.summary import summarise
from cache_schema.progress import Silent
from models.device import choose_device
from models.head import Head
from pipeline import fingerprint, teachers, windows
from pipeline.capture import BuildConfig, build
from pipeline.extract import Extractor
from pipeline.transformers_engine import TransformersEngine
from pipeline.workers import place_among_workers
from tests.tiny_models import tiny_dataset, tiny_llava, write_png

FULL = TargetSpec(
    targets=("response", "visual", "relation", "prompt"), precision="full", top_k=8, temperatures=(1.0, 2.0)
)
Setting = tuple[Path, Path]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """(teacher, folder of data.json and images/)."""
    teacher = tiny_llava(tmp_path_factory.mktemp("teacher"))
    folder = tmp_path_factory.mktemp("data")
    tiny_dataset(folder, rows=14, images=4)
    return teacher, folder


def config_of(setting: Setting, out: Path, **rest: Any) -> BuildConfig:
    teacher, folder = setting
    options = {"spec": FULL, "shard_size": 4, "batch_tokens": 300, "device": "cpu"} | rest
    return BuildConfig(
        teacher=teacher, data=folder / "data.json", image_root=folder / "images", out=str(out), **options
    )


def by_row(cache: Cache) -> dict[int, Any]:
    return {sample.row: sample for sample in (cache[i] for i in range(len(cache)))}


@pytest.fixture(scope="module")
def captured(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "c"
    summary = build(config_of(setting, out), Silent())
    assert summary.to_json() | {"seconds": 0, "tokens": 0} == {
        "captured": 14,
        "cut": 0,
        "quarantined": {},
        "shards": 4,
        "tokens": 0,
        "images": 12,
        "seconds": 0,
        "already_done": False,
    }
    return out


def test_targets_equal_those_of_the_models_own_logits(setting: Setting, captured: Path) -> None:
    teacher, folder = setting
    model = AutoModelForImageTextToText.from_pretrained(teacher).eval()
    processor = AutoProcessor.from_pretrained(teacher)
    cache = open_cache(captured)
    rows = json.loads((folder / "data.json").read_text())
    assert sorted(by_row(cache)) == list(range(14))
    for row, sample in by_row(cache).items():
        messages = []
        for turn in rows[row]["conversations"]:
            text = turn["value"].removeprefix("<image>\n")
            content: list[dict[str, str]] = [{"type": "text", "text": text}]
            if text != turn["value"]:
                content.insert(0, {"type": "image", "path": str(folder / "images" / rows[row]["image"])})
            messages.append({"role": "user" if turn["from"] == "human" else "assistant", "content": content})
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        supervised = np.flatnonzero(inputs.pop("assistant_masks")[0].numpy())
        with torch.inference_mode():
            logits = model(**inputs).logits[0, :, : len(processor.tokenizer)].double()
        assert sample.sample_id == rows[row]["id"]
        np.testing.assert_array_equal(sample.input_ids, inputs["input_ids"][0])
        np.testing.assert_array_equal(sample.response_positions, supervised - 1)
        visual = np.flatnonzero(sample.input_ids == model.config.image_token_id)
        np.testing.assert_array_equal(sample.visual_positions, visual)
        everything = np.union1d(np.union1d(sample.response_positions, visual), sample.prompt_positions)
        np.testing.assert_array_equal(everything, np.arange(len(sample.input_ids)))
        for record, positions in (
            (sample.response, sample.response_positions),
            (sample.visual, visual),
            (sample.prompt, sample.prompt_positions),
        ):
            if record is None:
                assert len(positions) == 0
                continue
            check_record(record, logits[torch.from_numpy(positions).long()])
        following = logits.log_softmax(1)[supervised - 1, sample.input_ids[supervised]]
        np.testing.assert_allclose(sample.response.label_logprob, following, atol=2e-5)
        assert len(sample.relations) == len(sample.images)
        for relation, image in zip(sample.relations, sample.images, strict=True):
            part = logits[torch.from_numpy(image.positions).long()]
            gram = (part @ part.T).numpy()
            ours = relation.factor.astype(np.float64) @ relation.factor.T
            cosine = (gram * ours).sum() / np.linalg.norm(gram) / np.linalg.norm(ours)
            assert 1 - cosine <= 1.1e-5
            np.testing.assert_allclose(relation.norm, np.linalg.norm(gram), rtol=1e-5)


def check_record(record: Any, logits: torch.Tensor) -> None:
    logprobs = logits.log_softmax(dim=1)
    values, ids = logprobs.topk(8, dim=1)
    np.testing.assert_allclose(record.logprobs, values, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(record.token_ids, ids)
    np.testing.assert_allclose(record.logsumexp, logits.logsumexp(1), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(record.entropy, -(logprobs.exp() * logprobs).sum(1), atol=1e-5, rtol=1e-5)
    for column, temperature in enumerate(record.temperatures):
        scaled = logits / float(temperature)
        tail = scaled.scatter(1, ids, -torch.inf).logsumexp(1) - scaled.logsumexp(1)
        np.testing.assert_allclose(record.tail_logprob[:, column], tail, atol=2e-5, rtol=1e-5)


def same_arrays(first: Path, second: Path) -> None:
    """Equal in every stored array of every shard, whatever the attempts are called."""
    a, b = open_cache(first), open_cache(second)
    assert a.manifest.identity == b.manifest.identity
    assert a.shards == b.shards
    for left, right in zip(by_row(a).values(), by_row(b).values(), strict=True):
        assert left.row == right.row
        for kind in ("response", "visual", "prompt"):
            one, other = getattr(left, kind), getattr(right, kind)
            assert (one is None) == (other is None)
            for name in one.__dataclass_fields__ if one is not None else ():
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        for one, other in zip(left.relations, right.relations, strict=True):
            np.testing.assert_array_equal(one.factor, other.factor)
            assert (one.norm, one.residual) == (other.norm, other.residual)


def test_many_workers_make_the_same_cache(setting: Setting, captured: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    stopped = Notes(stop_after=4)
    with pytest.raises(StoppedEarly):
        build(config_of(setting, out, rank=2, world_size=3), stopped)
    assert 0 < len(list(out.glob("commits/*.json"))) < 4
    notes = Notes()  # worker 1 never comes, and worker 2 has gone: 0 takes their shards
    build(config_of(setting, out, rank=0, world_size=3), notes)
    assert notes.done[0] > 4, "what others have finished counts as done"
    assert notes.done[-1] == 14
    same_arrays(captured, out)


def test_workers_at_the_same_time_make_the_same_cache(
    setting: Setting, captured: Path, tmp_path: Path
) -> None:
    teacher, folder = setting
    script = """
import sys
from pathlib import Path
from cache_schema import TargetSpec
from cache_schema.progress import Silent
from pipeline.capture import BuildConfig, build

teacher, folder, out = map(Path, sys.argv[1:])
spec = TargetSpec(
    targets=("response", "visual", "relation", "prompt"), precision="full", top_k=8, temperatures=(1.0, 2.0)
)
build(
    BuildConfig(
        teacher=teacher, data=folder / "data.json", image_root=folder / "images", out=str(out), spec=spec,
        shard_size=4, batch_tokens=300, device="cpu",
    ),
    Silent(),
)
"""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(teacher), str(folder), str(tmp_path / "c")],
            env=os.environ | {"SLURM_PROCID": rank, "SLURM_NTASKS": "2"},
            cwd=Path(__file__).parent.parent,
            stderr=subprocess.PIPE,
        )
        for rank in "01"
    ]
    for worker in workers:
        _, stderr = worker.communicate(timeout=200)
        assert worker.returncode == 0, stderr.decode()
    same_arrays(captured, tmp_path / "c")


def test_a_second_run_does_nothing_and_says_so(setting: Setting, captured: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in captured.rglob("*")}
    notes = Notes()
    summary = build(config_of(setting, captured), notes)
    assert summary.already_done
    assert summary.captured == 14
    assert any("nothing left" in line for line in notes.lines)
    assert {path: path.stat().st_mtime_ns for path in captured.rglob("*")} == before


def test_the_samples_that_took_longest_to_prepare_are_told(captured: Path) -> None:
    slowest = summarise(open_cache(captured))["slowest_samples"]
    seconds = [entry["seconds"] for entry in slowest]
    assert len(slowest) == 5
    assert min(seconds) > 0
    assert seconds == sorted(seconds, reverse=True)
    assert {entry["row"] for entry in slowest} <= set(by_row(open_cache(captured)))


class Notes(Silent):
    """Keeps messages, and stops the process politely after some updates."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.lines: list[str] = []
        self.fields: dict[str, str] = {}
        self.begun: list[str] = []
        self.done: list[int] = []
        self.left = stop_after

    def begin(self, what: str, total: int | None) -> None:
        self.begun.append(what)

    def message(self, line: str) -> None:
        self.lines.append(line)

    def update(self, done: int, **fields: str) -> None:
        self.fields = fields
        self.done += [done] if fields else []
        if self.left is not None and fields:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)


def test_other_versions_of_what_is_only_recorded_are_told(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(setting, tmp_path / "c")
    with pytest.raises(StoppedEarly):
        build(config, Notes(stop_after=6))
    same, other = Notes(stop_after=3), Notes()
    with pytest.raises(StoppedEarly):
        build(config, same)
    assert not any("captured with" in line for line in same.lines)
    description = TransformersEngine.description.fget
    assert description is not None
    told = property(lambda engine: description(engine) | {"torch": "9.9"})
    monkeypatch.setattr(TransformersEngine, "description", told)
    build(config, other)
    assert any(f"captured with torch {torch.__version__}, now 9.9" in line for line in other.lines)


@pytest.mark.parametrize("after", [1, 3, 6])
def test_a_stopped_build_goes_on_where_it_was(
    setting: Setting, captured: Path, tmp_path: Path, after: int
) -> None:
    out = tmp_path / "c"
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(StoppedEarly, match="run the same command again"):
        build(config_of(setting, out), Notes(stop_after=after))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    kept = {path: path.read_bytes() for path in out.glob("commits/*.json")}
    assert len(kept) < 4
    assert build(config_of(setting, out), Silent()).captured == 14
    for path, content in kept.items():
        assert path.read_bytes() == content, "a finished shard was made again"
    same_arrays(captured, out)


def test_batches_change_nothing_but_rounding(setting: Setting, captured: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    build(config_of(setting, out, batch_tokens=1), Silent())
    for left, right in zip(
        by_row(open_cache(captured)).values(), by_row(open_cache(out)).values(), strict=True
    ):
        for kind in ("response", "visual", "prompt"):
            one, other = getattr(left, kind), getattr(right, kind)
            if one is not None:
                np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
                np.testing.assert_allclose(one.tail_logprob, other.tail_logprob, atol=1e-5)
        for one, other in zip(left.relations, right.relations, strict=True):
            np.testing.assert_allclose(one.norm, other.norm, rtol=1e-5)


def test_windows_do_not_depend_on_the_machine(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are formed inside a window: with other windows another machine's cache would differ."""
    found: list[list[int]] = []
    whole = Extractor.launch

    def noted(self: Extractor, samples: Any, claimed: set[str]) -> Any:
        found.append([sample.row for sample in samples])
        return whole(self, samples, claimed)

    monkeypatch.setattr(Extractor, "launch", noted)
    monkeypatch.setattr(windows, "WINDOW_BYTES", 40_000)
    formed = []
    for threads in (1, 2, 5):
        found.clear()
        build(config_of(setting, tmp_path / str(threads), shard_size=14, prepare_threads=threads), Silent())
        formed.append(list(found))
    assert len(formed[0]) > 2
    assert sorted(row for window in formed[0] for row in window) == list(range(14))
    assert formed[1:] == [formed[0]] * 2
    assert len(formed[0][0]) < max(map(len, formed[0]))  # the first is small


@pytest.mark.parametrize("stopped", [False, True])
def test_a_disk_that_refuses_is_never_hidden(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    def full(self: CacheWriter, *_: Any, **__: Any) -> None:
        raise KdcacheError("the disk is full")

    monkeypatch.setattr(CacheWriter, "write_shard", full)
    with pytest.raises(KdcacheError, match="the disk is full"):
        build(config_of(setting, tmp_path / "c"), Notes(stop_after=3 if stopped else None))


def test_memory_that_runs_out_shrinks_the_batches(
    setting: Setting, captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TransformersEngine.hidden_states
    sizes = []

    def meagre(self: TransformersEngine, samples: Any) -> Any:
        sizes.append(len(samples))
        if len(samples) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return whole(self, samples)

    whole_packs = TransformersEngine.packed_hidden_states

    def meagre_packs(self: TransformersEngine, packs: Any) -> Any:
        if len(packs) > 1 or packs[0].first.row != 0:  # one pack fits, as at the start, the others do not
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return whole_packs(self, packs)

    monkeypatch.setattr(TransformersEngine, "hidden_states", meagre)
    monkeypatch.setattr(TransformersEngine, "packed_hidden_states", meagre_packs)
    monkeypatch.setattr(teachers, "packing_is_exact", lambda engine, sample: True)
    shown = Notes()
    assert build(config_of(setting, tmp_path / "c", shard_size=14), shown).captured == 14
    assert int(shown.fields["batch"].split()[0]) < 300
    assert max(sizes) > 1
    assert sizes.count(1) >= 10

    monkeypatch.setattr(teachers, "packing_is_exact", lambda engine, sample: False)

    def hopeless(self: TransformersEngine, samples: Any) -> Any:
        if len(samples[0]) > 90:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return whole(self, samples)

    monkeypatch.setattr(TransformersEngine, "hidden_states", hopeless)
    longest = [row for row, sample in by_row(open_cache(captured)).items() if len(sample.input_ids) > 90]
    assert 0 < len(longest) < 14
    summary = build(config_of(setting, tmp_path / "d"), Silent())
    assert summary.quarantined == {"out_of_memory": len(longest)}


def test_a_budget_that_shrank_holds_for_the_batches_to_come(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TransformersEngine.hidden_states
    refused = []

    def limited(self: TransformersEngine, samples: Any) -> Any:
        size = len(samples) * max(len(sample) for sample in samples)
        if size > 200:
            refused.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return whole(self, samples)

    monkeypatch.setattr(TransformersEngine, "hidden_states", limited)
    monkeypatch.setattr(teachers, "packing_is_exact", lambda engine, sample: False)
    config = config_of(setting, tmp_path / "c", shard_size=14, batch_tokens=400)
    assert build(config, Silent()).captured == 14
    assert 1 <= len(refused) <= 2


@pytest.mark.parametrize("form", ["bfloat16", "sharded", "device_map"])
def test_other_forms_of_a_teacher(setting: Setting, captured: Path, tmp_path: Path, form: str) -> None:
    teacher, _ = setting
    config = config_of(setting, tmp_path / "c")
    if form == "bfloat16":
        config = replace(config, dtype="bfloat16")
    elif form == "device_map":
        config = replace(config, device_map="cpu")
    else:
        shutil.copytree(teacher, tmp_path / "sharded")
        (tmp_path / "sharded" / "model.safetensors").unlink()
        model = AutoModelForImageTextToText.from_pretrained(teacher)
        model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
        assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
        config = replace(config, teacher=tmp_path / "sharded")
    assert build(config, Silent()).captured == 14
    tolerance = 0.3 if form == "bfloat16" else 1e-5
    ours, theirs = by_row(open_cache(config.out)), by_row(open_cache(captured))
    for row, sample in ours.items():
        error = np.abs(sample.response.label_logprob - theirs[row].response.label_logprob)
        assert error.max() <= tolerance
    assert open_cache(config.out).manifest.fingerprint.capture["dtype"] == (
        "bfloat16" if form == "bfloat16" else "float32"
    )


def test_a_quantised_teacher_without_its_package_is_refused(setting: Setting, tmp_path: Path) -> None:
    """In one line, before weights are read or even hashed."""
    notes = Notes()
    with pytest.raises(KdcacheError, match="8bit needs the package bitsandbytes; install it") as caught:
        build(config_of(setting, tmp_path / "c", quantization="8bit"), notes)
    assert "\n" not in str(caught.value)
    assert not notes.begun


def test_weights_are_hashed_once_while_they_are_loaded(
    setting: Setting, captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = threading.Event()
    read: list[Path] = []
    digest, load = fingerprint.sha256_of, teachers.load_engine

    def hashed(path: Path) -> str:
        read.append(path)
        assert loading.wait(60), "the teacher is loaded only after its weights are hashed"
        return digest(path)

    def loaded(*arguments: Any, **options: Any) -> Any:
        loading.set()
        return load(*arguments, **options)

    monkeypatch.setattr(fingerprint, "sha256_of", hashed)
    monkeypatch.setattr(teachers, "load_engine", loaded)
    build(config_of(setting, tmp_path / "c"), Silent())
    assert [path.name for path in read] == ["model.safetensors"]
    ours, theirs = (open_cache(path).manifest.identity for path in (tmp_path / "c", captured))
    assert ours == theirs


def test_the_manifest_tells_who_the_teacher_was(setting: Setting, captured: Path) -> None:
    teacher, _ = setting
    cache = open_cache(captured)
    fingerprint = cache.manifest.fingerprint
    tokenizer = AutoProcessor.from_pretrained(teacher).tokenizer
    special = {role: getattr(tokenizer, f"{role}_token") for role in ("eos", "bos", "pad", "unk")}
    assert fingerprint.training["tokenizer"] == tokenizer_digest(tokenizer.get_vocab(), special)
    assert fingerprint.training["vocab_size"] == len(tokenizer) == 340
    assert fingerprint.training["image_seq_tokens"] == 16
    assert fingerprint.training["vision_feature_layer"] == -2
    assert fingerprint.training["model_type"] == "llava"
    assert fingerprint.capture["sharing"] is True
    assert set(cache.assets) >= {
        "config.json",
        "tokenizer.json",
        "processor_config.json",
        "chat_template.jinja",
    }
    assert cache.assets["config.json"] == (teacher / "config.json").read_bytes()


def test_equal_prefixes_are_stored_once(captured: Path) -> None:
    commits = open_cache(captured).commits.values()
    assert sum(commit.counts["shared_images"] for commit in commits) > 0
    samples = list(by_row(open_cache(captured)).values())
    same = [s for s in samples if s.images and s.images[0].path == samples[0].images[0].path]
    assert len(same) > 1
    for sample in same[1:]:
        np.testing.assert_array_equal(sample.visual.logprobs, same[0].visual.logprobs)


# ---- data that is not as it should be ----


def damaged(folder: Path, target: Path) -> None:
    shutil.copytree(folder, target)
    rows = json.loads((target / "data.json").read_text())
    (target / "images" / "pictures" / "0.png").unlink()  # rows 0, 8, 12
    rows[1]["image"] = "pictures/broken.png"
    (target / "images" / "pictures" / "broken.png").write_bytes(
        write_png(target / "x.png", seed=1).read_bytes()[:500]
    )
    rows[2]["conversations"] = []
    rows[3]["image"] = "../x.png"
    rows[5]["conversations"][1]["value"] = "word " * 3000
    rows[6]["conversations"] = rows[6]["conversations"][:1]
    rows[7] = "not an object"
    (target / "data.json").write_text(json.dumps(rows))


def test_bad_rows_go_to_quarantine_and_can_be_tried_again(setting: Setting, tmp_path: Path) -> None:
    teacher, folder = setting
    target = tmp_path / "data"
    damaged(folder, target)
    config = config_of((teacher, target), tmp_path / "c")
    summary = build(config, Silent())
    assert summary.captured == 5
    assert summary.quarantined == {
        "broken_image": 1,
        "broken_row": 1,
        "missing_image": 3,
        "no_turns": 2,
        "outside_root": 1,
        "over_long": 1,
    }
    found = {row.row: row for row in open_cache(config.out).quarantined()}
    assert found[0].reason == "missing_image"
    assert found[0].sample_id == "row-0"
    assert found[1].reason == "broken_image"
    assert found[2].reason == found[6].reason == "no_turns"
    assert found[3].reason == "outside_root"
    assert found[5].reason == "over_long"
    assert found[7].reason == "broken_row"
    assert found[7].sample_id == "7"

    assert build(config, Silent()).already_done
    with pytest.raises(KdcacheError, match="device nonsense"):
        build(replace(config, retry_quarantine=True, device="nonsense"), Silent())
    assert build(config, Silent()).already_done, "a teacher that cannot be loaded costs no shard"
    shutil.copy(folder / "images" / "pictures" / "0.png", target / "images" / "pictures" / "0.png")
    again = build(replace(config, retry_quarantine=True), Silent())
    assert again.captured == 8
    assert "missing_image" not in again.quarantined


def test_samples_that_were_cut_are_counted(setting: Setting, captured: Path, tmp_path: Path) -> None:
    samples = by_row(open_cache(captured))
    limit = max(len(sample.input_ids) for sample in samples.values()) - 1
    summary = build(config_of(setting, tmp_path / "c", max_length=limit, over_long="cut"), Silent())
    cut = by_row(open_cache(tmp_path / "c"))
    shorter = [row for row in cut if len(cut[row].input_ids) < len(samples[row].input_ids)]
    assert summary.captured == 14
    assert summary.cut == len(shorter) > 0
    assert summarise(open_cache(tmp_path / "c"))["cut"] == summary.cut
    for row in shorter:
        sample = cut[row]
        np.testing.assert_array_equal(sample.input_ids, samples[row].input_ids[: len(sample.input_ids)])
        assert sample.labels[-1] == 0  # the end token of an answer


def test_rows_with_their_own_images(setting: Setting, captured: Path, tmp_path: Path) -> None:
    """A Parquet file as `datasets` writes it gives the targets that the same files on disk give."""
    _, folder = setting
    rows = json.loads((folder / "data.json").read_text())
    for row in rows:
        turns = row.pop("conversations")
        roles = {"human": "user", "gpt": "assistant"}
        row["messages"] = [{"role": roles[t["from"]], "content": t["value"]} for t in turns]
        names = [row.pop("image")] if "image" in row else []
        row["images"] = [{"bytes": (folder / "images" / n).read_bytes(), "path": None} for n in names]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet", row_group_size=5)
    root = tmp_path / "images"
    root.mkdir()
    config = replace(config_of(setting, tmp_path / "c"), data=tmp_path / "data.parquet", image_root=root)
    assert build(config, Silent()).captured == 14
    ours, theirs = by_row(open_cache(config.out)), by_row(open_cache(captured))
    for row, sample in ours.items():
        np.testing.assert_array_equal(sample.input_ids, theirs[row].input_ids)
        np.testing.assert_allclose(sample.response.logprobs, theirs[row].response.logprobs, atol=1e-5)
        for image, other in zip(sample.images, theirs[row].images, strict=True):
            assert image.sha256 == other.sha256
            assert (root / image.path).is_file()


def test_half_a_dataset_does_not_vanish_quietly(setting: Setting, tmp_path: Path) -> None:
    """Without --max-bad, 5 bad rows of 100 pass and 6 do not; below 100 rows any number passes."""
    folder = setting[1]
    good = [row for row in json.loads((folder / "data.json").read_text()) if "image" not in row]
    bad = {"id": "bad", "conversations": []}
    for rows, wrong, refused in ((100, 5, False), (100, 6, True), (99, 60, False)):
        data = tmp_path / f"{rows}-{wrong}.json"
        data.write_text(json.dumps([bad] * wrong + [good[i % len(good)] for i in range(rows - wrong)]))
        spec = TargetSpec(targets=("response",))
        config = replace(config_of(setting, tmp_path / data.stem, shard_size=rows, spec=spec), data=data)
        if not refused:
            assert build(config, Silent()).quarantined == {"no_turns": wrong}
            continue
        with pytest.raises(KdcacheError, match=r"6 of 100 .*no_turns 6\), more than --max-bad 0.05; .*\(1:"):
            build(config, Silent())
        assert build(replace(config, max_bad=1.0), Silent()).quarantined == {"no_turns": 6}


def test_a_broken_dataset_stops_early(setting: Setting, tmp_path: Path) -> None:
    teacher, folder = setting
    target = tmp_path / "data"
    damaged(folder, target)
    with pytest.raises(
        KdcacheError, match=r"rows so far cannot be captured .*more than --max-bad 0.1"
    ) as caught:
        build(config_of((teacher, target), tmp_path / "c", max_bad=0.1), Silent())
    assert "\n" not in str(caught.value)
    one_shard = {"shard_size": 14}  # 9 of its 14 rows are bad
    with pytest.raises(KdcacheError, match="9 of 14 rows"):
        build(config_of((teacher, target), tmp_path / "e", max_bad=0.64, **one_shard), Silent())
    assert not list((tmp_path / "e" / "commits").glob("*"))
    assert (
        build(config_of((teacher, target), tmp_path / "e", max_bad=0.65, **one_shard), Silent()).captured == 5
    )
    shutil.rmtree(target / "images" / "pictures")
    rows = json.loads((target / "data.json").read_text())
    (target / "data.json").write_text(json.dumps([row for row in rows if "image" in row]))
    with pytest.raises(KdcacheError, match=r"none of .* rows tried can be captured"):
        build(config_of((teacher, target), tmp_path / "d"), Silent())
    assert not (tmp_path / "d").exists()


def test_what_is_missing_is_said_in_one_line(setting: Setting, tmp_path: Path) -> None:
    teacher, _ = setting
    good = config_of(setting, tmp_path / "c")
    bare = tmp_path / "bare"
    bare.mkdir()
    weightless = tmp_path / "weightless"
    shutil.copytree(teacher, weightless)
    (weightless / "model.safetensors").unlink()
    tinyllava = tmp_path / "tinyllava"
    tinyllava.mkdir()
    (tinyllava / "config.json").write_text('{"model_type": "tinyllava"}')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    for change, message in [
        ({"teacher": tmp_path / "nowhere"}, "teacher folder .* does not exist"),
        ({"teacher": bare}, "no config.json"),
        ({"teacher": weightless}, "no weights"),
        ({"teacher": tinyllava}, "kdcache convert"),
        ({"data": tmp_path / "nowhere.json"}, "data file .* does not exist"),
        ({"image_root": tmp_path / "nowhere"}, "image root .* is not a folder"),
        ({"template": "nonsense"}, "template nonsense"),
        ({"device": "nonsense"}, "device nonsense cannot be used here"),
        ({"out": str(tmp_path / "full")}, "not empty"),
    ]:
        with pytest.raises(KdcacheError, match=message) as caught:
            build(replace(good, **change), Silent())
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_text_that_is_no_unicode_harms_its_own_row_only(setting: Setting, tmp_path: Path) -> None:
    teacher, folder = setting
    target = tmp_path / "data"
    shutil.copytree(folder, target)
    rows = json.loads((target / "data.json").read_text())
    rows[0]["id"] = "lone \ud83d id"
    rows[1]["conversations"][0]["value"] += "lone \ud83d"
    rows[2]["image"] = "lone-\ud83d.png"
    rows[3]["image"] = "café\udce9.png"
    (target / "data.json").write_text(json.dumps(rows))
    config = config_of((teacher, target), tmp_path / "c")
    summary = build(config, Silent())
    cache = open_cache(config.out)
    assert summary.captured == 14 - 3
    assert {row.row: row.reason for row in cache.quarantined()} == {
        1: "processor",
        2: "broken_row",
        3: "broken_row",
    }
    assert by_row(cache)[0].sample_id == "lone ? id"


@pytest.mark.parametrize("change", ["teacher", "data", "spec", "template", "max_length"])
def test_another_identity_is_refused(setting: Setting, captured: Path, tmp_path: Path, change: str) -> None:
    _, folder = setting
    config = config_of(setting, captured)
    if change == "teacher":
        config = replace(config, teacher=tiny_llava(tmp_path / "other", seed=5))
    elif change == "data":
        (tmp_path / "other.json").write_text((folder / "data.json").read_text().replace("circle", "square"))
        config = replace(config, data=tmp_path / "other.json")
    elif change == "spec":
        config = replace(config, spec=replace(FULL, top_k=9))
    elif change == "template":
        config = replace(config, template="plain")
    else:
        config = replace(config, max_length=100)
    with pytest.raises(IdentityMismatch, match="another identity"):
        build(config, Silent())


def test_a_head_that_is_not_understood_is_refused(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    understood = Head.of
    monkeypatch.setattr(Head, "of", lambda *given: replace(understood(*given), logit_scale=1.01))
    with pytest.raises(KdcacheError, match="nothing was captured"):
        build(config_of(setting, tmp_path / "c"), Silent())
    assert not (tmp_path / "c").exists()


def test_place_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert place_among_workers(None, None) == (0, 1)
    assert place_among_workers(2, 4) == (2, 4)
    for rank, size in ((4, 4), (-1, 2), (1, None), (None, 3)):
        with pytest.raises(KdcacheError, match="rank"):
            place_among_workers(rank, size)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert place_among_workers(None, None) == (3, 8)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert place_among_workers(None, None) == (1, 2)
    assert place_among_workers(0, 5) == (0, 5)


def test_workers_of_a_machine_take_different_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert choose_device("auto") == "cuda:0"
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert choose_device("auto") == "cuda:3"
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert choose_device("auto") == choose_device("cuda") == "cuda:1"
    assert choose_device("cpu") == "cpu"


def test_settings_out_of_range_are_refused(setting: Setting, tmp_path: Path) -> None:
    for change in ({"dtype": "int3"}, {"shard_size": 0}, {"max_bad": 2.0}, {"over_long": "drop"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            config_of(setting, tmp_path / "c", **change)


def test_images_from_a_url_make_the_same_cache(setting: Setting, captured: Path, tmp_path: Path) -> None:
    _, folder = setting
    store = fsspec.filesystem("memory")
    store.put(str(folder / "images"), "memory://built/images", recursive=True)
    rest = {"image_root": "memory://built/images", "files": FileCacheConfig(file_cache=tmp_path / "kept")}
    build(replace(config_of(setting, tmp_path / "c"), **rest), Silent())
    cache, other = open_cache(tmp_path / "c"), open_cache(captured)
    assert cache.manifest.dataset["image_root"] == "memory://built/images"
    for row, sample in by_row(cache).items():
        assert [image.sha256 for image in sample.images] == [i.sha256 for i in by_row(other)[row].images]
        np.testing.assert_array_equal(sample.response.logprobs, by_row(other)[row].response.logprobs)
    assert len(list((tmp_path / "kept").iterdir())) == 4

    gone = by_row(cache)[0].images[0].path
    store.rm(f"memory://built/images/{gone}")
    rest["files"] = FileCacheConfig(file_cache=tmp_path / "other")
    summary = build(replace(config_of(setting, tmp_path / "d"), max_bad=1.0, **rest), Silent())
    assert summary.quarantined == {"missing_image": 14 - summary.captured}
    bad = next(open_cache(tmp_path / "d").quarantined())
    assert bad.detail == f"{gone} is not a file under memory://built/images"
