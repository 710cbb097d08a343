"""sparse_kl and cross_entropy against their dense twins, in value and gradients."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from student.losses import cross_entropy, relation_loss, sparse_kl
from student.losses.fused import memory_budget_of
from tests.dense_twins import (
    Operations,
    dense_kl,
    dense_logits,
    imitate_wide_products,
    ragged_record,
    relation_twin,
    sparse_kl_twin,
    sparse_record,
)

TAILS = ("bucket", "renormalize", "drop", "sampled")
TEMPERATURES = (0.5, 1.0, 2.0, 8.0)


def problem(n=6, d=5, v=23, seed=0, spread=2.0, dtype=torch.float64):
    """hidden (n, d), weight (v, d), bias (v,), all requiring gradients, and the teacher's logits (n, v)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = [normal(n, d), normal(v, d), normal(v)]
    return *(x.to(dtype).requires_grad_() for x in leaves), normal(n, v) * spread


def gradients(value, leaves):
    return torch.autograd.grad(value, leaves, allow_unused=True)


def close(ours, twins, tolerance):
    for ours_one, twin in zip(ours, twins, strict=True):
        scale = max(1.0, twin.abs().max().item())
        assert (ours_one.double() - twin.double()).abs().max().item() <= tolerance * scale


def compare(leaves, record, *, tail, temperature, weights=None, tolerance=1e-9, memory_budget=2**20, **head):
    """Value and gradients of sparse_kl equal the twin's in float64."""
    hidden, weight, bias = leaves
    ours = sparse_kl(
        hidden,
        weight,
        record,
        tail=tail,
        temperature=temperature,
        weights=weights,
        bias=bias,
        memory_budget=memory_budget,
        **head,
    )
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = dense_logits(wide[0], wide[1], bias=wide[2], softcap=head.get("softcap"))
    vocab_size = head.get("vocab_size")
    per_position = sparse_kl_twin(logits, record, tail=tail, temperature=temperature, vocab_size=vocab_size)
    shares = torch.full_like(per_position, 1 / len(per_position)) if weights is None else weights
    twin = (shares * per_position).sum()
    close([ours.detach()], [twin.detach()], tolerance)
    close(gradients(ours, leaves), gradients(twin, wide), tolerance)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(
    "head", [{}, {"softcap": 3.0}, {"vocab_size": 19}], ids=["plain", "softcap", "padded"]
)
def test_value_and_gradients_equal_the_dense_twin(tail, temperature, head):
    *leaves, teacher = problem()
    record = sparse_record(
        teacher[:, : head.get("vocab_size")], 4, TEMPERATURES, draws=7, sample_temperature=temperature
    )
    compare(leaves, record, tail=tail, temperature=temperature, **head)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(
    "head", [{}, {"softcap": 3.0}, {"vocab_size": 19}], ids=["plain", "softcap", "padded"]
)
def test_records_of_different_counts_equal_the_dense_twin(tail, temperature, head):
    """One entry, all but one, and those between; rows are filled up with token 0, which may be an entry."""
    *leaves, teacher = problem()
    teacher = teacher[:, : head.get("vocab_size")]
    counts = torch.tensor([1, 4, teacher.shape[1] - 1, 2, 1, 9])
    record = ragged_record(teacher, counts, TEMPERATURES, draws=7, sample_temperature=temperature)
    compare(leaves, record, tail=tail, temperature=temperature, **head)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_counts(data):
    n, v = data.draw(st.integers(1, 6), label="n"), data.draw(st.integers(2, 30), label="v")
    counts = torch.tensor(data.draw(st.lists(st.integers(1, v), min_size=n, max_size=n), label="counts"))
    temperature = data.draw(st.sampled_from(TEMPERATURES), label="T")
    tail = data.draw(st.sampled_from(TAILS[:3]), label="tail")
    spread = data.draw(st.sampled_from([0.0, 3.0, 30.0]), label="spread")
    *leaves, teacher = problem(n, 4, v, seed=data.draw(st.integers(0, 99)), spread=spread)
    record = ragged_record(teacher, counts, TEMPERATURES)
    compare(leaves, record, tail=tail, temperature=temperature, tolerance=1e-8)


