"""Foretells how long recorded operations take on a device, from the rates of a table.

    python -m benchmarks.roofline [--device H200|H100|A100|CPU] [--json FILE]

An operation takes the longer of its arithmetic and its traffic, and at least the shortest time of a kernel.
The host starts kernels one after the other. Where nothing waits for the device, host and device run beside
each other and the longer decides; code that waits runs them in turn. calibration.json holds the operations of
version 0.1.0, which one H200 has measured: the table shows how far the model is off there. Not foretold:
library start-up, caches, clocks that fall under load, other processes. CPU is one core of the machine of
LOG.md, in processor time, by the code that runs there, in float32: one sample in place of 16.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import _shapes
from benchmarks._recorder import Operation, Recording, as_on_cpu, as_on_cuda, imagined
from student.losses import LossWeights, PlannedTargets
from student.model import DistilledStudent
from student.stages import CE_ONLY

CALIBRATION = Path(__file__).with_name("calibration.json")
SAMPLES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Rates that real work reaches, not those of the data sheet.

    matmul: floating-point operations per second of matrix products by the dtype of their factors. memory:
    bytes per second, read plus written. kernel: seconds that the smallest kernel takes. launch: seconds of
    the host per kernel. wait: seconds of the host per wait, beyond the work waited for. is_host: whether the
    host does the work itself.
    """

    name: str
    matmul: dict[str, float]
    memory: float
    kernel: float = 3e-6
    launch: float = 10e-6
    wait: float = 2e-5
    is_host: bool = False


_FACTORS = {"factorisation": 0.8e12}
"""Cholesky factors and triangular solves: by the one measurement of relation records (H100, 1.13 ms)."""


def _rates(half: float, single: float) -> dict[str, float]:
    return {"bfloat16": half, "float32": single, "float64": single, **_FACTORS}


