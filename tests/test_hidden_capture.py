"""Hidden states and the teacher's head in a cache: captured, checked, repaired, carried into other caches."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from cache_schema import CacheDamaged, KdcacheError, TargetSpec, open_cache
from cache_schema.errors import WrongUsage
from cache_schema.operations.merge import merge
from cache_schema.operations.select import select
from cache_schema.operations.summary import summarise
from cache_schema.operations.verify import verify
from cache_schema.progress import Silent
from models.head import Head
from models.stored_head import head_file, head_of
from pipeline.capture import BuildConfig, build
from tests.tiny_models import tiny_dataset, tiny_llava

SPEC = TargetSpec(targets=("response", "visual", "hidden"), precision="full", top_k=8)
TOKENS = 340


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(teacher, dataset); 4 images of 12 rows, so that some are shared."""
    teacher = tiny_llava(tmp_path_factory.mktemp("teacher"), hidden=48, dtype=torch.bfloat16)
    return teacher, tiny_dataset(tmp_path_factory.mktemp("data"), rows=12, images=4)


def config_of(setting, out, **rest):
    teacher, data = setting
    options = {"spec": SPEC, "shard_size": 5, "batch_tokens": 300, "device": "cpu"} | rest
    return BuildConfig(teacher=teacher, data=data.data, image_root=data.image_root, out=str(out), **options)


@pytest.fixture(scope="module")
def captured(setting, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "c"
    assert build(config_of(setting, out), Silent()).captured == 12
    return out


def samples_of(cache):
    return sorted((cache[i] for i in range(len(cache))), key=lambda sample: sample.row)


def test_hidden_states_and_head_give_the_records(captured):
    """The distribution of stored states and head against the record, which the exact states made."""
    cache = open_cache(captured)
    head = head_of(cache)
    assert head.weight.dtype == torch.bfloat16
    found = {"response": [], "visual": []}
    for sample in samples_of(cache):
        assert sample.hidden.keys() == ({"response", "visual"} if sample.images else {"response"})
        for kind, states in sample.hidden.items():
            record = sample.records[kind]
            assert states.shape == (len(sample.positions[kind]), 48)
            made = head.logits(torch.from_numpy(states)).double().log_softmax(1)
            assert made.shape[1] == TOKENS
            at = made.gather(1, torch.from_numpy(record.token_ids).long()).numpy()
            np.testing.assert_allclose(at[:, 0], record.logprobs[:, 0], atol=0.15)
            p = np.exp(record.logprobs.astype(np.float64))
            rest = np.log1p(-np.exp(at).sum(axis=1)) - record.tail_logprob[:, 0]
            kl = (p * (record.logprobs - at)).sum(axis=1) - np.exp(record.tail_logprob[:, 0]) * rest
            found[kind].append(kl)
    for kind, parts in found.items():
        assert 0 <= np.concatenate(parts).mean() < 1e-3, kind


def test_the_head_is_that_of_the_teacher_without_padding(setting, captured):
    model = AutoModelForImageTextToText.from_pretrained(setting[0], dtype=torch.bfloat16)
    (file,) = (captured / "head").iterdir()
    stored = open_cache(captured).manifest.head
    assert (file.name, stored.rows, stored.width) == (f"{stored.sha256}.safetensors", TOKENS, 48)
    assert (stored.dtype, stored.bias, stored.softcap, stored.logit_scale) == ("bfloat16", False, None, 1.0)
    assert torch.equal(load_file(file)["weight"], model.lm_head.weight[:TOKENS])


def test_a_head_comes_back_with_all_that_it_has():
    weight = torch.randn(7, 3, dtype=torch.float16)
    head = Head(weight=weight, bias=torch.randn(7), softcap=30.0, logit_scale=0.5, vocab_size=5)
    stored, data = head_file(head)

    class Holder:
        url = "memory"
        manifest = type("M", (), {"head": stored})

        def head_bytes(self):
            return data

    back, hidden = head_of(Holder()), torch.randn(4, 3)
    assert torch.equal(back.logits(hidden), head.logits(hidden))
    assert back.weight.dtype == torch.float16
    assert torch.equal(back.bias, head.bias[:5])


def test_a_quantised_head_is_refused_in_one_line():
    with pytest.raises(KdcacheError, match="head is in int8, which cannot be stored"):
        head_file(Head(weight=torch.zeros(4, 2, dtype=torch.int8)))


def test_the_cache_verifies_and_tells_its_bytes(captured):
    report = verify(captured)
    assert report.ok, report.problems
    assert report.leftovers == []
    sizes = summarise(open_cache(captured))["bytes"]
    head = open_cache(captured).manifest.head.size
    assert sizes["by_part"]["head"] == head
    assert sizes["by_part"]["hidden_response"] > 0 < sizes["by_part"]["hidden_visual"]
    assert sizes["per_position"]["hidden_response"] > 48
    assert sizes["total"] == sum(sizes["by_part"].values()) == sizes["when_complete"]


def test_a_lost_and_a_damaged_head_are_found_and_written_again(setting, captured, tmp_path):
    for fault in ("lost", "damaged"):
        out = tmp_path / fault
        shutil.copytree(captured, out)
        (file,) = (out / "head").iterdir()
        whole = file.read_bytes()
        if fault == "lost":
            file.unlink()
        else:
            file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        (problem,) = verify(out, repair=True).problems
        assert problem.file == f"head/{file.name}"
        with pytest.raises(CacheDamaged, match="head"):
            head_of(open_cache(out))
        assert not build(config_of(setting, out), Silent()).already_done
        assert file.read_bytes() == whole
        assert verify(out).ok
        assert build(config_of(setting, out), Silent()).already_done


def test_a_selection_and_a_merge_keep_states_bit_by_bit(captured, tmp_path):
    select(str(captured), "row < 7", str(tmp_path / "a"))
    select(str(captured), "row > 4", str(tmp_path / "b"))
    merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "m"))
    ours = {sample.row: sample for sample in samples_of(open_cache(captured))}
    for name in ("a", "b", "m"):
        assert verify(tmp_path / name).ok
        cache = open_cache(tmp_path / name)
        assert torch.equal(head_of(cache).weight, head_of(open_cache(captured)).weight)
        assert 0 < len(cache) < 12 or name == "m"
        for sample in samples_of(cache):
            for kind, states in ours[sample.row].hidden.items():
                np.testing.assert_array_equal(sample.hidden[kind], states)


