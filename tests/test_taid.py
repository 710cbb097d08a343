"""TAID: its target against dense twins, its schedule, and that a resumed run has the same one."""

import json
import math
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cache_schema.errors import WrongUsage
from student.interpolation import Interpolation
from student.loss_weights import LossWeights
from student.losses import Denominators, DistillationLoss, DistillationTargets, sparse_kl
from student.run_state import RunState
from student.stages import stage_from
from tests.dense_twins import dense_logits, ragged_record, sparse_record, taid_twin
from tests.student_caches import make_world
from tests.student_driver import run
from tests.test_losses_dense import BATCH, LENGTH, TOKENS, WIDTH, head_of, logits_of, states_of, target_of
from tests.test_losses_sparse_kl import close, gradients, problem


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("t", [0.0, 0.4, 0.9])
@pytest.mark.parametrize(
    "head", [{}, {"softcap": 3.0}, {"vocab_size": 19}], ids=["plain", "softcap", "padded"]
)
def test_from_entries_equals_the_twin(t, temperature, head):
    """The tail spread evenly; chunks of one position and of all."""
    hidden, weight, bias, teacher = problem()
    teacher = teacher[:, : head.get("vocab_size")]
    counts = torch.tensor([1, 4, teacher.shape[1], 2, 1, 9])
    for record in (sparse_record(teacher, 4, (1.0, 2.0)), ragged_record(teacher, counts, (1.0, 2.0))):
        for memory_budget in (1, 2**20):
            options = {"temperature": temperature, "bias": bias, "memory_budget": memory_budget, **head}
            ours = sparse_kl(hidden, weight, record, divergence=f"taid:{t}", **options)
            logits = dense_logits(hidden, weight, bias=bias, softcap=head.get("softcap"))
            twin = taid_twin(
                logits, record, t, temperature=temperature, vocab_size=head.get("vocab_size")
            ).mean()
            close([ours.detach()], [twin.detach()], 1e-9)
            leaves = (hidden, weight, bias)
            close(gradients(ours, leaves), gradients(twin, leaves), 1e-9)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    n, d, v = (data.draw(st.integers(1, high), label=name) for name, high in (("n", 6), ("d", 4), ("v", 20)))
    spread = data.draw(st.sampled_from([0.0, 1.0, 30.0]), label="spread")
    temperature = data.draw(st.sampled_from([1.0, 2.0]), label="T")
    hidden, weight, bias, teacher = problem(n, d, v, seed=data.draw(st.integers(0, 99)), spread=spread)
    record = sparse_record(teacher, data.draw(st.integers(1, v), label="k"), (1.0, 2.0))
    t = data.draw(st.floats(0.0, 0.99), label="t")
    budget = data.draw(st.integers(1, 4000), label="memory budget")
    ours = sparse_kl(
        *(hidden, weight, record),
        divergence=f"taid:{t!r}",
        temperature=temperature,
        bias=bias,
        memory_budget=budget,
    )
    twin = taid_twin(dense_logits(hidden, weight, bias=bias), record, t, temperature=temperature).mean()
    close([ours.detach()], [twin.detach()], 1e-8)
    close(gradients(ours, (hidden, weight, bias)), gradients(twin, (hidden, weight, bias)), 1e-8)


