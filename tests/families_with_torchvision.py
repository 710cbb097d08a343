"""The families whose processors need torchvision; run by test_pipeline_torchvision.py where it imports."""

from pathlib import Path

import pytest

from tests.family_checks import check_family
from tests.tiny_families import names


@pytest.mark.parametrize("name", names(torchvision=True))
def test_family(name: str, tmp_path: Path) -> None:
    check_family(name, tmp_path)
