"""`new-student --experts`: the same logits at the start, trained, exported, and loaded by transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cache_schema.errors import KdcacheError, WrongUsage
from cache_schema.progress import Silent
from student.assemble import new_student
from student.experts import upcycle
from student.export import export
from student.settings import NewStudentConfig, TrainConfig
from student.stages import DFT
from student.train import train
from tests.student_caches import make_world


def dense(**changes):
    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 352}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(**{**sizes, **heads, "tie_word_embeddings": True, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, and no flat distributions
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world of caches, and folders of its tower and of a dense and a sparse student of one seed."""
    folder = tmp_path_factory.mktemp("experts")
    made = make_world(folder, rows=12)
    dense().save_pretrained(folder / "language")
    given = {
        "vision_tower": made.student,
        "language_model": folder / "language",
        "like": str(made.cache),
        "seed": 3,
    }
    new_student(NewStudentConfig(**given, out=folder / "dense"))
    told = new_student(NewStudentConfig(**given, out=folder / "sparse", experts=4, active=2))
    return made, folder, told


def logits_of(folder, projector_of=None, seed=0):
    """(T, V) of a prompt with an image; with the projector of another folder's model."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    if projector_of is not None:  # each draws its own
        other = AutoModelForImageTextToText.from_pretrained(projector_of)
        model.model.multi_modal_projector = other.model.multi_modal_projector
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 300, (1, 40), generator=random)
    ids[0, 3:19] = model.config.image_token_id
    pixels = torch.randn(1, 3, 32, 32, generator=random)
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits[0]


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_upcycled_has_the_dense_logits(tied):
    model = dense(tie_word_embeddings=tied)
    ids = torch.randint(0, 352, (3, 30), generator=torch.Generator().manual_seed(1))
    sparse = upcycle(model, experts=4, active=2, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(sparse(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    routers = [layer.mlp.gate.weight for layer in sparse.base_model.layers]
    assert 0.01 < routers[0].std() < 0.03
    assert not torch.equal(*routers)
    again = upcycle(model, experts=4, active=2, seed=0)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in sparse.state_dict().items())


def test_a_sparse_student_has_the_dense_logits_when_transformers_loads_it(world):
    _, folder, told = world
    text = AutoConfig.from_pretrained(folder / "sparse").text_config
    assert (text.model_type, text.num_experts, text.num_experts_per_tok) == ("qwen2_moe", 4, 2)
    torch.testing.assert_close(
        logits_of(folder / "sparse"), logits_of(folder / "dense", folder / "sparse"), rtol=1e-5, atol=1e-5
    )
    assert told["parameters"]["language_model"] > 2 * 3 * 3 * 32 * 48


def test_experts_and_routers_are_trained_and_exported(world, tmp_path):
    made, folder, _ = world
    config = TrainConfig(
        stage=replace(DFT, global_batch=4, max_steps=3, learning_rate=1e-2),
        student=folder / "sparse",
        cache=str(made.cache),
        image_root=made.image_root,
        out=tmp_path / "run",
        trackers=(),
        workers=1,
        log_every=1,
    )
    train(config, Silent())
    before = AutoModelForImageTextToText.from_pretrained(folder / "sparse").state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    for part in ("experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight", "shared_expert.down_proj"):
        named = [name for name in before if part in name]
        assert len(named) == 2, part
        assert moved.issuperset(named), part
    experts = next(value for name, value in after.items() if "experts.down_proj" in name)
    assert not torch.allclose(experts[0], experts[1], atol=1e-4)
    export(tmp_path / "run", tmp_path / "exported", Silent())
    ours, theirs = logits_of(tmp_path / "run" / "model"), logits_of(tmp_path / "exported")
    torch.testing.assert_close(theirs, ours[:, : theirs.shape[1]], rtol=0, atol=0)
    assert (theirs - logits_of(folder / "dense", folder / "sparse")[:, : theirs.shape[1]]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"experts": 2, "active": 4}, "active may be 2 at most"),
        ({"experts": 4}, "experts and active need each other"),
        ({"active": 2}, "^experts and active need each other$"),
        ({"experts": 4, "active": 1}, "active"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(tmp_path, numbers, message):
    with pytest.raises(WrongUsage, match=message) as refused:
        NewStudentConfig(vision_tower=tmp_path, language_model=tmp_path, out=tmp_path / "out", **numbers)
    assert "\n" not in str(refused.value)


def test_another_language_model_is_refused_in_one_line():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    with pytest.raises(
        KdcacheError, match="experts need a Qwen2 language model, and this is llama"
    ) as refused:
        upcycle(model, experts=4, active=2, seed=0)
    assert "\n" not in str(refused.value)
