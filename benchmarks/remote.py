"""Requests and seconds at an object store, by format version.

    python -m benchmarks.remote [--shards 1300] [--milliseconds 20] [--connections 10] [--json FILE]

A stand-in of fsspec in memory: every request takes that long, a listing one request per 1,000 objects, and at
most so many are under way at once (10 is what s3fs allows by default). One shard of 16 samples under many
numbers: what is counted depends on the number of objects alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import md5
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
from fsspec.asyn import AsyncFileSystem

from benchmarks._random_cache import random_records
from cache_schema.format.cache import open_cache
from cache_schema.format.documents import VERSIONS
from cache_schema.format.identity import Fingerprint
from cache_schema.format.manifest import Manifest, Plan
from cache_schema.format.records import CapturedImage, CapturedSample, ImageRecord, Relation, TopK
from cache_schema.format.shard import encode_shard
from cache_schema.format.spec import TargetSpec
from cache_schema.format.store import open_store
from cache_schema.format.writer import CacheWriter

SAMPLES, VISUAL, RESPONSE, VOCAB = 16, 81, 24, 4096
PAGE = 1000


class SlowStore(AsyncFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Objects in memory; `requests` counts what was asked for."""

    protocol = "slow"
    cachable = True
    objects: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[Counter[str]] = Counter()

    def __init__(self, milliseconds: float = 0.0, connections: int = 10, **options: Any) -> None:
        super().__init__(**options)
        self.seconds = milliseconds / 1e3
        self.connections = connections
        self.free: asyncio.Semaphore | None = None

    async def _request(self, kind: str) -> None:
        if self.free is None:  # of the loop in which the requests run
            self.free = asyncio.Semaphore(self.connections)
        async with self.free:
            self.requests[kind] += 1
            await asyncio.sleep(self.seconds)

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        await self._request("get")
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path][start:end]

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        await self._request("put")
        if mode == "create" and path in self.objects:
            raise FileExistsError(path)
        self.objects[path] = value

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        await self._request("head")
        if path not in self.objects:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(self.objects[path]), "type": "file"}

    async def _find(self, path: str, **_: Any) -> dict[str, dict[str, Any]]:
        found = {name: data for name, data in self.objects.items() if name.startswith(f"{path}/")}
        for _page in range(max(-(-len(found) // PAGE), 1)):
            await self._request("list")
        return {
            name: {"name": name, "size": len(data), "type": "file", "ETag": f'"{md5(data).hexdigest()}"'}
            for name, data in found.items()
        }

    async def _rm_file(self, path: str, **_: Any) -> None:
        await self._request("delete")
        del self.objects[path]


def write(url: str, version: int, shards: int) -> CacheWriter:
    """The cache at `url`, all its shards of the same bytes."""
    spec = TargetSpec(top_k=32)
    plan = Plan(rows=shards * SAMPLES, shard_size=SAMPLES, order=np.arange(shards * SAMPLES))
    manifest = Manifest(
        fingerprint=Fingerprint(capture={}, training={"vocab_size": VOCAB}),
        spec=spec,
        plan=plan,
        created="2026-01-01T00:00:00+00:00",
        format_version=version,
    )
    writer = CacheWriter.open(url, manifest)
    random = np.random.default_rng(0)
    samples = [_sample(row, random) for row in range(SAMPLES)]
    encoded = encode_shard("NAME", samples, [], spec)
    for shard in range(shards):
        attempt = f"{shard:012x}"
        name = f"{shard:05d}-{attempt}"
        tables = {path.replace("NAME", name): data for path, data in encoded.tables.items()}
        writer.commit(shard, attempt, replace(encoded, name=name, tables=tables), engine={}, seconds=0.0)
    return writer


def _sample(row: int, random: np.random.Generator) -> CapturedSample:
    visual, response = (random_records(random, count, VOCAB, 32) for count in (VISUAL, RESPONSE))
    fields = {name: getattr(visual, name) for name in TopK.__dataclass_fields__}
    factor = random.normal(size=(VISUAL, 8)).astype(np.float32)
    image = ImageRecord(
        path=f"{row}.jpg",
        sha256=f"{row:064x}",
        width=1,
        height=1,
        positions=np.arange(VISUAL, dtype=np.int32),
    )
    norm = float(np.linalg.norm(factor @ factor.T))
    return CapturedSample(
        row=row,
        sample_id=str(row),
        input_ids=np.zeros(VISUAL + RESPONSE + 1, np.int32),
        label_spans=np.array([[VISUAL + 1, VISUAL + RESPONSE + 1]], np.int32),
        images=(
            CapturedImage(
                record=image,
                visual=TopK(**fields | {"label_logprob": None}),
                relation=Relation(residual=0.0, norm=norm, factor=factor),
            ),
        ),
        response=response,
    )


def measured(what: str, run: Callable[[], Any]) -> dict[str, Any]:
    """What `run` asked of the store, and how long it took."""
    SlowStore.requests.clear()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return {"what": what, "requests": dict(SlowStore.requests), "seconds": round(seconds, 3)}


def measure(url: str, options: dict[str, Any], state: str = "begun") -> list[dict[str, Any]]:
    """Opening a cache, and reading of it."""
    cache = open_cache(url, storage_options=options)
    return [
        measured(f"open the cache, {state}", lambda: open_cache(url, storage_options=options)),
        measured("list every object (verify)", lambda: open_store(url, options).list()),
        measured("read a shard", lambda: cache.read_shard(0)),
        measured("read its response targets alone", lambda: cache.read_shard(0, parts=("response",))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=1300)
    parser.add_argument("--milliseconds", type=float, default=20.0, help="of a request")
    parser.add_argument("--connections", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    fsspec.register_implementation("slow", SlowStore)
    place = {"milliseconds": options.milliseconds, "connections": options.connections}
    report: list[dict[str, Any]] = []
    for version in VERSIONS:
        url = f"slow://version-{version}"
        writer = write(url, version, options.shards)
        sizes = [len(d) for name, d in SlowStore.objects.items() if name.startswith(f"version-{version}/")]
        print(f"version {version}: {len(sizes):,} objects, {sum(sizes) / 1e6:.1f} MB")
        rows = measure(url, place)
        writer.finish()
        rows += measure(url, place, "finished")[:1]
        for row in rows:
            report.append({"version": version} | row)
            asked = ", ".join(f"{count:,} {kind}" for kind, count in row["requests"].items())
            print(f"  {row['what']:34} {row['seconds']:8.2f} s   {asked}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
