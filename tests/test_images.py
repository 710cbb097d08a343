"""Images as they are in the wild: every mode decodes to RGB, every fault has its reason."""

import errno
import hashlib
import os
import socket
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from cache_schema.datasets.image_roots import unpack_embedded
from cache_schema.datasets.images import open_image
from cache_schema.errors import KdcacheError, RowRejected, StoppedEarly

RAMP = np.linspace(0, 1, 24 * 16).reshape(16, 24)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def grey8() -> Image.Image:
    return Image.fromarray((RAMP * 255).astype(np.uint8))


def write(path: Path, kind: str) -> None:
    colour = Image.merge("RGB", (grey8(), grey8(), grey8()))
    if kind == "gif":
        second = Image.new("RGB", colour.size, "red")
        colour.save(path, format="GIF", save_all=True, append_images=[second])
    elif kind == "cmyk":
        colour.convert("CMYK").save(path, format="JPEG", quality=95)
    elif kind == "palette":
        colour.quantize(256).save(path, format="PNG", transparency=bytes(range(256)))
    elif kind == "alpha":
        colour.putalpha(7)
        colour.save(path, format="PNG")
    elif kind == "sixteen":
        Image.fromarray((RAMP * 65535).astype(np.uint16)).save(path, format="PNG")
    elif kind == "float":
        Image.fromarray(RAMP.astype(np.float32)).save(path, format="TIFF")
    else:
        grey8().convert(kind).save(path, format="PNG")


@pytest.mark.parametrize("kind", ["gif", "cmyk", "palette", "alpha", "sixteen", "float", "L", "LA", "RGB"])
def test_every_mode_keeps_the_picture(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "x.jpg", kind)  # the suffix says nothing, as in the wild
    opened = open_image(tmp_path, "x.jpg")
    assert opened.image.mode == "RGB"
    assert (opened.width, opened.height) == (24, 16)
    assert opened.sha256 == hashlib.sha256((tmp_path / "x.jpg").read_bytes()).hexdigest()
    error = np.abs(np.asarray(opened.image, dtype=np.float64) - (RAMP * 255)[..., None])
    assert error.max() <= (12 if kind in ("cmyk", "gif", "palette") else 1)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "x.jpg", exif=exif)
    opened = open_image(tmp_path, "x.jpg")
    assert (opened.width, opened.height) == (10, 30) == opened.image.size


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "GIF"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.95])
def test_truncated_files_are_broken(tmp_path: Path, format_: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    whole = saved(tmp_path / "whole", Image.fromarray(noise), format=format_).read_bytes()
    (tmp_path / "x").write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(RowRejected) as caught:
        open_image(tmp_path, "x")
    assert caught.value.reason == "broken_image"


def test_paths_that_are_no_image(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "folder" / "text").write_text("no image")
    grey8().save(tmp_path / "outside.png")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "back").symlink_to(root / "folder")
    reasons = {
        "nowhere.png": "missing_image",
        "folder": "missing_image",
        "folder/text/x.png": "missing_image",
        "folder/text": "broken_image",
        "back/text": "broken_image",  # a link that stays inside is followed
        "../outside.png": "outside_root",
        "folder/../../outside.png": "outside_root",
        str(tmp_path / "outside.png"): "outside_root",
        "https://example.org/x.png": "outside_root",
        "link.png": "outside_root",
        "x" * 5000: "unreadable_image",
        "nul\0.png": "outside_root",
    }
    for name, reason in reasons.items():
        with pytest.raises(RowRejected) as caught:
            open_image(root, name)
        assert caught.value.reason == reason, name
    with pytest.raises(RowRejected):
        open_image(root, "loop.png")


def test_a_path_inside_through_a_relative_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "root").mkdir()
    grey8().save(tmp_path / "root" / "x.png")
    monkeypatch.chdir(tmp_path)
    assert open_image("root", "./x.png").width == 24


def test_embedded_images_are_unpacked_once(tmp_path: Path) -> None:
    grey8().save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    path = f"embedded/ab/{hashlib.sha256(content).hexdigest()}"
    unpack_embedded(tmp_path, {path: content})
    written = (tmp_path / path).stat().st_mtime_ns
    unpack_embedded(tmp_path, {path: content})
    assert (tmp_path / path).stat().st_mtime_ns == written
    assert list((tmp_path / "embedded" / "ab").iterdir()) == [tmp_path / path]
    assert open_image(tmp_path, path).width == 24
    with pytest.raises(KdcacheError, match="cannot be written"):
        unpack_embedded(tmp_path / "x.png", {path: content})


def test_an_embedded_image_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(KdcacheError, match="No space left on device"):
        unpack_embedded(tmp_path, {"embedded/ab/abc": b"content"})
    assert list((tmp_path / "embedded" / "ab").iterdir()) == []


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)
        listener.bind("socket")
        with (tmp_path / "huge.png").open("wb") as file:
            file.truncate(200 << 30)  # a hole: it takes no room
        for name in ("pipe", "socket", "huge.png"):
            with pytest.raises(RowRejected) as caught:
                open_image(tmp_path, name)
            assert caught.value.reason == "unreadable_image", name
            assert name in caught.value.detail


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + head
    whole = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(head)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = b"IDAT" + zlib.compress(bytes(1000))
    return whole + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


@pytest.mark.parametrize("size", [(12_000, 11_500), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_quietly_broken(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "x.png").write_bytes(bomb(*size))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        warnings.filterwarnings("ignore", module=r"PIL\.")  # as `images` does for a process
        with pytest.raises(RowRejected, match=r"broken_image.*pixels"):
            open_image(tmp_path, "x.png")
    assert not told


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, ZeroDivisionError, RecursionError, Exception])
def test_whatever_a_decoder_raises_is_the_images_fault(
    tmp_path: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error("decoder\x1b[31m\n" + "x" * 100_000)

    grey8().save(tmp_path / "x.png")
    monkeypatch.setattr(PngImageFile, "load", fails)
    with pytest.raises(RowRejected) as caught:
        open_image(tmp_path, "x.png")
    assert caught.value.reason == "broken_image"
    assert len(caught.value.detail) < 500
    assert caught.value.detail.isprintable()


def test_a_signal_while_decoding_is_no_fault_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise StoppedEarly("stopped by SIGINT")

    grey8().save(tmp_path / "x.png")
    monkeypatch.setattr(PngImageFile, "load", stopped)
    with pytest.raises(StoppedEarly):
        open_image(tmp_path, "x.png")


def test_a_program_is_no_image(tmp_path: Path) -> None:
    grey8().save(tmp_path / "x.eps")
    with pytest.raises(RowRejected, match="EPS is a program"):
        open_image(tmp_path, "x.eps")


def test_paths_are_kept_from_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    grey8().save(root / "a" / "x.png")
    for name in ("a/x.png", str(root / "a" / "x.png"), "../root/a/x.png", "a/../a/x.png"):
        assert open_image(root, name).path == "a/x.png"
    (root / "b").symlink_to(root / "a")
    assert open_image(root, "b/x.png").path == "b/x.png"
