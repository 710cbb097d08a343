"""DistillationLoss: its terms, switches, means and denominators, against a loop over the samples."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from student.losses import (
    Denominators,
    DistillationLoss,
    DistillationTargets,
    Head,
    LossWeights,
    PositionTargets,
    RelationTargets,
)
from tests.dense_twins import Operations, imitate_wide_products, objective_twin
from tests.distillation_batches import LENGTH, SPANS, D, K, V, collate, make_samples

ALL = LossWeights(ce=1.0, response=0.9, visual=0.8, relation=0.5, prompt=0.7)


def batch(seed=0, spans=SPANS, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    labels, samples = make_samples(generator, spans, LENGTH, **kwargs)
    hidden = torch.randn(len(spans), LENGTH, D, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V + 3, D, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(V + 3, generator=generator, dtype=torch.float64).requires_grad_()
    return hidden, labels, samples, weight, bias


def values_of(parts):
    """Total and terms of LossParts by name."""
    terms = {"total": parts.total, "ce": parts.ce, **parts.kl, "relation": parts.relation}
    return {name: value.item() for name, value in terms.items()}


def compare(weights, *, seed=0, spans=SPANS, head=None, memory_budget=2**20, **kwargs):
    """All parts, and the gradients of the total, equal the twin's."""
    hidden, labels, samples, weight, bias = batch(seed, spans, **kwargs)
    head = {"vocab_size": V, "bias": bias, **(head or {})}
    targets = collate(samples, LENGTH)
    parts = DistillationLoss(weights, memory_budget=memory_budget)(
        hidden, labels, targets, Head(weight=weight, **head), Denominators.of(labels, targets)
    )
    twin = objective_twin(hidden, labels, samples, weights, head={"weight": weight, **head})
    for name, value in values_of(parts).items():
        expected = twin[name].item() if name == "total" or getattr(weights, name) else 0.0
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-12), name
    assert parts.unsupervised == sum(not supervised for _, supervised in spans)
    leaves = (hidden, weight, bias)
    expected_gradients = torch.autograd.grad(twin["total"], leaves, allow_unused=True, materialize_grads=True)
    for ours, true in zip(torch.autograd.grad(parts.total, leaves), expected_gradients, strict=True):
        assert torch.allclose(ours, true, rtol=1e-9, atol=1e-9)
    return parts


