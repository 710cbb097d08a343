"""The memory of this process by the kernel's account (Linux), in bytes."""

import re
from pathlib import Path


def held() -> int:
    """What is held now."""
    return _status("VmRSS")


def mapped() -> int:
    """The part of it that is pages of files, which the system takes back when others need memory."""
    return _status("RssFile")


def peak() -> int:
    """The most that was held, of this program: `ru_maxrss` would count the one that started it too."""
    return _status("VmHWM")


def reset_peak() -> int:
    """Sets the peak back to what is held now, which is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return held()


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, name
    return int(found[1]) * 1024
