"""The Triton kernel against the torch code: on a GPU where there is one, else in Triton's interpreter."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from student.divergences import FORWARD, Divergence
from student.losses import Denominators, DistillationLoss, Head, cross_entropy
from student.losses.logit_rows import LogitRows, row_losses
from student.losses.records import Entries
from tests.dense_twins import imitate_wide_products
from tests.distillation_batches import LENGTH, V, collate
from tests.test_losses_objective import ALL, batch

kernels = pytest.importorskip("student.losses.kernels", reason="Triton has no package for this system")
scale_in_place = pytest.importorskip("student.losses.scale_kernel").scale_in_place
OTHERS = (Divergence("jsd", 0.3), Divergence("reverse_kl"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def narrowed(exact):
    """What a kernel stores of `exact` in bfloat16: rounded, but Triton's interpreter cuts bits off."""
    if DEVICE == "cuda":
        return exact.bfloat16().double()
    bits = exact.float().view(torch.int32)
    return (bits & -65536).view(torch.float32).double()


@pytest.fixture(autouse=True)
def _quiet_interpreter():
    with np.errstate(all="ignore"):
        yield


def rows_and_products(n, v, e, tokens, seed=0):
    """Products (n, v) and what is asked of them, with a blank, a weight and a label left out."""
    generator = torch.Generator().manual_seed(seed)
    products = torch.randn(n, v, generator=generator) * 3
    ids = torch.rand(n, tokens, generator=generator).argsort(1)[:, :e].contiguous()
    logprobs = torch.randn(n, e, generator=generator).log_softmax(1) - 0.2
    ids[0, -1], logprobs[0, -1] = v, -math.inf
    labels = torch.randint(tokens, (n,), generator=generator)
    weights, label_weights = torch.rand(2, n, generator=generator).unbind()
    labels[2], labels[3] = ids[2, 0], v
    weights[1], label_weights[3] = 0, 0
    log_tail = torch.full((n,), math.log(1 - math.exp(-0.2)))
    entries = Entries(ids=ids, logprobs=logprobs, log_tail=log_tail)
    which = torch.arange(n) % 2
    return products, LogitRows(
        entries=entries, weights=weights, which=which, labels=labels, label_weights=label_weights
    )


def on(device, rows, dtype):
    entries = rows.entries
    return LogitRows(
        entries=Entries(
            ids=entries.ids.to(device),
            logprobs=entries.logprobs.to(device, dtype),
            log_tail=entries.log_tail.to(device, dtype),
        ),
        weights=rows.weights.to(device, dtype),
        which=rows.which.to(device),
        labels=rows.labels.to(device),
        label_weights=rows.label_weights.to(device, dtype),
    )


