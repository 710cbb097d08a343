"""kl_share: the KL at the positions of highest entropy alone, against dense logits, and what it saves."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks._recorder import as_on_cuda, imagined
from student.losses import Denominators, DistillationLoss, Head, LossWeights, PlannedTargets
from student.losses.selection import row_entropy
from student.stages import DFT, stage_from
from tests import dense_twins
from tests.dense_twins import Operations
from tests.distillation_batches import LENGTH, SPANS, D, V, collate, make_samples
from tests.test_losses_objective import ALL, batch, compare, values_of


@pytest.fixture
def selecting_twin(monkeypatch):
    """Lets the twin count, of a sample's positions of a kind, those of highest entropy for all of them."""
    every = dense_twins.sparse_kl_twin

    def choose(share):
        def selected(student, record, **kwargs):
            values = every(student, record, **kwargs)
            count = math.ceil(share * len(values))
            q = student.detach().softmax(1)
            entropy = -(q * q.log()).sum(1)
            scale = torch.zeros(len(values), dtype=values.dtype)
            scale[entropy.argsort(descending=True)[:count]] = len(values) / count
            return values * scale

        monkeypatch.setattr(dense_twins, "sparse_kl_twin", selected)

    return choose


@pytest.mark.parametrize("share", [0.2, 0.5, 0.75])
@pytest.mark.parametrize(
    ("reduction", "temperature"), list(itertools.product(["sample_mean", "token_mean"], [1.0, 2.0]))
)
def test_every_term_equals_the_loop(selecting_twin, share, reduction, temperature):
    selecting_twin(share)
    weights = replace(ALL, reduction=reduction, temperature=temperature, kl_share=share)
    for memory_budget in (1, 12 * (V + 4) * 8, 2**20):
        compare(weights, memory_budget=memory_budget)


