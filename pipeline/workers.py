"""Which of several workers this process is."""

from __future__ import annotations

import os

from cache_schema.errors import KdcacheError, WrongUsage

# torchrun and accelerate set the first pair, SLURM's srun the second, Open MPI's mpirun the third.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)

_LOCAL = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")


def is_one_of_several() -> bool:
    """Whether a launcher says which of the workers on this machine this process is."""
    return any(name in os.environ for name in _LOCAL)


def rank_on_machine() -> int:
    """Which of the workers on this machine this process is, as its launcher says, or 0."""
    return next((_number(name) for name in _LOCAL if name in os.environ), 0)


def place_among_workers(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world size) as given, or as a launcher's environment says, or (0, 1).

    WrongUsage when they do not fit together.
    """
    if rank is None and world_size is None:
        for rank_name, size_name in _LAUNCHERS:
            if rank_name in os.environ and size_name in os.environ:
                rank, world_size = _number(rank_name), _number(size_name)
                break
        else:
            return 0, 1
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise WrongUsage(
            f"rank {rank} of world size {world_size}: give both, the rank counted from 0 below the world size"
        )
    return rank, world_size


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError as error:
        raise KdcacheError(f"environment variable {name} is {os.environ[name]!r}, not a number") from error
