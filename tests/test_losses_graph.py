"""The token relationship graph against a twin that takes one token after the other."""

from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema.progress import Silent
from cache_schema.runs import read_metrics
from student.losses import LossWeights, relation_loss
from student.losses.graph import graph_distance
from student.settings import TrainConfig
from student.stages import DFT
from student.train import train
from tests.dense_twins import dense_logits
from tests.student_caches import make_world


def twin(logits, teacher, neighbours):
    """The loss of logits (P, V) and a teacher's Gram matrix (P, P), token by token."""

    def cosine(gram, i, j):
        return gram[i, j] / (gram[i, i] * gram[j, j]).sqrt()

    ours, count = logits @ logits.T, len(teacher)
    total = logits.new_zeros(())
    for i in range(count):
        others = [j for j in range(count) if j != i]
        nearest = sorted(others, key=lambda j: -float(cosine(teacher, i, j)))[:neighbours]
        for among in (nearest, others):
            if not among:
                continue
            log_p = torch.stack([10 * cosine(teacher, i, j) for j in among]).log_softmax(0)
            log_q = torch.stack([10 * cosine(ours, i, j) for j in among]).log_softmax(0)
            total = total + (log_p.exp() * (log_p - log_q)).sum() / count
    return total


def problem(p, d=4, v=20, r=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (p, d), (v, d), (v,), (p, r)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return *(leaf.requires_grad_() for leaf in made[:3]), made[3]


@pytest.mark.parametrize(
    "head", [{}, {"softcap": 3.0}, {"vocab_size": 17}], ids=["plain", "softcap", "padded"]
)
@pytest.mark.parametrize(("p", "neighbours"), [(7, 3), (7, 6), (7, 50), (2, 1), (1, 4)])
@pytest.mark.parametrize("d", [4, 30], ids=["V>D", "V<D"])
def test_value_and_gradients_equal_the_twin(head, p, neighbours, d):
    hidden, weight, bias, factor = problem(p, d)
    ours = relation_loss(hidden, weight, factor, bias=bias, neighbours=neighbours, **head)
    expected = twin(dense_logits(hidden, weight, bias=bias, **head), factor @ factor.T, neighbours)
    torch.testing.assert_close(ours.detach(), expected.detach(), atol=1e-9, rtol=1e-9)
    leaves = (hidden, weight, bias)
    if p == 1:
        assert ours.item() == 0
        return
    gradients = (torch.autograd.grad(each, leaves) for each in (ours, expected))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    neighbours=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_what_fills_up_a_batch_counts_for_nothing(lengths, neighbours, seed):
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    made = torch.zeros(2, len(lengths), longest, longest, dtype=torch.float64)
    real = torch.zeros(len(lengths), longest)
    factors = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
    for number, length in enumerate(lengths):
        real[number, :length] = 1
        for grams in made:
            states = torch.randn(length, 9, generator=generator, dtype=torch.float64)
            grams[number, :length, :length] = states @ states.T
    values, slopes = graph_distance(*made, real, neighbours, factors, torch.float64)
    for number, length in enumerate(lengths):
        alone = [grams[number : number + 1, :length, :length] for grams in made]
        value, slope = graph_distance(*alone, None, neighbours, factors[number : number + 1], torch.float64)
        torch.testing.assert_close(values[number], value[0])
        torch.testing.assert_close(slopes[number, :length, :length], slope[0])
        assert not slopes[number, length:].any()
        assert not slopes[number, :, length:].any()
    assert torch.isfinite(values).all()
    assert (values >= -1e-12).all()


def test_the_gradient_is_that_of_differences():
    _, weight, _, factor = problem(5)
    hidden = problem(5, seed=1)[0]
    assert torch.autograd.gradcheck(
        lambda h, w: relation_loss(h, w, factor, neighbours=2), (hidden, weight), check_undefined_grad=False
    )


def test_equal_relations_cost_nothing_and_tokens_of_zeros_are_no_fault():
    hidden, weight, _, _ = problem(6)
    logits = (hidden @ weight.T).detach()
    assert relation_loss(hidden, weight, logits, neighbours=3).item() == pytest.approx(0.0, abs=1e-12)
    assert relation_loss(hidden, weight, 3 * logits, neighbours=3).item() == pytest.approx(0.0, abs=1e-12)
    empty = torch.zeros_like(hidden).requires_grad_()
    value = relation_loss(empty, weight, logits, neighbours=3)
    (gradient,) = torch.autograd.grad(value, empty)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


def test_a_stage_is_trained_with_it(tmp_path):
    world = make_world(tmp_path / "world", rows=8)
    weights = LossWeights(ce=0.0, response=0.0, visual=0.0, relation=1.0, relation_neighbours=4)
    stage = replace(DFT, losses=weights, global_batch=4, max_steps=16, learning_rate=3e-3)
    out = tmp_path / "run"
    given = {"log_every": 1, "trackers": (), "device": "cpu", "save_every": 0}
    train(
        TrainConfig(
            stage=stage,
            student=world.student,
            cache=str(world.cache),
            image_root=str(world.image_root),
            out=out,
            **given,
        ),
        Silent(),
    )
    terms = [line["relation"] for line in read_metrics(out) if line["group"] == "train"]
    assert sum(terms[-4:]) < 0.9 * sum(terms[:4])
    assert yaml.safe_load((out / "recipe.yaml").read_text())["stage"]["losses"]["relation_neighbours"] == 4
