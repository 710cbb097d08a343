"""The second head: which losses use it, that a resumed run has the same one, that no model holds it."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from cache_schema import open_cache
from cache_schema.datasets.image_roots import open_root
from cache_schema.errors import WrongUsage
from cache_schema.progress import Silent
from models.folder import load_model, load_processor
from student.collate import Collator
from student.export import export
from student.losses import LossWeights
from student.losses.plan import plan_of
from student.model import DistilledStudent
from student.pixels import PixelInputs
from student.stages import DFT, stage_from
from tests.student_caches import make_world
from tests.student_driver import run

DUAL = LossWeights(dual_head=True, ce=0.7, relation=0.3)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def batch_for(world, weights):
    cache = open_cache(world.cache)
    collator = Collator(
        pixels=PixelInputs(load_processor(world.student)),
        image_root=open_root(world.image_root),
        pad_token_id=1,
        image_token_id=2,
        targets=("response", "visual", "relation"),
        losses=weights,
    )
    return collator([cache[index] for index in range(4)])


def stepped(world, weights, second=None):
    """The student with the gradients of one batch, its loss and the batch."""
    model = load_model(world.student, torch.float32)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # untied
    student = DistilledStudent(model, weights, vocab_size=340, trainable=DFT.trainable).eval()
    if second is not None:
        with torch.no_grad():
            student.second_head.weight.add_(second)
    batch = batch_for(world, weights)
    parts = student(batch.inputs, batch.labels, batch.targets, batch.denominators)
    parts.total.backward()
    return student, parts, batch


def head_gradient(student):
    return student.model.get_output_embeddings().weight.grad


@pytest.mark.parametrize("reduction", ["sample_mean", "token_mean"])
def test_each_term_has_its_head_and_the_backbone_has_both(world, reduction):
    terms = {"ce": 0.7, "relation": 0.3, "reduction": reduction}
    dual, parts, batch = stepped(world, LossWeights(**terms, dual_head=True))
    labels_only, labelled, _ = stepped(
        world, LossWeights(ce=0.7, response=0.0, visual=0.0, relation=0.0, reduction=reduction)
    )
    cache_only, distilled, _ = stepped(world, LossWeights(**{**terms, "ce": 0.0}))
    torch.testing.assert_close(parts.total, labelled.total + distilled.total, rtol=1e-6, atol=0)
    assert parts.ce == labelled.ce > 0
    assert {**parts.kl, "relation": parts.relation} == {**distilled.kl, "relation": distilled.relation}
    assert parts.unsupervised == labelled.unsupervised
    torch.testing.assert_close(head_gradient(dual), head_gradient(labels_only), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(dual.second_head.weight.grad, head_gradient(cache_only), rtol=1e-5, atol=1e-7)
    of_both = [dict(each.model.named_parameters()) for each in (labels_only, cache_only)]
    head = dual.model.get_output_embeddings().weight
    for name, parameter in dual.model.named_parameters():
        if parameter.grad is not None and parameter is not head:
            together = sum(each[name].grad for each in of_both)
            torch.testing.assert_close(parameter.grad, together, rtol=1e-4, atol=1e-6)
    for weights in DUAL.by_head:  # both plans are made by the loader
        assert plan_of(batch.labels, batch_for(world, DUAL).targets, weights).weights == weights
    made = batch_for(world, DUAL).targets
    assert [plan_of(batch.labels, made, each) for each in DUAL.by_head] == [made.plan, made.label_plan]


def test_a_changed_second_head_moves_the_terms_from_the_cache_alone(world):
    generator = torch.Generator().manual_seed(0)
    before_student, before, batch = stepped(world, DUAL)
    noise = torch.randn(before_student.second_head.weight.shape, generator=generator)
    student, after, _ = stepped(world, DUAL, second=noise)
    assert after.ce == before.ce
    assert all(after.kl[kind] != before.kl[kind] for kind in ("response", "visual"))
    assert after.relation != before.relation
    measured = [
        each.measure(batch.inputs, batch.labels, batch.targets)[0] for each in (before_student, student)
    ]
    assert measured[0].by_term == measured[1].by_term  # of the model that is written


def test_a_killed_run_resumes_with_the_same_heads_and_writes_a_model_of_one(world, tmp_path):
    common = {
        "base": "dft",
        "stage": {
            "global_batch": 8,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "losses": {"dual_head": True},
        },
        "student": world.student,
        "cache": str(world.cache),
        "image_root": world.image_root,
        "micro_batch": 4,
        "save_every": 1,
        "log_every": 1,
        "keep": 1,
        "device": "cpu",
    }
    again = {**common, "out": tmp_path / "again", "resume": True}
    codes = run(
        tmp_path / "runs.json", [{**common, "out": tmp_path / "whole"}, {**again, "kill": ("step", 3)}, again]
    )
    assert codes == [0, -signal.SIGKILL, 0]
    models, checkpoints = (
        [load_file(next((tmp_path / name).glob(pattern))) for name in ("whole", "again")]
        for pattern in ("model/model.safetensors", "checkpoints/*/weights.safetensors")
    )
    for whole, resumed in (models, checkpoints):
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    own = load_model(world.student, torch.float32)
    begun, second = own.get_output_embeddings().weight, checkpoints[0]["second_head.weight"]
    assert not torch.equal(second, begun)
    assert not any("second" in name for name in models[0])
    assert len(models[0]) == len(load_file(world.student / "model.safetensors"))
    trained = load_model(tmp_path / "whole/model", torch.float32).get_output_embeddings().weight
    assert not torch.equal(trained, second)
    export(tmp_path / "whole", tmp_path / "exported", Silent())
    exported = load_file(tmp_path / "exported/model.safetensors")
    assert exported.keys() == models[0].keys()
    assert "second_head" not in (tmp_path / "exported/config.json").read_text()


def test_what_means_nothing_is_refused():
    with pytest.raises(WrongUsage, match="dual_head needs the cross entropy and a term from the cache"):
        LossWeights(dual_head=True, ce=0.0)
    with pytest.raises(WrongUsage, match="dual_head needs the cross entropy and a term from the cache"):
        stage_from({"base": "sft", "losses": {"dual_head": True}})
    stage = stage_from({"base": "dft", "losses": {"dual_head": True}})
    assert stage.to_json()["losses"]["dual_head"] is True
    assert "dual_head" not in DFT.to_json()["losses"]