@pytest.mark.parametrize("reduction", ["sample_mean", "token_mean"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop", "sampled"])
@pytest.mark.parametrize("ragged", [False, True], ids=["fixed", "ragged"])
def test_every_term_equals_the_loop(ragged, reduction, temperature, tail):
    draws = 4 if tail == "sampled" else 0
    weights = replace(ALL, reduction=reduction, temperature=temperature, tail=tail)
    for memory_budget in (1, 2**20):
        compare(weights, draws=draws, drawn_at=temperature, memory_budget=memory_budget, ragged=ragged)


@pytest.mark.parametrize(
    "head", [{"softcap": 4.0}, {"logit_scale": 0.3}, {"softcap": 4.0, "logit_scale": 0.3}]
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_heads_that_are_not_plain(head, temperature):
    compare(replace(ALL, temperature=temperature), head=head)


@pytest.mark.parametrize("switches", list(itertools.product([0, 1], repeat=5)))
def test_every_combination_of_terms(switches):
    """The paper's Tables 3 and 4: each of response, visual, prompt, relation and CE on or off."""
    names = ("ce", "response", "visual", "relation", "prompt")
    compare(LossWeights(**dict(zip(names, map(float, switches), strict=True))), seed=1)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_batch(data):
    def image(start):
        length = data.draw(st.integers(1, 3))
        return list(range(start, start + length))

    spans = []
    for _ in range(data.draw(st.integers(1, 4), label="samples")):
        images, start = [], 0
        for _ in range(data.draw(st.integers(0, 2), label="images")):
            images.append(image(start))
            start = images[-1][-1] + 1 + data.draw(st.integers(0, 1))
        # The response begins no earlier than at the last visual token.
        spans.append((images, data.draw(st.integers(0, LENGTH - max(start, 1)), label="supervised")))
    weights = LossWeights(
        **{
            name: data.draw(st.sampled_from([0.0, 0.5, 2.0]), label=name)
            for name in ("ce", "response", "visual", "relation", "prompt")
        },
        temperature=data.draw(st.sampled_from([1.0, 2.0]), label="T"),
        reduction=data.draw(st.sampled_from(["sample_mean", "token_mean"]), label="reduction"),
    )
    budget = data.draw(st.sampled_from([1, 2000, 2**20]), label="memory budget")
    compare(weights, seed=data.draw(st.integers(0, 99)), spans=spans, memory_budget=budget)


@pytest.mark.parametrize("reduction", ["sample_mean", "token_mean"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 3), (4, 1)])
def test_accumulated_micro_batches_equal_the_batch(reduction, sizes):
    """Loss and gradients, although only some samples have images, a response or anything at all."""
    weights = replace(ALL, reduction=reduction)
    hidden, labels, samples, weight, bias = batch()
    head, loss = Head(weight=weight, bias=bias, vocab_size=V), DistillationLoss(weights)
    targets = collate(samples, LENGTH)
    whole = loss(hidden, labels, targets, head, Denominators.of(labels, targets))
    expected = torch.autograd.grad(whole.total, (hidden, weight, bias))

    pieces, start = [], 0
    for size in sizes:
        piece = slice(start, start + size)
        pieces.append((piece, collate(samples[piece], LENGTH)))
        start += size
    denominators = sum((Denominators.of(labels[p], t) for p, t in pieces), Denominators())
    assert denominators == Denominators.of(labels, targets)
    sums = dict.fromkeys(("total", "ce", "response", "visual", "prompt", "relation"), 0.0)
    unsupervised = 0
    for piece, part_targets in pieces:
        parts = loss(hidden[piece], labels[piece], part_targets, head, denominators)
        parts.total.backward()
        unsupervised += parts.unsupervised
        sums = {name: sums[name] + value for name, value in values_of(parts).items()}
    for name, value in values_of(whole).items():
        assert sums[name] == pytest.approx(value, rel=1e-12), name
    assert unsupervised == whole.unsupervised == 1
    for leaf, true in zip((hidden, weight, bias), expected, strict=True):
        assert torch.allclose(leaf.grad, true, rtol=1e-12, atol=1e-14)


def test_world_size_scales_the_total_alone():
    hidden, labels, samples, weight, _ = batch()
    targets = collate(samples, LENGTH)
    arguments = (hidden, labels, targets, Head(weight=weight, vocab_size=V), Denominators.of(labels, targets))
    one, four = DistillationLoss(ALL)(*arguments), DistillationLoss(ALL)(*arguments, world_size=4)
    assert four.total.item() == pytest.approx(4 * one.total.item(), rel=1e-12)
    for name in ("ce", "response", "visual", "prompt", "relation"):
        assert values_of(four)[name] == pytest.approx(values_of(one)[name], rel=1e-12)
    grads = [torch.autograd.grad(parts.total, (hidden, weight)) for parts in (one, four)]
    assert all(torch.allclose(4 * a, b, rtol=1e-12, atol=0) for a, b in zip(*grads, strict=True))


def test_a_batch_that_asks_nothing_is_0_and_has_gradients_of_0():
    """DDP waits for the gradients of every rank."""
    hidden, _, _, weight, _ = batch()
    labels = torch.full((5, LENGTH), -100)
    counts = Denominators.of(labels, None)
    parts = DistillationLoss(LossWeights())(hidden, labels, None, Head(weight=weight), counts)
    assert (parts.total.item(), parts.unsupervised) == (0.0, 5)
    assert counts == Denominators(samples=5.0)
    for grad in torch.autograd.grad(parts.total, (hidden, weight)):
        assert not grad.any()


def test_logits_of_a_position_are_made_once():
    """Also where it carries cross entropy, a response and a visual target; at T = 2 no less."""
    hidden, labels, samples, weight, _ = batch()
    targets = collate(samples, LENGTH)
    counts = Denominators.of(labels, targets)
    supervised = labels[:, 1:] != -100
    positions = {b * LENGTH + t for b, t in supervised.nonzero().tolist()}
    overlap = len(positions)
    for kind in ("response", "visual"):
        positions |= set(targets.positions[kind].positions.tolist())
    overlap += sum(len(targets.positions[kind]) for kind in ("response", "visual")) - len(positions)
    assert overlap > len(
        targets.positions["response"]
    )  # CE meets the response, and a response meets a visual position
    for temperature in (1.0, 2.0):
        weights = LossWeights(relation=0.0, temperature=temperature)
        with Operations() as seen:
            DistillationLoss(weights)(hidden, labels, targets, Head(weight=weight), counts)
        assert seen.multiplications == 3 * len(positions) * D * (V + 3)


def test_the_head_is_brought_to_bfloat16_once_a_step_and_again_when_it_has_changed(monkeypatch):
    imitate_wide_products(monkeypatch)
    hidden, labels, samples, weight, _ = batch()
    hidden, weight = (leaf.detach().float().requires_grad_() for leaf in (hidden, weight))
    targets = collate(samples, LENGTH)
    counts, loss = Denominators.of(labels, targets), DistillationLoss(LossWeights())

    class Casts(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and made.dtype == torch.bfloat16:
                self.seen += made.shape == weight.shape
            return made

    def step(loss):
        parts = loss(hidden, labels, targets, Head(weight=weight), counts, compute=torch.bfloat16)
        return parts.total.item(), *torch.autograd.grad(parts.total, (hidden, weight))

    def same(ours, others):
        return ours[0] == others[0] and all(map(torch.equal, ours[1:], others[1:]))

    with Casts() as casts:
        with loss.matrix.kept():
            found = [step(loss), step(loss)]
        assert casts.seen == 1
        expected = step(DistillationLoss(LossWeights()))
        assert same(found[0], expected)
        assert same(found[1], expected)
        with torch.no_grad():
            weight.mul_(1.5)
        casts.seen = 0
        with loss.matrix.kept():
            changed = step(loss)
        assert casts.seen == 1
    assert same(changed, step(DistillationLoss(LossWeights())))
    assert not same(changed, expected)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_no_array_of_positions_by_vocabulary_and_none_of_the_heads_size_when_frozen(trained):
    """1,000 positions and V = 4,000: nothing larger than the budget or the head's gradient is ever made."""
    generator = torch.Generator().manual_seed(0)
    v, d, count, budget = 4000, 16, 1000, 2**18
    weight = torch.randn(v, d, generator=generator).requires_grad_(trained)
    hidden = torch.randn(1, count + 1, d, generator=generator).requires_grad_()
    labels = torch.randint(v, (1, count + 1), generator=generator)
    positions = torch.arange(count)
    record = PositionTargets(
        positions=positions,
        samples=torch.zeros_like(positions),
        token_ids=torch.arange(K).expand(count, K),
        logprobs=torch.full((count, K), -3.0),
        tail_logprob=torch.full((count, 1), -0.5),
        temperatures=torch.ones(1),
    )
    targets = DistillationTargets(
        positions={"response": record},
        relations=(RelationTargets(positions=positions[:60], sample=0, factor=torch.randn(60, 2)),),
    )
    loss = DistillationLoss(LossWeights(), memory_budget=budget)
    with Operations() as seen:
        head = Head(weight=weight)
        loss(hidden, labels, targets, head, Denominators.of(labels, targets)).total.backward()
    assert v * d < budget // 4 < count * v // 8
    assert seen.largest <= (budget // 4 if not trained else max(budget // 4, v * d))
    assert (weight.grad is not None) == trained


def test_targets_move_between_devices_and_keep_their_temperatures_at_hand():
    _, labels, samples, _, _ = batch(draws=2)
    targets = collate(samples, LENGTH)
    moved = targets.to("meta")
    assert moved.positions["response"].positions.device.type == moved.relations[0].gram.device.type == "meta"
    assert moved.positions["visual"].sampled_ids.device.type == "meta"
    assert moved.positions["response"].temperatures.device.type == "cpu"
    counts = Denominators.of(labels, targets)
    assert counts.samples == 5
    assert (counts.ce_tokens, counts.tokens["response"]) == (19.0, 19.0)
    assert (counts.tokens["visual"], counts.images) == (19.0, 5.0)
    assert counts.tokens["prompt"] == 5 * LENGTH - 19 - 19 + 2  # two positions are visual and response
    assert Denominators.from_names(counts.by_name) == counts


def test_settings_that_make_no_sense_are_all_named():
    with pytest.raises(ValueError, match=r"visual must be .*; temperature must be .*; tail must be .*"):
        LossWeights(visual=-1.0, temperature=0.0, tail="ghost")
    with pytest.raises(ValueError, match="reduction must be one of sample_mean, token_mean, not 'sum'"):
        LossWeights(reduction="sum")
    hidden, labels, _, weight, bias = batch()
    with pytest.raises(ValueError, match=r"hidden must be \(B, T, D\) and labels \(B, T\)"):
        DistillationLoss(ALL)(hidden, labels[:, 1:], None, Head(weight=weight), Denominators())
    labels[0, 4] = 23
    narrow = Head(weight=weight, vocab_size=20)
    with pytest.raises(ValueError, match="label 23 is not a token: the head has 20 tokens"):
        DistillationLoss(ALL)(hidden, labels, None, narrow, Denominators.of(labels, None))
    for wrong, message in (
        ({"weight": weight[0]}, "weight must be"),
        ({"weight": weight, "bias": bias[1:]}, "bias must be"),
        ({"weight": weight, "vocab_size": V + 4}, "vocab_size must lie in"),
        ({"weight": weight, "softcap": 0.0}, "softcap must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            Head(**wrong)
