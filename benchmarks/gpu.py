"""`make bench-gpu`: everything that only a GPU can show, in one command without network, in under 8 minutes.

    python -m benchmarks.gpu [--part loss targets step capture loader roofline] [--small] [--out FOLDER]

Every part is a benchmark of its own, in a process of its own, and may fail without the others; its table and
its JSON go to FOLDER, as far as it came. roofline foretells the losses and the steps on the card at hand,
where its rates are known: its figures stand beside what was measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.roofline import DEVICES, SAMPLES
from models.device import device_name

PARTS = {
    "loss": ["benchmarks.gpu_loss"],
    "targets": ["benchmarks.gpu_targets"],
    "step": ["benchmarks.gpu_step"],
    "capture": ["benchmarks.gpu_capture"],
    "loader": ["benchmarks.loader", "--samples", "512"],
    "roofline": ["benchmarks.roofline"],
}
SMALL = ("step", "capture")
"""Parts that have small models."""
SECONDS, ALL_SECONDS = 180, 470
"""Most of a part, and of all of them."""
FORETOLD = {
    "loss, DFT": ("loss", ("loss, forward and backward",), 1),
    "loss, DFT, kl_share 0.5": ("loss", ("loss, kl_share 0.5",), 1),
    "loss, DFT, kl_share 0.2": ("loss", ("loss, kl_share 0.2",), 1),
    "step, SFT": ("step", ("steps", "SFT", "ms_per_sample"), SAMPLES),
    "step, DFT from the cache": ("step", ("steps", "DFT from the cache", "ms_per_sample"), SAMPLES),
}
"""By what roofline foretells: where it is measured, and how many of that make one."""


def main() -> int:
    """Runs the parts; 1 when one failed or there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="a small pair of models, for small cards")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA or ROCm device here; `make bench` runs what a CPU can show")
        return 1
    card = device_name(torch.device("cuda"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    options = {part: ["--small"] for part in SMALL if arguments.small}
    if known := [name for name in DEVICES if name in card]:
        options["roofline"] = ["--device", known[0]]
    results, failed = run(arguments.part, options, arguments.out)
    compared = [] if arguments.small else beside(results)
    for name, measured, foretold in compared:
        print(f"{name:28} {measured:8.1f} ms measured {foretold:8.1f} foretold {measured / foretold:6.2f}")
    summary = {
        "device": card,
        "torch": torch.__version__,
        "parts": results,
        "failed": failed,
        "foretold": [dict(zip(("name", "ms", "foretold_ms"), row, strict=True)) for row in compared],
    }
    (arguments.out / "bench-gpu.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def run(parts: list[str], options: dict[str, list[str]], out: Path) -> tuple[dict[str, Any], list[str]]:
    """What each part wrote, also one that failed, and which of them failed."""
    results, failed = {}, []
    began = time.monotonic()
    for part in parts:
        file = out / f"{part}.json"
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", *PARTS[part], *options.get(part, ()), "--json", str(file)]
        print(f"\n== {part} ==", flush=True)
        started = time.monotonic()
        try:
            left = max(1.0, ALL_SECONDS - (started - began))
            code = subprocess.run(command, check=False, timeout=min(SECONDS, left)).returncode
        except subprocess.TimeoutExpired:
            code = -1
            print(f"{part} was stopped: it took more than its time")
        print(f"({time.monotonic() - started:.0f} s)", flush=True)
        if code:
            failed.append(part)
        if file.exists():
            results[part] = json.loads(file.read_text(encoding="utf-8"))
    return results, failed


def beside(results: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(name, milliseconds measured, those foretold) of what was both."""
    found = []
    foretold = {row["name"]: row["ms"] for row in results.get("roofline", ())}
    for name, (part, keys, times) in FORETOLD.items():
        value = results.get(part)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and name in foretold:
            found.append((name, times * value, foretold[name]))
    return found


if __name__ == "__main__":
    sys.exit(main())
