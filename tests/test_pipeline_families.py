"""Every family of teachers, as a tiny random model with its real processor."""

from pathlib import Path

import pytest

from tests.family_checks import check_family
from tests.tiny_families import names


# PaliGemmaProcessor turns tensors into arrays in a way that NumPy 2 frowns upon.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", names(torchvision=False))
def test_family(name: str, tmp_path: Path) -> None:
    check_family(name, tmp_path)
