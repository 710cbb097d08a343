"""relation_loss against its dense twin, on both of its ways."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cache_schema import TargetSpec
from cache_schema.format.codecs.relation import encode_relation
from cache_schema.format.records import StoredRelation
from student.losses import (
    Denominators,
    DistillationLoss,
    DistillationTargets,
    Head,
    LossWeights,
    PlannedTargets,
    RelationTargets,
    cross_entropy,
    relation_loss,
)
from student.losses.plan import group_images
from student.losses.products import Gradients, HeadProducts
from student.losses.relation import RelationWork, run_relations, takes_gram
from tests.dense_twins import Operations, dense_logits, imitate_wide_products, relation_twin


def problem(p=6, d=4, v=20, r=3, seed=0, dtype=torch.float64):
    """hidden (p, d), weight (v, d), bias (v,), requiring gradients, and a factor (p, r)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((p, d), (v, d), (v,), (p, r))
    *leaves, factor = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return *(leaf.requires_grad_() for leaf in leaves), factor


def close(ours, twins, tolerance):
    for ours_one, twin in zip(ours, twins, strict=True):
        scale = max(1.0, twin.abs().max().item())
        assert (ours_one.double() - twin.double()).abs().max().item() <= tolerance * scale


def both_ways(hidden, head, image, memory_budget=2**20):
    """Value and gradients (hidden, weight, bias) of one image, through W^T W and through logits."""
    found = []
    for through_gram in (True, False):
        products = HeadProducts(head, hidden.dtype)
        gradients = Gradients(hidden, head, products, (True, True, head.bias is not None))
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr("student.losses.relation.takes_gram", lambda *_, way=through_gram: way)
            work = RelationWork(groups=group_images((image,)), weights=hidden.new_full((1,), 0.7))
            value = run_relations(hidden, head, work, products, gradients, memory_budget)
        weight = gradients.weight.result()
        bias = [] if gradients.bias is None else [gradients.bias]
        found.append([value, gradients.hidden, weight, *bias])
    return found


@pytest.mark.parametrize(
    "head", [{}, {"softcap": 3.0}, {"vocab_size": 17}], ids=["plain", "softcap", "padded"]
)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("d", [4, 30], ids=["V>D", "V<D"])
def test_value_and_gradients_equal_the_dense_twin(head, with_bias, d):
    hidden, weight, bias, factor = problem(d=d)
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    bias = bias if with_bias else None
    for target in ({"factor": factor}, {"gram": factor @ factor.T}):
        ours = relation_loss(hidden, weight, bias=bias, **target, **head)
        twin = relation_twin(dense_logits(hidden, weight, bias=bias, **head), factor @ factor.T)
        close([ours.detach()], [twin.detach()], 1e-12)
        close(torch.autograd.grad(ours, leaves), torch.autograd.grad(twin, leaves), 1e-9)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_both_ways_agree_for_any_shape_and_block(data):
    p, d, v, r = (
        data.draw(st.integers(1, high), label=n) for n, high in zip("pdvr", (8, 9, 25, 5), strict=True)
    )
    hidden, weight, bias, factor = problem(p, d, v, r, seed=data.draw(st.integers(0, 99)))
    bias = bias.detach() if data.draw(st.booleans(), label="bias") else None
    columns = data.draw(st.integers(1, v), label="columns")
    head = Head(weight=weight.detach(), bias=bias, vocab_size=columns, logit_scale=0.5)
    image = RelationTargets(positions=torch.randperm(p), sample=0, factor=factor)
    budget = data.draw(st.integers(1, 3 * p * v * 8), label="memory budget")
    through_gram, through_logits = both_ways(hidden.detach(), head, image, budget)
    close(through_gram, through_logits, 1e-9)