@pytest.mark.parametrize("head", [{"softcap": 4.0}, {"logit_scale": 0.3}], ids=["softcap", "scale"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop", "sampled"])
def test_tails_and_heads(selecting_twin, tail, head):
    selecting_twin(0.4)
    draws = 4 if tail == "sampled" else 0
    compare(replace(ALL, tail=tail, kl_share=0.4), head=head, draws=draws)


@pytest.mark.parametrize("switches", list(itertools.product([0, 1], repeat=4)))
def test_every_combination_of_terms(selecting_twin, switches):
    """Without cross entropy no row has a gradient in any case."""
    selecting_twin(0.5)
    names = ("ce", "response", "visual", "prompt")
    switched = dict(zip(names, map(float, switches), strict=True))
    compare(LossWeights(**switched, relation=0.0, kl_share=0.5), seed=1)


def test_rows_that_are_not_selected_have_no_gradient_made():
    """Of the three products of a position without a label two are left out, and no logits are made twice."""
    hidden, labels, samples, weight, _ = batch()
    targets = collate(samples, LENGTH)
    counts = Denominators.of(labels, targets)

    def multiplications(share):
        weights = LossWeights(relation=0.0, kl_share=share)
        with Operations() as seen:
            DistillationLoss(weights)(hidden, labels, targets, Head(weight=weight), counts)
        return seen.multiplications // (D * (V + 3))

    visual = [len(sample.visual.positions) for sample in samples if sample.visual]
    selected = sum(math.ceil(0.3 * count) for count in visual)
    rows = int(counts.ce_tokens) + sum(visual)
    assert multiplications(0.3) == rows + 2 * (int(counts.ce_tokens) + selected)


def test_a_plan_of_the_same_share_waits_for_nothing():
    labels, samples = make_samples(torch.Generator().manual_seed(0), SPANS, LENGTH)
    bare = collate(samples, LENGTH)
    weights = replace(ALL, kl_share=0.5)
    targets, counts = PlannedTargets.of(labels, bare, weights), Denominators.of(labels, bare)
    with imagined() as recorder, as_on_cuda():
        hidden = torch.empty(len(SPANS), LENGTH, D, requires_grad=True)
        head = Head(weight=torch.empty(V + 3, D, requires_grad=True), vocab_size=V)
        recorder.begin()
        loss = DistillationLoss(weights)
        loss(hidden, labels, targets, head, counts).total.backward()
    assert sum(each.waits * count for each, count in recorder.operations.items()) == 0
    assert any(each.name == "row_entropy" for each in recorder.operations)


def test_samples_of_a_batch_do_not_meet():
    """The loss of samples together is that of each alone."""
    weights = replace(ALL, kl_share=0.3)
    hidden, labels, samples, weight, bias = batch()
    head, loss = Head(weight=weight, bias=bias, vocab_size=V), DistillationLoss(weights)
    targets = collate(samples, LENGTH)
    counts = Denominators.of(labels, targets)
    whole = values_of(loss(hidden, labels, targets, head, counts))
    alone = [
        values_of(loss(hidden[b : b + 1], labels[b : b + 1], collate([sample], LENGTH), head, counts))
        for b, sample in enumerate(samples)
    ]
    for name, value in whole.items():
        assert value == pytest.approx(sum(each[name] for each in alone), rel=1e-12)


def test_a_row_of_no_number_is_selected():
    """A loss that is not finite must show, whatever is selected."""
    hidden, labels, samples, weight, _ = batch()
    broken = hidden.detach().clone()
    broken[0, 2] = math.nan
    targets = collate(samples, LENGTH)
    parts = DistillationLoss(LossWeights(relation=0.0, ce=0.0, kl_share=0.2))(
        broken, labels, targets, Head(weight=weight), Denominators.of(labels, targets)
    )
    assert not math.isfinite(parts.total.item())


def test_entropies():
    logits = torch.randn(7, 300, dtype=torch.float64) * 5
    logits[1], logits[2, 3] = 2.0, 1e4
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(row_entropy(logits), expected, rtol=1e-12, atol=1e-12)
    assert row_entropy(logits)[1].item() == pytest.approx(math.log(300), rel=1e-12)


@pytest.mark.parametrize("columns", [64, 75, 20])
@pytest.mark.parametrize("form", ["plain", "bias and cap"])
def test_the_kernel_of_entropies(columns, form):
    kernel = pytest.importorskip("student.losses.entropy_kernel", reason="no Triton here")
    launch = pytest.importorskip("student.losses.kernels").Launch(block=32, threads=32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = torch.randn(5, 80) * 6
    table[2, :columns] = 3.0
    table[3, 7] = 500.0
    products = table[:, :columns]
    made = products.double()
    options = {}
    if form != "plain":
        options = {"bias": torch.randn(columns), "scale": 0.7, "softcap": 4.0}
        made = (made + options["bias"].double()) * 0.7
        made = 4.0 * torch.tanh(made / 4.0)
        options["bias"] = options["bias"].to(device)
    with np.errstate(all="ignore"):
        found = kernel.kernel_entropy(table.to(device)[:, :columns], launch=launch, **options)
    assert torch.allclose(found.cpu().double(), row_entropy(made), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", [{}, {"softcap": 4.0}], ids=["plain", "softcap"])
def test_the_objective_through_the_kernels(monkeypatch, head):
    kernels = pytest.importorskip("student.losses.kernels", reason="no Triton here")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, labels, samples, weight, bias = batch()
    targets = collate(samples, LENGTH)

    def step(dtype):
        leaves = [leaf.detach().to(device, dtype).requires_grad_() for leaf in (hidden, weight, bias)]
        parts = DistillationLoss(replace(ALL, kl_share=0.4), memory_budget=4000)(
            leaves[0],
            labels.to(device),
            targets.to(device),
            Head(weight=leaves[1], bias=leaves[2], vocab_size=V, **head),
            Denominators.of(labels, targets),
        )
        gradients = torch.autograd.grad(parts.total, leaves)
        values = torch.stack([parts.total, parts.ce, *parts.kl.values(), parts.relation])
        return [each.detach().cpu().double() for each in (values, *gradients)]

    exact = step(torch.float64)
    monkeypatch.setattr("student.losses.positions.kernel_for", lambda device, dtype: kernels.row_kernel)
    with np.errstate(all="ignore"):
        ours = step(torch.float32)
    for mine, true in zip(ours, exact, strict=True):
        assert (mine - true).norm() < 1e-6 * true.norm()


def test_a_stage_of_a_recipe_has_a_share_and_older_ones_are_written_as_they_were():
    stage = stage_from({"base": "dft", "losses": {"kl_share": 0.5}})
    assert stage.losses.kl_share == 0.5
    assert stage.to_json()["losses"]["kl_share"] == 0.5
    assert "kl_share" not in DFT.to_json()["losses"]
    assert stage_from(DFT.to_json()) == DFT
    with pytest.raises(ValueError, match=r"kl_share must lie in \(0, 1\]"):
        LossWeights(kl_share=0.0)
