"""The Sinkhorn distance of SinKD over entries and tail, against a twin that compares pair by pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student.loss_weights import LossWeights
from student.losses import Denominators, DistillationLoss, DistillationTargets, sparse_kl
from tests.dense_twins import dense_logits, ragged_record, sinkhorn_twin, sparse_record
from tests.test_losses_dense import BATCH, LENGTH, TOKENS, WIDTH, head_of, logits_of, states_of, target_of
from tests.test_losses_sparse_kl import close, gradients, problem


def compare(leaves, record, epsilon, tolerance=1e-9, temperature=1.0, **head):
    hidden, weight, bias = leaves
    options = {"temperature": temperature, "bias": bias, **head}
    ours = sparse_kl(hidden, weight, record, divergence=f"sinkhorn:{epsilon}", **options)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = dense_logits(wide[0], wide[1], bias=wide[2], softcap=head.get("softcap"))
    twin = sinkhorn_twin(
        logits, record, epsilon, temperature=temperature, vocab_size=head.get("vocab_size")
    ).mean()
    close([ours.detach()], [twin.detach()], tolerance)
    close(gradients(ours, leaves), gradients(twin, wide), tolerance)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("epsilon", [0.1, 1.0])
@pytest.mark.parametrize(
    "head", [{}, {"softcap": 3.0}, {"vocab_size": 19}], ids=["plain", "softcap", "padded"]
)
def test_value_and_gradients_equal_the_twin(temperature, epsilon, head):
    """Two batches, the second one shorter; rows that keep different tokens, and different numbers of them."""
    *leaves, teacher = problem(n=19)
    teacher = teacher[:, : head.get("vocab_size")]
    compare(leaves, sparse_record(teacher, 4, (1.0, 2.0)), epsilon, temperature=temperature, **head)
    counts = torch.arange(19).clamp(min=1)
    record = ragged_record(teacher[:, :19], counts, (1.0, 2.0))
    if not head or head.get("vocab_size"):
        compare(leaves, record, epsilon, temperature=temperature, vocab_size=19)


def test_float32_agrees_to_rounding():
    *leaves, teacher = problem(n=9, d=16, v=300, dtype=torch.float32)
    compare(leaves, sparse_record(teacher, 8), 0.1, tolerance=5e-5)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    n, d, v = (data.draw(st.integers(1, high), label=name) for name, high in (("n", 18), ("d", 4), ("v", 12)))
    spread = data.draw(st.sampled_from([0.0, 1.0, 30.0]), label="spread")
    *leaves, teacher = problem(n, d, v, seed=data.draw(st.integers(0, 99)), spread=spread)
    record = sparse_record(teacher, data.draw(st.integers(1, v), label="k"))
    compare(leaves, record, data.draw(st.sampled_from([0.1, 0.5, 2.0]), label="epsilon"), tolerance=1e-8)


def test_gradcheck():
    *leaves, teacher = problem(n=3, d=3, v=9)
    record = sparse_record(teacher, 3)
    assert torch.autograd.gradcheck(
        lambda h, w, b: 3 * sparse_kl(h, w, record, divergence="sinkhorn:0.4", bias=b),
        leaves,
        check_undefined_grad=False,
    )


def test_of_one_row_it_is_the_distance_and_of_equals_none():
    """One position: |q - p|_1. The teacher itself in another order: what moves is a permutation."""
    hidden, weight, _, teacher = problem(n=1)
    found = sparse_kl(hidden, weight, sparse_record(teacher, 23), divergence="sinkhorn").item()
    twice = sparse_kl(hidden, weight, sparse_record(teacher, 23), divergence="total_variation").item()
    assert found == pytest.approx(2 * twice, rel=1e-12)
    sure = 9.0 * torch.eye(6, dtype=torch.float64)
    record = sparse_record(sure.roll(1, dims=0), 6)
    assert sparse_kl(sure, torch.eye(6).double(), record, divergence="sinkhorn:0.05").item() < 1e-9


def test_from_hidden_states_it_is_exact():
    """Batches end with samples: those of another one are not compared."""
    student, teacher = head_of(TOKENS, WIDTH, 1), head_of(TOKENS, 5, 2)
    positions = [3, 4, 5, LENGTH + 5, LENGTH + 6]
    target = target_of(positions, states_of(len(positions)))
    targets = DistillationTargets(positions={"response": target})
    hidden = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3)).double()
    labels = torch.full((BATCH, LENGTH), -100)
    labels[0, 4:7], labels[1, 6:8] = 1, 2
    weights = LossWeights(ce=0.0, relation=0.0, tail="dense", divergence="sinkhorn", reduction="token_mean")
    leaf = hidden.clone().requires_grad_()
    total = DistillationLoss(weights, teacher=teacher)(
        leaf, labels, targets, student, Denominators.of(labels, targets)
    ).total
    total.backward()
    own = hidden.clone().requires_grad_()
    z = logits_of(student, own.reshape(-1, WIDTH)[target.positions])
    record = sparse_record(logits_of(teacher, target.states.at(slice(None)).double()), TOKENS)
    parts = []
    for rows in (slice(0, 3), slice(3, 5)):
        cut = type(record)(**{**vars(record), "token_ids": record.token_ids[rows]})
        cut.logprobs, cut.tail_logprob = record.logprobs[rows], record.tail_logprob[rows]
        parts.append(sinkhorn_twin(z[rows], cut, 0.1))
    twin = torch.cat(parts).mean()
    twin.backward()
    torch.testing.assert_close(total, twin, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(leaf.grad, own.grad, rtol=1e-9, atol=1e-12)