def test_a_stage_reads_no_hidden_states_unless_asked(captured):
    block = open_cache(captured).read_shard(0, parts=("response",))
    assert block.sample(0).hidden == {}
    everything = open_cache(captured).read_shard(0)
    assert everything.nbytes > block.nbytes


def test_one_kind_alone_can_be_kept(setting, tmp_path):
    spec = replace(SPEC, hidden=("response",))
    build(config_of(setting, tmp_path / "c", spec=spec), Silent())
    assert verify(tmp_path / "c").ok
    assert all(sample.hidden.keys() == {"response"} for sample in samples_of(open_cache(tmp_path / "c")))


def test_the_spec_keeps_its_form_and_refuses_what_cannot_be():
    assert "hidden" not in TargetSpec().to_json()
    assert SPEC.hidden == ("response", "visual")
    document = SPEC.to_json()
    assert document["hidden"] == {"kinds": ["response", "visual"], "codec": "int8"}
    assert TargetSpec.from_json(document) == SPEC
    with pytest.raises(WrongUsage, match="in codec int4"):
        TargetSpec.from_json(document | {"hidden": {"kinds": ["response"], "codec": "int4"}})
    for targets, hidden, told in (
        (("relation", "hidden"), (), "need response or visual"),
        (("response",), ("response",), "not among the targets"),
        (("response", "hidden"), ("visual",), "not among the targets"),
    ):
        with pytest.raises(WrongUsage, match=told):
            TargetSpec(targets=targets, hidden=hidden)
    with pytest.raises(WrongUsage, match="cannot capture hidden"):
        build(
            BuildConfig(
                teacher="t",
                data="d",
                image_root="i",
                out="o",
                engine="vllm",
                engine_mode="logprobs",
                spec=TargetSpec(targets=("response", "hidden")),
            ),
            Silent(),
        )
