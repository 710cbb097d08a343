"""Time and peak memory of one loss step, forward and backward, each variant in a process of its own.

    python -m benchmarks.losses [--dtype float32 bfloat16] [--head frozen trained] [--json FILE]
    python -m benchmarks.losses --check       gradients against plain autograd, at this size

A batch of one sample: 729 visual positions, 729 response positions (CE and KL), one image's relation.
Memory is the peak of the process during the step over what it held before (weights, hidden states, this
variant's targets), less the gradient of a trained head. Seconds are the process's own (CPU time), so that
another process on the machine counts for little. Variants:
    dense      logits (N, V), softmax of the teacher's logits, Gram matrix of the logits; the teacher's
               logits are given and not counted
    distillkit logits (N, V) first, then top-k KL and CE in chunks; no tail, no relation term
    axolotl    logits in chunks, each chunk's gradients made by autograd on the way; no tail, no relation
    ours       student.losses, 64 entries a position
    fixed32    student.losses, 32 entries a position
    threshold  student.losses, entries by a threshold: 20 a position on average, one position with 256
    floor      the matrix products that no exact way avoids, in chunks, and nothing else
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._memory import peak as peak_bytes
from benchmarks._memory import reset_peak
from student.losses import (
    Denominators,
    DistillationLoss,
    DistillationTargets,
    Head,
    LossWeights,
    PositionTargets,
    RelationTargets,
)

VISUAL, RESPONSE, V, D, K, RANK = 729, 729, 151_936, 1_024, 64, 64
MEAN, CAP = 20, 256
VARIANTS = ("dense", "distillkit", "axolotl", "ours", "fixed32", "threshold", "floor")
CHUNK = 224


@dataclass
class Case:
    """hidden (N, D), weight (V, D), next labels (R,), the teacher as sparse record and relation factor, and
    its logits (N, V) where the variant is dense."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    token_ids: Tensor
    logprobs: Tensor
    tail: Tensor
    factor: Tensor
    teacher_logits: Tensor | None