@pytest.mark.parametrize("head", [{}, {"softcap": 2.0}], ids=["gram", "logits"])
def test_gradcheck(head):
    hidden, weight, bias, factor = problem(p=4, d=3, v=9, r=2)
    for one in ((lambda h, w, b: 2 * relation_loss(h, w, factor, bias=b, memory_budget=1, **head)),):
        assert torch.autograd.gradcheck(one, (hidden, weight, bias), check_undefined_grad=False)


def test_float32_keeps_the_digits_of_a_small_distance():
    """1 - cos of 1e-8 is below float32's step at 1."""
    hidden, weight, _, _ = problem(p=8, d=6, v=50)
    logits = (hidden @ weight.T).detach()
    gram = logits @ logits.T
    noise = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gram = gram + 1e-4 * gram.norm() / 8 * (noise + noise.T) / 2
    twin = relation_twin(logits, gram).item()
    assert 1e-9 < twin < 1e-7
    single = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    ours = relation_loss(*single, gram=gram)
    assert ours.item() == pytest.approx(twin, rel=1e-2)
    exact = torch.autograd.grad(relation_twin(hidden @ weight.T, gram), (hidden, weight))
    for mine, true in zip(torch.autograd.grad(ours, single), exact, strict=True):
        assert (mine.double() - true).norm() < 1e-2 * true.norm()


def test_nothing_to_compare_with():
    hidden, weight, _, factor = problem()
    for zeroed in ((hidden.detach() * 0, factor), (hidden.detach(), factor * 0)):
        states = zeroed[0].requires_grad_()
        value = relation_loss(states, weight, zeroed[1])
        assert value.item() == 1.0
        assert not any(grad.any() for grad in torch.autograd.grad(value, (states, weight)))


def test_large_logits():
    hidden, weight, _, factor = problem(p=30, d=16, v=400, dtype=torch.float32)
    ours = relation_loss(hidden * 3e3, weight, factor)
    assert ours.item() == pytest.approx(relation_loss(hidden, weight, factor).item(), rel=1e-5)


class Tied(nn.Module):
    """A model whose embedding is its head."""

    def __init__(self, v, d):
        super().__init__()
        self.embedding = nn.Embedding(v, d, dtype=torch.float64)
        self.mix = nn.Linear(d, d, dtype=torch.float64)

    def forward(self, ids):
        return torch.tanh(self.mix(self.embedding(ids)))


def test_tied_embeddings_get_both_gradients():
    torch.manual_seed(0)
    model, ids = Tied(20, 5), torch.tensor([3, 1, 4, 1, 5])
    factor = torch.randn(5, 2, dtype=torch.float64)
    relation_loss(model(ids), model.embedding.weight, factor).backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    relation_twin(model(ids) @ model.embedding.weight.T, factor @ factor.T).backward()
    close(ours, [parameter.grad for parameter in model.parameters()], 1e-12)


