"""Every Triton kernel as machine code for devices that are not there, and what it takes of them.

    python -m benchmarks.kernel_binaries [--device A100 H100 MI300] [--json FILE]

The product's own functions launch their kernels, at LLaVA-KD's vocabulary, on a driver that compiles and
does not run: threads per program, registers per thread, bytes of them spilled to memory, bytes of shared
memory per program. It shows that the kernels compile for these devices and fit them, not that they are right
or fast.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks._shapes import VOCAB
from pipeline.block_kernel import fused_fields, fused_statistics
from pipeline.block_statistics import BLOCK
from student.divergences import Divergence
from student.losses.entropy_kernel import kernel_entropy
from student.losses.kernels import row_kernel
from student.losses.logit_rows import LogitRows
from student.losses.records import Entries
from student.losses.scale_kernel import scale_in_place

TARGETS = {
    "A100": GPUTarget("cuda", 80, 32),
    "H100": GPUTarget("cuda", 90, 32),
    "MI300": GPUTarget("hip", "gfx942", 64),
}
TOKENS = 151_646
"""Of Qwen1.5's tokenizer: the other columns of the head are padding."""
ROWS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: list[dict[str, Any]] = []
    names = ("threads", "registers", "spilled", "shared")
    print(f"{'kernel':20} {'case':40} {'device':6} {' '.join(f'{name:>9}' for name in names)}")
    for case, launch in cases().items():
        for device in options.device:
            for found in compiled(launch, device):
                report.append({"case": case, "device": device, **found})
                numbers = " ".join(f"{found[name]:9}" for name in names)
                print(f"{found['kernel']:20} {case:40} {device:6} {numbers}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


def cases() -> dict[str, Callable[[], object]]:
    """What is compiled: calls of the product's functions, by name."""
    found: dict[str, Callable[[], object]] = {}
    others = (Divergence("jsd", 0.3), Divergence("reverse_kl"))
    capped = {"bias": torch.zeros(VOCAB), "scale": 0.5, "softcap": 30.0}
    in_place, apart = {"grads": torch.bfloat16}, {"temperature": 2.0, "apart": True}
    for name, words in {
        "losses and bf16 gradient": in_place,
        "losses and fp32 gradient": {"grads": torch.float32},
        "losses alone": {},
        "no padded columns": in_place | {"tokens": VOCAB},
        "temperature 2": in_place | apart,
        "truncated entries": in_place | {"inside_only": True},
        "other divergences": in_place | {"divergences": others},
        "other divergences, temperature 2": in_place | apart | {"divergences": others},
        "bias, scale and softcap": in_place | capped,
        "bias, scale, softcap and temperature 2": in_place | apart | capped,
    }.items():
        found[name] = partial(losses, **words)
    for k in (1, 64, 256):
        found[f"{k} entries"] = partial(losses, k=k, **in_place)
    for dtype in (torch.bfloat16, torch.float32):
        found[f"entropy of {dtype}"] = partial(kernel_entropy, torch.empty(ROWS, VOCAB, dtype=dtype))
        found[f"scale {dtype}"] = partial(
            scale_in_place, torch.empty(ROWS, VOCAB, dtype=dtype), torch.ones(())
        )
    found["entropy, bias and softcap"] = partial(kernel_entropy, torch.empty(ROWS, VOCAB), **capped)
    for temperatures in ((1.0,), (0.5, 1.0, 2.0)):
        found[f"k = 32, temperatures {temperatures}"] = partial(entries, 32, temperatures)
    found["k = 64"] = partial(entries, 64, (1.0,))
    found["up to 32 entries"] = partial(entries, 32, (1.0,), limited=True)
    found["up to 256 entries"] = partial(entries, 256, (1.0,), limited=True)
    return found


def losses(*, grads: torch.dtype | None = None, k: int = 32, **words: Any) -> None:
    """`row_kernel`, its gradient in place of the products."""
    rows = LogitRows(
        entries=Entries(
            ids=torch.zeros(ROWS, k, dtype=torch.int64),
            logprobs=torch.zeros(ROWS, k),
            log_tail=torch.zeros(ROWS),
        ),
        weights=torch.ones(ROWS),
        which=torch.zeros(ROWS, dtype=torch.int64),
        labels=torch.zeros(ROWS, dtype=torch.int64),
        label_weights=torch.ones(ROWS),
    )
    products = torch.zeros(ROWS, VOCAB)
    given = {"tokens": TOKENS, "temperature": 1.0, "inside_only": False, "apart": False, **words}
    row_kernel(products, rows, grads=None if grads is None else products.view(grads)[:, :VOCAB], **given)


def entries(k: int, temperatures: tuple[float, ...], *, limited: bool = False) -> None:
    """The two kernels of a record's fields."""
    logits = torch.zeros(ROWS, VOCAB)
    statistics = fused_statistics(logits, temperatures, BLOCK)
    fused_fields(logits, statistics, temperatures, k, BLOCK, torch.zeros(ROWS, 2) if limited else None)


class _Absent:
    """Triton's driver of a device that is not there."""

    def __init__(self, device: str) -> None:
        self._place = list(TARGETS).index(device)
        self._target = TARGETS[device]

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._place

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(launch: Callable[[], object], device: str) -> list[dict[str, Any]]:
    """What the kernels that `launch` launches take of a device, in turn."""
    found: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **words: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **words)
        threads = kernel.metadata.num_warps * TARGETS[device].warp_size
        found.append({"kernel": self.fn.__name__, "threads": threads, **_resources(kernel)})

    with (
        _driver(device),
        patch("student.losses.kernels.warp_size", lambda on: TARGETS[device].warp_size),
        patch.object(JITFunction, "run", compile_only),
    ):
        launch()
    return found


@contextmanager
def _driver(device: str) -> Iterator[None]:
    before = driver._active
    driver.set_active(_Absent(device))
    try:
        yield
    finally:
        driver._active = before


def _resources(kernel: Any) -> dict[str, int]:
    """Registers and bytes of them spilled per thread, and bytes of shared memory per program."""
    shared = int(kernel.metadata.shared)
    if "cubin" not in kernel.asm:
        text = kernel.asm["amdgcn"]
        registers, spilled = (int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1]) for name in _AMD)
        return {"registers": registers, "spilled": 4 * spilled, "shared": shared}
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        ran = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = (int(re.findall(rf"{name}:(\d+)", ran.stdout)[-1]) for name in ("REG", "STACK"))
    return {"registers": registers, "spilled": stack, "shared": shared}


_AMD = ("vgpr_count", "vgpr_spill_count")


if __name__ == "__main__":
    main()
