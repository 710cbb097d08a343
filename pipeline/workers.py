"""The rank of this process among several workers."""

from __future__ import annotations

import os

from cache_schema.errors import WrongUsage
from models.device import number_in

# torchrun and accelerate set the first pair, SLURM's srun the second, Open MPI's mpirun the third.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)


def place_among_workers(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world size) as given, or as a launcher's environment says, or (0, 1).

    WrongUsage when they do not fit together.
    """
    if rank is None and world_size is None:
        for rank_name, size_name in _LAUNCHERS:
            if rank_name in os.environ and size_name in os.environ:
                rank, world_size = number_in(rank_name), number_in(size_name)
                break
        else:
            return 0, 1
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise WrongUsage(f"rank {rank} of world size {world_size}: give both, with 0 <= rank < world size")
    return rank, world_size