def test_the_gram_of_a_frozen_head_is_made_once_until_it_changes():
    p, d, v = 3, 4, 20
    hidden, weight, bias, factor = problem(p, d, v)
    weight, bias = nn.Parameter(weight.detach(), requires_grad=False), bias.detach()
    per_call = 2 * p * d * d + 3 * p * p * d + p * p * 3 + d * d * p  # nothing with V in it

    def cost(**kwargs):
        with Operations() as seen:
            value = relation_loss(hidden, weight, factor, **kwargs)
            value.backward()
        return value.item(), seen.multiplications

    first, with_gram = cost()
    again, without = cost()
    assert first == again
    assert without == with_gram - v * d * d
    assert without <= per_call
    with torch.no_grad():
        weight.mul_(torch.linspace(0.5, 2, v, dtype=torch.float64)[:, None])
    changed, cost_after_change = cost()
    assert cost_after_change == with_gram
    assert changed == pytest.approx(relation_twin(hidden @ weight.T, factor @ factor.T).item(), rel=1e-12)
    # Another number of columns, or a bias, is another matrix; and a bias may change alone.
    for kwargs in ({"vocab_size": 11}, {"bias": bias}):
        twin = relation_twin(dense_logits(hidden, weight, **kwargs), factor @ factor.T).item()
        assert cost(**kwargs)[0] == pytest.approx(twin, rel=1e-12)
    bias += 1.0
    twin = relation_twin(dense_logits(hidden, weight, bias=bias), factor @ factor.T).item()
    assert cost(bias=bias)[0] == pytest.approx(twin, rel=1e-12)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_cheaper_way_is_taken(trained):
    """For a trained head few tokens go through logits, many through W^T W; a frozen one always through it."""
    d, v = 32, 400
    for p in (2, 8, 16, 64):
        hidden, weight, _, factor = problem(p, d, v)
        weight = weight.detach().requires_grad_(trained)
        head = Head(weight=weight)
        gradients = Gradients(hidden, head, HeadProducts(head, hidden.dtype), (True, trained, False))
        gram_way = takes_gram(head, [p], gradients)
        relation_loss(hidden, weight, factor)  # a frozen head's matrix is there from now on
        with Operations() as seen:
            relation_loss(hidden, weight, factor).backward()
        through_logits = v * (4 * p * d + 2 * p * p)
        through_gram = 2 * v * d * d if trained else 0
        assert gram_way == (not trained or through_gram <= through_logits)
        small = 10 * p * d * (p + d)
        assert seen.multiplications <= min(through_gram, through_logits) + small
    assert trained == (not takes_gram(head, [2], gradients))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_bfloat16_sums_in_float32(trained):
    hidden, weight, _, factor = problem(p=40, d=64, v=500)
    low = [hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_(trained)]
    value = relation_loss(*low, factor)
    wide = [x.detach().double().requires_grad_() for x in low]
    twin = relation_twin(wide[0] @ wide[1].T, factor @ factor.T)
    assert value.item() == pytest.approx(twin.item(), rel=1e-5)
    value.backward()
    for leaf, true in zip(low, torch.autograd.grad(twin, wide), strict=True):
        if leaf.requires_grad:
            rounding = (true.bfloat16().double() - true).norm()
            assert (leaf.grad.double() - true).norm() < 1.05 * rounding


def test_a_head_that_is_not_linear_has_bfloat16_factors_too(monkeypatch):
    products = imitate_wide_products(monkeypatch)
    p, d, v = 24, 16, 300
    hidden, weight, _, factor = problem(p, d, v, dtype=torch.float32)
    states = hidden.detach().bfloat16().requires_grad_()
    relation_loss(states, weight, factor, softcap=3.0).backward()
    assert sum(products) == 4 * p * d * v + 2 * p * p * v
    wide = [leaf.detach().double().requires_grad_() for leaf in (states, weight)]
    twin = relation_twin(dense_logits(*wide, softcap=3.0), factor.double() @ factor.double().T)
    for ours, true in zip((states, weight), torch.autograd.grad(twin, wide), strict=True):
        assert (ours.grad.double() - true).norm() < 1e-2 * true.norm()


def test_images_share_one_matrix_and_one_pass():
    """Three images of different token counts, their losses and gradients summed, at the cost of one W^T W."""
    hidden, weight, _, _ = problem(p=14, d=4, v=30)
    cuts = (torch.arange(0, 5), torch.arange(5, 7), torch.arange(7, 14))
    grams = [torch.randn(len(c), 2, dtype=torch.float64) for c in cuts]
    images = tuple(RelationTargets(positions=c, sample=0, factor=f) for c, f in zip(cuts, grams, strict=True))
    labels = torch.full((1, 14), -100)
    targets = DistillationTargets(relations=images)
    loss = DistillationLoss(LossWeights(relation=1.0))
    with Operations() as seen:
        parts = loss(hidden[None], labels, targets, Head(weight=weight), Denominators.of(labels, targets))
    assert seen.multiplications < 2 * 30 * 4 * 4 + 14 * 4 * 100
    twin = sum(relation_twin(hidden[c] @ weight.T, f @ f.T) for c, f in zip(cuts, grams, strict=True)) / 3
    close([parts.relation], [twin.detach()], 1e-12)
    close(
        torch.autograd.grad(parts.total, (hidden, weight)), torch.autograd.grad(twin, (hidden, weight)), 1e-9
    )


