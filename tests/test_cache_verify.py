"""`verify` finds every damage and `--repair` leaves a cache that a build completes."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema import CacheDamaged, CacheWriter, KdcacheError, TargetSpec, open_cache
from cache_schema.operations import verify as verifying
from cache_schema.operations import verify_shard
from cache_schema.operations.verify import GRACE_SECONDS, verify
from tests.cache_teacher import (
    assert_same_cache,
    build_cache,
    capture,
    disturbed_spec,
    holding,
    make_manifest,
)

SPEC = TargetSpec(targets=("response", "visual", "relation", "prompt"), top_k=6)


@pytest.fixture(scope="module", params=[1, 2])
def sound(tmp_path_factory, request) -> Path:
    """A cache of each format version."""
    path = tmp_path_factory.mktemp("sound")
    build_cache(path, SPEC, version=request.param)
    return path


@pytest.fixture
def cache(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "cache")
    return tmp_path / "cache"


def test_a_sound_cache_has_no_problem(sound: Path) -> None:
    report = verify(sound)
    assert report.problems == []
    assert report.leftovers == []
    assert (report.shards, report.samples + report.quarantined) == (5, 20)
    document = json.loads(json.dumps(report.to_json()))
    assert document["ok"] is True
    assert "unchecked" not in document


def test_processes_share_the_shards_and_find_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    class Pool(ProcessPoolExecutor):
        def __init__(self, count: int, **options: Any) -> None:
            started.append(count)
            super().__init__(count, **options)

    monkeypatch.setattr(verifying, "ProcessPoolExecutor", Pool)
    verify(cache, jobs=3)
    assert not started  # so small a cache is checked sooner than a process starts
    monkeypatch.setattr(verifying, "LEAST_BYTES", 1)
    chunk = holding(cache, 3, "relation/norm/c/0")
    chunk.write_bytes(chunk.read_bytes()[:-1])
    next((cache / "samples").glob("00001-*")).unlink()
    alone, together = verify(cache), verify(cache, jobs=3)
    assert started == [3]
    assert together.problems == alone.problems
    assert len(alone.problems) == 2
    names = ("shards", "samples", "quarantined", "bytes", "unchecked")
    assert [getattr(together, name) for name in names] == [getattr(alone, name) for name in names]
    records = [json.loads(path.read_text()) for path in (cache / "commits").glob("*.json")]
    paths = {cache / file["path"] for record in records for file in record["files"]}
    sizes = {path: path.stat().st_size for path in paths if path.exists()}
    assert alone.bytes == sum(sizes.values())
    assert together.to_json()["samples_per_second"] > 0


def test_a_quick_check_decodes_nothing_and_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decodes(*_: object) -> None:
        raise AssertionError("something was decoded")

    monkeypatch.setattr(verify_shard, "read_groups", decodes)
    monkeypatch.setattr(verify_shard, "read_table", decodes)
    report = verify(cache, quick=True)
    assert report.ok
    assert "nothing in them was decoded" in report.to_json()["unchecked"]
    table = next((cache / "samples").glob("00001-*"))
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    table.write_bytes(bytes(content))
    (problem,) = verify(cache, quick=True).problems
    assert "digest" in problem.what
    assert verify(cache, quick=True, repair=True).repaired == ["set aside commits/00001.json"]


def test_an_incomplete_cache_is_intact_and_says_what_is_missing(tmp_path: Path) -> None:
    CacheWriter.open(tmp_path, make_manifest(SPEC))
    report = verify(tmp_path)
    assert report.intact
    assert not report.ok
    assert report.missing_shards == [0, 1, 2, 3, 4]
    assert "5 of 5 shards" in str(report.problems[0])


def test_repair_sets_aside_and_a_build_makes_again(cache: Path, sound: Path) -> None:
    next((cache / "samples").glob("00002-*")).unlink()
    chunk = holding(cache, 3, "relation/norm/c/0")
    chunk.write_bytes(chunk.read_bytes()[:-1])
    (cache / "commits" / "00004.json").write_bytes(b"{}")
    problems = verify(cache).problems
    assert [problem.file.split("-")[0] for problem in problems] == [
        "commits/00004.json", "commits/", "samples/00002", "targets/00003"
    ]  # fmt: skip
    assert all("kdcache build" in problem.remedy for problem in problems)
    kept = {path: path.read_bytes() for path in cache.rglob("0000[01]*") if path.is_file()}
    assert len(verify(cache, repair=True).repaired) == 3
    again = verify(cache)
    assert again.intact
    assert again.missing_shards == [2, 3, 4]
    assert build_cache(cache, SPEC) == [2, 3, 4]
    assert_same_cache(cache, sound)
    assert all(path.read_bytes() == data for path, data in kept.items())


def test_an_altered_manifest_is_written_anew_and_the_shards_are_kept(cache: Path) -> None:
    path = cache / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"top_k": 6', b'"top_k": 7'))
    assert [p.file for p in verify(cache, repair=True).problems] == ["manifest.json"]
    assert not path.exists()
    with pytest.raises(KdcacheError, match="another identity"):
        CacheWriter.open(cache, make_manifest(SPEC, weights="c" * 64))
    assert build_cache(cache, SPEC) == []
    assert verify(cache).ok


def test_leftovers_are_swept_when_they_are_surely_dead(
    cache: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "commits" / "00003.json").unlink()
    living = next((cache / "targets").glob("00002-*"))
    dead = cache / "targets" / f"00002-0123456789ab.{living.name.split('.', 1)[1]}"
    (shutil.copytree if living.is_dir() else shutil.copyfile)(living, dead)
    (cache / "samples" / ".00003-ba9876543210.arrow.12345678.part").write_bytes(b"half")
    report = verify(cache, repair=True)
    assert len(report.leftovers) > (60 if living.is_dir() else 3)
    assert not dead.exists()
    assert list((cache / "targets").glob("00003-*")), "an attempt that may be alive was swept"
    with monkeypatch.context() as patch:
        ahead = time.time() + 2 * GRACE_SECONDS
        patch.setattr(time, "time", lambda: ahead)
        verify(cache, repair=True)
    assert list((cache / "targets").glob("00003-*")), "swept by a clock that is not the store's"
    past = time.time() - GRACE_SECONDS - 60
    for path in cache.rglob("*"):
        os.utime(path, (past, past))
    verify(cache, repair=True)
    assert not list((cache / "targets").glob("00003-*"))
    assert not list((cache / "samples").glob(".*"))
    build_cache(cache, SPEC)
    assert_same_cache(cache, sound)


def test_an_extra_file_in_a_committed_shard_is_found_and_set_aside(cache: Path) -> None:
    targets = next((cache / "targets").glob("00001-*"))
    extra = targets / "response/ids/c/0/1" if targets.is_dir() else targets.with_suffix(".txt")
    extra.write_bytes(b"more")
    (cache / "readme.txt").write_text("hello")
    assert [problem.file for problem in verify(cache, repair=True).problems] == [
        "readme.txt", extra.relative_to(cache).as_posix()
    ]  # fmt: skip
    assert [problem.file for problem in verify(cache).problems] == ["readme.txt"]


def test_no_cache(tmp_path: Path) -> None:
    with pytest.raises(KdcacheError, match="no cache here"):
        verify(tmp_path)


KINDS = ("flip", "flip", "flip", "truncate", "empty", "missing", "append", "swap")


def strike(files: list[Path], number: int, random: random.Random) -> dict[Path, bytes | None]:
    """Damage one file, or swap two; the bytes to restore."""
    kind, path = KINDS[number % len(KINDS)], files[number % len(files)]
    data = path.read_bytes()
    if kind == "swap":
        alike = [f for f in files if f != path and f.name == path.name and f.read_bytes() != data]
        other = random.choice(alike) if alike else random.choice([f for f in files if f != path])
        before = {path: data, other: other.read_bytes()}
        path.write_bytes(before[other])
        other.write_bytes(data)
        return before
    if kind == "flip":
        at = random.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :])
    elif kind == "truncate":
        path.write_bytes(data[: random.randrange(len(data))])
    elif kind == "append":
        path.write_bytes(data + b"\0")
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    return {path: data}


def find_faults(cache: Path, count: int, seed: int) -> None:
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    source = random.Random(seed)
    source.shuffle(files)
    for number in range(count):
        before = strike(files, number, source)
        named = [str(problem) for problem in verify(cache).problems]
        # An altered commit record no longer tells which files are its own: it is named itself.
        records = [path for path in before if path.parent.name == "commits"]
        for path in records or before:
            expected = path.relative_to(cache).as_posix() if path.exists() else "missing"
            expected = "shards are missing" if path in records and not path.exists() else expected
            assert any(expected in line for line in named), (number, path, named)
        if not all(path.parts[-2] == "quarantine" for path in before):
            with pytest.raises(KdcacheError):
                read_everything(cache)
        for path, data in before.items():
            path.write_bytes(data)
    assert verify(cache).ok


def read_everything(cache: Path) -> None:
    opened = open_cache(cache)
    for shard in opened.shards:
        opened.read_shard(shard, images=True)
    if opened.manifest.head is not None:
        opened.head_bytes()
    if len(opened.shards) < opened.plan.shards:
        raise CacheDamaged("a shard is missing")


@pytest.mark.parametrize("version", [1, 2])
def test_random_faults_are_found(tmp_path: Path, version: int) -> None:
    build_cache(tmp_path, disturbed_spec(version), rows=8, version=version)
    find_faults(tmp_path, 24, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", [1, 2])
def test_400_random_faults_are_found(tmp_path: Path, version: int) -> None:
    build_cache(tmp_path, disturbed_spec(version), rows=8, version=version)
    find_faults(tmp_path, 400, seed=2)


def test_content_is_checked_and_all_problems_are_reported(tmp_path: Path, monkeypatch) -> None:
    """Sound files that hold wrong numbers, as a faulty writer would leave them."""
    monkeypatch.setattr(CacheWriter, "_refuse_unsound", lambda *_: None)
    writer = CacheWriter.open(tmp_path, make_manifest(SPEC))
    rows = writer.manifest.plan.rows_of(0).tolist()
    samples, bad = capture(rows, SPEC)
    nowhere = np.full(len(samples[0].response), np.nan, np.float32)
    far = samples[1].response.token_ids + 1000
    broken = [
        replace(samples[0], response=replace(samples[0].response, logsumexp=nowhere)),
        replace(samples[1], response=replace(samples[1].response, token_ids=far)),
        replace(samples[2], row=99),
        *samples[3:],
    ]
    writer.write_shard(0, broken, bad, engine={}, seconds=0.0)
    lines = "\n".join(str(problem) for problem in verify(tmp_path).problems)
    assert f"row {samples[0].row}): logsumexp is not finite at position 0" in lines
    assert f"row {samples[1].row}): token ids outside 0..499" in lines
    assert "samples and quarantine do not match the rows of the plan" in lines
    assert "4 of 5 shards are missing" in lines
