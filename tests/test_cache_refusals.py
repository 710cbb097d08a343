"""What cannot be written, or must not be, ends in one clear line and leaves the cache intact."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cache_schema import CacheDamaged, CacheWriter, IdentityMismatch, KdcacheError, TargetSpec, open_cache
from cache_schema.format.store import LocalStore
from cache_schema.operations.select import select
from cache_schema.operations.verify import verify
from tests.cache_faults import moments
from tests.cache_teacher import KILL_SPEC, assert_same_cache, build_cache, capture, make_manifest


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed")
    build_cache(path, KILL_SPEC)
    return path


def failing(code: int) -> Callable[[], None]:
    def strike() -> None:
        raise OSError(code, os.strerror(code))

    return strike


@pytest.mark.parametrize(
    ("version", "at"),
    [(1, at) for at in (1, 2, 3, 40, 117, 118, 119, 120, 121, 122, 123, 124, 200, 400)]
    + [(2, at) for at in (1, 3, 8, 9, *range(20, 40), 80)],
)
def test_a_full_disk_at_any_moment(tmp_path: Path, undisturbed: Path, version: int, at: int) -> None:
    with (
        moments(at, failing(errno.ENOSPC)) as counter,
        pytest.raises(KdcacheError, match="disk is full: free"),
    ):
        build_cache(tmp_path / "cache", KILL_SPEC, version=version)
    assert len(counter.names) >= at
    if (tmp_path / "cache" / "manifest.json").exists():
        report = verify(tmp_path / "cache")
        assert report.intact, report.problems
        assert report.leftovers == []
    build_cache(tmp_path / "cache", KILL_SPEC)
    assert_same_cache(tmp_path / "cache", undisturbed)


def test_a_commit_that_may_have_happened_keeps_its_files(tmp_path: Path, undisturbed: Path) -> None:
    """The record is linked and then the directory cannot be synced: the shard's files must stay."""
    with moments(0, failing(errno.EIO)) as counter:
        build_cache(tmp_path / "first", KILL_SPEC)
    links = [i + 1 for i, name in enumerate(counter.names) if name.startswith("link 0000")]
    with moments(links[1] + 1, failing(errno.EIO)), pytest.raises(KdcacheError, match="Input/output error"):
        build_cache(tmp_path / "cache", KILL_SPEC)
    assert open_cache(tmp_path / "cache").shards == [0, 1]
    assert verify(tmp_path / "cache").intact
    build_cache(tmp_path / "cache", KILL_SPEC)
    assert_same_cache(tmp_path / "cache", undisturbed)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_directory(tmp_path: Path, code: int) -> None:
    with moments(1, failing(code)), pytest.raises(KdcacheError, match=r"cannot be written: make it writable"):
        CacheWriter.open(tmp_path, make_manifest(KILL_SPEC))
    with pytest.raises(KdcacheError, match=r"not a directory|cannot be written"):
        CacheWriter.open("/dev/null/cache", make_manifest(KILL_SPEC))
    (tmp_path / "file").write_text("text")
    with pytest.raises(KdcacheError, match=f"{tmp_path}/file: it is not a directory"):
        CacheWriter.open(tmp_path / "file", make_manifest(KILL_SPEC))


