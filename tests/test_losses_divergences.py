"""The divergences other than the forward KL: against naive twins, against TRL, and at their edges."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema.errors import WrongUsage
from student.divergences import APART, PARAMETERS, Divergence, by_kind
from student.loss_weights import LossWeights
from student.losses import sparse_kl
from student.losses.divergences import FORMULAS
from student.stages import DFT, stage_from
from tests.dense_twins import dense_logits, event_twin, ragged_record, sparse_record
from tests.test_losses_objective import ALL
from tests.test_losses_objective import compare as compare_objective
from tests.test_losses_sparse_kl import TEMPERATURES, close, gradients, problem

NAMES = (
    "forward_kl",
    "reverse_kl",
    "jsd:0.5",
    "jsd:0.1",
    "jsd:0",
    "jsd:1",
    "total_variation",
    "skew_kl",
    "skew_kl:0.7",
    "skew_reverse_kl",
    "adaptive_kl",
    "adaptive_kl:0.9",
    "balanced_kl",
    "dac_kl",
    "dac_kl:0.6",
    "dac_kl:1",
    "dbild",
    "dbild:3",
    "dbild:8",
    "first:1",
    "first:1.7",
)


def compare(leaves, record, name, *, temperature=1.0, tolerance=1e-9, memory_budget=2**20, **head):
    """Value and gradients equal the twin's in float64."""
    hidden, weight, bias = leaves
    options = {"temperature": temperature, "memory_budget": memory_budget, "bias": bias, **head}
    ours = sparse_kl(hidden, weight, record, divergence=name, **options)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = dense_logits(wide[0], wide[1], bias=wide[2], softcap=head.get("softcap"))
    vocab_size = head.get("vocab_size")
    twin = event_twin(logits, record, name, temperature=temperature, vocab_size=vocab_size).mean()
    close([ours.detach()], [twin.detach()], tolerance)
    close(gradients(ours, leaves), gradients(twin, wide), tolerance)


def test_every_name_has_a_formula():
    assert set(FORMULAS) | APART == set(PARAMETERS)
    assert set(FORMULAS) - APART == {name.partition(":")[0] for name in NAMES}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_records_of_different_counts_equal_the_twin(name, temperature):
    *leaves, teacher = problem()
    record = ragged_record(teacher[:, :19], torch.tensor([1, 4, 18, 2, 1, 9]), (1.0, 2.0))
    compare(leaves, record, name, temperature=temperature, vocab_size=19)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "head", [{}, {"softcap": 3.0}, {"vocab_size": 19}], ids=["plain", "softcap", "padded"]
)
def test_value_and_gradients_equal_the_twin(name, temperature, head):
    *leaves, teacher = problem()
    record = sparse_record(teacher[:, : head.get("vocab_size")], 4, (1.0, 2.0))
    compare(leaves, record, name, temperature=temperature, **head)


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_to_rounding(name):
    *leaves, teacher = problem(n=9, d=16, v=300, dtype=torch.float32)
    compare(leaves, sparse_record(teacher, 8), name, tolerance=5e-6)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape_chunk_temperature_and_k(data):
    n, d, v = (data.draw(st.integers(1, high), label=name) for name, high in (("n", 6), ("d", 5), ("v", 24)))
    padding = data.draw(st.integers(0, 3), label="padding")
    name = data.draw(st.sampled_from(NAMES))
    temperature = data.draw(st.sampled_from(TEMPERATURES), label="T")
    budget = data.draw(st.integers(1, 16 * 8 * (v + 16)), label="memory budget")
    spread = data.draw(st.sampled_from([0.0, 0.1, 3.0, 30.0]), label="spread")
    *leaves, teacher = problem(n, d, v + padding, seed=data.draw(st.integers(0, 99)), spread=spread)
    teacher = teacher[:, :v]
    if data.draw(st.booleans(), label="ties"):
        teacher = teacher.round()
    record = sparse_record(teacher, data.draw(st.integers(1, v), label="k"), TEMPERATURES)
    head = {"vocab_size": v} if padding else {}
    compare(leaves, record, name, temperature=temperature, memory_budget=budget, tolerance=1e-8, **head)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", [name for name in NAMES if name[:8] not in ("adaptive", "balanced")])
