"""The loss of a step on a GPU: right or wrong, milliseconds, memory, launches. Under a minute, no data.

    python -m benchmarks.gpu_loss [--sweep] [--samples 16] [--json FILE]

A micro-batch of 16 samples of 890 tokens: 729 visual, 105 response, K = 32, V = 151,936 (151,646 tokens),
D = 1,024, trained head and hidden states in float32, bfloat16 products (what autocast makes), relation on.
First the kernel and the whole loss are held against float64 on fresh random inputs. Times are medians by the
device's own clock. floor: the products that no exact way avoids, in bfloat16 with float32 sums: logits, both
gradients, W^T W, W (W^T W). dense: all logits of one sample, float32 softmax, autograd, times the samples.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
from student.losses.kernels import LAUNCH, Launch, row_kernel
from student.losses.logit_rows import LogitRows, row_losses
from student.losses.products import HeadProducts, add_product
from student.losses.records import Entries

LENGTH, VISUAL, RESPONSE, K, V, TOKENS, D, RANK = 890, 729, 105, 32, 151_936, 151_646, 1_024, 64
FIELDS = ("token_ids", "logprobs", "tail_logprob")
GPU = torch.device("cuda")


def timed(step: Callable[[], Any], repeats: int = 7) -> float:
    """Median milliseconds of `step` by the device's events, after two that do not count."""
    step(), step()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


