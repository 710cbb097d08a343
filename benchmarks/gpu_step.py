"""Training steps on a GPU at LLaVA-KD's shapes, with random weights: SFT, DFT from the cache, DFT with a live
teacher.

    python -m benchmarks.gpu_step [--small] [--no-live] [--device cuda] [--json FILE]

A micro-batch of 16 samples of 890 tokens (729 visual, 105 supervised) that lies on the device, forward, loss
and backward, and an optimizer step every fourth; bf16 autocast, float32 master weights, K = 32, relations of
rank 64. Milliseconds are the median of single micro-batches by the device's clock, in turns. MFU: the step's
floating-point operations (student.throughput.StepFlops) over the time and the data sheet's peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import _shapes
from benchmarks._clock import Clock, Span
from models.device import device_name, peak_flops
from models.parts import Part
from student.losses import LossWeights, PlannedTargets
from student.model import DistilledStudent
from student.stages import CE_ONLY
from student.throughput import StepFlops, hold_frozen

SAMPLES, ACCUMULATE, LIVE_SAMPLES = 16, 4, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a small pair, for small cards")
    parser.add_argument("--device", default="cuda", help="cpu: a tiny pair, to try the script")
    parser.add_argument("--no-live", action="store_true", help="without the live teacher")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shapes = (_shapes.STUDENT, _shapes.TEACHER)
    if arguments.small:
        shapes = (_shapes.SMALL_STUDENT, _shapes.SMALL_TEACHER)
    if arguments.device == "cpu":
        shapes = (_shapes.TINY_STUDENT, _shapes.TINY_TEACHER)
    result = measure(
        torch.device(arguments.device), *shapes, live=not arguments.no_live, repeats=arguments.repeats
    )
    show(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


def measure(
    device: torch.device, shape: _shapes.Shape, teacher_shape: _shapes.Shape, *, live: bool, repeats: int
) -> dict[str, Any]:
    """Milliseconds per sample, peak bytes and MFU of every kind of step."""
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        batch = _shapes.batch_of(Path(folder), shape, samples=SAMPLES, rank=64).to(device)
    torch.manual_seed(0)
    with torch.device(device):
        model = shape.build()
    steps: dict[str, Callable[[], None]] = {}
    result: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "student": shape.name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    parts: tuple[Part, ...] = ("projector", "language_model")
    sft, dft, alone = (
        DistilledStudent(model, weights, vocab_size=shape.vocab, trainable=parts)
        for weights in (CE_ONLY, LossWeights(), LossWeights())
    )
    hold_frozen(model, torch.bfloat16)
    sft.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    inputs = {name: value for name, value in batch.inputs.items() if name != "attention_mask"}
    taken = 0

    def step(student: DistilledStudent, targets: PlannedTargets) -> None:
        nonlocal taken
        with torch.autocast(device.type, dtype=torch.bfloat16):
            parts = student(inputs, batch.labels, targets, batch.denominators)
        parts.total.backward()
        taken += 1
        if taken % ACCUMULATE == 0:
            optimizer.step()
            optimizer.zero_grad()

    states = torch.randn(
        *batch.labels.shape, shape.width, device=device, requires_grad=True
    )  # as autocast's last norm hands them out

    alone.hidden_states = lambda _: states  # type: ignore[method-assign]

    def loss_alone() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            alone(inputs, batch.labels, batch.targets, batch.denominators).total.backward()
        states.grad = None

    labels_only = PlannedTargets.of(batch.labels, None, CE_ONLY)
    steps["SFT"] = lambda: step(sft, labels_only)
    steps["DFT from the cache"] = lambda: step(dft, batch.targets)
    steps["loss of DFT alone"] = loss_alone
    found = timed(clock, steps, repeats, SAMPLES)
    if live:
        lives = live_steps(device, model, teacher_shape, inputs, batch, optimizer)
        found |= timed(clock, lives, max(3, repeats // 3), LIVE_SAMPLES)
    peak = peak_flops(device)
    flops_of = StepFlops(model)
    for name, rows in (("SFT", _shapes.ANSWER), ("DFT from the cache", shape.visual + _shapes.ANSWER)):
        flops = flops_of(batch.inputs, SAMPLES * rows)
        found[name]["mfu"] = flops / SAMPLES / (found[name]["ms_per_sample"] * 1e-3) / peak if peak else None
    for row in found.values():
        row["over_sft"] = row["ms_per_sample"] / found["SFT"]["ms_per_sample"]
    return {**result, "steps": found}


def live_steps(
    device: torch.device,
    model: Any,
    teacher_shape: _shapes.Shape,
    inputs: dict[str, Any],
    batch: Any,
    optimizer: Any,
) -> dict[str, Callable[[], None]]:
    """DFT with the teacher in memory: dense KL and Gram losses, as LLaVA-KD's trainer computes them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            teacher = teacher_shape.build().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    few = {name: value[:LIVE_SAMPLES] for name, value in inputs.items()}
    labels = batch.labels[:LIVE_SAMPLES]
    visual = few["input_ids"] == _shapes.IMAGE_ID
    answers = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))

    def forward() -> torch.Tensor:
        with torch.no_grad():
            states: torch.Tensor = teacher.base_model(**few, use_cache=False).last_hidden_state
        return states

    def step() -> None:
        hidden = forward()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(**few, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        for kind in (answers, visual):
            with torch.no_grad():
                target = F.softmax(teacher.lm_head(hidden[kind]).float(), dim=-1)
            loss = loss + F.kl_div(F.log_softmax(logits[kind].float(), -1), target, reduction="batchmean")
        for row in range(LIVE_SAMPLES):
            ours = logits[row][visual[row]].float()
            with torch.no_grad():
                theirs = teacher.lm_head(hidden[row][visual[row]]).float()
                other = theirs @ theirs.t()
            gram = ours @ ours.t()
            loss = (
                loss + 0.5 * (1 - F.cosine_similarity(gram.flatten(), other.flatten(), dim=0)) / LIVE_SAMPLES
            )
        loss.backward()
        optimizer.zero_grad()

    return {"DFT with a live teacher": step, "the teacher's forward alone": forward}


def timed(
    clock: Clock, steps: dict[str, Callable[[], Any]], repeats: int, samples: int
) -> dict[str, dict[str, Any]]:
    """Each step's milliseconds per sample and peak bytes; the steps take turns."""
    spans: dict[str, list[Span]] = {name: [] for name in steps}
    for _ in range(repeats + 2):
        for name, step in steps.items():
            spans[name].append(clock.span(step))
    return {
        name: {
            "peak_gb_over_weights": found[-1].peak / 1e9,
            "ms_per_sample": statistics.median(span.device for span in found[2:]) / samples,
            "host_ms_per_sample": statistics.median(span.host for span in found[2:]) / samples,
        }
        for name, found in spans.items()
    }


def show(result: dict[str, Any]) -> None:
    """The table."""
    print(
        f"{result['device']}, torch {result['torch']}, {result['student']}, "
        f"{result['parameters']:,} parameters"
    )
    print(f"{'':30} {'ms/sample':>10} {'host':>7} {'over SFT':>9} {'MFU':>6} {'peak GB':>8}")
    for name, row in result["steps"].items():
        mfu = f"{row['mfu']:6.1%}" if row.get("mfu") else f"{'':>6}"
        print(
            f"{name:30} {row['ms_per_sample']:10.2f} {row['host_ms_per_sample']:7.2f} {row['over_sft']:9.2f} "
            f"{mfu} {row['peak_gb_over_weights']:8.2f}"
        )


if __name__ == "__main__":
    main()
