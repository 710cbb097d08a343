"""The device of this process, where several processes share a machine."""

from __future__ import annotations

import os

import torch

from cache_schema.errors import KdcacheError, WrongUsage, first_line

_LOCAL_SIZE = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")


def choose_device(device: str) -> str:
    """The device of this process: of `auto`, or an accelerator without a number, each of several processes on
    a machine has its own; any other name as it is. WrongUsage when there is no such device."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device != "auto" and (accelerator is None or device != accelerator.type):
        try:
            torch.zeros(1, device=device).item()
        except (AssertionError, RuntimeError) as error:
            raise WrongUsage(f"device {device} cannot be used here: {first_line(error)}") from error
        return device
    if accelerator is None:
        return "cpu"
    if accelerator.type == "mps":
        return "mps"
    return f"{accelerator.type}:{rank_on_machine() % torch.accelerator.device_count()}"


def device_name(device: torch.device) -> str:
    """`cpu`, or the accelerator's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Floating-point operations per second of dense 16-bit products, from the vendors' data sheets."""


def peak_flops(device: torch.device) -> float | None:
    """The data sheet's rate of dense 16-bit products on `device`, in operations per second."""
    name = device_name(device)
    return next((peak for card, peak in _PEAKS.items() if card in name), None)


def is_one_of_several() -> bool:
    """Whether a launcher sets the local rank of this process."""
    return any(name in os.environ for name in _LOCAL_RANK)


def rank_on_machine() -> int:
    """The local rank of this process, from its launcher, or 0."""
    return next((number_in(name) for name in _LOCAL_RANK if name in os.environ), 0)


def cores_per_process() -> int:
    """The cores that this process may use, shared with the other processes that its launcher started here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = next((number_in(name) for name in _LOCAL_SIZE if name in os.environ), 1)
    return max(1, cores // max(1, processes))


def number_in(name: str) -> int:
    """The value of an environment variable. KdcacheError when it is not a number."""
    try:
        return int(os.environ[name])
    except ValueError as error:
        raise KdcacheError(f"environment variable {name} is {os.environ[name]!r}, not a number") from error
