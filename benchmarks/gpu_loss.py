"""The loss of a step on a GPU: right or wrong, milliseconds, memory, launches. Under a minute, no data.

    python -m benchmarks.gpu_loss [--sweep] [--samples 16] [--device cuda] [--json FILE]

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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._clock import Clock
from benchmarks._loss_batch import (
    Sizes,
    check_kernel,
    check_loss,
    factor_of,
    for_weights,
    micro_batch,
    records,
)
from models.device import device_name
from student.losses import DistillationLoss, Head, LossWeights
from student.losses.fused import memory_budget_of
from student.losses.kernels import LAUNCH, Launch, row_kernel
from student.losses.logit_rows import LogitRows
from student.losses.products import HeadProducts, add_product
from student.losses.records import Entries


def loss_step(of: Sizes, batch: dict[str, Any], weights: LossWeights, budget: int | None = None) -> Any:
    """Forward and backward of the objective."""
    batch["hidden"].grad = batch["weight"].grad = None
    parts = DistillationLoss(weights, memory_budget=budget)(
        batch["hidden"],
        batch["labels"],
        batch["targets"],
        Head(weight=batch["weight"], vocab_size=of.tokens),
        batch["counts"],
        compute=torch.bfloat16,
    )
    parts.total.backward()
    return parts


def floor_step(
    of: Sizes, batch: dict[str, Any], low: Tensor, out: Tensor, total: Tensor
) -> Callable[[], None]:
    """The products alone, in chunks of `out` (n, V) float32."""
    states = batch["hidden"].detach().reshape(-1, of.d).bfloat16()
    count = sum(len(target) for target in batch["targets"].positions.values())
    grads = out.view(torch.bfloat16)[:, : of.v]

    def step() -> None:
        for start in range(0, count, len(out)):
            part = states[start : min(start + len(out), count)]
            torch.mm(part, low.t(), out_dtype=torch.float32, out=out[: len(part)])
            torch.mm(grads[: len(part)], low, out_dtype=torch.float32)
            add_product(total, grads[: len(part)].t(), part)
        gram = torch.mm(low.t(), low, out_dtype=torch.float32).bfloat16()
        add_product(total, low, gram)

    return step


def plain_floor(of: Sizes, batch: dict[str, Any], low: Tensor) -> Callable[[], None]:
    """The same operations as bfloat16 products with bfloat16 results: no traffic of float32."""
    states = batch["hidden"].detach().reshape(-1, of.d).bfloat16()
    count = sum(len(target) for target in batch["targets"].positions.values())

    def step() -> None:
        logits = states[:count] @ low.t()
        logits @ low
        logits.t() @ states[:count]
        low @ (low.t() @ low)

    return step


def dense_step(of: Sizes, batch: dict[str, Any]) -> None:
    """One sample the dense way, the teacher's logits at hand."""
    teacher = batch.setdefault(
        "teacher", torch.randn(of.visual + of.response, of.v, device=of.device, dtype=torch.bfloat16)
    )
    batch["hidden"].grad = batch["weight"].grad = None
    at = batch["targets"].positions
    rows = torch.cat([at["visual"].positions[: of.visual], at["response"].positions[: of.response]])
    rows = rows.to(of.device)
    with torch.autocast(of.device.type, dtype=torch.bfloat16):
        logits = batch["hidden"].reshape(-1, of.d)[rows] @ batch["weight"].t()
        loss = F.cross_entropy(logits[of.visual :].float(), batch["labels"][0, of.length - of.response :])
        for part in (slice(0, of.visual), slice(of.visual, None)):
            p = F.softmax(teacher[part], dim=-1, dtype=torch.float32)
            q = F.log_softmax(logits[part], dim=-1, dtype=torch.float32)
            loss = loss + F.kl_div(q, p, reduction="batchmean")
        seen = logits[: of.visual, : of.tokens]
        gram, factor = (seen @ seen.t()).float(), factor_of(batch["targets"].relations[0]).to(of.device)
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


def sweep(clock: Clock, of: Sizes, buffer: Tensor, rows: LogitRows) -> dict[str, float]:
    """Milliseconds of the kernel over a chunk in several layouts."""
    found = {}
    half = buffer.view(torch.bfloat16)[:, : of.v]
    kernel = {"tokens": of.tokens, "temperature": 1.0, "inside_only": False, "apart": False}
    layouts = [
        (2048, 128, 4, 1), (4096, 256, 2, 1), (4096, 256, 4, 1), (4096, 512, 2, 1), (8192, 512, 1, 1),
        (8192, 512, 2, 1), (16384, 1024, 1, 1), (8192, 1024, 1, 1), (8192, 512, 2, 2),
        (4096, 256, 4, 2), (4096, 256, 2, 3), (4096, 512, 1, 1),
    ]  # fmt: skip
    for block, threads, programs, stages in layouts:
        launch = Launch(block=block, threads=threads, programs=programs, stages=stages)
        name = f"kernel, block {block}, {threads} threads, {programs} a processor, {stages} stages"
        try:
            found[name] = clock.median(
                lambda at=launch: row_kernel(buffer, rows, grads=half, launch=at, **kernel), 5
            )
        except Exception as error:  # noqa: BLE001  a layout that this card refuses
            found[f"{name}: {str(error)[:60]}"] = math.nan
    return found


