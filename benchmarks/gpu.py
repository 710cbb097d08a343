"""`make bench-gpu`: everything that only a GPU can show, in one command without network, in under 8 minutes.

    python -m benchmarks.gpu [--part loss targets step capture roofline] [--small] [--out FOLDER]

Every part is a benchmark of its own, in a process of its own, and may fail without the others; its table and
its JSON go to FOLDER. roofline foretells the loss and the steps on the card at hand, where its rates are
known.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.roofline import DEVICES
from models.device import device_name

PARTS = {
    "loss": ["benchmarks.gpu_loss"],
    "targets": ["benchmarks.gpu_targets"],
    "step": ["benchmarks.gpu_step"],
    "capture": ["benchmarks.gpu_capture"],
    "roofline": ["benchmarks.roofline"],
}
SECONDS = 240


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
    results, failed = {}, []
    for part in arguments.part:
        file = arguments.out / f"{part}.json"
        command = [sys.executable, "-m", *PARTS[part], "--json", str(file)]
        if arguments.small and part in ("step", "capture"):
            command.append("--small")
        known = [name for name in DEVICES if name in card]
        if part == "roofline" and known:
            command += ["--device", known[0]]
        print(f"\n== {part} ==", flush=True)
        started = time.monotonic()
        try:
            code = subprocess.run(command, check=False, timeout=SECONDS).returncode
        except subprocess.TimeoutExpired:
            code = -1
        print(f"({time.monotonic() - started:.0f} s)", flush=True)
        if code:
            failed.append(part)
        elif file.exists():
            results[part] = json.loads(file.read_text(encoding="utf-8"))
    summary = {"device": card, "torch": torch.__version__, "parts": results, "failed": failed}
    (arguments.out / "bench-gpu.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
