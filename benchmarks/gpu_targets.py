"""What the targets of a batch cost on an accelerator, part by part, each checked against float64.

    python -m benchmarks.gpu_targets [--images 18] [--device cuda] [--small] [--json FILE]

LLaVA-KD's shapes: 729 visual tokens and 130 others a sample, hidden 2,560, V = 151,936, K = 32, bfloat16.
`rank 64`: hidden states whose Gram matrices have eigenvalues i^-2; `full`: random ones. Times are medians in
milliseconds; `host` is the time that the host needs to launch a batch. Ends with 1 when a check fails. Does
nothing on a machine without CUDA or ROCm, unless another device is named.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_schema.format.codecs.relation import RelationBlock, pack_relations
from cache_schema.format.records import StoredRelation
from cache_schema.format.spec import TargetSpec
from models.head import Head
from pipeline.block_statistics import block_statistics
from pipeline.relation_batch import leading, residual_of
from pipeline.targets import Asked, BatchRecords, TargetMaker

REACH = {"top-k, ms a sample": 1.5, "relation rank 64, ms an image": 2.0, "relation full, ms an image": 6.0}
BEFORE = {"top-k, ms a sample": 6.7, "relation full, ms an image": 44.4}  # an H200, one image after the other
BOUND = 1e-5


class Bench:
    """Times and checks. values: what was shown, by section and name; failed: the checks that failed."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.failed: list[str] = []
        self.values: dict[str, dict[str, float]] = {}

    def section(self, name: str) -> None:
        print(name)
        self._section = self.values.setdefault(name, {})

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, work: Callable[[], Any], rounds: int = 5) -> tuple[float, float]:
        """Median milliseconds on the device, and until the host has launched it; the first round warms up."""
        done, launched = [], []
        for _ in range(rounds + 1):
            self.wait()
            start = time.perf_counter()
            work()
            launched.append(time.perf_counter() - start)
            self.wait()
            done.append(time.perf_counter() - start)
        return 1e3 * statistics.median(done[1:]), 1e3 * statistics.median(launched[1:])

    def show(self, what: str, value: float, unit: str = "ms", note: str = "") -> None:
        self._section[what.strip()] = value
        print(f"{what:58s} {value:10.3f} {unit}  {note}", flush=True)

    def part(self, what: str, work: Callable[[], Any], share: float = 1.0, operations: float = 0.0) -> None:
        """A part's time over `share`, or why it does not run here. operations: floating-point ones of it."""
        try:
            took = self.time(work)[0]
            note = f"{operations / took / 1e9:.0f} TFLOP/s" if operations else ""
            self.show(what, took / share, note=note)
        except RuntimeError as error:
            print(f"{what:58s} failed: {str(error).splitlines()[0]}")

    def check(self, what: str, error: float, bound: float) -> None:
        good = error <= bound
        print(f"  {'ok  ' if good else 'FAIL'} {what}: {error:.3g} (at most {bound:g})", flush=True)
        if not good:
            self.failed.append(what)

    def launches_and_waits(self, work: Callable[[], Any]) -> str:
        """Kernels launched by `work`, and operations in it that wait for the device."""
        if self.device.type != "cuda":
            return ""
        self.wait()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
        torch.cuda.set_sync_debug_mode("default")
        places = sorted({f"{w.filename.split('/')[-1]}:{w.lineno}" for w in caught})
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            self.wait()
        kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
        return f"{kernels} kernels and copies, {len(caught)} waits {places or ''}"


def hidden_states(images: int, tokens: int, width: int, power: float, device: torch.device) -> Tensor:
    """(images, tokens, width) bfloat16 whose Gram matrices have eigenvalues about i^-2 power."""
    generator = torch.Generator(device).manual_seed(1)
    states = torch.randn(images, tokens, width, generator=generator, device=device)
    if power:
        left = torch.linalg.qr(torch.randn(images, tokens, tokens, generator=generator, device=device)).Q
        sizes = torch.arange(1, tokens + 1, device=device).float() ** -power
        states = (left * sizes * tokens**0.5) @ torch.linalg.qr(states.mT).Q[:, :, :tokens].mT
    return states.bfloat16()


