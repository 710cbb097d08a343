"""Caches from strangers: manifests, commit records, tables and arrays changed by somebody who also makes the
digests right again. Some 12,000 of them, each by its seed.

Every one is read or refused in one line of bounded length, in bounded time and memory; what is read is what
a cache can hold: records as long as their positions, paths below the root, and nothing that moves the cursor
of a terminal.
A seed that ever failed is kept in FAILED and tried first.
"""

import hashlib
import json
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cache_schema import open_cache
from cache_schema.format import archive, sealed
from cache_schema.format.groups import read_groups, write_groups
from cache_schema.format.manifest import Manifest
from cache_schema.format.shard import SAMPLE_SCHEMA, read_table, write_table
from cache_schema.format.spec import KINDS
from cache_schema.operations.summary import summarise
from cache_schema.operations.verify import verify
from models.stored_head import head_of
from tests.fake_caches import make_cache
from tests.fuzzing import LONGEST_LINE, changed_bytes, mutated, within_bounds
from tests.test_cli import run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

GOLDEN = Path(__file__).parent / "golden"
SECONDS = 20.0  # for one cache, all that is tried on it
MEMORY = 1 << 30  # bytes that the whole suite may add to the process
EACH = 750

FAILED: dict[str, tuple[int, ...]] = {}


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


