"""The engine vLLM without vLLM: what is refused, what is asked of it, and what its answers become."""

import gc
import json
import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from cache_schema import KdcacheError, TargetSpec, open_cache
from cache_schema.datasets.rows import open_dataset
from cache_schema.operations.arrow_export import to_arrow
from cache_schema.operations.diff import diff
from cache_schema.operations.summary import summarise
from cache_schema.operations.verify import verify
from cache_schema.progress import Silent
from models.head import Head, read_head
from models.parts import nested_tower_name
from pipeline import teachers
from pipeline.capture import BuildConfig, build
from pipeline.job import open_job
from pipeline.prefix import _changed_after_images
from pipeline.vllm_engine import record_of
from pipeline.vllm_inputs import Prompts
from pipeline.vllm_start import claim_device
from tests.fake_vllm import install
from tests.family_checks import SIZES, rows_for
from tests.tiny_families import make, names
from tests.tiny_models import tiny_dataset, tiny_llava, write_png
from views.inspect_page import print_summary_page
from views.sample_document import sample_document
from views.sample_page import print_sample

SPEC = TargetSpec(targets=("response", "visual", "relation", "prompt"), precision="full", top_k=8)
TEXT = replace(SPEC, targets=("response", "prompt"))


@pytest.fixture(autouse=True)
def environment() -> Any:
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(teacher, folder of data.json and images/)."""
    folder = tmp_path_factory.mktemp("data")
    tiny_dataset(folder, rows=10, images=3)
    return tiny_llava(tmp_path_factory.mktemp("teacher")), folder


def config_of(setting: tuple[Path, Path], out: Path, **rest: Any) -> BuildConfig:
    teacher, folder = setting
    options = {"spec": SPEC, "shard_size": 4, "batch_tokens": 300, "device": "cpu"} | rest
    return BuildConfig(
        teacher=teacher, data=folder / "data.json", image_root=folder / "images", out=str(out), **options
    )


@pytest.fixture(scope="module")
def plain(setting: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("plain") / "c"
    build(config_of(setting, out), Silent())
    return str(out)


# ---- what is refused before anything is loaded ----


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine_mode": "logprobs", "engine": "transformers"}, "add --engine vllm"),
        ({"quantization": "8bit"}, "--quantization"),
        ({"device_map": "auto"}, "--device-map"),
        ({"engine_mode": "logprobs"}, "cannot capture visual and relation; .* --targets response"),
        ({"engine_mode": "logprobs", "spec": replace(TEXT, targets=("relation",))}, "capture relation;"),
        ({"engine_mode": "logprobs", "spec": replace(TEXT, temperatures=(1.0, 2.0))}, "--temperatures"),
        ({"engine_mode": "logprobs", "spec": replace(TEXT, tail_samples=4)}, "--tail-samples"),
        ({}, r"pip install 'kdcache\[vllm\]'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    nowhere = (tmp_path / "no-teacher", tmp_path / "no-data")
    with pytest.raises(KdcacheError, match=said) as caught:
        build(config_of(nowhere, tmp_path / "c", **{"engine": "vllm", **options}), Silent())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_a_spec_without_fields_is_another_spec() -> None:
    spec = replace(TEXT, without=("logsumexp", "entropy"))
    assert TargetSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert "without" not in TEXT.to_json()
    for changed in ({"without": ("tail",)}, {"targets": ("visual",)}, {"temperatures": (1.0, 2.0)}):
        with pytest.raises(ValueError, match=r"without|all fields"):
            replace(spec, **changed)  # type: ignore[arg-type]


# ---- builds ----


def test_hidden_states_make_the_same_cache_and_never_two_models(
    setting: tuple[Path, Path], plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = install(monkeypatch)
    models: list[Any] = []
    load, start = teachers.load_engine, teachers.start_vllm

    def loaded(*args: Any, **kwargs: Any) -> Any:
        engine = load(*args, **kwargs)
        models.append(weakref.ref(engine.model))
        return engine

    def begun(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        assert len(models) == 1
        assert models[0]() is None, "both engines are in memory"
        return start(*args, **kwargs)

    monkeypatch.setattr(teachers, "load_engine", loaded)
    monkeypatch.setattr(teachers, "start_vllm", begun)
    config = config_of(setting, tmp_path / "c", engine="vllm")
    assert build(config, Silent()).captured == 10
    report = diff(open_cache(plain), open_cache(config.out))
    assert report.same, report.to_json()
    assert {entry["key"] for entry in report.identity} == {"engine", "engine_mode"}
    assert max(kind.max for kind in report.kl.values()) < 1e-6
    (llm,) = started
    assert llm.options["enable_prefix_caching"] is False
    assert llm.options["mm_device_do_normalize"] is False
    assert llm.options["max_num_batched_tokens"] >= llm.options["max_model_len"] == 2048
    assert build(config, Silent()).already_done
    assert len(started) == 1, "a finished cache needs no engine"
    assert build(replace(config, engine="transformers"), Silent()).already_done


def test_log_probabilities_make_the_same_responses(
    setting: tuple[Path, Path], plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = install(monkeypatch)
    config = config_of(setting, tmp_path / "c", engine="vllm", engine_mode="logprobs", spec=TEXT)
    assert build(config, Silent()).captured == 10
    assert started[0].cut.org_vocab_size == 340
    cache, whole = open_cache(config.out), open_cache(plain)
    report = diff(whole, cache)
    assert report.same_samples
    assert max(kind.max for kind in report.kl.values()) < 1e-6
    assert cache.spec.without == ("logsumexp", "entropy")
    assert verify(config.out).ok
    for sample in (cache[i] for i in range(len(cache))):
        (other,) = (whole[i] for i in range(len(whole)) if whole.index().row[i] == sample.row)
        for kind in ("response", "prompt"):
            mine, theirs = getattr(sample, kind), getattr(other, kind)
            if theirs is None:
                continue
            assert mine.logsumexp is mine.entropy is None
            np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
            for name in ("logprobs", "tail_logprob", "label_logprob"):
                np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), atol=1e-4)
    with pytest.raises(KdcacheError, match="spec"):  # neither engine goes on with the other's cache
        build(replace(config, engine="transformers", engine_mode="hidden"), Silent())


def test_log_probabilities_follow_the_rules_of_their_kind(
    setting: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    spec = replace(TEXT, entries={"response": 0.006}, top_k=5)
    config = config_of(setting, tmp_path / "c", engine="vllm", engine_mode="logprobs", spec=spec)
    build(config, Silent())
    build(config_of(setting, tmp_path / "plain", spec=spec), Silent())
    cache, whole = open_cache(config.out), open_cache(tmp_path / "plain")
    assert verify(config.out).ok
    assert max(kind.max for kind in diff(whole, cache).kl.values()) < 1e-5
    counts: set[int] = set()
    for number in range(len(cache)):
        mine, theirs = cache[number], whole[number]
        counts |= set(mine.response.counts.tolist())
        np.testing.assert_array_equal(mine.response.counts, theirs.response.counts)
        np.testing.assert_array_equal(mine.response.token_ids, theirs.response.token_ids)
        np.testing.assert_allclose(mine.response.tail_logprob, theirs.response.tail_logprob, atol=1e-4)
        assert mine.prompt.token_ids.shape == (len(mine.prompt), 5)
    assert len(counts) > 3


@pytest.mark.parametrize("precision", ["full", "compact"])
def test_a_cache_without_fields_can_be_looked_at(
    setting: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    precision: Any,
) -> None:
    install(monkeypatch)
    spec = replace(TEXT, precision=precision)
    config = config_of(setting, tmp_path / "c", engine="vllm", engine_mode="logprobs", spec=spec)
    build(config, Silent())
    cache = open_cache(config.out)
    summary = summarise(cache)
    assert summary["positions"]["response"]["mean_entropy"] is None
    print_summary_page(summary)
    document = sample_document(cache, "0")
    assert document["response"][0]["entropy"] is None
    print_sample(cache, "0", None)
    assert "entropy 0" not in capsys.readouterr().out
    assert to_arrow(config.out, tmp_path / "arrow")["samples"] == 10


def test_engines_that_disagree_are_refused_with_both_values(
    setting: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, shift=0.5)
    for mode, spec in (("hidden", SPEC), ("logprobs", TEXT)):
        config = config_of(setting, tmp_path / mode, engine="vllm", engine_mode=mode, spec=spec)
        with pytest.raises(
            KdcacheError, match=r"has the log-probability -?\d.* in transformers and .* in vllm"
        ):
            build(config, Silent())
        assert not (tmp_path / mode).exists()


def test_samples_without_finite_states_are_not_compared(
    setting: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a teacher whose embedding of one token is no number: the rows that hold it go to quarantine."""
    job = open_job(config_of(setting, tmp_path / "c"), Silent())
    tokens = {row: {*job.preparer.prepare(job.dataset[row]).input_ids.tolist()} for row in range(10)}
    probed = [sample.row for sample in job.probes(4)]
    token = next(
        token
        for token in sorted(tokens[probed[0]])
        if 2 <= sum(token in every for every in tokens.values()) <= 7
    )
    folder = tiny_llava(tmp_path / "hole", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    (name,) = (key for key in weights if key.endswith("embed_tokens.weight"))
    weights[name][token] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    install(monkeypatch)
    config = config_of((folder, setting[1]), tmp_path / "c", engine="vllm", spot_check=4)
    summary = build(config, Silent())
    assert summary.quarantined == {"not_finite": sum(token in every for every in tokens.values())}
    assert verify(config.out).ok


@pytest.mark.parametrize(("fault", "reason"), [("refused", "engine"), ("other_ids", "engine_ids")])
def test_a_row_that_vllm_reads_otherwise_is_kept_in_quarantine(
    setting: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    job = open_job(config_of(setting, tmp_path / "c"), Silent())
    samples = [job.preparer.prepare(job.dataset[row]) for row in range(10)]
    probed = {sample.row for sample in job.probes(4)}
    assert len(probed) == 4
    lengths = [
        sum(
            1
            for _ in Prompts(job.processor.tokenizer, Path()).of([replace(s, images=())])[0][
                "prompt_token_ids"
            ]
        )
        for s in samples
    ]
    bad = next(row for row in range(10) if row not in probed and lengths.count(lengths[row]) == 1)
    install(monkeypatch, **{fault: (lengths[bad],)})
    config = config_of(setting, tmp_path / "c", engine="vllm", shard_size=10, batch_tokens=10_000)
    summary = build(config, Silent())
    assert summary.captured == 9
    assert summary.quarantined == {reason: 1}
    assert verify(config.out).ok
    assert bad not in open_cache(config.out).index().row


def test_an_engine_that_broke_is_not_asked_again(
    setting: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, refused=tuple(range(200)), broken=True)
    with pytest.raises(KdcacheError, match="vLLM failed while it ran: this prompt is refused; run the same"):
        build(config_of(setting, tmp_path / "c", engine="vllm"), Silent())


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_attention_in_both_directions_is_refused_before_anything_is_loaded(name: str, tmp_path: Path) -> None:
    teacher = make(name, tmp_path / "teacher")
    tiny_dataset(tmp_path, rows=2, images=1)
    with pytest.raises(KdcacheError, match=f"cannot run a {name}.* both directions; omit --engine vllm"):
        open_job(config_of((teacher, tmp_path), tmp_path / "c", engine="vllm"), Silent())


# ---- the parts ----


# PaliGemma's processor puts tokens around the template's text, and vLLM would not repeat its attention.
@pytest.mark.parametrize("name", [name for name in names(torchvision=False) if name != "paligemma"])
def test_prompts_are_what_the_template_wrote(name: str, tmp_path: Path) -> None:
    teacher = make(name, tmp_path / "teacher")
    for number, (image, size) in enumerate(SIZES.items()):
        write_png(tmp_path / "images" / image, seed=number, size=size)
    (tmp_path / "data.json").write_text(json.dumps(rows_for(name)))
    config = config_of((teacher, tmp_path), tmp_path / "c")
    job = open_job(config, Silent())
    tokenizer = job.processor.tokenizer
    for conversation in (open_dataset(config.data)[row] for row in range(len(job.dataset))):
        sample = job.preparer.prepare(conversation)
        (prompt,) = Prompts(tokenizer, config.image_root).of([sample])
        rendered = job.template.render(conversation.messages)
        ids = tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
        assert prompt["prompt_token_ids"] == ids
        if sample.images:  # what the probe changes must leave whole what stands around an image
            changed = _changed_after_images(sample)
            end = max(expansion.end for expansion in sample.expansions)
            np.testing.assert_array_equal(changed.input_ids[:end], sample.input_ids[:end])
            assert (changed.input_ids[end:] != sample.input_ids[end:]).all()
        images = prompt.get("multi_modal_data", {"image": []})["image"]
        assert [image.size for image in images] == [SIZES[path] for path in conversation.images]


@pytest.mark.parametrize("form", ["tied", "untied", "sharded", "bias"])
def test_the_head_of_a_folder_is_the_models(tmp_path: Path, form: str) -> None:
    folder = tiny_llava(tmp_path / "t", tie_word_embeddings=form in ("tied", "sharded"))
    if form == "sharded":
        model = AutoModelForImageTextToText.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    head = Head.of(AutoModelForImageTextToText.from_pretrained(folder), 340)
    bias = None
    if form == "bias":
        tensors = load_file(folder / "model.safetensors")
        name = next(key for key in tensors if key.endswith("lm_head.weight"))
        bias = torch.arange(352.0)
        tensors[name.replace("weight", "bias")] = bias
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(folder)
    found = read_head(folder, config, vocab_size=340, dtype=torch.float32, device="cpu")
    torch.testing.assert_close(found.weight, head.weight, rtol=0, atol=0)
    assert (found.vocab_size, found.softcap, found.logit_scale) == (340, head.softcap, head.logit_scale)
    assert (found.bias is None) is (bias is None)
    half = read_head(folder, config, vocab_size=340, dtype=torch.bfloat16, device="cpu")
    assert half.weight.dtype == torch.bfloat16


def test_a_folder_without_a_head_says_so(tmp_path: Path) -> None:
    folder = tiny_llava(tmp_path / "t")
    save_file({"a.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(KdcacheError, match=r"^0 weights .* can be the head"):
        read_head(
            folder, AutoConfig.from_pretrained(folder), vocab_size=340, dtype=torch.float32, device="cpu"
        )


def test_tails_of_log_probabilities_alone() -> None:
    logits = torch.randn(50, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    logits[0, 7] = 60.0  # next to nothing outside
    logprobs = logits.log_softmax(1)
    values, ids = logprobs.topk(10, dim=1)
    record = record_of(ids.int().numpy(), values.float().numpy(), np.zeros(50, np.float32), vocab_size=200)
    tail = logprobs.scatter(1, ids, -torch.inf).logsumexp(1).exp().numpy()
    np.testing.assert_allclose(np.exp(record.tail_logprob[:, 0]), tail, atol=2e-6)
    whole = record_of(
        np.argsort(-logprobs.numpy()).astype(np.int32),
        -np.sort(-logprobs.float().numpy()),
        np.zeros(50, np.float32),
        vocab_size=200,
    )
    assert (whole.tail_logprob == -np.inf).all()


@pytest.mark.parametrize(
    ("device", "launcher", "visible", "left", "called"),
    [
        ("auto", {}, None, None, "auto"),
        ("auto", {"LOCAL_RANK": "3"}, None, "3", "auto"),
        ("auto", {"LOCAL_RANK": "1"}, "4,6", "6", "auto"),
        ("auto", {"LOCAL_RANK": "2"}, "4,6", "4", "auto"),
        ("auto", {"SLURM_LOCALID": "1"}, "4,6", "6", "auto"),
        ("cuda", {"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, None, "2", "cuda"),
        ("cuda:1", {"LOCAL_RANK": "0"}, "4,6", "6", "cuda"),
        ("cuda:1", {}, None, "1", "cuda"),
        ("auto", {"LOCAL_RANK": "1"}, "", "", "auto"),
        ("cpu", {"LOCAL_RANK": "1"}, None, None, "cpu"),
    ],
)
def test_a_worker_sees_its_own_device(
    device: str, launcher: dict[str, str], visible: str | None, left: str | None, called: str
) -> None:
    see(launcher, visible)
    assert claim_device(device) == called, "of one device that is left, the number would be another's"
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == left


def see(launcher: dict[str, str], visible: str | None) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        os.environ.pop(name, None)
    os.environ.update(launcher | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))


def test_a_device_that_is_not_in_sight_is_refused() -> None:
    see({}, "4,6")
    with pytest.raises(KdcacheError, match="device cuda:2 cannot be used here"):
        claim_device("cuda:2")


def test_names_of_a_vision_tower() -> None:
    assert nested_tower_name("vision_tower.encoder.x") == "vision_tower.vision_model.encoder.x"
    assert (
        nested_tower_name("model.vision_tower.embeddings.y") == "model.vision_tower.vision_model.embeddings.y"
    )
    for name in ("vision_tower.vision_model.encoder.x", "language_model.vision_tower.z"):
        assert nested_tower_name(name) == name
