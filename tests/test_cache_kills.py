"""A build that is killed at any moment and started again leaves what an undisturbed build leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cache_schema.format.cache import open_cache
from cache_schema.format.documents import FORMAT_VERSION
from cache_schema.operations.verify import verify
from tests.cache_teacher import assert_same_cache, build_cache, disturbed_spec, make_head

ROOT = Path(__file__).parents[1]


def start(url: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.cache_build_child", str(url), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module", params=[1, 2])
def version(request) -> int:
    """The format version of the builds."""
    return request.param


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, version: int) -> Path:
    path = tmp_path_factory.mktemp("undisturbed")
    build_cache(path, disturbed_spec(version), version=version)
    return path


@pytest.fixture(scope="module")
def names(tmp_path_factory, version: int) -> list[str]:
    """Every moment of a build, in order."""
    process = start(tmp_path_factory.mktemp("moments"), "--version", version, "--moments")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output.split("\n")[:-1]


def boundaries(names: list[str]) -> list[int]:
    """The moments just before a rename or a commit, and just after it."""
    at = [i + 1 for i, name in enumerate(names) if name.startswith(("rename", "link"))]
    return sorted({moment for i in at for moment in (i, i + 1)})


def spread(moments: list[int], count: int) -> list[int]:
    return [moments[i * len(moments) // count] for i in range(count)]


def version_of(cache: Path) -> int:
    return open_cache(cache).manifest.format_version


def kill_and_resume(path: Path, at: int, undisturbed: Path) -> None:
    version = version_of(undisturbed)
    process = start(path, "--version", version, "--die-at", at)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    if (path / "manifest.json").exists():
        report = verify(path)
        assert report.intact, report.problems
    before = [file.read_bytes() for file in sorted(path.glob("commits/*.json"))]
    begun = (path / "manifest.json").exists()
    build_cache(
        path, disturbed_spec(version)
    )  # as new builds do, in version 2: one that is there keeps its own
    assert version_of(path) == (version if begun else FORMAT_VERSION)
    assert_same_cache(path, undisturbed)
    after = [file.read_bytes() for file in sorted(path.glob("commits/*.json"))]
    assert all(record in after for record in before)


def kill_one_of_two(path: Path, at: int, undisturbed: Path) -> None:
    version = version_of(undisturbed)
    dying = start(path, 0, 2, "--version", version, "--die-at", at)
    living = start(path, 1, 2, "--version", version)
    dying.communicate(timeout=120)
    made = living.communicate(timeout=120)[0].split()
    assert living.returncode == 0
    assert dying.returncode in (0, -signal.SIGKILL)
    assert made
    build_cache(path, disturbed_spec(version))
    assert_same_cache(path, undisturbed)


def test_moments_cover_the_protocol(names: list[str], version: int) -> None:
    assert len(names) > {1: 300, 2: 80}[version]
    assert sum(name.startswith("rename") for name in names) == 5 * {1: 3, 2: 4}[version]
    head = [f"{make_head()[0].sha256}.safetensors"] if version == 2 else []
    # The manifest twice: the second creation must be refused, which shows that the place can refuse.
    assert [name.split()[1] for name in names if name.startswith("link")] == [
        "manifest.json", "manifest.json", *head, *(f"{i:05d}.json" for i in range(5))
    ]  # fmt: skip


def test_a_few_kills(tmp_path: Path, names: list[str], undisturbed: Path) -> None:
    between = [i + 1 for i, name in enumerate(names) if name.startswith("link")]
    for at in (between[0], between[2], between[3] + 1, *spread(list(range(1, len(names))), 3)):
        kill_and_resume(tmp_path / str(at), at, undisturbed)


def test_two_workers_share_a_build_and_one_dies(tmp_path: Path, names: list[str], undisturbed: Path) -> None:
    kill_one_of_two(tmp_path / "cache", len(names) // 3, undisturbed)


def test_two_builds_share_the_work(tmp_path: Path, undisturbed: Path) -> None:
    both = [start(tmp_path / "cache", rank, 2, "--version", version_of(undisturbed)) for rank in range(2)]
    made = [process.communicate(timeout=120)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(made[0] + made[1]) == ["0", "1", "2", "3", "4"]
    assert_same_cache(tmp_path / "cache", undisturbed)
    assert verify(tmp_path / "cache").leftovers == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_at_every_boundary_and_between(tmp_path: Path, names: list[str], undisturbed: Path) -> None:
    moments = sorted({*boundaries(names), *spread(list(range(1, len(names))), 20)})
    assert len(moments) >= 50
    for at in moments:
        kill_and_resume(tmp_path / str(at), at, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_with_two_workers(tmp_path: Path, names: list[str], undisturbed: Path) -> None:
    for at in spread(boundaries(names)[: len(names) // 2], 10):
        kill_one_of_two(tmp_path / str(at), at, undisturbed)
