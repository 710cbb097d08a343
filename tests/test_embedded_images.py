"""Caches that embed their images: the original bytes once per shard, checked, carried, and enough alone."""

import hashlib
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from safetensors.torch import load_file

from cache_schema import CacheDamaged, IdentityMismatch, KdcacheError, TargetSpec, open_cache
from cache_schema.errors import WrongUsage
from cache_schema.operations.merge import merge
from cache_schema.operations.select import select
from cache_schema.operations.summary import summarise
from cache_schema.operations.verify import verify
from cache_schema.progress import Silent
from pipeline.capture import BuildConfig, build
from student.train import train
from tests.cache_teacher import EVERYTHING, assert_same_cache, build_cache
from tests.student_caches import make_world
from tests.test_cache_kills import start
from tests.test_student_train import settings
from tests.tiny_models import tiny_dataset
from views.html_page import write_html
from views.settings import PageConfig

SPEC = TargetSpec(targets=("response", "visual", "relation"), top_k=8, embed_images=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A student that can be its own teacher, its dataset, and a cache with images; the images are gone."""
    folder = tmp_path_factory.mktemp("embedded")
    world = make_world(folder / "world")
    tiny_dataset(folder / "data", rows=14, images=4)
    config = BuildConfig(
        teacher=world.student,
        data=folder / "data/data.json",
        image_root=str(folder / "data/images"),
        out=str(folder / "cache"),
        spec=SPEC,
        shard_size=4,
        device="cpu",
    )
    build(config, Silent())
    originals = {
        hashlib.sha256(p.read_bytes()).hexdigest(): p.read_bytes()
        for p in (folder / "data/images").rglob("*.png")
    }
    (folder / "data/images").rename(folder / "gone")
    return world, folder, config, originals


def images_in(cache) -> dict[str, bytes]:
    return {i.sha256: i.content for n in range(len(cache)) for i in cache[n].images}


def test_each_distinct_image_is_stored_once_a_shard_as_it_was(made) -> None:
    _, folder, _, originals = made
    cache = open_cache(folder / "cache")
    assert images_in(cache) == originals
    for shard in cache.shards:
        (file,) = (f for f in cache.commits[shard].files if f.path.startswith("images/"))
        table = pa.ipc.open_file(folder / "cache" / file.path).read_all()  # as a stranger reads it
        used = {i.sha256 for n in range(len(cache)) if cache.shard_of(n)[0] == shard for i in cache[n].images}
        assert sorted(table["sha256"].to_pylist()) == sorted(used)
        assert all(originals[row["sha256"]] == row["data"] for row in table.to_pylist())
    assert len(cache.commits[0].files) <= 6
    assert cache.read_shard(0).sample(0).images[0].content is None, "only where it is asked for"
    sizes = summarise(cache)["bytes"]
    assert sizes["parts"]["images"] if "parts" in sizes else "images" in str(sizes)
    assert verify(folder / "cache").ok


def test_embedding_is_another_cache(made, tmp_path: Path) -> None:
    _, folder, config, _ = made
    shutil.copytree(folder / "gone", tmp_path / "images")
    plain = replace(config, image_root=str(tmp_path / "images"), spec=replace(SPEC, embed_images=False))
    with pytest.raises(IdentityMismatch):
        build(plain, Silent())
    build(replace(plain, out=str(tmp_path / "plain")), Silent())
    assert set(images_in(open_cache(tmp_path / "plain")).values()) == {None}
    assert "embed_images" not in plain.spec.to_json()
    with pytest.raises(KdcacheError):
        merge([str(folder / "cache"), str(tmp_path / "plain")], str(tmp_path / "both"), progress=Silent())


def test_the_cache_alone_trains_the_same_student(made, tmp_path: Path) -> None:
    world, folder, _, _ = made
    store = fsspec.filesystem("memory")
    for path in (folder / "cache").rglob("*"):
        if path.is_file():
            store.pipe_file(f"memory://alone/{path.relative_to(folder / 'cache')}", path.read_bytes())
    config = settings(world, tmp_path / "alone", cache="memory://alone", adopt_template=True, max_steps=2)
    train(replace(config, image_root=None), Silent())
    train(replace(config, out=tmp_path / "with", image_root=str(folder / "gone")), Silent())
    one, other = (load_file(tmp_path / name / "model/model.safetensors") for name in ("alone", "with"))
    assert all(bool((one[name] == other[name]).all()) for name in one)


def test_without_either_it_is_wrong_usage(made, tmp_path: Path) -> None:
    world, *_ = made
    with pytest.raises(WrongUsage, match="does not embed its images: give --image-root"):
        train(replace(settings(world, tmp_path), image_root=None), Silent())


def test_the_page_shows_them(made, tmp_path: Path) -> None:
    _, folder, _, _ = made
    page = write_html(open_cache(folder / "cache"), tmp_path / "p.html", PageConfig(samples=3)).read_text()
    assert "data:image/png;base64," in page
    assert "Give --image-root" not in page


def test_selections_and_merges_carry_them(made, tmp_path: Path) -> None:
    _, folder, _, originals = made
    cache = str(folder / "cache")
    select(cache, "row < 7", str(tmp_path / "low"), progress=Silent())
    select(cache, "row >= 7", str(tmp_path / "high"), progress=Silent())
    merge([str(tmp_path / "low"), str(tmp_path / "high")], str(tmp_path / "both"), progress=Silent())
    for name in ("low", "high", "both"):
        assert verify(tmp_path / name).ok
        found = images_in(open_cache(tmp_path / name))
        assert found
        assert all(found[digest] == originals[digest] for digest in found)
    assert images_in(open_cache(tmp_path / "both")) == originals


def test_damage_is_found_and_other_bytes_are_refused(made, tmp_path: Path) -> None:
    _, folder, _, _ = made
    shutil.copytree(folder / "cache", tmp_path / "c")
    file = next((tmp_path / "c/images").iterdir())
    whole = file.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not verify(tmp_path / "c").ok, place
    file.unlink()
    report = verify(tmp_path / "c", repair=True)
    assert any("images/" in problem.file and "missing" in problem.what for problem in report.problems)
    assert len(open_cache(tmp_path / "c").shards) == len(open_cache(folder / "cache").shards) - 1
    shutil.rmtree(tmp_path / "c")
    shutil.copytree(folder / "cache", tmp_path / "c")
    shard = int(file.name[:5])
    file.unlink()
    with pytest.raises(CacheDamaged, match="missing"):
        open_cache(tmp_path / "c").read_shard(shard, images=True)


def test_kills_around_the_images_leave_what_an_undisturbed_build_leaves(tmp_path: Path) -> None:
    build_cache(tmp_path / "undisturbed", EVERYTHING)
    expected = images_in(open_cache(tmp_path / "undisturbed"))
    assert len(expected) > 5
    names = start(tmp_path / "moments", "--moments").communicate(timeout=120)[0].split("\n")[:-1]
    steps = [place for place, name in enumerate(names, 1) if "images" in name or ".arrow" in name]
    assert len(steps) >= 5
    for at in steps[:: max(1, len(steps) // 6)]:
        process = start(tmp_path / str(at), "--die-at", at)
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL
        build_cache(tmp_path / str(at), EVERYTHING)
        assert_same_cache(tmp_path / str(at), tmp_path / "undisturbed")
        assert images_in(open_cache(tmp_path / str(at))) == expected
        assert verify(tmp_path / str(at)).ok
