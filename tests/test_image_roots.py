"""Images at fsspec URLs: paths stay below the URL, faults have reasons, copies are kept within a bound."""

import errno
import hashlib
import io
import json
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from moto.server import ThreadedMotoServer
from PIL import Image

from cache_schema import patience
from cache_schema.datasets import image_roots
from cache_schema.datasets.image_roots import FolderRoot, RemoteRoot, open_root, unpack_embedded
from cache_schema.datasets.images import open_image
from cache_schema.errors import KdcacheError, RowRejected, WrongUsage
from cache_schema.file_cache import FileCache, FileCacheConfig
from cache_schema.progress import Silent
from student.answering import rows_to_ask


def picture(number: int = 0) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def base(request) -> str:
    """A URL `memory://NAME/images` with a/x.png, an empty file, and a file beside the folder."""
    name = f"memory://{request.node.name.translate(str.maketrans('[]', '--'))}"
    files = fsspec.filesystem("memory")
    for path, content in {
        "images/a/x.png": picture(),
        "images/empty.png": b"",
        "outside.png": picture(1),
    }.items():
        files.pipe_file(f"{name}/{path}", content)
    return f"{name}/images"


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The names that the memory store was asked for."""
    names: list[str] = []
    cat = MemoryFileSystem.cat_file

    def spy(self, path, *arguments, **options):
        names.append(path.rsplit("/", 1)[1])
        return cat(self, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", spy)
    return names


ESCAPES = (
    *("../outside.png", "a/../../outside.png", "a/../a/x.png", "..", "/outside.png", "//outside.png"),
    *("%2e%2e/outside.png", "a/%2E%2e/%2e./outside.png", "%252e%252e/outside.png", "..%2foutside.png"),
    *("%2foutside.png", "..\\outside.png", "a\\x.png", "..%5coutside.png", "%2525252e%2525252e/outside.png"),
    *("memory://outside.png", "file:///etc/passwd", "file:/etc/passwd", "zip://x::memory://outside.png"),
    *("a/x.png?versionId=1", "a/x.png%3fversionId=1", "a/x.png#part", "a/x.png\0", "a/https://host/x.png"),
)


@pytest.mark.parametrize("path", ESCAPES)
def test_no_path_leads_out_of_a_url(base: str, path: str, asked: list[str]) -> None:
    with pytest.raises(RowRejected) as caught:
        open_image(base, path)
    assert caught.value.reason == "outside_root"
    assert asked == []


def test_an_image_at_a_url_is_the_image_in_a_folder(base: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.png").write_bytes(picture())
    for path in ("a/x.png", "./a//x.png"):
        here, there = open_image(tmp_path, "a/x.png"), open_image(base, path)
        assert (there.path, there.sha256, there.image.tobytes()) == (
            here.path,
            here.sha256,
            here.image.tobytes(),
        )
    fsspec.filesystem("memory").pipe_file(f"{base}/100% sure+1.png", picture(2))
    assert open_image(base, "100% sure+1.png").path == "100% sure+1.png"


def test_local_urls_are_folders(tmp_path: Path) -> None:
    assert isinstance(open_root(f"file://{tmp_path}"), FolderRoot)
    assert isinstance(open_root(str(tmp_path)), FolderRoot)
    assert isinstance(open_root("memory://x"), RemoteRoot)


def test_faults_of_a_remote_image_have_reasons(base: str, monkeypatch) -> None:
    for path, reason in {
        "a/y.png": "missing_image",
        "a": "missing_image",
        "empty.png": "broken_image",
    }.items():
        with pytest.raises(RowRejected) as caught:
            open_image(base, path)
        assert caught.value.reason == reason, path
        assert "://" in caught.value.detail or reason == "broken_image"
    monkeypatch.setattr(image_roots, "LARGEST_FILE", 100)
    with pytest.raises(RowRejected, match=r"unreadable_image.*larger"):
        open_image(base, "a/x.png")


def test_roots_that_cannot_be_used_are_one_line() -> None:
    with pytest.raises(KdcacheError, match=r"nowhere://x: .*give a folder or an fsspec URL"):
        open_root("nowhere://x")
    with pytest.raises(WrongUsage, match="password") as caught:
        open_root("ftp://me:geheim@host/images")
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "reset"), TimeoutError("slow"), RuntimeError("driver")])
def test_what_passes_is_tried_again(base: str, error: Exception, monkeypatch) -> None:
    cat, fails = MemoryFileSystem.cat_file, [error, error]

    def unstable(self, *arguments, **options):
        if fails:
            raise fails.pop()
        return cat(self, *arguments, **options)

    monkeypatch.setattr(patience, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", unstable)
    assert open_image(base, "a/x.png").width == 24
    assert not fails


def test_a_server_that_stays_away_is_one_line_within_the_bound(base: str, monkeypatch) -> None:
    tries: list[float] = []

    def down(self, *arguments, **options):
        tries.append(time.monotonic())
        raise OSError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(patience, "_FIRST_WAIT", 0.05)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", down)
    began = time.monotonic()
    with pytest.raises(
        KdcacheError, match=r"images/a/x.png cannot be read \(.*refused.*check the connection"
    ) as caught:
        open_image(open_root(base, patience=0.5), "a/x.png")
    assert not isinstance(caught.value, RowRejected), "the row is not to blame"
    assert time.monotonic() - began < 2
    assert 3 <= len(tries) <= 6
    tries.clear()
    with pytest.raises(KdcacheError):
        open_image(open_root(base, patience=0.0), "a/x.png")
    assert len(tries) == 1


def test_refusals_are_not_tried_again(base: str, monkeypatch) -> None:
    tries = []

    def refuses(self, *arguments, **options):
        tries.append(1)
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", refuses)
    with pytest.raises(RowRejected, match=r"unreadable_image.*Access Denied"):
        open_image(base, "a/x.png")
    assert len(tries) == 1


def test_copies_are_kept_on_the_disk_and_checked(base: str, tmp_path: Path, asked: list[str]) -> None:
    config = FileCacheConfig(file_cache=tmp_path / "kept")
    digest = hashlib.sha256(picture()).hexdigest()
    root = open_root(base, config)
    assert open_image(root, "a/x.png").sha256 == digest
    assert open_image(root, "a/x.png").sha256 == digest
    assert open_image(open_root(base, config), "a/x.png", digest).sha256 == digest  # as a later run reads it
    assert asked == ["x.png"]
    (tmp_path / "kept" / digest).write_bytes(b"rotten")
    assert open_image(root, "a/x.png", digest).sha256 == digest
    assert asked == ["x.png"] * 2
    assert (tmp_path / "kept" / digest).read_bytes() == picture()


def test_the_folder_of_copies_stays_within_its_bound(tmp_path: Path, base: str) -> None:
    files = fsspec.filesystem("memory")
    for number in range(40):
        files.pipe_file(f"{base}/{number}.png", picture(number))
    bound = 10 * len(picture())
    root = open_root(base, FileCacheConfig(file_cache=tmp_path, file_cache_gib=bound / 2**30))
    for number in range(40):
        open_image(root, f"{number}.png")
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= bound
    newest = hashlib.sha256(picture(39)).hexdigest()
    assert (tmp_path / newest).exists()
    assert len(list(tmp_path.iterdir())) > 5


def test_a_full_disk_keeps_no_copies_and_stops_nothing(base: str, tmp_path: Path, monkeypatch) -> None:
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    root = open_root(base, FileCacheConfig(file_cache=tmp_path))
    monkeypatch.setattr("os.replace", full)
    assert open_image(root, "a/x.png").width == 24
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(KdcacheError, match="give another --file-cache"):
        open_root(base, FileCacheConfig(file_cache=tmp_path / "file"))


def test_the_folder_is_looked_through_now_and_then_only(tmp_path: Path, monkeypatch) -> None:
    scans = []
    sweep = FileCache._sweep
    monkeypatch.setattr(FileCache, "_sweep", lambda self: scans.append(1) or sweep(self))
    kept = FileCache(tmp_path, 16_000)
    for number in range(100):
        kept.put({f"{number:064d}": bytes(100)})
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 10_000
    assert 10 <= len(scans) <= 12


def test_requests_run_at_once_and_one_image_is_asked_for_once(base: str, tmp_path: Path, monkeypatch) -> None:
    cat, under_way, most, calls = MemoryFileSystem.cat_file, 0, 0, 0
    lock = threading.Lock()

    def slow(self, *arguments, **options):
        nonlocal under_way, most, calls
        with lock:
            under_way, calls = under_way + 1, calls + 1
            most = max(most, under_way)
        time.sleep(0.05)
        with lock:
            under_way -= 1
        return cat(self, *arguments, **options)

    files = fsspec.filesystem("memory")
    names = [f"{number}.png" for number in range(16)]
    for number, name in enumerate(names):
        files.pipe_file(f"{base}/{name}", picture(number))
    monkeypatch.setattr(MemoryFileSystem, "cat_file", slow)
    root = open_root(base, FileCacheConfig(file_cache=tmp_path))
    root.prefetch((name, None) for name in [*names, *names, "../outside.png"])
    digests = [open_image(root, name).sha256 for name in names]
    assert digests == [hashlib.sha256(picture(number)).hexdigest() for number in range(16)]
    assert most >= 8
    assert calls == 16


def test_rows_to_ask_fetch_the_images_of_the_next_rows_at_once(tmp_path: Path, monkeypatch) -> None:
    base, files = "memory://ahead", fsspec.filesystem("memory")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a picture"}]
    rows = [{"id": str(n), "image": f"{n // 2}.png", "conversations": turns} for n in range(24)]
    for number in range(12):
        files.pipe_file(f"{base}/{number}.png", picture(number))
    files.pipe_file(f"{base}/3.png", b"")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    gate = threading.Barrier(8, timeout=20)  # breaks unless eight requests wait for each other
    fetch, asked = RemoteRoot._fetch, []

    def slow(self, name):
        asked.append(name)
        if len(asked) <= 8:
            gate.wait()
        return fetch(self, name)

    monkeypatch.setattr(RemoteRoot, "_fetch", slow)
    root = open_root(base, FileCacheConfig(file_cache=tmp_path / "kept"))
    found = list(rows_to_ask(tmp_path / "rows.json", root, None, 0, Silent()))
    assert [row for row, _ in found] == list(range(24))
    assert [row for row, told in found if isinstance(told, RowRejected)] == [6, 7]
    assert set(asked) == {f"{number}.png" for number in range(12)}


def test_images_of_rows_are_unpacked_to_a_url(base: str) -> None:
    path = f"embedded/ab/{hashlib.sha256(picture()).hexdigest()}"
    unpack_embedded(base, {path: picture()})
    unpack_embedded(base, {path: b"never written"})
    assert open_image(base, path).width == 24


def test_over_s3(tmp_path: Path, monkeypatch) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "k", "secret": "s", "endpoint_url": f"http://{host}:{port}"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    try:
        files = fsspec.filesystem("s3")
        files.mkdir("pictures")
        files.pipe(
            {"pictures/coco/a b.png": picture(), "pictures/coco/empty.png": b"", "pictures/out.png": b"x"}
        )
        root = open_root("s3://pictures/coco/", FileCacheConfig(file_cache=tmp_path), patience=2.0)
        assert open_image(root, "a b.png").sha256 == hashlib.sha256(picture()).hexdigest()
        for path, reasons in {
            "none.png": ["missing_image"],
            "empty.png": ["broken_image", "unreadable_image"],
            "../out.png": ["outside_root"],
            "x/%2e%2e/%2e%2e/out.png": ["outside_root"],
        }.items():
            with pytest.raises(RowRejected) as caught:
                open_image(root, path)
            assert caught.value.reason in reasons, path
    finally:
        server.stop()