def stored_relation(rank, tokens, seed=0):
    """A record of every size of step that a cache can hold."""
    random = np.random.default_rng(seed)
    return StoredRelation(
        tokens=tokens,
        residual=0.0,
        norm=1.0,
        scales=random.random(rank, np.float32),
        columns=random.integers(0, 1 << 16, (rank, tokens), np.uint16),
        triangle=np.zeros(0, np.float16),
    )


def test_steps_make_the_factor_of_the_host_on_the_device():
    """Bit by bit, for every step that 16 bits hold."""
    stored = replace(
        stored_relation(256, 256), columns=np.arange(1 << 16, dtype=np.uint16).reshape(256, 256).copy()
    )
    target = RelationTargets.of(stored, torch.arange(256), 0)
    assert target.factor is None
    steps = group_images((target, replace(target, stored=stored)))[0].steps
    assert steps.columns.dtype == torch.int16
    assert steps.factor().dtype == torch.float32
    for made in steps.factor():
        assert made.numpy().tobytes() == stored.decode().factor.tobytes()
    moved = group_images((target.to("meta"),))[0].steps
    assert moved.columns.device.type == moved.scales.device.type == "meta"


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["linear", "softcap"])
@pytest.mark.parametrize("neighbours", [0, 2], ids=["cosine", "graph"])
def test_records_of_all_forms_in_one_batch(softcap, neighbours):
    """Steps of several ranks and lengths, a factor in floats and a triangle: their groups are filled up, and
    value and gradients are those of the factors as the host decodes them."""
    cuts = (torch.arange(0, 5), torch.arange(5, 9), torch.arange(9, 14), torch.arange(14, 18))
    steps = [stored_relation(rank, len(cut), rank) for rank, cut in zip((3, 7, 2), cuts, strict=False)]
    floats = replace(steps[1], columns=np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32))
    records = [*steps, floats]
    exact = encode_relation(steps[1].decode(), TargetSpec(relation="exact"))
    cuts, records = (*cuts, cuts[1]), [*records, exact]
    hidden, weight, _, _ = problem(p=18, d=4, v=30)
    labels = torch.full((1, 18), -100)
    weights = LossWeights(relation=1.0, relation_neighbours=neighbours)
    found = []
    for of in (records, [record.decode() for record in records]):
        images = tuple(RelationTargets.of(record, cut, 0) for record, cut in zip(of, cuts, strict=True))
        targets = PlannedTargets.of(labels, DistillationTargets(relations=images), weights)
        head = Head(weight=weight, softcap=softcap)
        parts = DistillationLoss(weights)(
            hidden[None], labels, targets, head, Denominators.of(labels, targets)
        )
        found.append((parts.total, *torch.autograd.grad(parts.total, (hidden, weight))))
        assert {group.steps is None for group in targets.plan.groups} == (
            {True, False} if of is records else {True}
        )
    close(*found, 1e-6)


def test_what_does_not_fit_is_refused():
    hidden, weight, _, factor = problem()
    with pytest.raises(ValueError, match="exactly one of factor and gram"):
        relation_loss(hidden, weight)
    with pytest.raises(ValueError, match="exactly one of factor and gram"):
        relation_loss(hidden, weight, factor, gram=factor @ factor.T)
    with pytest.raises(ValueError, match=r"factor must be \(6, r\), not \(5, 3\)"):
        relation_loss(hidden, weight, factor[:5])
    with pytest.raises(ValueError, match=r"gram must be \(6, 6\)"):
        relation_loss(hidden, weight, gram=factor)
    assert math.isnan(RelationTargets(positions=torch.arange(2), sample=0, factor=factor[:2]).norm)
    assert cross_entropy(hidden, weight, torch.zeros(6, dtype=torch.int64)).item() > 0