def check_positions(bench: Bench, head: Head, spec: TargetSpec, states: Tensor, found: BatchRecords) -> None:
    """Some positions against float64 logits."""
    rows = torch.arange(0, len(states), max(1, len(states) // 128))[:128]
    logits = states[rows.to(states.device)].double() @ head.weight[: head.columns].double().T
    logprobs = logits.log_softmax(dim=1).cpu()
    record, at = found.topk, rows.numpy()
    ids = torch.from_numpy(record.token_ids[at]).long()
    best = logprobs.topk(spec.top_k, dim=1).values
    bench.check("log-probabilities", float((torch.from_numpy(record.logprobs[at]) - best).abs().max()), 1e-4)
    bench.check("of the ids", float((logprobs.gather(1, ids) - best).abs().max()), 1e-4)
    lse = logits.logsumexp(dim=1).cpu()
    bench.check("log-sum-exp", float((torch.from_numpy(record.logsumexp[at]) - lse).abs().max()), 1e-4)
    entropy = -(logprobs.exp() * logprobs).sum(dim=1)
    bench.check("entropy", float((torch.from_numpy(record.entropy[at]) - entropy).abs().max()), 1e-4)
    for column, temperature in enumerate(spec.temperatures):
        soft = (logits / temperature).log_softmax(dim=1).cpu().scatter_(1, ids, -torch.inf)
        tail = torch.from_numpy(record.tail_logprob[at, column]) - soft.logsumexp(dim=1)
        bench.check(f"tail at temperature {temperature:g}", float(tail.abs().max()), 1e-4)


def check_relations(bench: Bench, head: Head, hidden: Tensor, found: BatchRecords) -> None:
    """Every image's record as it is read back against R in float64."""
    weight = head.weight[: head.columns].double()
    moment = weight.T @ weight
    stored = [record for record in found.relations if isinstance(record, StoredRelation)]
    worst = told = 0.0
    for image, relation in enumerate(RelationBlock(pack_relations(stored))):
        states = hidden[image].double()
        gram = states @ moment @ states.T
        gram /= gram.norm()
        factor = torch.from_numpy(relation.factor).to(gram.device).double()
        made = factor @ factor.T
        apart = float((gram - made / made.norm()).square().sum() / 2)
        worst, told = max(worst, apart), max(told, abs(apart - relation.residual))
    bench.check("1 - cos to the Gram matrix in float64", worst, BOUND)
    bench.check("the residual that is told", told, 1e-8)


def positions(bench: Bench, head: Head, samples: int, of_each: int) -> None:
    spec = TargetSpec(top_k=32, targets=("response", "visual"))
    count = samples * of_each
    bench.section("top-k")
    generator = torch.Generator(bench.device).manual_seed(2)
    states = torch.randn(count, head.weight.shape[1], generator=generator, device=bench.device).bfloat16()
    numbers = np.arange(count)
    asked = Asked(places=numbers, labels=numbers % 1000, rows=numbers, positions=numbers)
    for temperatures in ((1.0,), (1.0, 2.0)):
        many = TargetSpec(top_k=32, targets=("response", "visual"), temperatures=temperatures)
        check_positions(bench, head, many, states, TargetMaker(head, many).batch(states, asked).wait())
    maker = TargetMaker(head, spec)
    took, host = bench.time(lambda: maker.batch(states, asked))
    name = "top-k, ms a sample"
    bench.show(name, took / samples, note=f"reach {REACH[name]}, before {BEFORE[name]}")
    bench.show(
        "  host time of a batch", host, note=bench.launches_and_waits(lambda: maker.batch(states, asked))
    )
    few = states[: maker.rows_of(count)]
    share = len(few) / of_each
    work = 2.0 * len(few) * head.weight.shape[1] * head.columns
    print(f"  parts, from chunks of {len(few)} positions")
    bench.part("  products, a sample", lambda: head.logits(few), share, work)
    if bench.device.type == "cuda":
        tokens = head.weight[: head.columns].T
        bench.part(
            "  products into rows without padding (not used)",
            lambda: torch.mm(few, tokens, out_dtype=torch.float32),
            share,
            work,
        )
    logits = head.logits(few)
    bench.part("  block statistics, a sample", lambda: block_statistics(logits, (1.0,)), share)
    bench.part("  all after the products, a sample", lambda: maker._group(logits), share)


def relations(bench: Bench, head: Head, images: int, tokens: int) -> None:
    spec = TargetSpec(top_k=32, targets=("relation",), relation_bound=BOUND)
    maker = TargetMaker(head, spec)
    none = np.empty(0, dtype=np.int64)
    rows = np.arange(images * tokens).reshape(images, tokens)
    asked = Asked(places=none, labels=none, rows=none, positions=none, images=list(rows))
    for kind, power in (("rank 64", 1.0), ("full", 0.0)):
        bench.section(f"relations, {kind}")
        hidden = hidden_states(images, tokens, head.weight.shape[1], power, bench.device)
        states = hidden.flatten(0, 1)
        found = maker.batch(states, asked).wait()
        ranks = [record.rank for record in found.relations if isinstance(record, StoredRelation)]
        print(f"  ranks {min(ranks)} to {max(ranks)}")
        check_relations(bench, head, hidden, found)
        took, host = bench.time(lambda s=states: maker.batch(s, asked))
        name = f"relation {kind}, ms an image"
        bench.show(name, took / images, note=f"reach {REACH[name]}, before {BEFORE.get(name, '')}")
        waits = bench.launches_and_waits(lambda s=states: maker.batch(s, asked))
        bench.show("  host time of a batch", host, note=waits)
        pending = maker.batch(states, asked)
        size = sum(t.nbytes for t in pending.tensors) / 1e6
        bench.show(
            "  copy to the host, an image", bench.time(lambda p=pending: copied(p.tensors))[0] / images
        )
        arrays = [tensor.cpu().numpy() for tensor in pending.tensors]
        start = time.process_time()
        stored = pending.records(arrays).relations
        bench.show("  records on the host, CPU an image", 1e3 * (time.process_time() - start) / images)
        compress(bench, stored, size / images)


def copied(tensors: list[Tensor]) -> list[Tensor]:
    if tensors[0].device.type != "cuda":
        return tensors
    return [torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) for t in tensors]


def compress(bench: Bench, stored: list[Any], transferred: float) -> None:
    from cache_schema.format.groups import write_groups

    write_groups({"relation": pack_relations(stored[:1])}, {})  # imports what it needs
    start = time.process_time()
    size = sum(len(data) for data in write_groups({"relation": pack_relations(stored)}, {}).values())
    note = f"{size / len(stored) / 1e3:.1f} kB an image, {transferred:.2f} MB copied"
    bench.show(
        "  packing and compressing, CPU an image",
        1e3 * (time.process_time() - start) / len(stored),
        note=note,
    )


def pieces(bench: Bench, images: int, tokens: int) -> None:
    """What the relations are made of, and what could stand in their place."""
    device = bench.device
    gram = hidden_states(images, tokens, 2 * tokens, 0.5, device).float()
    gram = gram @ gram.mT
    gram /= torch.linalg.vector_norm(gram, dim=(1, 2), keepdim=True)
    eye = 1e-3 * torch.eye(tokens, device=device)
    bench.section("pieces of the relations, milliseconds for all images")
    bench.part("  leading, 80 columns", lambda: leading(gram, min(80, tokens)))
    bench.part("  leading, 272 columns", lambda: leading(gram, min(272, tokens)))
    factor = torch.randn(images, tokens, tokens, device=device)
    bench.part("  residual_of", lambda: residual_of(gram, factor))
    for dtype in (torch.float64, torch.float32):
        for size in (80, 272, tokens):
            matrix = (gram + eye)[:, :size, :size].to(dtype)
            bench.part(f"  cholesky_ex {size} {dtype}", lambda m=matrix: torch.linalg.cholesky_ex(m))
            lower = torch.linalg.cholesky_ex(matrix).L
            wide = factor[:, :, :size].to(dtype)
            bench.part(
                f"  solve_triangular {size} {dtype}",
                lambda a=lower, b=wide: torch.linalg.solve_triangular(a.mT, b, upper=True, left=False),
            )
    small = gram[:, :80, :80].contiguous()
    bench.part("  eigh 80 (not used)", lambda: torch.linalg.eigh(small))
    bench.part("  matmul tokens^3 float32", lambda: factor @ gram)
    double = factor.double()
    bench.part("  matmul tokens^3 float64", lambda: double @ double)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=18, help="samples a batch, one image each")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes, to try the script on a CPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("needs an accelerator")
        return
    bench = Bench(options.device)
    vocab, width, tokens, others = (5003, 96, 49, 10) if options.small else (151936, 2560, 729, 130)
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {options.images} samples of {tokens + others} positions")
    generator = torch.Generator(bench.device).manual_seed(0)
    weight = torch.randn(vocab, width, generator=generator, device=bench.device)
    head = Head(weight=(weight * 2 / width**0.5).bfloat16(), vocab_size=vocab - 271)
    with torch.inference_mode():
        positions(bench, head, options.images, tokens + others)
        relations(bench, head, options.images, tokens)
        pieces(bench, options.images, tokens)
    if options.json is not None:
        result = {
            "device": name,
            "torch": torch.__version__,
            "images": options.images,
            "failed": bench.failed,
        }
        options.json.write_text(json.dumps(result | {"ms": bench.values}, indent=1), encoding="utf-8")
    if bench.failed:
        sys.exit(f"failed: {', '.join(bench.failed)}")


if __name__ == "__main__":
    main()