def test_gradcheck(name, temperature):
    """Those whose shares are constants of the gradient are left to the twin."""
    *leaves, teacher = problem(n=3, d=3, v=9)
    record = sparse_record(teacher[:, :8], 3, (1.0, 2.0))
    assert torch.autograd.gradcheck(
        lambda h, w, b: (
            3
            * sparse_kl(
                h,
                w,
                record,
                divergence=name,
                temperature=temperature,
                bias=b,
                memory_budget=1,
                vocab_size=8,
            )
        ),
        leaves,
        check_undefined_grad=False,
    )


@pytest.mark.parametrize("name", ["reverse_kl", "jsd:0.3", "total_variation", "skew_kl", "skew_reverse_kl"])
def test_all_entries_kept_is_dense_and_fewer_are_a_lower_bound(name):
    hidden, weight, _, teacher = problem(v=30)
    full = sparse_kl(hidden, weight, sparse_record(teacher, 30), divergence=name).item()
    p, q = teacher.softmax(1), (hidden @ weight.T).softmax(1)
    if name == "total_variation":
        dense = 0.5 * (p - q).abs().sum(1).mean()
    elif name == "reverse_kl":
        dense = (q * (q / p).log()).sum(1).mean()
    else:
        alpha = float(name.partition(":")[2] or 0.1)
        forward = alpha if name != "skew_reverse_kl" else 1 - alpha
        mixed = forward * p + (1 - forward) * q
        to_p, to_q = (p * (p / mixed).log()).sum(1).mean(), (q * (q / mixed).log()).sum(1).mean()
        if name.startswith("jsd"):
            dense = alpha * to_p + (1 - alpha) * to_q
        else:
            dense = to_p if name == "skew_kl" else to_q
    assert full == pytest.approx(dense.item(), rel=1e-12)
    bounds = [
        sparse_kl(hidden, weight, sparse_record(teacher, k), divergence=name).item() for k in (1, 4, 12, 30)
    ]
    assert bounds == sorted(bounds)


@pytest.mark.parametrize(
    ("beta", "temperature", "expected"),
    # TRL 1.16, GKDTrainer.generalized_jsd_loss, "batchmean" over the 6 positions; no factor T^2 there.
    [
        (0.0, 1.0, 3.073076640381751),
        (0.0, 2.0, 0.9612318708553457),
        (0.1, 1.0, 0.1729729488725609),
        (0.1, 2.0, 0.07660604107105143),
        (0.5, 1.0, 0.3797252330090212),
        (0.5, 2.0, 0.18482821315461492),
        (0.9, 1.0, 0.1529108142957342),
        (0.9, 2.0, 0.07013139868149798),
        (1.0, 1.0, 2.0783700738334865),
        (1.0, 2.0, 0.8302411880147904),
    ],
)
def test_the_convention_of_trl(beta, temperature, expected):
    hidden, weight, bias, teacher = problem(seed=7)
    record = sparse_record(teacher, 23, (1.0, 2.0))
    ours = sparse_kl(hidden, weight, record, divergence=f"jsd:{beta}", temperature=temperature, bias=bias)
    assert ours.item() / temperature**2 == pytest.approx(expected, rel=1e-9)