def make_case(
    dtype: torch.dtype,
    *,
    trained: bool,
    dense: bool,
    entries: int | None = K,
    seed: int = 0,
    visual: int = VISUAL,
    response: int = RESPONSE,
) -> Case:
    """Random states, head and targets; made without a matrix product, whose scratch memory would stay.

    entries: of every position; None: MEAN of them on average, at most CAP.
    """
    torch.manual_seed(seed)
    count, k = visual + response, entries or CAP
    ids = (torch.randint(V, (count, 1)) + torch.arange(k) * (V // k)) % V
    logprobs = torch.randn(count, max(V // 1024, 2 * k)).log_softmax(1)[:, :k]
    logprobs = logprobs.sort(1, descending=True).values
    if entries is None:
        counts = torch.empty(count).exponential_(1 / (MEAN - 1)).add(1).long().clamp(max=CAP)
        counts[0] = CAP
        beyond = torch.arange(k) >= counts[:, None]
        ids, logprobs = ids.masked_fill(beyond, -1), logprobs.masked_fill(beyond, -torch.inf)
    return Case(
        hidden=torch.randn(count, D).to(dtype).requires_grad_(),
        weight=torch.empty(V, D, dtype=dtype).normal_(std=0.05).requires_grad_(trained),
        labels=torch.randint(V, (response,)),
        token_ids=ids,
        logprobs=logprobs,
        tail=torch.log1p(-logprobs.exp().sum(1, keepdim=True)),
        factor=torch.randn(visual, RANK),
        teacher_logits=torch.empty(count, V, dtype=dtype).normal_() if dense else None,
    )


def dense(case: Case) -> float:
    """Logits, probabilities and Gram matrix as plain tensors, autograd for the rest."""
    assert case.teacher_logits is not None
    logits = (case.hidden @ case.weight.t()).float()
    response, visual = logits[VISUAL:], logits[:VISUAL]
    loss = F.cross_entropy(response, case.labels)
    for student, teacher in (
        (response, case.teacher_logits[VISUAL:]),
        (visual, case.teacher_logits[:VISUAL]),
    ):
        target = F.softmax(teacher, dim=-1, dtype=torch.float32)
        loss = loss + F.kl_div(F.log_softmax(student, dim=-1), target, reduction="batchmean")
        del target
    gram, other = visual @ visual.t(), case.factor @ case.factor.t()
    loss = loss + 0.5 * (1 - F.cosine_similarity(gram.flatten(), other.flatten(), dim=0))
    loss.backward()
    return loss.item()


def _sparse_terms(logits: Tensor, case: Case, start: int) -> Tensor:
    """Top-k KL without a tail, and CE, of the positions from `start` on; summed."""
    rows = slice(start, start + len(logits))
    log_q = logits.log_softmax(-1)
    kept = log_q.gather(1, case.token_ids[rows])
    teacher = case.logprobs[rows]
    loss = (teacher.exp() * (teacher - kept)).sum() / VISUAL
    first = max(VISUAL - start, 0)
    if first < len(logits):
        labels = case.labels[start + first - VISUAL : start + len(logits) - VISUAL]
        loss = loss + F.nll_loss(log_q[first:], labels, reduction="sum") / RESPONSE
    return loss


def distillkit(case: Case) -> float:
    """All logits first; log-softmax and gather chunk by chunk, recomputed in the backward pass."""
    logits = case.hidden @ case.weight.t()
    loss = torch.zeros(())
    for start in range(0, len(logits), CHUNK):
        part = logits[start : start + CHUNK]
        loss = loss + torch.utils.checkpoint.checkpoint(
            lambda part, start: _sparse_terms(part.float(), case, start), part, start, use_reentrant=False
        )
    loss.backward()
    return loss.item()


def axolotl(case: Case) -> float:
    """Chunks of hidden states; each chunk's gradients made at once and summed."""
    total = 0.0
    for start in range(0, len(case.hidden), CHUNK):
        loss = _sparse_terms((case.hidden[start : start + CHUNK] @ case.weight.t()).float(), case, start)
        loss.backward()
        total += loss.item()
    return total


def ours(case: Case, weights: LossWeights | None = None) -> float:
    """The objective of student.losses: KL with tail bucket (another divergence by `weights`), CE,
    relation."""
    visual, count = len(case.factor), len(case.hidden)
    # The last token has a label and no target: position t predicts token t + 1.
    hidden = torch.cat([case.hidden, case.hidden[-1:]])[None]
    labels = torch.full((1, count + 1), -100)
    labels[0, visual + 1 :] = case.labels

    def records(rows: slice) -> PositionTargets:
        positions = torch.arange(count)[rows]
        return PositionTargets(
            positions=positions,
            samples=torch.zeros_like(positions),
            token_ids=case.token_ids[rows],
            logprobs=case.logprobs[rows],
            tail_logprob=case.tail[rows],
            temperatures=torch.ones(1),
        )

    targets = DistillationTargets(
        positions={"response": records(slice(visual, count)), "visual": records(slice(0, visual))},
        relations=(RelationTargets(positions=torch.arange(visual), sample=0, factor=case.factor),),
    )
    parts = DistillationLoss(weights or LossWeights())(
        hidden, labels, targets, Head(weight=case.weight), Denominators.of(labels, targets)
    )
    parts.total.backward()
    return parts.total.item()


def plain(case: Case) -> float:
    """What `ours` computes, as `dense` would: all logits, autograd."""
    logits = (case.hidden @ case.weight.t()).float()
    log_q = logits.log_softmax(-1)
    kept = (case.logprobs.exp() * (case.logprobs - log_q.gather(1, case.token_ids))).sum()
    log_q_tail = log_q.scatter(1, case.token_ids, -torch.inf).logsumexp(1, keepdim=True)
    loss = (kept + (case.tail.exp() * (case.tail - log_q_tail)).sum()) / VISUAL
    loss = loss + F.nll_loss(log_q[VISUAL:], case.labels)
    visual = logits[:VISUAL]
    gram, other = visual @ visual.t(), case.factor @ case.factor.t()
    loss = loss + 0.5 * (1 - F.cosine_similarity(gram.flatten(), other.flatten(), dim=0))
    loss.backward()
    return loss.item()


def check() -> None:
    """Print how far value and gradients of `ours` are from those of `plain`, in float32."""
    case = make_case(torch.float32, trained=True, dense=False)
    values, gradients = [], []
    for step in (ours, plain):
        case.hidden.grad = case.weight.grad = None
        values.append(step(case))
        gradients.append((case.hidden.grad, case.weight.grad))
    print(f"value: {abs(values[0] - values[1]) / values[1]:.1e} apart (relative)")
    for name, mine, true in zip(("hidden", "weight"), *gradients, strict=True):
        assert mine is not None
        assert true is not None
        print(f"gradient in {name}: {(mine - true).norm() / true.norm():.1e} apart (relative norm)")


def floor(case: Case) -> float:
    """Logits, gradient of the states and, of a trained head, its gradient, half of W^T W, and W (W^T W)."""
    weight = case.weight.detach()
    block = torch.empty(CHUNK, V, dtype=weight.dtype)
    grad = torch.zeros_like(weight) if case.weight.requires_grad else None
    for start in range(0, len(case.hidden), CHUNK):
        states = case.hidden.detach()[start : start + CHUNK]
        logits = torch.mm(states, weight.t(), out=block[: len(states)])
        torch.mm(logits, weight)
        if grad is not None:
            grad.addmm_(logits.t(), states)
    if grad is not None:
        gram = torch.zeros(D, D, dtype=weight.dtype)
        for panel in range(0, D, 256):
            gram[panel : panel + 256, panel:] = weight[:, panel : panel + 256].t() @ weight[:, panel:]
        grad.addmm_(weight, gram)
    return 0.0


def measure(variant: str, dtype: torch.dtype, *, trained: bool, repeats: int) -> dict[str, float]:
    """Seconds (the best of `repeats` after a first step) and peak bytes of a step."""
    entries = {"fixed32": 32, "threshold": None}.get(variant, K)
    step: Callable[[Case], float] = globals()["ours" if variant in ("fixed32", "threshold") else variant]
    case = make_case(dtype, trained=trained, dense=variant == "dense", entries=entries)
    before = reset_peak()
    loss = step(case)
    peak = peak_bytes() - before
    if trained:
        peak -= case.weight.numel() * case.weight.itemsize
    seconds = []
    for _ in range(repeats):
        case.hidden.grad = case.weight.grad = None
        began = time.process_time()
        step(case)
        seconds.append(time.process_time() - began)
    return {"seconds": min(seconds), "peak_mb": peak / 2**20, "loss": loss}


def compare(dtype: str, head: str, *, repeats: int, variants: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """All variants of a case, one process each, with ratios to the dense way and to the floor."""
    rows: dict[str, dict[str, float]] = {}
    for variant in variants:
        command = [sys.executable, "-m", "benchmarks.losses", "--one", variant]
        command += ["--dtype", dtype, "--head", head, "--repeats", str(repeats)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows[variant] = json.loads(done.stdout)
    for row in rows.values():
        if "dense" in rows:
            row["time_to_dense"] = row["seconds"] / rows["dense"]["seconds"]
            row["peak_to_dense"] = row["peak_mb"] / rows["dense"]["peak_mb"]
        if "floor" in rows:
            row["time_to_floor"] = row["seconds"] / rows["floor"]["seconds"]
    return rows


def main() -> None:
    """Print a table, or with --json write the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="of weights and states")
    parser.add_argument("--head", nargs="+", default=["frozen", "trained"], help="whether it gets a gradient")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="which ways")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps, of which the best counts")
    parser.add_argument("--threads", type=int, default=1, help="threads of the matrix products")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--check", action="store_true", help="compare gradients instead of measuring")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        dtype = getattr(torch, options.dtype[0])
        trained = options.head[0] == "trained"
        print(json.dumps(measure(options.one, dtype, trained=trained, repeats=options.repeats)))
        return
    if options.check:
        check()
        return
    results = {}
    print(f"N = {VISUAL + RESPONSE}, V = {V:,}, D = {D:,}, K = {K}; torch {torch.__version__}")
    print(
        f"{'case':18} {'variant':10} {'seconds':>8} {'peak MB':>8} {'time/dense':>11} {'peak/dense':>11}"
        " time/floor"
    )
    for dtype in options.dtype:
        for head in options.head:
            rows = compare(dtype, head, repeats=options.repeats, variants=tuple(options.variants))
            results[f"{dtype} {head}"] = rows
            for variant, row in rows.items():
                ratios = [
                    row.get(name, float("nan"))
                    for name in ("time_to_dense", "peak_to_dense", "time_to_floor")
                ]
                print(
                    f"{dtype + ' ' + head:18} {variant:10} {row['seconds']:8.2f} {row['peak_mb']:8.0f}"
                    f" {ratios[0]:11.2f} {ratios[1]:11.3f} {ratios[2]:10.2f}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
