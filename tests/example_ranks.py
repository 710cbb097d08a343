"""An example under torchrun, after which all processes must have the same weights.

torchrun --nproc-per-node 2 -m tests.example_ranks FILE WORDS...
"""

from __future__ import annotations

import runpy
import sys

import torch
import torch.distributed as dist


def main() -> None:
    sys.argv = sys.argv[1:]
    student = runpy.run_path(sys.argv[0], run_name="__main__")["student"]
    assert dist.get_world_size() == 2
    for name, parameter in student.named_parameters():
        own = parameter.detach().cpu()
        first = own.clone()
        dist.broadcast(first, src=0)
        assert torch.equal(own, first), name


if __name__ == "__main__":
    main()
