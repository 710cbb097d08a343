"""The time of the loss with each divergence, as a ratio to the forward KL: python -m benchmarks.divergences

The case of benchmarks.losses with a trained head; steps of all divergences alternate in one process.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.losses import make_case, ours
from student.divergences import PARAMETERS
from student.losses import LossWeights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each, of which the best counts")
    parser.add_argument("--only", nargs="+", default=list(PARAMETERS), metavar="NAME", help="beside the KL")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    torch.set_num_threads(1)
    case = make_case(torch.float32, trained=True, dense=False)
    names = dict.fromkeys(("forward_kl", *arguments.only))
    # A temperature, so that `first` needs no held-out labels.
    seconds: dict[str, list[float]] = {"first:1" if name == "first" else name: [] for name in names}
    for _ in range(rounds + 1):
        for name, taken in seconds.items():
            case.hidden.grad = case.weight.grad = None
            began = time.process_time()
            ours(case, LossWeights(divergence=name))
            taken.append(time.process_time() - began)
    base = min(seconds["forward_kl"][1:])
    for name, taken in seconds.items():
        print(f"{name:18} {min(taken[1:]):7.2f} s {min(taken[1:]) / base:6.3f}")


if __name__ == "__main__":
    main()
