"""Dense losses from stored hidden states and the teacher's head, against dense twins in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema.errors import WrongUsage
from models.head import Head
from student.losses import (
    Denominators,
    DistillationLoss,
    DistillationTargets,
    LossWeights,
    PositionTargets,
    TeacherStates,
    sparse_kl,
)
from student.stages import DFT
from tests.dense_twins import dense_kl, dense_logits

TOKENS, ROWS, WIDTH, THEIRS = 37, 41, 6, 5  # tokens, with the student's padding, and widths
BATCH, LENGTH = 2, 9


def states_of(count: int, seed: int = 0) -> TeacherStates:
    generator = torch.Generator().manual_seed(seed)
    return TeacherStates(
        values=torch.randint(-127, 128, (count, THEIRS), generator=generator).to(torch.int8),
        scales=torch.rand(count, generator=generator) / 60,
        channels=torch.stack(
            [
                torch.stack([torch.randn(THEIRS, generator=generator), torch.ones(THEIRS)]),
                torch.stack([torch.zeros(THEIRS), torch.rand(THEIRS, generator=generator) + 0.5]),
            ]
        ),
        channel_of=torch.arange(count) % 2,
    )


def head_of(rows: int, width: int, seed: int, **rest) -> Head:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(rows, generator=generator, dtype=torch.float64)
    return Head(weight=weight, bias=bias, vocab_size=TOKENS, **rest)


def target_of(positions: list[int], states: TeacherStates) -> PositionTargets:
    places = torch.tensor(positions)
    return PositionTargets(
        positions=places,
        samples=places // LENGTH,
        token_ids=torch.zeros(len(places), 1, dtype=torch.long),
        logprobs=torch.zeros(len(places), 1),
        tail_logprob=torch.zeros(len(places), 1),
        temperatures=torch.ones(1),
        states=states,
    )


def logits_of(head: Head, states: torch.Tensor) -> torch.Tensor:
    return dense_logits(
        states,
        head.weight,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    )


CASES = {
    "linear": ({}, 1.0, False),
    "trained": ({}, 1.0, True),
    "capped": ({"softcap": 3.0, "logit_scale": 0.5}, 1.0, True),
    "warm": ({}, 2.0, True),
}


@pytest.fixture
def batch():
    labels = torch.full((BATCH, LENGTH), -100)
    labels[0, 4:8] = torch.tensor([1, 5, 30, 2])
    labels[1, 6:] = torch.tensor([9, 0, 36])
    response = [3, 4, 5, 6, LENGTH + 5, LENGTH + 6, LENGTH + 7]
    targets = DistillationTargets(
        positions={
            "response": target_of(response, states_of(len(response))),
            "visual": target_of([1, 2, 3], states_of(3, seed=1)),
        }
    )
    hidden = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3)).double()
    return hidden, labels, targets


def twin(hidden, labels, targets, student, teacher, weights):
    """The objective from both models' logits, by autograd."""
    total = 0.0
    logits = logits_of(student, hidden.reshape(-1, WIDTH))
    for b in range(BATCH):
        supervised = (labels[b, 1:] != -100).nonzero()[:, 0]
        if weights.ce:
            ce = torch.nn.functional.cross_entropy(logits[b * LENGTH + supervised], labels[b, supervised + 1])
            total = total + weights.ce * ce / BATCH
        for kind, target in targets.positions.items():
            own = (target.samples == b).nonzero()[:, 0]
            if len(own):
                states = target.states.at(slice(None)).double()[own]
                theirs = torch.nn.functional.pad(
                    logits_of(teacher, states), (0, ROWS - TOKENS), value=-torch.inf
                )
                kl = dense_kl(logits[target.positions[own]], theirs, temperature=weights.temperature)
                total = total + weights.by_target[kind] * kl.mean() / BATCH
    return total


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("budget", [None, 1])
def test_value_and_gradients_are_those_of_dense_logits(batch, name, budget):
    hidden, labels, targets = batch
    form, temperature, trained = CASES[name]
    weights = LossWeights(tail="dense", temperature=temperature, visual=0.7, relation=0.0)
    student, teacher = head_of(ROWS, WIDTH, 1, **form), head_of(TOKENS, THEIRS, 2, softcap=4.0)
    found = []
    for which in ("ours", "twin"):
        leaves = [hidden.clone().requires_grad_(), student.weight.clone(), student.bias.clone()]
        if trained:
            leaves[1].requires_grad_()
            leaves[2].requires_grad_()
        head = Head(weight=leaves[1], bias=leaves[2], vocab_size=TOKENS, **form)
        if which == "ours":
            loss = DistillationLoss(weights, teacher=teacher, memory_budget=budget)
            parts = loss(leaves[0], labels, targets, head, Denominators.of(labels, targets))
            total = parts.total
            assert float(parts.ce + parts.kl["response"] + 0.7 * parts.kl["visual"]) == pytest.approx(
                float(total.detach()), rel=1e-12
            )
        else:
            total = twin(leaves[0], labels, targets, head, teacher, weights)
        total.backward()
        found.append([total.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "divergence",
    ["reverse_kl", "jsd:0.3", "total_variation", "adaptive_kl", "dac_kl:0.9", "dbild", "dbild:5"],
)
def test_other_divergences_are_those_of_a_record_of_every_token(batch, divergence):
    hidden, labels, targets = batch
    student, teacher = head_of(ROWS, WIDTH, 1), head_of(TOKENS, THEIRS, 2)
    whole = {}
    for kind, target in targets.positions.items():
        logprobs = logits_of(teacher, target.states.at(slice(None)).double()).log_softmax(1)
        whole[kind] = PositionTargets(
            positions=target.positions,
            samples=target.samples,
            token_ids=logprobs.argsort(dim=1, descending=True),
            logprobs=logprobs.sort(dim=1, descending=True).values,
            tail_logprob=torch.full((len(logprobs), 1), -torch.inf),
            temperatures=torch.ones(1),
        )
    totals, slopes = [], []
    for tail, held in (("dense", targets), ("bucket", DistillationTargets(positions=whole))):
        weights = LossWeights(tail=tail, divergence=divergence, relation=0.0)
        leaf = hidden.clone().requires_grad_()
        loss = DistillationLoss(weights, teacher=teacher)
        total = loss(leaf, labels, held, student, Denominators.of(labels, held)).total
        total.backward()
        totals.append(total.detach())
        slopes.append(leaf.grad)
    torch.testing.assert_close(*totals, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*slopes, rtol=1e-8, atol=1e-11)


def test_a_frozen_head_needs_a_log_sum_exp_and_one_vector(batch):
    """KL = sum p log p - (h . W^T p + b . p) + LSE(W h + b), with gradient W^T q - W^T p in h: what the
    teacher adds is one vector per position, whatever the student's states."""
    hidden, labels, targets = batch
    student, teacher = head_of(ROWS, WIDTH, 1), head_of(TOKENS, THEIRS, 2)
    target = targets.positions["response"]
    targets = DistillationTargets(positions={"response": target})
    leaf = hidden.clone().requires_grad_()
    loss = DistillationLoss(
        LossWeights(ce=0.0, relation=0.0, tail="dense", reduction="token_mean"), teacher=teacher
    )
    total = loss(leaf, labels, targets, student, Denominators.of(labels, targets)).total
    total.backward()
    log_p = logits_of(teacher, target.states.at(slice(None)).double()).log_softmax(1)
    p = log_p.exp()
    vector, constant = p @ student.weight[:TOKENS], (p * log_p).sum(1) - p @ student.bias[:TOKENS]
    states = hidden.reshape(-1, WIDTH)[target.positions]
    logits = logits_of(student, states)
    value = constant - (states * vector).sum(1) + logits.logsumexp(1)
    slope = logits.softmax(1) @ student.weight - vector
    torch.testing.assert_close(total.detach(), value.mean(), rtol=1e-12, atol=1e-12)
    made = leaf.grad.reshape(-1, WIDTH)[target.positions]
    torch.testing.assert_close(made, slope / len(value), rtol=1e-9, atol=1e-12)


def test_what_is_missing_or_unlike_is_refused(batch):
    hidden, labels, targets = batch
    student, weights = head_of(ROWS, WIDTH, 1), LossWeights(tail="dense", relation=0.0)
    counts = Denominators.of(labels, targets)
    with pytest.raises(ValueError, match="needs the teacher's hidden states and its head"):
        DistillationLoss(weights)(hidden, labels, targets, student, counts)
    other = head_of(TOKENS + 1, THEIRS, 2)
    other = Head(weight=other.weight)
    with pytest.raises(ValueError, match="the teacher has 38 tokens, the student 37"):
        DistillationLoss(weights, teacher=other)(hidden, labels, targets, student, counts)
    with pytest.raises(Exception, match="kl_share below 1 does not go with tail `dense`"):
        LossWeights(tail="dense", kl_share=0.5)


def bernoulli_twin(hidden, target, student, teacher, temperature):
    """The mean over positions of T^2 times the mean over tokens of KL(1/2 || sigmoid(x)), by both events."""
    logits = logits_of(student, hidden.reshape(-1, WIDTH))[target.positions, :TOKENS]
    q = torch.sigmoid((logits - logits_of(teacher, target.states.at(slice(None)).double())) / temperature)
    kl = 0.5 * (0.5 / q).log() + 0.5 * (0.5 / (1.0 - q)).log()
    return temperature**2 * kl.mean()


def binary_kl(hidden, labels, target, student, teacher, temperature, budget=None):
    targets = DistillationTargets(positions={"response": target})
    weights = LossWeights(
        ce=0.0,
        relation=0.0,
        tail="dense",
        divergence="binary_kl",
        temperature=temperature,
        reduction="token_mean",
    )
    loss = DistillationLoss(weights, teacher=teacher, memory_budget=budget)
    return loss(hidden, labels, targets, student, Denominators.of(labels, targets)).total


@pytest.mark.parametrize("form", [{}, {"softcap": 3.0, "logit_scale": 0.5}], ids=["linear", "capped"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("budget", [None, 1])
def test_binary_kl_is_that_of_two_events_of_every_token(batch, form, temperature, budget):
    hidden, labels, targets = batch
    target, teacher = targets.positions["response"], head_of(TOKENS, THEIRS, 2, softcap=4.0)
    made = head_of(ROWS, WIDTH, 1, **form)
    found = []
    for which in (binary_kl, bernoulli_twin):
        leaves = [hidden.clone().requires_grad_(), *(each.clone() for each in (made.weight, made.bias))]
        head = Head(
            weight=leaves[1].requires_grad_(), bias=leaves[2].requires_grad_(), vocab_size=TOKENS, **form
        )
        if which is binary_kl:
            total = binary_kl(leaves[0], labels, target, head, teacher, temperature, budget)
        else:
            total = bernoulli_twin(leaves[0], target, head, teacher, temperature)
        total.backward()
        assert not leaves[1].grad[TOKENS:].any()
        found.append([total.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert found[0][0] > 0.1


def test_binary_kl_passes_gradcheck_and_sees_a_shift_that_a_softmax_does_not(batch):
    hidden, labels, targets = batch
    target, teacher, student = (
        targets.positions["response"],
        head_of(TOKENS, THEIRS, 2),
        head_of(ROWS, WIDTH, 1),
    )
    assert torch.autograd.gradcheck(
        lambda states: binary_kl(states, labels, target, student, teacher, 2.0),
        hidden.requires_grad_(),
        check_undefined_grad=False,
    )
    assert student.bias is not None
    shifted = Head(weight=student.weight, bias=student.bias + 3.0, vocab_size=TOKENS)
    one, other = (binary_kl(hidden, labels, target, head, teacher, 1.0).item() for head in (student, shifted))
    assert other > one + 0.1


@settings(max_examples=30, deadline=None)
@given(
    spread=st.sampled_from([0.0, 1e-3, 1.0, 50.0, 1e5]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    seed=st.integers(0, 99),
)
def test_binary_kl_is_finite_and_its_slope_bounded_for_any_logits(spread, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = (spread * torch.randn(1, 3, WIDTH, generator=generator, dtype=torch.float64)).requires_grad_()
    labels, target = torch.tensor([[-100, 1, 2]]), target_of([0, 1], states_of(2, seed))
    weight = torch.eye(TOKENS, WIDTH, dtype=torch.float64)
    head, teacher = Head(weight=weight), head_of(TOKENS, THEIRS, seed)
    total = binary_kl(hidden, labels, target, head, teacher, temperature)
    (slope,) = torch.autograd.grad(total, hidden)
    x = (hidden[0, :2] @ weight.T - logits_of(teacher, target.states.at(slice(None)).double())) / temperature
    expected = temperature**2 * (torch.nn.functional.softplus(x) - x / 2 - math.log(2)).mean()
    assert total.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    assert total.item() >= 0.0
    assert slope.abs().max() <= temperature / (2 * TOKENS * 2) + 1e-15


def test_binary_kl_without_logits_is_refused():
    with pytest.raises(WrongUsage, match="binary_kl needs tail `dense`: it compares logits"):
        LossWeights(divergence="response=binary_kl")
    record = target_of([0], states_of(1))
    with pytest.raises(WrongUsage, match="take a stage with tail `dense`"):
        sparse_kl(torch.zeros(1, 2), torch.zeros(3, 2), record, divergence="binary_kl")
    dual = LossWeights(divergence="binary_kl", tail="dense", dual_head=True, temperature=2.0)
    assert dual.by_head[0].divergences["response"].name == "binary_kl"


def test_a_stage_asks_for_hidden_states_by_its_tail():
    from dataclasses import replace

    dense = replace(DFT, losses=LossWeights(tail="dense"))
    assert dense.parts == ("response", "visual", "relation", "hidden")
    assert DFT.parts == DFT.targets
    assert dense.only(()).parts == ()
