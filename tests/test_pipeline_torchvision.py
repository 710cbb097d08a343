"""Families whose processors need torchvision, and quantised teachers, in a process that has both."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cache_schema.errors import KdcacheError
from models.folder import load_processor
from tests.tiny_families import names
from tests.torchvision_folder import environment

ROOT = Path(__file__).resolve().parent.parent


def passed(file: str) -> int:
    """How many tests of `file` passed in a process that has torchvision and bitsandbytes; all must."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"tests/{file}"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    found = re.search(r"(\d+) passed", run.stdout)
    assert found is not None
    return int(found[1])


def test_families_with_torchvision() -> None:
    assert passed("families_with_torchvision.py") == len(names(torchvision=True))


def test_pixels_with_torchvision() -> None:
    assert passed("test_student_pixels.py") == 18


def test_quantised_teachers() -> None:
    assert passed("quantised_teachers.py") == 2


def test_a_processor_without_its_torchvision_says_so(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.tiny_families import make; "
        "make('qwen2_vl', Path(sys.argv[1]))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment(), check=True, timeout=120
    )
    with pytest.raises(KdcacheError, match=r"needs torchvision; install it") as caught:
        load_processor(tmp_path)
    assert "\n" not in str(caught.value)
