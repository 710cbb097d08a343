"""The same code builds, verifies, repairs and reads at any fsspec URL."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from cache_schema import (
    CacheDamaged,
    CacheWriter,
    IdentityMismatch,
    KdcacheError,
    TargetSpec,
    open_cache,
)
from cache_schema.file_cache import FileCacheConfig
from cache_schema.format import store
from cache_schema.format.store import ObjectStore
from cache_schema.operations.verify import verify
from tests.cache_teacher import (
    EVERYTHING,
    assert_same_cache,
    build_cache,
    capture,
    disturbed_spec,
    make_head,
    make_manifest,
)

SPEC = TargetSpec(targets=("response", "visual"), top_k=4)
ROWS = 12


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed")
    build_cache(path, SPEC, rows=ROWS)
    return path


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    """Options for a bucket `s3://caches` of a server on loopback."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "k", "secret": "s", "endpoint_url": f"http://{host}:{port}"}
    fsspec.filesystem("s3", **options).mkdir("caches")
    yield options
    server.stop()


@pytest.fixture(params=["file", "memory", "s3"])
def place(request, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """An empty place for a cache, and its storage options."""
    name = request.node.name.replace("[", "-").replace("]", "")
    if request.param == "file":
        return f"file://{tmp_path}/cache", {}
    if request.param == "memory":
        return f"memory://{name}", {}
    return f"s3://caches/{name}", request.getfixturevalue("s3")


def test_built_verified_and_read(place, undisturbed: Path) -> None:
    url, options = place
    with pytest.raises(KdcacheError, match="no cache here"):
        open_cache(url, storage_options=options)
    assert build_cache(url, SPEC, rows=ROWS, storage_options=options) == [0, 1, 2]
    assert build_cache(url, SPEC, rows=ROWS, storage_options=options) == []
    assert_same_cache(url, undisturbed, storage_options=options)
    cache, expected = open_cache(url, storage_options=options), open_cache(undisturbed)
    assert len(cache) == len(expected)
    assert cache.index().tokens.tolist() == expected.index().tokens.tolist()
    assert cache[3].response.logprobs.tolist() == expected[3].response.logprobs.tolist()
    with pytest.raises(IdentityMismatch, match="teacher_weights"):
        CacheWriter.open(url, make_manifest(SPEC, ROWS, weights="b" * 64), storage_options=options)


def test_a_folder_is_no_file_of_itself(monkeypatch) -> None:
    # As s3fs lists a folder whose first file appears between its two requests.
    found = store.open_store("memory://appears")
    monkeypatch.setattr(
        found._fs, "find", lambda top, detail: {top: {"name": top, "size": 0, "type": "directory"}}
    )
    assert found.list() == found.list("commits") == {}


@pytest.mark.parametrize("version", [1, 2])
def test_damage_is_found_and_repaired(place, undisturbed: Path, version: int) -> None:
    url, options = place
    build_cache(url, SPEC, rows=ROWS, version=version, storage_options=options)
    files, root = fsspec.core.url_to_fs(url, **options)
    found = files.find(root)

    def holder(shard: int, chunk: str) -> str:
        ends = (chunk, ".zarr.zip")
        return next(path for path in found if f"targets/{shard:05d}-" in path and path.endswith(ends))

    altered = holder(1, "response/ids/c/0/0")
    missing = holder(2, "visual/steps/c/0/0")
    longer = holder(0, "response/drop/c/0")
    content = files.cat_file(altered)
    files.pipe_file(altered, content[:-1] + bytes([content[-1] ^ 1]))
    files.pipe_file(longer, files.cat_file(longer) + b"\0")
    files.rm_file(missing)
    files.pipe_file(f"{root}/notes.txt", b"mine")
    cache = open_cache(url, storage_options=options)
    for shard in (1, 2):
        with pytest.raises(CacheDamaged, match=r"kdcache verify --repair"):
            cache.read_shard(shard)
    report = verify(url, storage_options=options, repair=True)
    named = sorted(problem.file for problem in report.problems)
    assert [f"{root}/{name}" for name in named] == sorted([altered, missing, longer, f"{root}/notes.txt"])
    assert len(report.repaired) == 3
    files.rm_file(f"{root}/notes.txt")
    assert build_cache(url, SPEC, rows=ROWS, storage_options=options) == [0, 1, 2]
    assert_same_cache(url, undisturbed, storage_options=options)


@pytest.mark.parametrize("version", [1, 2])
def test_of_racing_writers_one_wins(place, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    url, options = place
    spec = disturbed_spec(version)
    manifest = make_manifest(spec, ROWS, version=version)
    writers = [CacheWriter.open(url, manifest, storage_options=options) for _ in range(4)]
    samples, bad = capture(writers[0].manifest.plan.rows_of(2).tolist(), spec)
    start = threading.Barrier(len(writers))
    for kind in (store.LocalStore, store.ObjectStore):
        create = kind.create
        monkeypatch.setattr(kind, "create", lambda *a, create=create: (start.wait(), create(*a))[1])
    records: list[Any] = []

    def write(writer: CacheWriter) -> None:
        if writer.lacks_head:
            writer.put_head(make_head()[1])
        records.append(writer.write_shard(2, samples, bad, engine={}, seconds=0.0))

    threads = [threading.Thread(target=write, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [record for record in records if record is not None]
    assert len(records) == 4
    assert len(winners) == 1
    assert open_cache(url, storage_options=options).commits == {2: winners[0]}
    report = verify(url, storage_options=options)
    assert report.intact
    assert report.leftovers == []


def test_a_lost_reply_to_the_commit_does_not_lose_the_shard(place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store carried out the creation, the reply was lost, the repetition says that the file exists."""
    url, options = place
    for kind in (store.LocalStore, store.ObjectStore):
        create = kind.create
        monkeypatch.setattr(kind, "create", lambda *a, create=create: create(*a) and False)
    assert build_cache(url, SPEC, rows=ROWS, storage_options=options) == [0, 1, 2]
    assert verify(url, storage_options=options).ok


def test_a_commit_that_is_carried_out_late_finds_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The creation times out, no record is there yet, and the store carries it out all the same."""
    url, asked = "memory://late", []

    def create(self: ObjectStore, path: str, data: bytes) -> bool:
        asked.append((path, data))
        raise TimeoutError("no reply")

    with monkeypatch.context() as patch:
        CacheWriter.open(url, make_manifest(SPEC, ROWS))
        patch.setattr(ObjectStore, "create", create)
        with pytest.raises(KdcacheError, match="no reply"):
            build_cache(url, SPEC, rows=ROWS)
    ((path, data),) = asked
    assert store.open_store(url).create(path, data)
    assert verify(url).intact
    assert build_cache(url, SPEC, rows=ROWS) == [1, 2]
    assert verify(url).ok


def test_a_store_that_overwrites_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(self: ObjectStore, path: str, data: bytes) -> bool:
        self.put(path, data)
        return True

    monkeypatch.setattr(ObjectStore, "create", create)
    with pytest.raises(KdcacheError, match="cannot create files exclusively"):
        CacheWriter.open("memory://careless", make_manifest(SPEC, ROWS))


@pytest.mark.parametrize("version", [1, 2])
def test_large_objects_are_read_in_ranges(s3: dict[str, Any], monkeypatch, version: int) -> None:
    build_cache(f"s3://caches/ranges-{version}", SPEC, rows=8, version=version, storage_options=s3)
    monkeypatch.setattr(store, "RANGE_BYTES", 400)
    cache = open_cache(f"s3://caches/ranges-{version}", storage_options=s3)
    asked = []
    ranges = cache.store._fs.cat_ranges

    def spy(paths: list[str], *arguments: Any, **options: Any) -> list[bytes]:
        asked.append(paths)
        return ranges(paths, *arguments, **options)

    monkeypatch.setattr(cache.store._fs, "cat_ranges", spy)
    table, groups = cache.stored_shard(0, SPEC.targets)  # every byte is checked against its digest
    assert len(asked) == 1
    assert len(asked[0]) > len(set(asked[0])) >= {1: 15, 2: 2}[version]
    assert table.num_rows
    assert groups.keys() == {"response", "visual"}
    asked.clear()
    _, groups = cache.stored_shard(0, ("visual",))
    assert groups.keys() == {"visual"}
    if version == 2:  # of the zip only what was asked for
        start, end, _ = cache.commits[0].files[-1].parts["visual"]
        ranges_of_zip = sum(path.endswith(".zip") for path in asked[0])
        assert ranges_of_zip == -(-(end - start) // 400) < -(-cache.commits[0].files[-1].bytes // 400)


def test_a_store_out_of_reach_is_one_line(s3: dict[str, Any]) -> None:
    options = s3 | {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 1}}}
    with pytest.raises(KdcacheError, match=r"s3://caches/x: cannot be read \(EndpointConnectionError"):
        open_cache("s3://caches/x", storage_options=options)
    with pytest.raises(KdcacheError, match=r"s3://caches/x: .*EndpointConnectionError"):
        CacheWriter.open("s3://caches/x", make_manifest(SPEC, ROWS), storage_options=options)


@pytest.mark.parametrize("version", [1, 2])
def test_blocks_are_kept_locally_within_a_bound(tmp_path: Path, monkeypatch, version: int) -> None:
    url = f"memory://blocks-{version}"
    build_cache(url, SPEC, rows=ROWS, version=version)
    folder = tmp_path / "blocks"
    size = sum(file.bytes for file in open_cache(url).commits[0].files)
    cache = open_cache(url, file_cache=folder, file_cache_bytes=2 * size)
    asked: list[int] = []
    read_many = ObjectStore.read_many
    monkeypatch.setattr(
        ObjectStore, "read_many", lambda s, sizes: asked.append(len(sizes)) or read_many(s, sizes)
    )
    first = cache.read_shard(0).sample(0)
    again = open_cache(url, file_cache=folder, file_cache_bytes=2 * size)
    asked.clear()
    assert again.read_shard(0).sample(0).response.logprobs.tolist() == first.response.logprobs.tolist()
    assert asked == [0]
    for path in folder.iterdir():
        path.write_bytes(b"rotten")
    assert again.read_shard(0).sample(0).response.logprobs.tolist() == first.response.logprobs.tolist()
    assert asked[-1] > {1: 15, 2: 1}[version]
    for shard in range(3):
        cache.read_shard(shard)
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 2 * size


SHARDS = 18


def many_shards(url: str, **options: Any) -> CacheWriter:
    writer = CacheWriter.open(url, make_manifest(SPEC, rows=SHARDS, shard_size=1), **options)
    for shard in writer.pending():
        samples, bad = capture(writer.manifest.plan.rows_of(shard).tolist(), SPEC)
        writer.write_shard(shard, samples, bad, engine={}, seconds=0.0)
    return writer


def test_a_head_is_kept_locally_too(s3: dict[str, Any], tmp_path: Path, monkeypatch) -> None:
    url = "s3://caches/with-head"
    build_cache(url, EVERYTHING, rows=4, storage_options=s3)
    files = FileCacheConfig(file_cache=tmp_path / "kept")
    first = open_cache(url, storage_options=s3, files=files).head_bytes()
    asked: list[str] = []
    read = ObjectStore.read_many
    monkeypatch.setattr(
        ObjectStore, "read_many", lambda s, ranges: asked.extend(r.path for r in ranges) or read(s, ranges)
    )
    again = open_cache(url, storage_options=s3, files=files)
    assert again.head_bytes() == first == make_head()[1]
    assert not any(path.startswith("head/") for path in asked)
    (kept,) = (path for path in (tmp_path / "kept").rglob("*") if path.is_file())
    kept.write_bytes(b"other")  # a damaged copy is read anew
    assert open_cache(url, storage_options=s3, files=files).head_bytes() == first
    assert any(path.startswith("head/") for path in asked)
    build_cache(tmp_path / "here", EVERYTHING, rows=4)
    assert open_cache(tmp_path / "here", files=files)._blocks is None, "a folder needs no copy"


def test_a_finished_cache_opens_by_its_roll(s3: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One listing, the manifest and the roll; a record that is not the roll's is read itself."""
    url = "s3://caches/roll"
    writer = many_shards(url, storage_options=s3)
    expected = open_cache(url, storage_options=s3).commits
    writer.finish()
    read: list[str] = []
    read_many, read_one = ObjectStore.read_many, ObjectStore.read
    monkeypatch.setattr(
        ObjectStore,
        "read_many",
        lambda s, ranges: read.extend(r.path for r in ranges) or read_many(s, ranges),
    )
    monkeypatch.setattr(ObjectStore, "read", lambda s, path: read.append(path) or read_one(s, path))

    def opened() -> tuple[dict[int, Any], list[str]]:
        read.clear()
        return open_cache(url, storage_options=s3).commits, list(read)

    assert opened() == (expected, ["manifest.json", "commits/.roll.json"])
    writer.reopen(4)
    without = {shard: record for shard, record in expected.items() if shard != 4}
    assert opened() == (without, ["manifest.json", "commits/.roll.json"])
    many_shards(url, storage_options=s3)  # shard 4 again, of another attempt; the roll is old now
    commits, asked = opened()
    assert commits.keys() == expected.keys()
    assert commits[4].attempt != expected[4].attempt
    assert asked == ["manifest.json", "commits/.roll.json", "commits/00004.json"]
    assert verify(url, storage_options=s3).ok
    writer.finish()
    assert opened() == (commits, ["manifest.json", "commits/.roll.json"])
    for damaged in (writer.store.read("commits/.roll.json")[:-9], b""):
        writer.store.put("commits/.roll.json", damaged)
        found, asked = opened()
        assert found == commits
        assert len(asked) == 2 + SHARDS
    (problem,) = verify(url, storage_options=s3, repair=True).problems
    assert problem.file == "commits/.roll.json"
    assert verify(url, storage_options=s3).ok


def test_a_roll_is_made_of_whole_caches_alone(tmp_path: Path) -> None:
    writer = many_shards(str(tmp_path))
    (moved, *_) = writer.store.list("commits")
    writer.store.move(moved, "aside/record.json")
    writer.finish()
    assert "commits/.roll.json" not in writer.store.list()
    writer.store.move("aside/record.json", moved)
    writer.finish()
    assert "commits/.roll.json" in writer.store.list()
    assert writer.committed() == set(range(SHARDS))
    assert open_cache(tmp_path).shards == list(range(SHARDS))
    report = verify(tmp_path)
    assert report.ok
    assert report.leftovers == []
    few = CacheWriter.open(tmp_path / "few", make_manifest(SPEC, ROWS))
    few.finish()
    assert few.store.list("commits") == {}