@pytest.mark.parametrize("tail", TAILS)
def test_float32_agrees_to_rounding(tail):
    *leaves, teacher = problem(n=9, d=16, v=300, dtype=torch.float32)
    record = sparse_record(teacher, 8, (1.0, 2.0), draws=9, sample_temperature=2.0)
    compare(leaves, record, tail=tail, temperature=2.0, tolerance=3e-6)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_chunk_temperature_and_k(data):
    n, d, v = (data.draw(st.integers(1, high), label=name) for name, high in (("n", 7), ("d", 6), ("v", 30)))
    k = data.draw(st.integers(1, v), label="k")
    temperature = data.draw(st.sampled_from(TEMPERATURES), label="T")
    tail = data.draw(st.sampled_from(TAILS if k < v else TAILS[:3]), label="tail")
    budget = data.draw(st.integers(1, 16 * 8 * (v + 16)), label="memory budget")
    spread = data.draw(st.sampled_from([0.0, 0.1, 3.0, 30.0]), label="spread")
    *leaves, teacher = problem(n, d, v, seed=data.draw(st.integers(0, 99)), spread=spread)
    if data.draw(st.booleans(), label="ties"):
        teacher = teacher.round()
    draws = 5 if tail == "sampled" else 0
    record = sparse_record(teacher, k, TEMPERATURES, draws=draws, sample_temperature=temperature)
    weights = torch.rand(n, dtype=torch.float64) * (torch.rand(n) > 0.3)
    compare(
        leaves,
        record,
        tail=tail,
        temperature=temperature,
        weights=weights,
        memory_budget=budget,
        tolerance=1e-8,
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
def test_all_entries_kept_is_the_dense_kl(tail, temperature):
    hidden, weight, _, teacher = problem()
    record = sparse_record(teacher, teacher.shape[1], TEMPERATURES)
    ours = sparse_kl(hidden, weight, record, tail=tail, temperature=temperature)
    twin = dense_kl(hidden @ weight.T, teacher, temperature).mean()
    close([ours.detach()], [twin.detach()], 1e-9)
    close(gradients(ours, (hidden, weight)), gradients(twin, (hidden, weight)), 1e-9)


def test_bucket_agrees_with_the_chain_rule_of_kl():
    """KL(p || q) = KL over (S, tail) + p_tail KL(p | tail || q | tail): nothing of the twin in it."""
    hidden, weight, _, teacher = problem(v=40)
    record = sparse_record(teacher, 6)
    student = hidden @ weight.T
    inside = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, record.token_ids, True)
    outside_teacher = teacher.masked_fill(inside, -math.inf)
    outside_student = student.masked_fill(inside, -1e300)
    p_tail = (teacher.softmax(1) * ~inside).sum(1)
    twin = (dense_kl(student, teacher) - p_tail * dense_kl(outside_student, outside_teacher)).mean()
    ours = sparse_kl(hidden, weight, record)
    close([ours.detach()], [twin.detach()], 1e-12)
    close(gradients(ours, (hidden, weight)), gradients(twin, (hidden, weight)), 1e-12)