@pytest.mark.parametrize("grads_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "bias and cap"])
@pytest.mark.parametrize("tokens", [100, 93], ids=["tokens", "padded"])
@pytest.mark.parametrize(
    ("temperature", "inside_only", "divergences"),
    [
        *itertools.product([1.0, 2.0], [False, True], [(FORWARD,)]),
        *itertools.product([1.0, 2.0], [False], [OTHERS]),
    ],
)
def test_the_kernel_is_row_losses(temperature, inside_only, divergences, tokens, form, grads_dtype):
    n, v = 6, 100
    products, rows = rows_and_products(n, v, 5, tokens)
    kwargs = {} if form == "plain" else {"bias": torch.randn(v), "cap": 4.0, "scale": 0.7}
    error, rounding = compare(
        products, rows, tokens, temperature, inside_only, divergences, grads_dtype, **kwargs
    )
    assert error < (1e-6 if grads_dtype == torch.float32 else 1.02 * rounding)


@pytest.mark.parametrize(
    ("n", "v", "e", "tokens"),
    [(1, 101, 1, 101), (4, 31, 3, 29), (4, 300, 256, 270), (4, 20, 16, 16), (4, 64, 2, 33)],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_odd_shapes_and_logits_far_from_zero(n, v, e, tokens, temperature):
    """A vocabulary that no block divides, one entry, 256, all tokens; no label; columns at -inf."""
    products, rows = rows_and_products(4, v, e, tokens)
    if e == tokens:
        rows.entries.log_tail[:] = -math.inf
    products += 2000.0
    free = torch.ones(4, v + 1, dtype=torch.bool).scatter_(1, rows.entries.ids, False)
    free = free.scatter_(1, rows.labels[:, None], False)[:, :v]
    products[free & (torch.arange(v) % 5 == 0)] = -math.inf
    for part in (slice(0, n), slice(3, 4)):  # the last row has no label
        error, _ = compare(
            products[part], rows.pick(part), tokens, temperature, False, (FORWARD,), torch.float32
        )
        assert error < 1e-6


def compare(
    products,
    rows,
    tokens,
    temperature,
    inside_only,
    divergences,
    grads_dtype,
    *,
    bias=None,
    cap=None,
    scale=1.0,
):
    """The relative errors of the kernel's gradient, and of one that is exact but for its dtype. Values must
    be those of `row_losses` in float64."""
    n, v = products.shape
    apart = temperature != 1.0

    exact = (products.double() + (0 if bias is None else bias.double())) * scale
    slope = torch.full_like(exact, scale)
    if cap is not None:
        exact = cap * torch.tanh(exact / cap)
        slope = scale * (1 - (exact / cap).square())
    exact = torch.cat([exact, torch.full((n, 1), -math.inf, dtype=torch.float64)], dim=1)
    tempered = exact / temperature
    kl_rows, ce_rows = on("cpu", rows, torch.float64).split()
    options = {"tokens": tokens, "inside_only": inside_only, "divergences": divergences}
    _, ce = row_losses(exact, ce_rows, temperature=1.0, **options)
    kl, _ = row_losses(tempered, kl_rows, temperature=temperature, **options)
    true = (exact + tempered)[:, :v] * slope

    buffer = torch.zeros(n, -(-v // 16) * 16, device=DEVICE)
    buffer[:, :v] = products
    grads = buffer.view(grads_dtype)[:, :v]
    ours_kl, ours_ce = kernels.row_kernel(
        buffer[:, :v],
        on(DEVICE, rows, torch.float32),
        grads=grads,
        temperature=temperature,
        apart=apart,
        bias=None if bias is None else bias.to(DEVICE),
        scale=scale,
        softcap=cap,
        launch=kernels.Launch(block=32, threads=32, programs=1),
        **options,
    )
    assert torch.allclose(ours_kl.cpu().double(), kl, rtol=1e-5, atol=1e-6)
    assert torch.allclose(ours_ce.cpu().double(), ce, rtol=1e-5, atol=1e-6)
    error = (grads.cpu().double() - true).norm() / true.norm()
    return error, (narrowed(true) - true).norm() / true.norm()


def test_a_pass_without_gradient_gives_the_same_values():
    products, rows = rows_and_products(5, 70, 3, 64)
    options = {"tokens": 64, "temperature": 2.0, "inside_only": False, "apart": True}
    rows = on(DEVICE, rows, torch.float32)
    found = [
        kernels.row_kernel(logits, rows, grads=logits if wanted else None, **options)
        for wanted in (True, False)
        for logits in [products.clone().to(DEVICE)]
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def step(weights, head, *, dtype, compute=None, **kwargs):
    hidden, labels, samples, weight, bias = batch(**kwargs)
    leaves = [leaf.detach().to(DEVICE, dtype).requires_grad_() for leaf in (hidden, weight, bias)]
    targets = collate(samples, LENGTH)
    parts = DistillationLoss(weights, memory_budget=4000)(
        leaves[0],
        labels.to(DEVICE),
        targets.to(DEVICE),
        Head(weight=leaves[1], bias=leaves[2], vocab_size=V, **head),
        Denominators.of(labels, targets),
        compute=compute,
    )
    values = [parts.total, parts.ce, *parts.kl.values(), parts.relation]
    gradients = torch.autograd.grad(parts.total, leaves)
    return torch.stack(values).detach().cpu().double(), *(each.cpu().double() for each in gradients)


@pytest.mark.parametrize("head", [{}, {"softcap": 4.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize(
    ("tail", "divergence"),
    [
        *((tail, "forward_kl") for tail in ("bucket", "renormalize", "drop", "sampled")),
        ("bucket", "response=adaptive_kl,visual=skew_reverse_kl"),
        ("bucket", "visual=sinkhorn,response=reverse_kl"),
    ],
)
def test_the_objective_through_the_kernel(monkeypatch, tail, divergence, head):
    """Float32 to rounding; with bfloat16 factors at most 3 times as far off as the torch code's."""
    weights = replace(ALL, tail=tail, temperature=2.0, divergence=divergence)
    made = {"draws": 4 if tail == "sampled" else 0, "drawn_at": 2.0}
    exact = step(weights, head, dtype=torch.float64, **made)
    monkeypatch.setattr("student.losses.positions.kernel_for", lambda device, dtype: kernels.row_kernel)
    for ours, true in zip(step(weights, head, dtype=torch.float32, **made), exact, strict=True):
        assert (ours - true).norm() < 1e-6 * true.norm()
    if DEVICE == "cpu":
        imitate_wide_products(monkeypatch)
    low = step(weights, head, dtype=torch.float32, compute=torch.bfloat16, **made)
    monkeypatch.setattr("student.losses.positions.kernel_for", lambda device, dtype: None)
    reference = step(weights, head, dtype=torch.float32, compute=torch.bfloat16, **made)
    for ours, other, true in zip(low, reference, exact, strict=True):
        assert 1e-5 * true.norm() < (ours - true).norm() < max(3 * (other - true).norm(), 8e-3 * true.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0])
def test_a_gradient_is_scaled_in_place(dtype, factor):
    values = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    expected = values.double() * torch.tensor(factor).double().item()
    scale_in_place(values, torch.tensor(factor, device=DEVICE))
    expected = narrowed(expected) if dtype == torch.bfloat16 and factor != 1.0 else expected
    assert torch.allclose(values.double().cpu(), expected.cpu(), rtol=1e-6, atol=0)


def test_a_gradient_of_the_losses_other_than_1_reaches_all(monkeypatch):
    monkeypatch.setattr("student.losses.fused.scale_kernel_for", lambda device, dtype: scale_in_place)
    hidden, weight = (torch.randn(*shape, device=DEVICE).requires_grad_() for shape in ((7, 4), (V, 4)))
    labels = torch.arange(7, device=DEVICE)
    once = torch.autograd.grad(cross_entropy(hidden, weight, labels), (hidden, weight))
    thrice = torch.autograd.grad(3.0 * cross_entropy(hidden, weight, labels), (hidden, weight))
    for one, three in zip(once, thrice, strict=True):
        assert torch.allclose(3.0 * one, three, rtol=1e-6)