@pytest.mark.parametrize("t", [0.4, 1.0])
def test_from_hidden_states_it_is_exact(t):
    """softmax((1 - t) z + t z_teacher) of both models' whole logits; at t = 1 the dense KL."""
    student, teacher = head_of(TOKENS, WIDTH, 1), head_of(TOKENS, 5, 2)
    positions = [3, 4, LENGTH + 5]
    target = target_of(positions, states_of(len(positions)))
    targets = DistillationTargets(positions={"response": target})
    hidden = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3)).double()
    labels = torch.full((BATCH, LENGTH), -100)
    labels[0, 4:6], labels[1, 6] = 1, 2
    weights = LossWeights(ce=0.0, relation=0.0, tail="dense", divergence="taid", reduction="token_mean")
    loss = DistillationLoss(weights, teacher=teacher)
    loss.teacher_share = t
    leaf = hidden.clone().requires_grad_()
    total = loss(leaf, labels, targets, student, Denominators.of(labels, targets)).total
    total.backward()
    own = hidden.clone().requires_grad_()
    z = logits_of(student, own.reshape(-1, WIDTH)[target.positions])
    theirs = logits_of(teacher, target.states.at(slice(None)).double())
    p = ((1 - t) * z.detach() + t * theirs).softmax(1)
    twin = (p * (p.log() - z.log_softmax(1))).sum(1).mean()
    twin.backward()
    torch.testing.assert_close(total, twin, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(leaf.grad, own.grad, rtol=1e-9, atol=1e-12)


def test_the_error_of_a_tail_spread_evenly():
    """Against the exact target: an upper bound of neither sign, so measured. Half of the teacher's mass is in
    the tail at 4 of 200 tokens; the gradient's angle falls as more are kept, and is 0 with all of them."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(40, 200, generator=generator, dtype=torch.float64) * 2
    student = teacher + torch.randn(40, 200, generator=generator, dtype=torch.float64)
    identity = torch.eye(200, dtype=torch.float64)

    def gradient(keep):
        leaf = student.clone().requires_grad_()
        return gradients(
            sparse_kl(leaf, identity, sparse_record(teacher, keep), divergence="taid:0.4"), [leaf]
        )[0]

    exact = gradient(200)
    angles = []
    for keep in (4, 16, 64, 199, 200):
        cosine = torch.cosine_similarity(gradient(keep).flatten(), exact.flatten(), dim=0)
        angles.append(math.degrees(math.acos(min(1.0, cosine.item()))))
    assert angles == sorted(angles, reverse=True)
    assert angles[0] > 10
    assert angles[2] < 10
    assert angles[3] < 1e-3  # one token: even is exact


def test_gradient_is_that_of_a_constant_target():
    """d/dz KL(p || softmax z) = q - p = t (q - p_teacher) to first order in a small difference."""
    _, _, _, teacher = problem(n=1, v=9)
    student = (teacher + 1e-4 * torch.arange(9)).requires_grad_()
    found = gradients(
        sparse_kl(student, torch.eye(9).double(), sparse_record(teacher, 9), divergence="taid:0.3"), [student]
    )[0]
    torch.testing.assert_close(
        found, 0.3 * (student.softmax(1) - teacher.softmax(1)).detach(), rtol=1e-3, atol=1e-9
    )


def test_the_schedule_by_hand():
    """t follows the line unless the loss makes it run ahead; it never falls and ends at 1."""
    weights = LossWeights(response=2.0, visual=0.5, divergence="taid:0.4")
    state = Interpolation.of(weights)
    terms = [{"response_kl": 1.0 / (n + 1), "visual_kl": 2.0, "prompt_kl": 9.0} for n in range(10)]
    shares, momentum = [0.4], 0.0
    losses = [2.0 * each["response_kl"] + 0.5 * each["visual_kl"] for each in terms]
    for step in range(10):
        state.advance(weights, terms[step], step, 10)
        if step:
            momentum = 0.99 * momentum + 0.01 * (losses[step - 1] - losses[step]) / losses[step - 1]
            ahead = shares[-1] + 5e-4 / (1 + math.exp(-momentum)) * (1 - shares[-1])
            shares.append(max(0.4 + 0.6 * step / 10, ahead))
            assert state.share == pytest.approx(shares[-1], rel=1e-12)
        else:
            assert state.share == 0.4
    assert shares == sorted(shares)
    late = Interpolation(start=0.4, share=0.9, momentum=0.5, last=2.0)
    late.advance(weights, terms[0], 1, 10)  # far ahead of the line
    assert 0.9 < late.share < 0.9 + 5e-4 * 0.1
    assert Interpolation.of(LossWeights(divergence="jsd")) is None
    off = LossWeights(response=0.0, divergence="response=taid")
    assert off.interpolated == ("response",)


def test_the_state_survives_json():
    state = RunState(step=3, interpolation=Interpolation(start=0.4, share=1 / 3, momentum=-0.1, last=None))
    again = RunState.from_json(3, {**json.loads(json.dumps(state.to_json()))})
    assert again == state


def test_what_means_nothing_is_refused():
    with pytest.raises(WrongUsage, match="needs one t for all kinds"):
        LossWeights(divergence="response=taid:0.1,visual=taid:0.2")
    with pytest.raises(WrongUsage, match="kl_share below 1 does not go with divergence taid"):
        LossWeights(divergence="visual=taid", kl_share=0.5)
    with pytest.raises(WrongUsage, match=r"t must lie in \[0, 1\)"):
        LossWeights(divergence="taid:1")
    with pytest.raises(WrongUsage, match="needs tail `bucket` or `dense`"):
        LossWeights(divergence="taid", tail="drop")
    stage = stage_from({"base": "dft", "losses": {"divergence": "response=taid"}})
    assert stage.losses.apart == ("response",)
    assert stage.losses.interpolates_from == 0.4


def test_a_killed_run_resumes_with_the_same_schedule(tmp_path):
    world = make_world(tmp_path / "world")
    common = {
        "base": "dft",
        "stage": {
            "global_batch": 8,
            "max_steps": 5,
            "learning_rate": 1e-3,
            "losses": {"divergence": "taid:0.2"},
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
        tmp_path / "runs.json", [{**common, "out": tmp_path / "whole"}, {**again, "kill": ("step", 4)}, again]
    )
    assert codes == [0, -signal.SIGKILL, 0]
    whole, resumed = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    shares = []
    for name in ("whole", "again"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        shares.append([json.loads(line)["teacher_share"] for line in lines])
    assert shares[0] == shares[1]
    assert shares[0][:2] == [0.2, 0.2]
    assert shares[0][4] == pytest.approx(0.2 + 0.8 * 3 / 5, abs=1e-3)