def parts_of(
    clock: Clock, of: Sizes, batch: dict[str, Any], low: Tensor, buffer: Tensor, total: Tensor, options: Any
) -> dict[str, float]:
    """Milliseconds of each part of a step, for one chunk or the whole batch."""
    n = len(buffer)
    states = batch["hidden"].detach().reshape(-1, of.d)[:n].bfloat16()
    half = buffer.view(torch.bfloat16)[:, : of.v]
    ids, logprobs, tail = records(n, of.tokens, of.k, of.device)
    rows = LogitRows(
        entries=Entries(ids=ids, logprobs=logprobs.contiguous(), log_tail=tail[:, 0].contiguous()),
        weights=torch.rand(n, device=of.device),
        which=torch.zeros(n, dtype=torch.long, device=of.device),
        labels=torch.randint(of.tokens, (n,), device=of.device),
        label_weights=torch.rand(n, device=of.device),
    )
    pulled = torch.empty(n, of.d, device=of.device)
    relation_only = LossWeights(ce=0.0, response=0.0, visual=0.0)
    related = for_weights(batch, relation_only)
    kernel = {"tokens": of.tokens, "temperature": 1.0, "inside_only": False, "apart": False}

    def two_steps() -> None:
        total.add_(torch.mm(half.t(), states, out_dtype=torch.float32))

    torch.mm(states, low.t(), out_dtype=torch.float32, out=buffer)
    head = Head(weight=batch["weight"], vocab_size=of.tokens)
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
        "relation alone, with W^T W and the head's gradient": lambda: loss_step(of, related, relation_only),
        "zeros of the head's gradient": lambda: torch.zeros_like(total),
    }
    found = {name: clock.median(step) for name, step in steps.items()}
    if options.sweep:
        found |= sweep(clock, of, buffer, rows)
    return found


def main() -> None:
    """Print checks and a table; with --json write the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=16, help="in the micro-batch")
    parser.add_argument("--sweep", action="store_true", help="also layouts of the kernel and sizes of chunks")
    parser.add_argument("--device", default="cuda", help="cpu: tiny sizes, to try the script")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    device = torch.device(options.device)
    of = Sizes(device=device) if device.type == "cuda" else Sizes.tiny(device)
    began = time.monotonic()
    torch.manual_seed(int(time.time()))
    print(f"{device_name(device)}, torch {torch.__version__}")
    for line in check_kernel(of) + check_loss(of):
        print(line)
    found: dict[str, float] = {}
    try:
        measure(Clock(device), of, options, found)
    finally:  # what was measured before something failed
        if options.json:
            options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    for name, value in found.items():
        print(f"{name:60} {value:9.3f}")
    for name in ("floor, float32 sums, chunks", "floor, bf16 out, in one"):
        print(f"loss / {name}: {found['loss, forward and backward'] / found[name]:.2f}")
    print(f"{time.monotonic() - began:.0f} s")


def measure(clock: Clock, of: Sizes, options: Any, found: dict[str, float]) -> None:
    """Puts milliseconds, launches and megabytes in `found`."""
    batch = micro_batch(of, options.samples)
    step = lambda: loss_step(of, batch, LossWeights())  # noqa: E731
    found["loss, forward and backward"] = clock.median(step)
    for share in (0.5, 0.2):
        weights = LossWeights(kl_share=share)
        chosen = for_weights(batch, weights)
        found[f"loss, kl_share {share}"] = clock.median(lambda c=chosen, w=weights: loss_step(of, c, w))
    for budget in (320, 640, 1280) if options.sweep else ():
        found[f"loss, chunks of {budget} MB"] = clock.median(
            lambda b=budget: loss_step(of, batch, LossWeights(), b * 2**20), 3
        )
    without = LossWeights(relation=0.0)
    chosen = for_weights(batch, without)
    found["loss without relation"] = clock.median(lambda: loss_step(of, chosen, without))
    batch["hidden"].grad = batch["weight"].grad = None
    clock.free()
    peak = clock.span(step).peak
    gradients = sum(batch[name].grad.nbytes for name in ("hidden", "weight"))
    found["peak over weights, targets and gradients, MB"] = (peak - gradients) / 1e6 if peak else math.nan
    if of.device.type == "cuda":
        found |= profile(step)
    batch["hidden"].grad = batch["weight"].grad = None
    low, total = batch["weight"].detach().bfloat16(), torch.zeros(of.v, of.d, device=of.device)
    rows = options.samples * (of.visual + of.response)
    chunks = math.ceil(rows / (memory_budget_of(of.device) // (4 * of.v)))
    buffer = torch.empty(math.ceil(rows / chunks), of.v, device=of.device)
    found["floor, float32 sums, chunks"] = clock.median(floor_step(of, batch, low, buffer, total))
    found |= parts_of(clock, of, batch, low, buffer, total, options)
    del buffer
    found["floor, bf16 out, in one"] = clock.median(plain_floor(of, batch, low))
    name = f"dense, one sample x {options.samples}"
    try:
        found[name] = clock.median(lambda: dense_step(of, batch), 3) * options.samples
    except torch.OutOfMemoryError:
        found[name] = math.nan


if __name__ == "__main__":
    main()