class Stranger:
    """A copy of a cache whose files can be changed, with digests made to fit, and put back."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.root = shutil.copytree(source, folder)
        self.original = {
            path.relative_to(self.root).as_posix(): path.read_bytes()
            for path in self.root.rglob("*")
            if path.is_file()
        }
        self.changed: set[str] = set()
        self.commits = [name for name in self.original if name.startswith("commits/")]

    def files(self, folder: str) -> list[str]:
        return [name for name in self.original if name.startswith(f"{folder}/")]

    def write(self, name: str, data: bytes) -> None:
        (self.root / name).write_bytes(data)
        self.changed.add(name)

    def document(self, name: str) -> dict[str, Any]:
        return sealed.unseal((self.root / name).read_bytes(), name)

    def seal(self, name: str, document: Any) -> None:
        """The document with the digest that a stranger gives it; NaN and lone surrogates are no hindrance."""
        blank = json.dumps({**document, "digest": "0" * 64}, default=repr).encode()
        head, _, tail = blank.rpartition(b"0" * 64)
        self.write(name, head + hashlib.sha256(blank).hexdigest().encode() + tail)

    def replace(self, name: str, data: bytes, parts: dict[str, Any] | None = None) -> None:
        """A file of a shard, and its size and digest in the commit record."""
        self.write(name, data)
        for path in self.commits:
            document = self.document(path)
            for file in document["files"]:
                if file["path"] == name:
                    file |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                    if parts is not None:
                        file["parts"] = parts
                    self.seal(path, document)

    def arrays(self, rng: random.Random) -> tuple[str, dict[str, bytes]]:
        """The hierarchy of a shard: the name that `put_arrays` takes, and path inside it -> bytes."""
        record = self.document(rng.choice(self.commits))
        stem = f"targets/{record['shard']:05d}-{record['attempt']}.zarr"
        if f"{stem}.zip" in self.original:
            entries = archive.unpack(self.original[f"{stem}.zip"])
            return f"{stem}.zip", {path: bytes(data) for path, data in entries.items()}
        return stem, {
            name.removeprefix(f"{stem}/"): data
            for name, data in self.original.items()
            if name.startswith(f"{stem}/")
        }

    def put_arrays(self, name: str, files: dict[str, bytes]) -> None:
        """Files of that hierarchy in place of those of their paths."""
        if name.endswith(".zip"):
            data, places = archive.pack(files)
            digests = {
                group: hashlib.sha256(data[place.start : place.end]).hexdigest()
                for group, place in places.items()
            }
            parts = {
                group: {"start": place.start, "end": place.end, "sha256": digests[group]}
                for group, place in places.items()
            }
            self.replace(name, data, parts)
            return
        for path, data in files.items():
            if self.original.get(f"{name}/{path}", data) != data:
                self.replace(f"{name}/{path}", data)

    def restore(self) -> None:
        for name in self.changed:
            (self.root / name).write_bytes(self.original[name])
        self.changed.clear()


@pytest.fixture(
    params=["cache-v1/full", "cache-v1/compact", "cache-v2/entries", "cache-v2/everything"], scope="module"
)
def stranger(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stranger:
    return Stranger(GOLDEN / request.param, tmp_path_factory.mktemp("stranger") / "cache")


def seeds(kind: str, count: int = EACH) -> Iterator[tuple[int, random.Random]]:
    for seed in (*FAILED.get(kind, ()), *range(count)):
        yield seed, random.Random(f"{kind} {seed}")


def look(root: Path) -> int:
    """All that a reader asks of a cache; the number of samples read."""
    cache = open_cache(root)
    json.dumps(summarise(cache), allow_nan=False)
    index = cache.index()
    list(cache.quarantined())
    cache.find("id-1")
    read = 0
    if cache.manifest.head is not None:
        head_of(cache)
    for number in range(min(len(cache), 64)):
        sample = cache[number]
        assert all(len(own) == len(sample.positions[kind]) for kind, own in sample.hidden.items())
        read += 1
        assert len(sample.labels) == len(sample.input_ids) == index.tokens[number]
        for kind in KINDS:
            record, positions = sample.records[kind], sample.positions[kind]
            assert record is None or len(record) == len(positions)
            assert not len(positions) or 0 <= positions.min() <= positions.max() < len(sample.input_ids)
            if record is not None and record.token_ids.size:
                assert 0 <= record.token_ids.min() <= record.token_ids.max() < cache.manifest.vocab_size
    return read


def tried(stranger: Stranger, kind: str, change: Callable[[random.Random], None], count: int = EACH) -> int:
    """How many of the changed caches could be read whole."""
    good = 0
    for seed, rng in seeds(kind, count):
        what = f"{kind}: seed {seed}, {stranger.root}"
        try:
            change(rng)
            with within_bounds(f"{kind} of {stranger.root}", seed, SECONDS):
                look(stranger.root)
                good += 1
            if seed % 20 == 0:
                with within_bounds(f"{kind} of {stranger.root}", seed, SECONDS):
                    report = verify(stranger.root)
                    assert all(len(str(problem)) <= 4 * LONGEST_LINE for problem in report.problems), what
        finally:
            stranger.restore()
    return good


def test_manifests(stranger: Stranger) -> None:
    def change(rng: random.Random) -> None:
        if rng.random() < 0.1:
            stranger.write("manifest.json", changed_bytes(stranger.original["manifest.json"], rng))
        else:
            document = mutated(stranger.document("manifest.json"), rng, rng.choice((1, 1, 2, 4)))
            stranger.seal("manifest.json", document if isinstance(document, dict) else {"x": document})

    assert tried(stranger, "manifests", change) < EACH


def test_commit_records(stranger: Stranger) -> None:
    def change(rng: random.Random) -> None:
        path = rng.choice(stranger.commits)
        document = mutated(stranger.document(path), rng, rng.choice((1, 1, 2, 4)))
        stranger.seal(path, document if isinstance(document, dict) else {"x": document})

    assert 0 < tried(stranger, "commits", change) < EACH


def test_bytes_of_tables_and_arrays(stranger: Stranger) -> None:
    names = [
        name for folder in ("samples", "quarantine", "targets", "images") for name in stranger.files(folder)
    ]

    def change(rng: random.Random) -> None:
        name = rng.choice(names)
        stranger.replace(name, changed_bytes(stranger.original[name], rng))

    assert tried(stranger, "bytes", change) < EACH


def test_values_of_tables(stranger: Stranger) -> None:
    names = stranger.files("samples")

    def change(rng: random.Random) -> None:
        name = rng.choice(names)
        rows = read_table(stranger.original[name]).to_pylist()
        for _ in range(20):
            try:
                table = pa.Table.from_pylist(mutated(rows, rng, rng.choice((1, 1, 2))), SAMPLE_SCHEMA)
            except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
                continue
            break
        else:
            return
        stranger.replace(name, write_table(table))

    assert tried(stranger, "tables", change) > 0


def test_metadata_of_arrays(stranger: Stranger) -> None:
    def change(rng: random.Random) -> None:
        name, files = stranger.arrays(rng)
        path = rng.choice([path for path in files if path.endswith("zarr.json")])
        document = mutated(json.loads(files[path]), rng, rng.choice((1, 1, 2)))
        stranger.put_arrays(name, files | {path: json.dumps(document, default=repr).encode()})

    assert tried(stranger, "metadata", change) > 0


def test_values_of_arrays(stranger: Stranger) -> None:
    """Indices, offsets, counts and numbers that point anywhere."""

    def change(rng: random.Random) -> None:
        name, files = stranger.arrays(rng)
        groups = read_groups(files)
        group = rng.choice(sorted(groups))
        array = rng.choice(sorted(groups[group]))
        values = groups[group][array] = groups[group][array].copy()
        draws = np.random.default_rng(rng.randrange(1 << 30))
        what = rng.random()
        if values.size and what < 0.7:
            at = draws.integers(0, values.size, rng.choice((1, 3)))
            if values.dtype.kind == "f":
                values.flat[at] = rng.choice((np.nan, np.inf, -np.inf, 1e30, -1.0, 0.0))
            else:
                info = np.iinfo(values.dtype)
                values.flat[at] = draws.integers(
                    info.min, info.max, len(at), dtype=values.dtype, endpoint=True
                )
        elif what < 0.85:
            groups[group][array] = values[: len(values) // 2]
        elif what < 0.95:
            groups[group][array] = np.concatenate([values, values])
        else:
            del groups[group][array]
        stranger.put_arrays(name, write_groups(groups, {"temperatures": [1.0]}))

    assert tried(stranger, "values", change, 250) > 0


HOSTILE = "\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202enoitaxat\n[bold red]x[/]<script>alert(1)</script>\ud7ff"


def hostile(value: Any) -> Any:
    """The value with every text in it, keys of free mappings too, ending in what no terminal may get."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, dict):
        return {key: hostile(inner) for key, inner in value.items()} | {HOSTILE: HOSTILE}
    return [hostile(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture(params=[1, 2])
def talkative(request: pytest.FixtureRequest, tmp_path: Path) -> Stranger:
    """A cache whose every free text holds control sequences: in documents, samples and quarantine."""
    make_cache(tmp_path / "made", tmp_path / "images", rows=6, bad={4: "broken_image"}, version=request.param)
    stranger = Stranger(tmp_path / "made", tmp_path / "cache")
    manifest = stranger.document("manifest.json")
    manifest |= {"dataset": hostile(manifest["dataset"]), "kdcache_version": HOSTILE}
    capture = {
        key: hostile(value) for key, value in manifest["fingerprint"]["capture"].items() if key != "spec"
    }
    manifest["fingerprint"]["capture"] |= capture
    manifest["fingerprint"]["recorded"] = hostile(manifest["fingerprint"]["recorded"])
    stranger.seal("manifest.json", manifest)
    identity = Manifest.from_bytes((stranger.root / "manifest.json").read_bytes()).identity
    for path in stranger.commits:
        document = stranger.document(path)
        document |= {"cache": identity, "engine": hostile(document["engine"]), "kdcache_version": HOSTILE}
        document["statistics"]["quarantined"] = {HOSTILE: 1}
        for file in document["files"]:
            if file["path"].split("/")[0] in ("samples", "quarantine"):
                table = read_table(stranger.original[file["path"]])
                rows = table.to_pylist()
                for row in rows:
                    for name in ("sample_id", "reason", "detail"):
                        if name in row:
                            row[name] += HOSTILE
                    for image in row.get("images", ()):
                        image["path"] += HOSTILE
                data = write_table(pa.Table.from_pylist(rows, table.schema))
                stranger.write(file["path"], data)
                file |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        stranger.seal(path, document)
    return stranger


def test_no_text_of_a_cache_moves_a_terminal(
    talkative: Stranger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = talkative.root
    make_cache(tmp_path / "other", tmp_path / "images", rows=6)
    for words in (
        ("diff", cache, tmp_path / "other"),
        ("inspect", cache),
        ("inspect", cache, "--sample", "0"),
        ("inspect", cache, "--html", tmp_path / "page.html"),
        ("inspect", cache, "--json"),
        ("verify", cache),
        ("verify", cache, "--quick", "--json"),
        ("diff", cache, cache),
        ("diff", cache, cache, "--json"),
        ("select", cache, "--where", "tokens > 0", "--out", tmp_path / "selected"),
        ("merge", cache, "--format", "2", "--out", tmp_path / "merged"),
        ("to-arrow", cache, "--out", tmp_path / "arrow"),
        ("train", "--stage", "sft", "--student", cache, "--cache", cache, "--out", tmp_path / "run"),
    ):
        code, out, err = run(*words, capsys=capsys)
        assert code == 0 or words[0] == "train" or tmp_path / "other" in words, (words, err)
        if "--json" in words:
            json.loads(out)
        for text in (out, err):
            strange = {c for c in text if not c.isprintable() and c != "\n"}
            assert not strange, (words, strange, text[:2000])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "[/]<script>" not in page
