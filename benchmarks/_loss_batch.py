"""A micro-batch at LLaVA-KD's shapes on a GPU, and the losses held against float64 there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cache_schema.format.records import StoredRelation
from student.losses import (
    Denominators,
    DistillationLoss,
    DistillationTargets,
    Head,
    LossWeights,
    PlannedTargets,
    PositionTargets,
    RelationTargets,
)
from student.losses.kernels import row_kernel
from student.losses.logit_rows import LogitRows, row_losses
from student.losses.records import Entries

FIELDS = ("token_ids", "logprobs", "tail_logprob")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a micro-batch: samples of `length` tokens, among them `visual` and `response` positions with K
    entries; a head of V columns, the first `tokens` of them real, over D; relations of `rank`.

    checked, rows: columns of the head, and rows of logits, in the checks against float64.
    """

    device: torch.device
    length: int = 890
    visual: int = 729
    response: int = 105
    k: int = 32
    v: int = 151_936
    tokens: int = 151_646
    d: int = 1_024
    rank: int = 64
    checked: int = 20_000
    rows: int = 37

    @classmethod
    def tiny(cls, device: torch.device) -> Sizes:
        """To try the scripts on a CPU."""
        return cls(
            device=device,
            length=20,
            visual=6,
            response=4,
            k=4,
            v=96,
            tokens=91,
            d=16,
            rank=4,
            checked=80,
            rows=5,
        )


