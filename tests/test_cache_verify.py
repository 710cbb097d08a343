"""`verify` finds every damage and `--repair` leaves a cache that a build completes."""

from __future__ import annotations

import pytest

from cache_schema import CacheWriter, KdcacheError, TargetSpec, open_cache
from cache_schema.verify import verify
from tests.cache_teacher import build_cache, make_manifest

SPEC = TargetSpec(targets=("response", "visual", "relation", "prompt"), top_k=6)


def test_a_sound_cache_has_no_problem(tmp_path) -> None:
    build_cache(tmp_path, SPEC)
    report = verify(tmp_path)
    assert report.problems == []
    assert (report.shards, report.samples + report.quarantined) == (5, 20)
    assert report.missing_shards == []


def test_an_incomplete_cache_is_sound_and_says_what_is_missing(tmp_path) -> None:
    CacheWriter.open(tmp_path, make_manifest(SPEC))
    report = verify(tmp_path)
    assert report.ok
    assert report.missing_shards == [0, 1, 2, 3, 4]


def test_repair_sets_aside_and_a_build_makes_again(tmp_path) -> None:
    build_cache(tmp_path, SPEC)
    before = [open_cache(tmp_path)[i].input_ids.tolist() for i in range(18)]
    next((tmp_path / "samples").glob("00002-*")).unlink()
    chunk = next((tmp_path / "targets").glob("00003-*/relation/norm/c/0"))
    chunk.write_bytes(chunk.read_bytes()[:-1])
    (tmp_path / "commits" / "00004.json").write_bytes(b"{}")
    report = verify(tmp_path)
    assert len(report.problems) == 3
    assert verify(tmp_path, repair=True).repaired
    again = verify(tmp_path)
    assert again.ok
    assert again.missing_shards == [2, 3, 4]
    build_cache(tmp_path, SPEC)
    assert verify(tmp_path).ok
    assert [open_cache(tmp_path)[i].input_ids.tolist() for i in range(18)] == before


def test_an_altered_manifest_is_written_anew_and_the_shards_are_kept(tmp_path) -> None:
    build_cache(tmp_path, SPEC)
    path = tmp_path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"top_k": 6', b'"top_k": 7'))
    assert [p.file for p in verify(tmp_path, repair=True).problems] == ["manifest.json"]
    assert not path.exists()
    with pytest.raises(KdcacheError, match="another identity"):
        CacheWriter.open(tmp_path, make_manifest(SPEC, weights="c" * 64))
    assert list(CacheWriter.open(tmp_path, make_manifest(SPEC)).pending()) == []
    assert verify(tmp_path).ok


def test_no_cache(tmp_path) -> None:
    with pytest.raises(KdcacheError, match="no cache there"):
        verify(tmp_path)