DEVICES = {
    device.name: device
    for device in (
        Device(
            name="H200",
            matmul=_rates(700e12, 45e12),
            memory=4.0e12,
        ),
        Device(
            name="H100",
            matmul=_rates(700e12, 45e12),
            memory=2.8e12,
        ),
        Device(
            name="A100",
            matmul=_rates(260e12, 18e12),
            memory=1.4e12,
        ),
        Device(
            name="CPU",  # products: those of the floor of benchmarks.losses, 2026-11-26
            matmul={"bfloat16": 140e9, "float32": 140e9, "float64": 70e9, "factorisation": 1e9},
            memory=12e9,
            kernel=0.0,
            launch=5e-6,
            wait=0.0,
            is_host=True,
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Seconds of device and host, launches, waits, and the seconds of the products alone in bfloat16."""

    device: float
    host: float
    floor: float
    launches: int
    waits: int
    flops: int
    bytes: int
    is_host: bool

    @property
    def seconds(self) -> float:
        """The longer of device and host; their sum where the host waits, or is the device."""
        in_turn = self.waits or self.is_host
        return self.device + self.host if in_turn else max(self.device, self.host)


def foretell(recording: Recording, device: Device) -> Forecast:
    """The time that `recording` takes on `device`."""
    busy = host = floor = 0.0
    launches = waits = flops = moved = 0
    for operation, count in recording.items():
        rate = device.matmul.get(operation.dtype, device.matmul["float32"])
        seconds = max(operation.flops / rate, operation.bytes / device.memory)
        busy += count * max(seconds, operation.launches * device.kernel)
        host += count * (operation.launches * device.launch + operation.waits * device.wait)
        floor += count * operation.flops / device.matmul["bfloat16"]
        launches += count * operation.launches
        waits += count * operation.waits
        flops += count * operation.flops
        moved += count * operation.bytes
    return Forecast(
        device=busy,
        host=host,
        floor=floor,
        launches=launches,
        waits=waits,
        flops=flops,
        bytes=moved,
        is_host=device.is_host,
    )


def calibration() -> list[dict[str, Any]]:
    """What was measured of version 0.1.0, each with its recording: name, device, measured_ms, recording."""
    cases = json.loads(CALIBRATION.read_text(encoding="utf-8"))
    for case in cases:
        case["recording"] = Counter({Operation(*fields): count for *fields, count in case.pop("operations")})
    return list(cases)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The operations of a step, and the most bytes that it held over weights, inputs and gradients."""

    operations: Recording
    peak: int


STEPS: dict[str, tuple[LossWeights, bool]] = {
    "loss, DFT": (LossWeights(), False),
    "loss, DFT, kl_share 0.5": (LossWeights(kl_share=0.5), False),
    "loss, DFT, kl_share 0.2": (LossWeights(kl_share=0.2), False),
    "loss, DFT, adaptive_kl": (LossWeights(divergence="adaptive_kl"), False),
    "step, SFT": (CE_ONLY, True),
    "step, DFT from the cache": (LossWeights(), True),
}
"""By name, what is recorded: the objective, and whether the student's forward and backward are in it."""


def recordings(
    steps: Sequence[str] = tuple(STEPS), *, samples: int = SAMPLES, on_cuda: bool = True
) -> dict[str, Recorded]:
    """Some of STEPS for a micro-batch of samples at LLaVA-KD's shapes, by the code as it is: on CUDA under
    autocast, or on a CPU in float32."""
    with tempfile.TemporaryDirectory() as folder:
        batch = _shapes.batch_of(Path(folder), _shapes.STUDENT, samples=samples, rank=64)

    def record(weights: LossWeights, *, whole: bool) -> Recorded:
        given = batch.targets if weights != CE_ONLY else None
        targets = PlannedTargets.of(batch.labels, given, weights)
        with imagined() as recorder, as_on_cuda() if on_cuda else as_on_cpu():
            student = DistilledStudent(
                _shapes.STUDENT.build(),
                weights,
                vocab_size=_shapes.VOCAB,
                trainable=("projector", "language_model"),
            ).train()
            student.needs_mask = False  # as training finds out
            leaves = [parameter for parameter in student.parameters() if parameter.requires_grad]
            if not whole:
                states = torch.empty(*batch.labels.shape, _shapes.STUDENT.width, requires_grad=True)
                student.hidden_states = lambda _: states
                leaves.append(states)
            recorder.begin()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on_cuda):
                parts = student(batch.inputs, batch.labels, targets, batch.denominators)
            parts.total.backward()
            gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
            peak = recorder.peak - sum(each.numel() * each.element_size() for each in gradients)
            return Recorded(operations=recorder.operations, peak=peak)

    return {name: record(STEPS[name][0], whole=STEPS[name][1]) for name in steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=sorted(DEVICES), default="H200")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [
        {
            **_row(f"0.1.0: {case['name']}", case["recording"], DEVICES[case["device"]]),
            "measured_ms": case["measured_ms"],
        }
        for case in calibration()
    ]
    device = DEVICES[arguments.device]
    samples = 1 if device.is_host else SAMPLES
    rows += [
        {**_row(name, found.operations, device), "peak": found.peak}
        for name, found in recordings(samples=samples, on_cuda=not device.is_host).items()
    ]
    print(
        f"{'1 sample' if samples == 1 else f'{samples} samples':40} {'ms':>8} {'measured':>9} {'floor':>7} "
        f"{'ratio':>6} {'launches':>9} {'waits':>6} {'peak MB':>8}"
    )
    for row in rows:
        measured = f"{row['measured_ms']:9.1f}" if "measured_ms" in row else f"{'-':>9}"
        peak = f"{row['peak'] / 1e6:8.0f}" if "peak" in row else ""
        print(
            f"{row['name']:40} {row['ms']:8.1f} {measured} {row['floor_ms']:7.1f} "
            f"{row['ms'] / row['floor_ms']:6.2f} {row['launches']:9,} {row['waits']:6} {peak}"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _row(name: str, recording: Recording, device: Device) -> dict[str, Any]:
    forecast = foretell(recording, device)
    row = {
        key: value
        for key, value in asdict(forecast).items()
        if key in ("launches", "waits", "flops", "bytes")
    }
    return {
        "name": name,
        "device": device.name,
        "ms": round(forecast.seconds * 1e3, 2),
        "device_ms": round(forecast.device * 1e3, 2),
        "host_ms": round(forecast.host * 1e3, 2),
        "floor_ms": round(forecast.floor * 1e3, 2),
        **row,
    }


if __name__ == "__main__":
    main()