def records(count: int, tokens: int, k: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """ids (count, k), distinct, their log-probabilities, most likely first, and the tail's (count, 1)."""
    first = torch.randint(tokens, (count, 1), device=device)
    ids = (first + torch.arange(k, device=device) * (tokens // k)) % tokens
    logprobs = torch.randn(count, 4 * k, device=device).mul(2).log_softmax(1)[:, :k]
    logprobs = logprobs.sort(1, descending=True).values
    return ids, logprobs, torch.log1p(-logprobs.exp().sum(1, keepdim=True))


def for_weights(batch: dict[str, Any], weights: LossWeights) -> dict[str, Any]:
    """The micro-batch with its targets planned for another objective."""
    targets, labels = batch["targets"], batch["labels"]
    bare = DistillationTargets(positions=targets.positions, relations=targets.relations)
    planned = PlannedTargets.of(labels.cpu(), bare, weights)
    return {**batch, "targets": planned.to(labels.device)}


def asked_of(of: Sizes, samples: int) -> tuple[Tensor, DistillationTargets]:
    """Labels (B, T) and targets of a micro-batch, on the host."""
    labels = torch.full((samples, of.length), -100)
    labels[:, of.length - of.response :] = torch.randint(of.tokens, (samples, of.response))
    begin = 10

    def positions(start: int, count: int) -> PositionTargets:
        places = torch.arange(start, start + count) + of.length * torch.arange(samples)[:, None]
        ids, logprobs, tail = records(samples * count, of.tokens, of.k, torch.device("cpu"))
        return PositionTargets(
            positions=places.flatten(),
            samples=torch.arange(samples).repeat_interleave(count),
            token_ids=ids,
            logprobs=logprobs,
            tail_logprob=tail,
            temperatures=torch.ones(1),
        )

    random = np.random.default_rng(0)
    relations = tuple(
        RelationTargets(
            positions=torch.arange(begin, begin + of.visual) + of.length * b,
            sample=b,
            stored=StoredRelation(
                tokens=of.visual,
                residual=0.0,
                norm=1.0,
                scales=np.full(of.rank, 1 / 64, np.float32),
                columns=random.integers(0, 256, (of.rank, of.visual), np.uint16),
                triangle=np.zeros(0, np.float16),
            ),
        )
        for b in range(samples)
    )
    targets = DistillationTargets(
        positions={
            "response": positions(of.length - of.response - 1, of.response),
            "visual": positions(begin, of.visual),
        },
        relations=relations,
    )
    return labels, targets


def micro_batch(of: Sizes, samples: int) -> dict[str, Any]:
    """Hidden states (B, T, D), the head, labels and targets of a micro-batch."""
    hidden = torch.randn(samples, of.length, of.d, device=of.device).requires_grad_()
    weight = torch.empty(of.v, of.d, device=of.device).normal_(std=0.05).requires_grad_()
    labels, targets = asked_of(of, samples)
    return {
        "hidden": hidden,
        "weight": weight,
        "labels": labels.to(of.device),
        "targets": PlannedTargets.of(labels, targets).to(of.device),
        "counts": Denominators.of(labels, targets),
    }


def factor_of(image: RelationTargets) -> Tensor:
    """(P, r) on the device of its positions."""
    assert image.stored is not None
    return torch.from_numpy(image.stored.decode().factor).to(image.positions.device)


def check_kernel(of: Sizes) -> list[str]:
    """The kernel against `row_losses` in float64 on the device: all of its variants."""
    lines = []
    n, v, tokens, e = of.rows, of.checked + 16, of.checked - of.checked // 100, 19
    for temperature in (1.0, 2.0):
        for inside_only in (False, True):
            for bias, cap, scale in ((False, None, 1.0), (True, 5.0, 0.5)):
                # Triton's interpreter does not round to bfloat16.
                for half in (False, True) if of.device.type == "cuda" else (False,):
                    z = torch.randn(n, v, device=of.device) * 4
                    ids = torch.rand(n, tokens, device=of.device).argsort(1)[:, :e].contiguous()
                    _, logprobs, tail = records(n, tokens, e, of.device)
                    ids[0, -1], logprobs[0, -1] = v, -math.inf
                    labels = torch.randint(tokens, (n,), device=of.device)
                    labels[2], labels[3] = ids[2, 0], v
                    entries = Entries(
                        ids=ids, logprobs=logprobs.contiguous(), log_tail=tail[:, 0].contiguous()
                    )
                    kl_weights, ce_weights = torch.rand(n, device=of.device), torch.rand(n, device=of.device)
                    kl_weights[1], ce_weights[3] = 0, 0
                    rows = LogitRows(
                        entries=entries,
                        weights=kl_weights,
                        which=torch.zeros_like(labels),
                        labels=labels,
                        label_weights=ce_weights,
                    )
                    wide = LogitRows(
                        entries=Entries(ids=ids, logprobs=logprobs.double(), log_tail=tail[:, 0].double()),
                        weights=kl_weights.double(),
                        which=torch.zeros_like(labels),
                        labels=labels,
                        label_weights=ce_weights.double(),
                    )
                    b = torch.randn(v, device=of.device) if bias else None
                    x = (z.double() + (0 if b is None else b.double())) * scale
                    slope = torch.full_like(x, scale)
                    if cap is not None:
                        x = cap * torch.tanh(x / cap)
                        slope = scale * (1 - (x / cap).square())
                    blank = torch.full((n, 1), -math.inf, device=of.device, dtype=torch.float64)
                    kl_rows, ce_rows = wide.split()
                    full = torch.cat([x, blank], 1)
                    tempered = full / temperature
                    options = {"tokens": tokens, "inside_only": inside_only}
                    _, ce = row_losses(full, ce_rows, temperature=1.0, **options)
                    kl, _ = row_losses(tempered, kl_rows, temperature=temperature, **options)
                    true = (full + tempered)[:, :v] * slope
                    buffer = torch.zeros(n, -(-v // 16) * 16, device=of.device)
                    buffer[:, :v] = z
                    grads = (buffer.view(torch.bfloat16) if half else buffer)[:, :v]
                    ours_kl, ours_ce = row_kernel(
                        buffer[:, :v],
                        rows,
                        grads=grads,
                        temperature=temperature,
                        apart=temperature != 1.0,
                        bias=b,
                        scale=scale,
                        softcap=cap,
                        **options,
                    )
                    errors = [
                        float((mine.double() - exact).norm() / exact.norm())
                        for mine, exact in ((ours_kl, kl), (ours_ce, ce), (grads, true))
                    ]
                    rounding = float((true.bfloat16().double() - true).norm() / true.norm())
                    fine = max(errors[:2]) < 1e-5 and errors[2] < (1.05 * rounding + 1e-5 if half else 1e-5)
                    name = (
                        f"T={temperature} inside_only={inside_only} head={'bias, cap' if bias else 'plain'}"
                    )
                    lines.append(
                        f"{'ok   ' if fine else 'WRONG'} kernel {name} bf16={half}: kl {errors[0]:.1e},"
                        f" ce {errors[1]:.1e}, gradient {errors[2]:.1e}"
                    )
    return lines


def check_loss(of: Sizes) -> list[str]:
    """The whole loss of one sample against float64, beside the errors of dense logits under autocast."""
    v, tokens, batch = of.checked, of.checked - of.checked // 100, micro_batch(of, 1)
    weight = batch["weight"].detach()[:v].clone().requires_grad_()
    hidden, targets = batch["hidden"], batch["targets"]
    at = {
        kind: replace(one, **dict(zip(FIELDS, records(len(one), tokens, of.k, of.device), strict=True)))
        for kind, one in targets.positions.items()
    }
    labels = batch["labels"] % tokens
    labels[batch["labels"] < 0] = -100
    relations = tuple(one.to(of.device) for one in targets.relations)
    targets = PlannedTargets.of(labels, DistillationTargets(positions=at, relations=relations))

    def dense(h: Tensor, w: Tensor, cast: torch.dtype | None) -> tuple[Tensor, ...]:
        with torch.autocast(of.device.type, dtype=torch.bfloat16, enabled=cast is not None):
            z = h[0] @ w.t()
            loss = F.cross_entropy(z[:-1].to(torch.float64), labels[0, 1:])
            for target in targets.positions.values():
                log_q = z[target.positions].double().log_softmax(1)
                p = target.logprobs.double().exp()
                inside = (p * (target.logprobs - log_q.gather(1, target.token_ids))).sum(1)
                masked = log_q.scatter(1, target.token_ids, -math.inf)[:, :tokens]
                tail = target.tail_logprob[:, 0].double()
                loss = loss + (inside + tail.exp() * (tail - masked.logsumexp(1))).mean()
            seen = z[targets.relations[0].positions][:, :tokens]
            gram, factor = (seen @ seen.t()).double(), factor_of(targets.relations[0]).double()
            other = factor @ factor.t()
            loss = loss + 0.5 * (1 - F.cosine_similarity(gram.flatten(), other.flatten(), dim=0))
        return (loss.detach(), *torch.autograd.grad(loss, (h, w)))

    head = Head(weight=weight, vocab_size=tokens)
    parts = DistillationLoss(LossWeights(), memory_budget=300 * v * 4)(
        hidden, labels, targets, head, batch["counts"], compute=torch.bfloat16
    )
    ours = (parts.total.detach(), *torch.autograd.grad(parts.total, (hidden, weight)))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = dense(*wide, None)
    low = dense(hidden, weight, torch.bfloat16)
    lines = []
    for name, mine, true, other in zip(("value", "hidden", "weight"), ours, exact, low, strict=True):
        error, reference = (float((x.double() - true).norm() / true.norm()) for x in (mine, other))
        fine = error < 2 * reference + 1e-6
        lines.append(
            f"{'ok   ' if fine else 'WRONG'} loss {name}: {error:.1e}, dense in bf16 {reference:.1e}"
        )
    return lines