def records(count: int, tokens: int, k: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """ids (count, k), distinct, their log-probabilities, most likely first, and the tail's (count, 1)."""
    first = torch.randint(tokens, (count, 1), device=device)
    ids = (first + torch.arange(k, device=device) * (tokens // k)) % tokens
    logprobs = torch.randn(count, 4 * k, device=device).mul(2).log_softmax(1)[:, :k]
    logprobs = logprobs.sort(1, descending=True).values
    return ids, logprobs, torch.log1p(-logprobs.exp().sum(1, keepdim=True))


def micro_batch(samples: int) -> dict[str, Any]:
    """Hidden states (B, T, D), the head, labels and targets of a micro-batch."""
    hidden = torch.randn(samples, LENGTH, D, device=GPU).requires_grad_()
    weight = torch.empty(V, D, device=GPU).normal_(std=0.05).requires_grad_()
    labels = torch.full((samples, LENGTH), -100)
    labels[:, LENGTH - RESPONSE :] = torch.randint(TOKENS, (samples, RESPONSE))
    begin = 10

    def positions(start: int, count: int) -> PositionTargets:
        places = torch.arange(start, start + count) + LENGTH * torch.arange(samples)[:, None]
        ids, logprobs, tail = records(samples * count, TOKENS, K, torch.device("cpu"))
        return PositionTargets(
            positions=places.flatten(),
            samples=torch.arange(samples).repeat_interleave(count),
            token_ids=ids,
            logprobs=logprobs,
            tail_logprob=tail,
            temperatures=torch.ones(1),
        )

    relations = tuple(
        RelationTargets(
            positions=torch.arange(begin, begin + VISUAL) + LENGTH * b,
            sample=b,
            factor=torch.randn(VISUAL, RANK),
        )
        for b in range(samples)
    )
    targets = DistillationTargets(
        positions={
            "response": positions(LENGTH - RESPONSE - 1, RESPONSE),
            "visual": positions(begin, VISUAL),
        },
        relations=relations,
    )
    return {
        "hidden": hidden,
        "weight": weight,
        "labels": labels.to(GPU),
        "targets": PlannedTargets.of(labels, targets).to(GPU),
        "counts": Denominators.of(labels, targets),
    }


def loss_step(batch: dict[str, Any], weights: LossWeights, budget: int | None = None) -> Any:
    """Forward and backward of the objective."""
    batch["hidden"].grad = batch["weight"].grad = None
    parts = DistillationLoss(weights, memory_budget=budget)(
        batch["hidden"],
        batch["labels"],
        batch["targets"],
        Head(weight=batch["weight"], vocab_size=TOKENS),
        batch["counts"],
        compute=torch.bfloat16,
    )
    parts.total.backward()
    return parts


def check_kernel() -> list[str]:
    """The kernel against `row_losses` in float64 on the device: all of its variants."""
    lines = []
    n, v, tokens, e = 37, 5003, 4801, 19
    for temperature in (1.0, 2.0):
        for inside_only in (False, True):
            for bias, cap, scale in ((False, None, 1.0), (True, 5.0, 0.5)):
                for half in (False, True):
                    z = torch.randn(n, v, device=GPU) * 4
                    ids = torch.rand(n, tokens, device=GPU).argsort(1)[:, :e].contiguous()
                    _, logprobs, tail = records(n, tokens, e, GPU)
                    ids[0, -1], logprobs[0, -1] = v, -math.inf
                    labels = torch.randint(tokens, (n,), device=GPU)
                    labels[2], labels[3] = ids[2, 0], v
                    entries = Entries(
                        ids=ids, logprobs=logprobs.contiguous(), log_tail=tail[:, 0].contiguous()
                    )
                    kl_weights, ce_weights = torch.rand(n, device=GPU), torch.rand(n, device=GPU)
                    kl_weights[1], ce_weights[3] = 0, 0
                    rows = LogitRows(
                        entries=entries, weights=kl_weights, labels=labels, label_weights=ce_weights
                    )
                    wide = LogitRows(
                        entries=Entries(ids=ids, logprobs=logprobs.double(), log_tail=tail[:, 0].double()),
                        weights=kl_weights.double(),
                        labels=labels,
                        label_weights=ce_weights.double(),
                    )
                    b = torch.randn(v, device=GPU) if bias else None
                    x = (z.double() + (0 if b is None else b.double())) * scale
                    slope = torch.full_like(x, scale)
                    if cap is not None:
                        x = cap * torch.tanh(x / cap)
                        slope = scale * (1 - (x / cap).square())
                    blank = torch.full((n, 1), -math.inf, device=GPU, dtype=torch.float64)
                    kl_rows, ce_rows = wide.split(v)
                    full = torch.cat([x, blank], 1)
                    tempered = full / temperature
                    options = {"tokens": tokens, "inside_only": inside_only}
                    _, ce = row_losses(full, ce_rows, temperature=1.0, **options)
                    kl, _ = row_losses(tempered, kl_rows, temperature=temperature, **options)
                    true = (full + tempered)[:, :v] * slope
                    buffer = torch.zeros(n, -(-v // 16) * 16, device=GPU)
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


def check_loss() -> list[str]:
    """The whole loss of one sample against float64, beside the errors of dense logits under autocast."""
    v, tokens, batch = min(V, 20_000), min(TOKENS, 19_800), micro_batch(1)
    weight = batch["weight"].detach()[:v].clone().requires_grad_()
    hidden, targets = batch["hidden"], batch["targets"]
    at = {
        kind: replace(one, **dict(zip(FIELDS, records(len(one), tokens, K, GPU), strict=True)))
        for kind, one in targets.positions.items()
    }
    labels = batch["labels"] % tokens
    labels[batch["labels"] < 0] = -100
    relations = tuple(one.to(GPU) for one in targets.relations)
    targets = PlannedTargets.of(labels, DistillationTargets(positions=at, relations=relations))

    def dense(h: Tensor, w: Tensor, cast: torch.dtype | None) -> tuple[Tensor, ...]:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=cast is not None):
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
            gram, factor = (seen @ seen.t()).double(), targets.relations[0].factor.double()
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


def floor_step(batch: dict[str, Any], low: Tensor, out: Tensor, total: Tensor) -> Callable[[], None]:
    """The products alone, in chunks of `out` (n, V) float32."""
    states = batch["hidden"].detach().reshape(-1, D).bfloat16()
    count = sum(len(target) for target in batch["targets"].positions.values())
    grads = out.view(torch.bfloat16)[:, :V]

    def step() -> None:
        for start in range(0, count, len(out)):
            part = states[start : min(start + len(out), count)]
            torch.mm(part, low.t(), out_dtype=torch.float32, out=out[: len(part)])
            torch.mm(grads[: len(part)], low, out_dtype=torch.float32)
            add_product(total, grads[: len(part)].t(), part)
        gram = torch.mm(low.t(), low, out_dtype=torch.float32).bfloat16()
        add_product(total, low, gram)

    return step


def plain_floor(batch: dict[str, Any], low: Tensor) -> Callable[[], None]:
    """The same operations as bfloat16 products with bfloat16 results: no traffic of float32."""
    states = batch["hidden"].detach().reshape(-1, D).bfloat16()
    count = sum(len(target) for target in batch["targets"].positions.values())

    def step() -> None:
        logits = states[:count] @ low.t()
        logits @ low
        logits.t() @ states[:count]
        low @ (low.t() @ low)

    return step


def dense_step(batch: dict[str, Any]) -> None:
    """One sample the dense way, the teacher's logits at hand."""
    teacher = batch.setdefault("teacher", torch.randn(VISUAL + RESPONSE, V, device=GPU, dtype=torch.bfloat16))
    batch["hidden"].grad = batch["weight"].grad = None
    at = batch["targets"].positions
    rows = torch.cat([at["visual"].positions[:VISUAL], at["response"].positions[:RESPONSE]])
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = batch["hidden"].reshape(-1, D)[rows] @ batch["weight"].t()
        loss = F.cross_entropy(logits[VISUAL:].float(), batch["labels"][0, LENGTH - RESPONSE :])
        for part in (slice(0, VISUAL), slice(VISUAL, None)):
            p = F.softmax(teacher[part], dim=-1, dtype=torch.float32)
            q = F.log_softmax(logits[part], dim=-1, dtype=torch.float32)
            loss = loss + F.kl_div(q, p, reduction="batchmean")
        seen = logits[:VISUAL, :TOKENS]
        gram, factor = (seen @ seen.t()).float(), batch["targets"].relations[0].factor.to(GPU)
        loss = loss + 0.5 * (1 - F.cosine_similarity(gram.flatten(), (factor @ factor.t()).flatten(), dim=0))
    loss.backward()


def profile(step: Callable[[], Any]) -> dict[str, int]:
    """Launches and waits of one step."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        step()
        torch.cuda.synchronize()
    counts = dict.fromkeys(("launches", "copies", "waits"), 0)
    for event in seen.key_averages():
        if "LaunchKernel" in event.key:
            counts["launches"] += event.count
        elif event.key.startswith("cudaMemcpy"):
            counts["copies"] += event.count
        elif event.key in ("cudaStreamSynchronize", "cudaEventSynchronize"):
            counts["waits"] += event.count
    top = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)[:14]
    for event in top:
        print(f"    {event.self_device_time_total / 1e3:8.3f} ms  {event.count:4}  {event.key[:100]}")
    return counts


def sweep(buffer: Tensor, rows: LogitRows) -> dict[str, float]:
    """Milliseconds of the kernel over a chunk in several layouts."""
    found = {}
    half = buffer.view(torch.bfloat16)[:, :V]
    kernel = {"tokens": TOKENS, "temperature": 1.0, "inside_only": False, "apart": False}
    layouts = [
        (2048, 4, 4, 1), (4096, 8, 2, 1), (4096, 8, 4, 1), (4096, 16, 2, 1), (8192, 16, 1, 1),
        (8192, 16, 2, 1), (16384, 32, 1, 1), (8192, 32, 1, 1), (8192, 16, 2, 2),
        (4096, 8, 4, 2), (4096, 8, 2, 3),
    ]  # fmt: skip
    for block, warps, programs, stages in layouts:
        launch = Launch(block=block, warps=warps, programs=programs, stages=stages)
        name = f"kernel, block {block}, {warps} warps, {programs} a processor, {stages} stages"
        try:
            found[name] = timed(
                lambda at=launch: row_kernel(buffer, rows, grads=half, launch=at, **kernel), 5
            )
        except Exception as error:  # noqa: BLE001  a layout that this card refuses
            found[f"{name}: {str(error)[:60]}"] = math.nan
    return found


def parts_of(
    batch: dict[str, Any], low: Tensor, buffer: Tensor, total: Tensor, options: Any
) -> dict[str, float]:
    """Milliseconds of each part of a step, for one chunk or the whole batch."""
    n = len(buffer)
    states = batch["hidden"].detach().reshape(-1, D)[:n].bfloat16()
    half = buffer.view(torch.bfloat16)[:, :V]
    ids, logprobs, tail = records(n, TOKENS, K, GPU)
    rows = LogitRows(
        entries=Entries(ids=ids, logprobs=logprobs.contiguous(), log_tail=tail[:, 0].contiguous()),
        weights=torch.rand(n, device=GPU),
        labels=torch.randint(TOKENS, (n,), device=GPU),
        label_weights=torch.rand(n, device=GPU),
    )
    pulled = torch.empty(n, D, device=GPU)
    relation_only = LossWeights(ce=0.0, response=0.0, visual=0.0)
    kernel = {"tokens": TOKENS, "temperature": 1.0, "inside_only": False, "apart": False}

    def two_steps() -> None:
        total.add_(torch.mm(half.t(), states, out_dtype=torch.float32))

    torch.mm(states, low.t(), out_dtype=torch.float32, out=buffer)
    head = Head(weight=batch["weight"], vocab_size=TOKENS)
    steps: dict[str, Callable[[], Any]] = {
        f"logits product, {n} rows": lambda: torch.mm(states, low.t(), out_dtype=torch.float32, out=buffer),
        f"logits product, bf16 out, {n} rows": lambda: torch.mm(states, low.t(), out=half),
        f"kernel, {n} rows": lambda: row_kernel(buffer, rows, grads=half, launch=LAUNCH, **kernel),
        f"kernel without gradient, {n} rows": lambda: row_kernel(buffer, rows, grads=None, **kernel),
        f"hidden gradient, {n} rows": lambda: torch.mm(half, low, out_dtype=torch.float32, out=pulled),
        f"weight gradient into its sum, {n} rows": lambda: add_product(total, half.t(), states),
        f"weight gradient and then its sum, {n} rows": two_steps,
        "head to bf16": lambda: batch["weight"].detach().bfloat16(),
        "W^T W": lambda: HeadProducts(head, torch.bfloat16).gram(),
        "relation alone, with W^T W and the head's gradient": lambda: loss_step(batch, relation_only),
        "zeros of the head's gradient": lambda: torch.zeros_like(total),
    }
    found = {name: timed(step) for name, step in steps.items()}
    if options.sweep:
        found |= sweep(buffer, rows)
    return found


def main() -> None:
    """Print checks and a table; with --json write the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=16, help="in the micro-batch")
    parser.add_argument("--sweep", action="store_true", help="also layouts of the kernel and sizes of chunks")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    began = time.monotonic()
    torch.manual_seed(int(time.time()))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for line in check_kernel() + check_loss():
        print(line)
    found: dict[str, float] = {}
    batch = micro_batch(options.samples)
    step = lambda: loss_step(batch, LossWeights())  # noqa: E731
    found["loss, forward and backward"] = timed(step)
    budgets = (320, 640, 1280) if options.sweep else ()
    for budget in budgets:
        found[f"loss, chunks of {budget} MB"] = timed(
            lambda b=budget: loss_step(batch, LossWeights(), b * 2**20), 3
        )
    found["loss without relation"] = timed(lambda: loss_step(batch, LossWeights(relation=0.0)))
    batch["hidden"].grad = batch["weight"].grad = None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = sum(batch[name].grad.numel() * 4 for name in ("hidden", "weight"))
    counts = profile(step)
    print(f"launches {counts['launches']}, copies {counts['copies']}, waits {counts['waits']}")
    batch["hidden"].grad = batch["weight"].grad = None
    low, total = batch["weight"].detach().bfloat16(), torch.zeros(V, D, device=GPU)
    rows = options.samples * (VISUAL + RESPONSE)
    chunks = math.ceil(rows / (640 * 2**20 // (4 * V)))
    buffer = torch.empty(math.ceil(rows / chunks), V, device=GPU)
    found["floor, float32 sums, chunks"] = timed(floor_step(batch, low, buffer, total))
    found |= parts_of(batch, low, buffer, total, options)
    del buffer
    found["floor, bf16 out, in one"] = timed(plain_floor(batch, low))
    try:
        found[f"dense, one sample x {options.samples}"] = (
            timed(lambda: dense_step(batch), 3) * options.samples
        )
    except torch.OutOfMemoryError:
        found["dense"] = math.nan
    for name, value in found.items():
        print(f"{name:60} {value:9.3f} ms")
    for name in ("floor, float32 sums, chunks", "floor, bf16 out, in one"):
        print(f"loss / {name}: {found['loss, forward and backward'] / found[name]:.2f}")
    print(f"peak over weights, targets and gradients: {(peak - gradients) / 2**20:.0f} MB")
    print(f"{time.monotonic() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({**found, **counts, "peak": peak - gradients}, indent=2))


if __name__ == "__main__":
    main()
