"""The time of the loss with each divergence, as a ratio to the forward KL: python -m benchmarks.divergences

A quarter of the positions of benchmarks.losses, a trained head, KL and cross entropy without the relation
loss, whose time is the same for all; CPU time. A step with the forward KL stands before and after every other
one; a ratio is that to the mean of these two, so that other work on the machine counts for both.
--foretold: instead, the loss of benchmarks.roofline at LLaVA-KD's shapes, by the cost model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.losses import RESPONSE, VISUAL, Case, make_case, ours
from benchmarks.roofline import DEVICES, foretell, recordings
from student.divergences import PARAMETERS
from student.losses import LossWeights

# A temperature, so that `first` needs no held-out labels.
TEXTS = {name: "first:1" if name == "first" else name for name in PARAMETERS if name != "forward_kl"}
"""The divergences to compare with the forward KL, as settings name them."""


def seconds_of(case: Case, divergence: str) -> float:
    """CPU seconds of a step."""
    case.hidden.grad = case.weight.grad = None
    began = time.process_time()
    ours(case, LossWeights(divergence=divergence, relation=0.0))
    return time.process_time() - began


def measured(names: Sequence[str], rounds: int) -> None:
    """Prints the ratio of each, the median of the rounds, when it is there."""
    torch.set_num_threads(1)
    case = make_case(torch.float32, trained=True, dense=False, visual=VISUAL // 4, response=RESPONSE // 4)
    seconds_of(case, "forward_kl")
    before = seconds_of(case, "forward_kl")
    print(f"{'forward_kl':18} {before:7.2f} s")
    for name in names:
        ratios = []
        for _ in range(rounds):
            taken, after = seconds_of(case, TEXTS[name]), seconds_of(case, "forward_kl")
            ratios.append(2 * taken / (before + after))
            before = after
        print(f"{name:18} {taken:7.2f} s {statistics.median(ratios):6.2f}", flush=True)


def foretold(names: Sequence[str], device: str) -> None:
    """Prints the ratio of each by the cost model."""
    base = 0.0
    for name in ("forward_kl", *names):
        step = f"loss, DFT, {name}"
        forecast = foretell(recordings([step])[step].operations, DEVICES[device])
        base = base or forecast.seconds
        print(
            f"{name:18} {forecast.seconds * 1e3:7.1f} ms {forecast.seconds / base:6.2f} "
            f"{forecast.launches:8,} launches {forecast.waits:5,} waits",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=3, help="timed steps of each, of which the median counts"
    )
    parser.add_argument("--only", nargs="+", default=list(TEXTS), choices=list(TEXTS), metavar="NAME")
    parser.add_argument("--foretold", choices=sorted(DEVICES), help="by the cost model, on this device")
    arguments = parser.parse_args()
    if arguments.foretold:
        foretold(arguments.only, arguments.foretold)
    else:
        measured(arguments.only, arguments.rounds)


if __name__ == "__main__":
    main()