@pytest.mark.parametrize("head", [{}, {"softcap": 2.5}], ids=["plain", "softcap"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", TAILS)
def test_gradcheck(tail, temperature, head):
    *leaves, teacher = problem(n=3, d=3, v=9)
    record = sparse_record(teacher, 3, (1.0, 2.0), draws=4, sample_temperature=temperature)
    # 3 times: the gradient that arrives is not 1. A budget of 1 byte: one position a chunk.
    assert torch.autograd.gradcheck(
        lambda h, w, b: (
            3 * sparse_kl(h, w, record, tail=tail, temperature=temperature, bias=b, memory_budget=1, **head)
        ),
        leaves,
        check_undefined_grad=False,
    )


def test_temperature_scales_value_and_gradient_alike():
    """At k = V and nearly equal large-T softmaxes, T^2 KL tends to the variance form, whatever T."""
    hidden, weight, _, teacher = problem(seed=3)
    record = sparse_record(teacher, teacher.shape[1], (1.0, 50.0, 100.0))
    values = [sparse_kl(hidden, weight, record, temperature=t) for t in (50.0, 100.0)]
    assert values[1].item() == pytest.approx(values[0].item(), rel=0.05)
    norms = [gradients(value, (hidden,))[0].norm().item() for value in values]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_sampled_gradient_is_unbiased():
    """The mean gradient over 4,000 draws is the dense one: a z-test for each component, Bonferroni."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight, _, teacher = problem(n=2, d=4, v=30, spread=1.0)
    temperature, rounds = 2.0, 4000
    record = sparse_record(teacher, 4, (1.0, temperature), sample_temperature=temperature)
    outside = (teacher / temperature).scatter(1, record.token_ids, -math.inf).softmax(1)
    # One call for all rounds: position n of round r is row r * 2 + n, and keeps a gradient of its own.
    rows = rounds * 2
    repeated = hidden.detach().repeat(rounds, 1).requires_grad_()
    for name in ("token_ids", "logprobs", "tail_logprob"):
        setattr(record, name, getattr(record, name).repeat(rounds, 1))
    record.sampled_ids = torch.multinomial(
        outside.repeat(rounds, 1), 3, replacement=True, generator=generator
    )
    record.sampled_counts = torch.ones_like(record.sampled_ids)
    value = sparse_kl(
        repeated,
        weight.detach(),
        record,
        tail="sampled",
        temperature=temperature,
        weights=torch.ones(rows, dtype=torch.float64),
    )
    drawn = gradients(value, (repeated,))[0].reshape(rounds, -1)
    dense = gradients(dense_kl(hidden @ weight.detach().T, teacher, temperature).sum(), (hidden,))[
        0
    ].flatten()
    z = (drawn.mean(0) - dense) / (drawn.std(0) / math.sqrt(rounds))
    assert drawn.std(0).min() > 1e-3  # the draws do matter
    assert z.abs().max() < 3.5  # two-sided 5e-4 each, 4e-3 over the 8 components


def test_draws_may_repeat_or_carry_counts():
    hidden, weight, _, teacher = problem(n=1, v=12)
    repeated = sparse_record(teacher, 3, draws=1)
    a, b = sorted(set(range(12)) - set(repeated.token_ids[0].tolist()))[:2]
    repeated.sampled_ids = torch.tensor([[a, b, a, a]])
    repeated.sampled_counts = torch.ones(1, 4, dtype=torch.int32)
    counted = sparse_record(teacher, 3, draws=1)
    counted.sampled_ids = torch.tensor([[b, a, 0, 0]])
    counted.sampled_counts = torch.tensor([[1, 3, 0, 0]])
    values = [sparse_kl(hidden, weight, record, tail="sampled") for record in (repeated, counted)]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-14)
    twin = sparse_kl_twin(hidden @ weight.T, counted, tail="sampled")
    assert values[0].item() == pytest.approx(twin.item(), rel=1e-12)


@pytest.mark.parametrize("log_tail", [math.log(1e-12), -80.0])
def test_tails_keep_their_digits_in_float32(log_tail):
    """A student's tail of 1e-12 and less: log(1 - sum) would give log 0."""
    v, k = 40, 4
    logits = torch.full((1, v), log_tail - math.log(v - k), dtype=torch.float64)
    logits[0, :k] = -math.log(k)
    logits[0, k] += 1.0  # so that the tail is not flat
    hidden = torch.eye(1, dtype=torch.float32).requires_grad_()
    weight = logits.T.float().clone().requires_grad_()
    wide = weight.detach().double().requires_grad_()
    for teacher_log_tail in (math.log(0.1), log_tail - 2.0):
        teacher = torch.zeros(1, v, dtype=torch.float64)
        teacher[0, k:] = teacher_log_tail + math.log(k) - math.log(v - k)
        record = sparse_record(teacher, k, dtype=torch.float32)
        ours = sparse_kl(hidden, weight, record)
        twin = sparse_kl_twin(wide.T, sparse_record(teacher, k))[0]
        assert ours.item() == pytest.approx(twin.item(), rel=1e-5, abs=1e-6)
        ours_grad, twin_grad = gradients(ours, (weight,))[0], gradients(twin, (wide,))[0]
        # The tail's own gradients, of 1e-13 and less, have their digits too.
        assert torch.allclose(ours_grad[k:].double(), twin_grad[k:], rtol=2e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
def test_extreme_logits(tail, temperature, dtype):
    """Logits of +-1e4, and ids that the bias forbids (-inf), which the teacher gives no mass."""
    *leaves, teacher = problem(n=4, v=12, dtype=dtype)
    with torch.no_grad():
        leaves[0][0] *= 1e4
        leaves[2][0], leaves[2][1] = 1e4, -1e4
        leaves[2][10:] = -math.inf
    teacher[:, 10:] = -math.inf
    teacher[1] *= 1e4
    for k in (1, 3, 12):
        record = sparse_record(teacher, k, TEMPERATURES)
        hidden, weight, bias = leaves
        ours = sparse_kl(hidden, weight, record, tail=tail, temperature=temperature, bias=bias)
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        # The twin's own 0 * inf: it sees the allowed columns only.
        ids = record.token_ids.clone()
        record.token_ids = ids[:, : min(k, 10)]
        record.logprobs = record.logprobs[:, : min(k, 10)]
        logits = dense_logits(wide[0], wide[1][:10], bias=wide[2][:10])
        twin = sparse_kl_twin(logits, record, tail=tail, temperature=temperature).mean()
        # Next to 1e4 a float32 logit is known to 5e-4.
        tolerance = 1e-9 if dtype == torch.float64 else 5e-4
        close([ours.detach()], [twin.detach()], tolerance)
        ours_grads = [grad.nan_to_num(nan=1e30) for grad in gradients(ours, leaves)]
        assert all((grad[10:] == 0).all() for grad in ours_grads[1:])
        close(ours_grads, gradients(twin, wide), tolerance)


def test_all_mass_in_the_tail_and_none():
    hidden, weight, _, teacher = problem(n=2, v=12)
    record = sparse_record(teacher, 3, (1.0, 2.0))
    record.logprobs[0], record.tail_logprob[0] = -math.inf, 0.0  # nothing inside
    record.logprobs[1] = record.logprobs[1].log_softmax(0)
    record.tail_logprob[1] = -math.inf  # nothing outside
    for temperature in (1.0, 2.0):
        value = sparse_kl(hidden, weight, record, temperature=temperature)
        q = ((hidden @ weight.T) / temperature).softmax(1)
        inside = torch.softmax(record.logprobs[1] / temperature, 0)
        first = -torch.log(1 - q[0, record.token_ids[0]].sum())
        second = (inside * (inside.log() - q[1, record.token_ids[1]].log())).sum()
        twin = temperature**2 * (first + second) / 2
        close([value.detach()], [twin.detach()], 1e-12)
        close(gradients(value, (hidden, weight)), gradients(twin, (hidden, weight)), 1e-12)


def test_positions_of_weight_0_contribute_exactly_0():
    hidden, weight, _, teacher = problem(n=4)
    record = sparse_record(teacher, 4)
    weights = torch.tensor([0.5, 0.0, 0.25, 0.0])
    clean = sparse_kl(hidden, weight, record, weights=weights)
    clean_grads = gradients(clean, (hidden, weight))
    with torch.no_grad():
        hidden[1], hidden[3] = math.nan, 1e30
    record.logprobs[1] = math.inf
    value = sparse_kl(hidden, weight, record, weights=weights)
    assert value.item() == clean.item()
    for ours, other in zip(gradients(value, (hidden, weight)), clean_grads, strict=True):
        assert torch.equal(ours, other)
    assert not clean_grads[0][[1, 3]].any()
    # A record without any mass, too, asks nothing of the student.
    record.logprobs[:], record.tail_logprob[:] = -math.inf, -math.inf
    empty = sparse_kl(hidden, weight, record, weights=torch.tensor([0.5, 0.0, 0.5, 0.0]))
    assert empty.item() == 0.0
    assert not any(grad.any() for grad in gradients(empty, (hidden, weight)))


def test_no_positions():
    hidden, weight, _, teacher = problem(n=3)
    record = sparse_record(teacher, 4)
    for value in (
        sparse_kl(hidden, weight, record, weights=torch.zeros(3)),
        cross_entropy(hidden, weight, torch.full((3,), -100)),
        sparse_kl(hidden[:0], weight, sparse_record(teacher[:0], 4)),
    ):
        assert value.item() == 0.0
        assert not any(grad.any() for grad in gradients(value, (hidden, weight)) if grad is not None)


def test_padding_columns_are_an_error_of_the_student():
    """The teacher gives them no mass, the student's softmax does: KL and CE push them down."""
    hidden, weight, bias, teacher = problem(v=20)
    with torch.no_grad():
        bias[17:] += 6.0  # most of the student's mass
    padded = teacher.index_fill(1, torch.arange(17, 20), -math.inf)
    dense = dense_kl(dense_logits(hidden, weight, bias=bias), padded).mean()
    for k in (17, 20):  # a record of every token, with and without the columns that have no mass
        value = sparse_kl(hidden, weight, sparse_record(padded, k), bias=bias, vocab_size=17)
        assert value.item() == pytest.approx(dense.item())
    labels = torch.tensor([3, 16, 0, 1, 2, 5])
    for value in (
        sparse_kl(hidden, weight, sparse_record(teacher[:, :17], 5), bias=bias, vocab_size=17),
        cross_entropy(hidden, weight, labels, bias=bias, vocab_size=17),
    ):
        assert (gradients(value, (bias,))[0][17:] > 0.1).all()


def test_what_does_not_fit_is_refused():
    hidden, weight, _, teacher = problem()
    record = sparse_record(teacher, 4, (1.0, 2.0))
    with pytest.raises(ValueError, match=r"temperature 3.0 was not captured, only at \[1.0, 2.0\]"):
        sparse_kl(hidden, weight, record, temperature=3.0)
    with pytest.raises(ValueError, match=r"temperature 3.0 was not captured"):
        sparse_kl(hidden, weight, record, temperature=3.0, tail="drop")
    assert sparse_kl(hidden, weight, record, temperature=3.0, tail="renormalize").item() > 0
    with pytest.raises(ValueError, match="none were captured"):
        sparse_kl(hidden, weight, record, tail="sampled")
    drawn = sparse_record(teacher, 4, (1.0, 2.0), draws=3, sample_temperature=2.0)
    with pytest.raises(ValueError, match=r"drawn at temperature 2.0; at 1.0 the draws are biased"):
        sparse_kl(hidden, weight, drawn, tail="sampled")
    with pytest.raises(ValueError, match=r"token id 2[0-2] has mass, but the student has 20 tokens"):
        sparse_kl(hidden, weight, sparse_record(teacher, 23), vocab_size=20)
    with pytest.raises(ValueError, match="hidden has 5 positions, the target 6"):
        sparse_kl(hidden[:5], weight, record)
    with pytest.raises(ValueError, match="weights must be"):
        sparse_kl(hidden, weight, record, weights=torch.ones(5))
    with pytest.raises(ValueError, match="tail must be bucket"):
        sparse_kl(hidden, weight, record, tail="ghost")
    with pytest.raises(ValueError, match=r"temperature must be positive"):
        sparse_kl(hidden, weight, record, temperature=0.0)
    with pytest.raises(ValueError, match=r"vocab_size must lie in 1..23"):
        sparse_kl(hidden, weight, record, vocab_size=24)
    with pytest.raises(ValueError, match=r"hidden must be \(N, 5\)"):
        sparse_kl(hidden[:, :4], weight, record)


def test_second_derivatives_raise():
    hidden, weight, _, teacher = problem()
    value = sparse_kl(hidden, weight, sparse_record(teacher, 4))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(value, (hidden,), create_graph=True)


def test_backward_twice_over_a_kept_graph():
    hidden, weight, _, teacher = problem()
    value = 2 * sparse_kl(hidden, weight, sparse_record(teacher, 4))
    first = torch.autograd.grad(value, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(value, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "head", [{}, {"softcap": 3.0}, {"vocab_size": 19}], ids=["plain", "softcap", "padded"]
)
def test_cross_entropy_equals_torch(head):
    *leaves, _ = problem()
    hidden, weight, bias = leaves
    labels = torch.tensor([3, -100, 0, 18, -100, 3])
    weights = torch.tensor([0.5, 9.0, 0.0, 1.5, 9.0, 1.0], dtype=torch.float64)
    logits = dense_logits(hidden, weight, bias=bias, softcap=head.get("softcap"))
    mean = F.cross_entropy(logits, labels)
    weighed = (weights * F.cross_entropy(logits, labels, reduction="none")).sum()
    for budget in (1, 2**20):
        ours = cross_entropy(hidden, weight, labels, bias=bias, memory_budget=budget, **head)
        close([ours.detach()], [mean.detach()], 1e-12)
        close(gradients(ours, leaves), torch.autograd.grad(mean, leaves, retain_graph=True), 1e-12)
        ours = cross_entropy(hidden, weight, labels, weights=weights, bias=bias, memory_budget=budget, **head)
        close([ours.detach()], [weighed.detach()], 1e-12)
        close(gradients(ours, leaves), torch.autograd.grad(weighed, leaves, retain_graph=True), 1e-12)
    with pytest.raises(ValueError, match="label 23 is not a token: the head has 23 tokens"):
        cross_entropy(hidden, weight, torch.tensor([23] * 6))
    with pytest.raises(ValueError, match="label -1 is not a token"):
        cross_entropy(hidden, weight, torch.tensor([-1] * 6))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_bfloat16_sums_in_float32(monkeypatch, trained):
    """Value and gradients are those of exact arithmetic on the bfloat16 inputs, rounded once at the end."""
    *leaves, teacher = problem(n=40, d=64, v=500, seed=2)
    hidden = (leaves[0] * 2).detach().bfloat16().requires_grad_()
    weight = leaves[1].detach().bfloat16().requires_grad_(trained)
    record = sparse_record(teacher, 16, dtype=torch.float32)
    budget = 6 * 500 * 7  # several chunks
    monkeypatch.setattr("student.losses.products._PIECE_BYTES", 64 * 4 * 37)  # several pieces, the last short
    value = sparse_kl(hidden, weight, record, memory_budget=budget)
    assert value.dtype == torch.float32
    wide = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    twin = sparse_kl_twin(wide[0] @ wide[1].T, sparse_record(teacher, 16)).mean()
    assert value.item() == pytest.approx(twin.item(), rel=2e-6)
    naive = sparse_kl_twin((hidden @ weight.T).double(), sparse_record(teacher, 16)).mean()
    assert abs(naive.item() - twin.item()) > 20 * abs(value.item() - twin.item())
    value.backward()
    exact = torch.autograd.grad(twin, wide)
    for ours, true in zip((hidden.grad, weight.grad), exact, strict=True):
        if ours is None:
            assert not trained
            continue
        assert ours.dtype == torch.bfloat16
        error = (ours.double() - true).norm() / true.norm()
        rounding = (true.bfloat16().double() - true).norm() / true.norm()
        # The logits' gradient is rounded to bfloat16 before it meets a bfloat16 head; nothing else is.
        assert error < (2 if ours is hidden.grad else 1.05) * rounding


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_devices_that_multiply_bfloat16_into_float32(monkeypatch, trained, weight_dtype):
    """What is done on CUDA, with its product imitated: no GPU here."""
    products = imitate_wide_products(monkeypatch)
    n, d, v = 40, 64, 500
    *leaves, teacher = problem(n, d, v, seed=2)
    hidden = (leaves[0] * 2).detach().bfloat16().requires_grad_()
    weight = leaves[1].detach().bfloat16().to(weight_dtype).requires_grad_(trained)
    value = sparse_kl(
        hidden, weight, sparse_record(teacher, 16, dtype=torch.float32), memory_budget=6 * v * 7
    )
    value = value + relation_loss(
        hidden, weight, torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    )
    value.backward()
    assert sum(products) >= (3 if trained else 2) * n * d * v
    wide = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    factor = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).double()
    logits = wide[0] @ wide[1].T
    twin = sparse_kl_twin(logits, sparse_record(teacher, 16)).mean() + relation_twin(
        logits, factor @ factor.T
    )
    assert value.item() == pytest.approx(twin.item(), rel=2e-6)
    for leaf, true in zip((hidden, weight), torch.autograd.grad(twin, wide), strict=True):
        if leaf.requires_grad:
            assert leaf.grad.dtype == leaf.dtype
            assert (leaf.grad.double() - true).norm() < 4e-3 * true.norm()


@pytest.mark.parametrize("seed", range(3))
def test_errors_of_bfloat16_factors_are_below_those_of_dense_bfloat16_logits(monkeypatch, seed):
    """Against float64: at most 1.2 times the error of the gradients that logits in bfloat16, softmax in
    float32 and autograd give; of the value at most 0.2 times."""
    imitate_wide_products(monkeypatch)
    n, d, v = 40, 64, 500
    *leaves, teacher = problem(n, d, v, seed=seed)
    hidden, weight = ((leaf * 2).detach().bfloat16().requires_grad_() for leaf in leaves[:2])
    record, low_record = sparse_record(teacher, 16), sparse_record(teacher, 16, dtype=torch.float32)
    labels = torch.randint(v, (n,), generator=torch.Generator().manual_seed(seed))

    def dense(logits, record):
        return sparse_kl_twin(logits, record).mean() + torch.nn.functional.cross_entropy(logits, labels)

    def errors(value, leaves):
        found = (value, *torch.autograd.grad(value, leaves))
        return [each.detach().double() for each in found]

    wide = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    exact = errors(dense(wide[0] @ wide[1].T, record), wide)
    reference = errors(dense((hidden @ weight.T).float(), low_record), (hidden, weight))
    ours = errors(
        sparse_kl(hidden, weight, low_record, memory_budget=6 * v * 7)
        + cross_entropy(hidden, weight, labels, memory_budget=6 * v * 7),
        (hidden, weight),
    )
    for mine, other, true, most in zip(ours, reference, exact, (0.2, 1.2, 1.2), strict=True):
        assert (mine - true).norm() <= most * (other - true).norm()


def test_mixed_dtypes_meet_in_the_wider():
    hidden, weight, _, teacher = problem()
    record = sparse_record(teacher, 4)
    low = hidden.detach().bfloat16().requires_grad_()
    single = weight.detach().float().requires_grad_()
    value = sparse_kl(low, single, record)
    twin = sparse_kl_twin(low.detach().double() @ single.detach().double().T, record).mean()
    assert value.item() == pytest.approx(twin.item(), rel=1e-6)
    value.backward()
    assert (low.grad.dtype, single.grad.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sparse_kl(hidden.float(), single, record).dtype == torch.float32
        exact = sparse_kl(hidden, weight, record).item()
    assert exact == pytest.approx(sparse_kl(hidden, weight, record).item(), rel=1e-14)


def test_operations_are_three_products_for_a_trained_head_and_two_for_a_frozen_one():
    n, d, v = 12, 8, 64
    *leaves, teacher = problem(n, d, v, dtype=torch.float32)
    hidden, weight, _ = leaves
    record = sparse_record(teacher, 4)
    for frozen, products in ((True, 2), (False, 3)):
        for budget in (1, 2**20):
            with Operations() as seen:
                sparse_kl(
                    hidden, weight.detach() if frozen else weight, record, memory_budget=budget
                ).backward()
            assert seen.multiplications == products * n * d * v
    with Operations() as seen, torch.no_grad():
        sparse_kl(hidden, weight, record)
    assert seen.multiplications == n * d * v


def test_every_combination_of_what_requires_a_gradient():
    hidden, weight, bias, teacher = problem()
    record = sparse_record(teacher, 4)
    full = gradients(sparse_kl(hidden, weight, record, bias=bias), (hidden, weight, bias))
    for wanted in itertools.product([False, True], repeat=3):
        leaves = [x.detach().requires_grad_(w) for x, w in zip((hidden, weight, bias), wanted, strict=True)]
        value = sparse_kl(leaves[0], leaves[1], record, bias=leaves[2])
        assert value.requires_grad == any(wanted)
        if any(wanted):
            value.backward()
        for leaf, want, grad in zip(leaves, wanted, full, strict=True):
            assert (leaf.grad is not None) == want
            assert not want or torch.equal(leaf.grad, grad)


@pytest.mark.parametrize(
    ("free", "budget"), [(70 << 30, 648 << 20), (4 << 30, 256 << 20), (100 << 20, 32 << 20)]
)
def test_chunks_of_a_gpu_are_sized_by_its_free_memory_at_the_first_step(monkeypatch, free, budget):
    left = [free]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (left[0], 80 << 30))
    memory_budget_of.cache_clear()
    assert memory_budget_of(torch.device("cuda", 0)) == budget
    left[0] = 1 << 30  # the next steps add up in the same order
    assert memory_budget_of(torch.device("cuda", 0)) == budget
    memory_budget_of.cache_clear()
    assert memory_budget_of(torch.device("cpu")) == 96 << 20