def test_a_directory_with_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(KdcacheError, match=r"not empty.*notes.txt"):
        CacheWriter.open(tmp_path, make_manifest(KILL_SPEC))
    with pytest.raises(KdcacheError, match="no cache here"):
        open_cache(tmp_path)
    with pytest.raises(KdcacheError, match="no cache here"):
        open_cache(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_manifest_that_another_worker_writes_meanwhile_is_joined(tmp_path: Path) -> None:
    """Both workers see no manifest; one writes it before the other looks at what lies there."""
    manifest = make_manifest(KILL_SPEC, rows=8)

    class Late(LocalStore):
        def exists(self, path: str) -> bool:
            found = super().exists(path)
            if path == "manifest.json" and not found:
                CacheWriter.join(LocalStore(tmp_path / "cache"), manifest)
            return found

    writer = CacheWriter.join(Late(tmp_path / "cache"), manifest)
    assert list(writer.pending())


def test_another_identity_is_refused_with_both_values(tmp_path: Path) -> None:
    spec = TargetSpec(top_k=8)
    CacheWriter.open(tmp_path, make_manifest(spec))
    CacheWriter.open(tmp_path, make_manifest(spec))
    with pytest.raises(IdentityMismatch, match=r"teacher_weights: here \"b.*in the cache \"a.*another dir"):
        CacheWriter.open(tmp_path, make_manifest(spec, weights="b" * 64))
    with pytest.raises(IdentityMismatch, match=r"top_k: here 9, in the cache 8"):
        CacheWriter.open(tmp_path, make_manifest(TargetSpec(top_k=9)))
    with pytest.raises(IdentityMismatch, match="plan: here 21 rows"):
        CacheWriter.open(tmp_path, make_manifest(spec, rows=21))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    manifest = make_manifest(KILL_SPEC)
    newer = type(manifest)(
        **{n: getattr(manifest, n) for n in manifest.__dataclass_fields__} | {"format_version": 3}
    )
    (tmp_path / "manifest.json").write_bytes(newer.to_bytes())
    with pytest.raises(KdcacheError, match="format version 3, this kdcache reads 1 and 2"):
        open_cache(tmp_path)


def test_what_is_not_as_the_spec_says_is_not_written(tmp_path: Path) -> None:
    writer = CacheWriter.open(tmp_path, make_manifest(KILL_SPEC))
    rows = writer.manifest.plan.rows_of(0).tolist()
    samples, bad = capture(rows, KILL_SPEC)

    def write(changed: list) -> None:
        writer.write_shard(0, changed, bad, engine={}, seconds=0.0)

    with pytest.raises(ValueError, match="not the 4 rows of the plan"):
        write(samples[1:])
    first = {n: getattr(samples[0], n) for n in samples[0].__dataclass_fields__}
    response = {n: getattr(first["response"], n) for n in first["response"].__dataclass_fields__}
    for change, message in (
        ({"logprobs": response["logprobs"] * float("nan")}, "logprobs is not finite"),
        ({"logprobs": response["logprobs"][:, ::-1]}, "logprobs increase"),
        ({"logprobs": response["logprobs"] - 1}, "do not sum to 1"),
        ({"token_ids": response["token_ids"] + 400}, "token ids outside 0..499"),
        ({"token_ids": response["token_ids"] * 0}, "occurs twice"),
        ({"token_ids": response["token_ids"][:, :3]}, "shapes"),
        ({"logsumexp": response["logsumexp"] * float("inf")}, "logsumexp is not finite"),
    ):
        broken = type(samples[0])(**first | {"response": type(first["response"])(**response | change)})
        with pytest.raises(ValueError, match=rf"row {samples[0].row}, response: .*{message}"):
            write([broken, *samples[1:]])
    with pytest.raises(ValueError, match="response targets are missing"):
        write([type(samples[0])(**first | {"response": None}), *samples[1:]])
    assert writer.committed() == set()
    assert list((tmp_path).glob("targets/*")) == []


def test_reopening_a_shard_captures_it_anew(tmp_path: Path, undisturbed: Path) -> None:
    build_cache(tmp_path, KILL_SPEC)
    writer = CacheWriter.open(tmp_path, make_manifest(KILL_SPEC))
    writer.reopen(2)
    assert list(writer.pending()) == [2]
    assert build_cache(tmp_path, KILL_SPEC) == [2]
    assert_same_cache(tmp_path, undisturbed)
    assert build_cache(tmp_path, KILL_SPEC) == []


def read_whole(path: Path) -> list[int]:
    cache = open_cache(path)
    return [cache[number].row for number in range(len(cache))]


@pytest.mark.parametrize("special", ["pipe", "device"])
@pytest.mark.parametrize("folder", ["", "commits", "samples", "targets"])
def test_pipes_and_devices_in_place_of_files_are_refused(
    tmp_path: Path, undisturbed: Path, folder: str, special: str
) -> None:
    """A pipe would be waited for without end, and /dev/zero read until memory ends."""
    copy = Path(shutil.copytree(undisturbed, tmp_path / "cache"))
    path = next(path for path in sorted((copy / folder).iterdir()) if path.is_file())
    path.unlink()
    if special == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CacheDamaged, match=f"{path.name}: .*a device, not a file"):
        read_whole(copy)
    problems = verify(copy).problems
    assert any(problem.file == path.relative_to(copy).as_posix() for problem in problems)


def test_a_file_longer_than_its_record_says_is_told(tmp_path: Path, undisturbed: Path) -> None:
    copy = Path(shutil.copytree(undisturbed, tmp_path / "cache"))
    path = min((copy / "samples").iterdir())
    with path.open("ab") as file:
        file.truncate(path.stat().st_size + (1 << 40))  # sparse: 1 TiB that takes no disk
    with pytest.raises(CacheDamaged, match=rf"{path.name}: truncated or altered"):
        read_whole(copy)


@pytest.mark.parametrize("name", ["manifest.json", "commits"])
def test_a_document_too_large_for_one_is_not_read(tmp_path: Path, undisturbed: Path, name: str) -> None:
    copy = Path(shutil.copytree(undisturbed, tmp_path / "cache"))
    path = copy / name
    path = min(path.glob("[!.]*")) if path.is_dir() else path
    with path.open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(
        CacheDamaged,
        match=f"{path.name}: 1,099,511,627,776 bytes, where no document of a cache has over 536,870,912",
    ):
        open_cache(copy)
    assert any(problem.file == path.relative_to(copy).as_posix() for problem in verify(copy).problems)


def test_a_selection_does_not_hold_the_symbolic_links_of_its_source(
    tmp_path: Path, undisturbed: Path
) -> None:
    copy = Path(shutil.copytree(undisturbed, tmp_path / "cache"))
    path = min((copy / "samples").iterdir())
    path.symlink_to(path.rename(tmp_path / "elsewhere"))
    select(str(copy), None, str(tmp_path / "selected"))
    assert not [path for path in (tmp_path / "selected").rglob("*") if path.is_symlink()]
    assert len(read_whole(tmp_path / "selected")) == len(read_whole(undisturbed))