def test_a_truncated_reverse_kl_collapses_and_the_tail_event_prevents_it():
    """The student moves its mass to tokens that were not kept. Over the kept entries alone the reverse KL
    falls to 0, or below; with the tail event it grows as the dense one does."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(1, 200, generator=generator, dtype=torch.float64) * 3
    record = sparse_record(teacher, 8)
    p = teacher.softmax(1)
    kept = record.token_ids[0]
    dense, truncated, bucketed = [], [], []
    for shift in (0.0, 5.0, 10.0, 15.0, 20.0):
        student = teacher + shift
        student[0, kept] -= shift
        q = student.softmax(1)
        dense.append((q * (q / p).log()).sum().item())
        truncated.append((q * (q / p).log())[0, kept].sum().clamp(min=0).item())
        one = torch.ones(1, 1, dtype=torch.float64)
        bucketed.append(sparse_kl(one, student.T, record, divergence="reverse_kl").item())
    assert dense == sorted(dense)
    assert dense[-1] > 1.9
    assert truncated == [0.0] * 5
    assert bucketed == pytest.approx(dense, rel=1e-9)  # inside the tail student and teacher agree here


def test_a_teacher_without_tail_stays_finite():
    hidden, weight, bias, teacher = problem(n=2, v=12)
    record = sparse_record(teacher, 3)
    record.logprobs = record.logprobs.log_softmax(1)
    record.tail_logprob[:] = -math.inf
    for name in NAMES:
        value = sparse_kl(hidden, weight, record, divergence=name, bias=bias)
        assert math.isfinite(value.item())
        assert all(grad.isfinite().all() for grad in gradients(value, (hidden, weight, bias)))


def test_the_knee_and_the_clipped_classes_follow_the_teacher():
    """Two tokens far above the others: the knee is the third, so dbild alone means dbild:3; a mass of 0.9
    needs both, so other tokens count only in the student's softmax."""
    hidden, weight, _, _ = problem(n=1, v=9)
    teacher = torch.tensor([[9.0, 8.6, 2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4]], dtype=torch.float64)
    record = sparse_record(teacher, 9)
    by_knee, three, four = (
        sparse_kl(hidden, weight, record, divergence=name).item() for name in ("dbild", "dbild:3", "dbild:4")
    )
    assert by_knee == pytest.approx(three, rel=1e-12)
    assert abs(by_knee - four) > 1e-6
    p = teacher[0, :2].softmax(0)
    log_q = (hidden @ weight.T).log_softmax(1)[0, :2]
    clipped = sparse_kl(hidden, weight, record, divergence="dac_kl:0.9").item()
    assert clipped == pytest.approx((p * (p.log() - log_q)).sum().item(), rel=1e-12)


def test_terms_of_other_divergences_equal_the_loop():
    for text in (
        "jsd:0.3",
        "response=reverse_kl,visual=adaptive_kl",
        "visual=skew_kl:0.2,prompt=total_variation",
        "taid:0.3",
        "visual=sinkhorn,response=sinkhorn:0.5",
        "response=taid:0.6,visual=jsd",
        "response=first:1.2,visual=first:0.7",
        "response=dbild:3,visual=dac_kl:0.8,prompt=dbild",
    ):
        for memory_budget in (1, 2**20):
            compare_objective(replace(ALL, divergence=text, temperature=2.0), memory_budget=memory_budget)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl", "is not one of forward_kl"),
        ("jsd:2", "beta must lie in"),
        ("jsd:x", "beta must be a number"),
        ("skew_kl:0", "alpha must lie in"),
        ("reverse_kl:1", "no parameter"),
        ("first:0", "temperature must be positive"),
        ("dbild:1", "k must be at least 2"),
        ("picture=jsd", "must be KIND=NAME"),
        ("visual=jsd,visual=jsd", "must be KIND=NAME"),
        (3, "must be a name"),
    ],
)
def test_wrong_names_are_refused(text, message):
    with pytest.raises(WrongUsage, match=message):
        LossWeights(divergence=text)
    with pytest.raises(WrongUsage, match=message):
        stage_from({"base": "dft", "losses": {"divergence": text}})


def test_other_tails_are_refused():
    with pytest.raises(WrongUsage, match="needs tail `bucket`"):
        LossWeights(divergence="jsd", tail="drop")
    hidden, weight, _, teacher = problem()
    with pytest.raises(ValueError, match="is defined with tail `bucket`"):
        sparse_kl(hidden, weight, sparse_record(teacher, 3), divergence="jsd", tail="renormalize")


def test_by_kind_and_json():
    assert by_kind("visual=jsd") == {
        "response": Divergence("forward_kl"),
        "visual": Divergence("jsd", 0.5),
        "prompt": Divergence("forward_kl"),
    }
    stage = stage_from({"base": "dft", "losses": {"divergence": "response=jsd:0.2"}})
    assert stage_from(stage.to_json()) == stage
    assert "divergence" not in DFT.to_json()["losses"]
