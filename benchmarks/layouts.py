"""How fast a cache is read, beside other layouts of the same targets.

    python -m benchmarks.layouts [--samples 512] [--top-k 64] [--json FILE]

Samples of 729 visual and 130 response positions of the visual model (benchmarks/_teachers.py). One pass in
shuffled order, warm, CPU time of one core: every sample comes as ids int32 and log-probabilities float32.
    memmap     raw int32 and float32, one copy a sample: the most that any layout can do
    ours       shards in shuffled order, their samples in shuffled order, every file's digest checked
    distillkit ids bit-packed at the vocabulary's width and 8-bit log-probabilities, a row a sample in
               memory-mapped Arrow (its values are a polynomial of 3.5 bits; 8 bits decode faster)
    axolotl    nested lists of int64 ids and float32 log-probabilities, a row a sample in memory-mapped
               Arrow, as its dataset columns target_token_ids and target_logprobs
    parquet    lists of int32 and float16 with zstd, 16 samples per row group, read by row group
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numcodecs import blosc
from numpy.typing import NDArray

from benchmarks._teachers import topk_of, visual_teacher
from cache_schema.format.cache import open_cache
from cache_schema.format.identity import Fingerprint
from cache_schema.format.manifest import Manifest, Plan
from cache_schema.format.records import CapturedImage, CapturedSample, ImageRecord, TopK
from cache_schema.format.spec import TargetSpec
from cache_schema.format.writer import CacheWriter

VISUAL, RESPONSE, VOCAB = 729, 130, 49_152
POSITIONS = VISUAL + RESPONSE
SHARD = 256
BASE = 8

Pair = tuple[NDArray[np.int32], NDArray[np.float32]]


def targets(samples: int, k: int) -> TopK:
    """Positions of `samples` samples: of BASE samples, and the same curves again under other ids."""
    record = topk_of(visual_teacher(-(-BASE * POSITIONS // VISUAL), vocab=VOCAB), k)
    rng, parts = np.random.default_rng(1), []
    size = BASE * POSITIONS
    for _ in range(samples // BASE):
        relabel = rng.permutation(VOCAB).astype(np.int32)
        fields = {n: getattr(record, n) for n in TopK.__dataclass_fields__ if n != "temperatures"}
        fields = {n: None if v is None else v[:size] for n, v in fields.items()}
        parts.append(fields | {"token_ids": relabel[fields["token_ids"]]})
    joined = {n: None if v is None else np.concatenate([p[n] for p in parts]) for n, v in parts[0].items()}
    return TopK(temperatures=record.temperatures, **joined)


def rows_of(record: TopK, start: int, count: int, *, label: bool) -> TopK:
    fields = {n: getattr(record, n) for n in TopK.__dataclass_fields__}
    cut = {n: v if v is None or n == "temperatures" else v[start : start + count] for n, v in fields.items()}
    return TopK(**cut | ({} if label else {"label_logprob": None}))


class Ours:
    """This project's cache."""

    def write(self, folder: Path, record: TopK, samples: int) -> None:
        spec = TargetSpec(targets=("response", "visual"), top_k=record.token_ids.shape[1])
        plan = Plan(rows=samples, shard_size=SHARD, order=np.arange(samples))
        manifest = Manifest(
            fingerprint=Fingerprint(capture={}, training={}),
            spec=spec,
            plan=plan,
            created="2026-01-01T00:00:00+00:00",
        )
        writer = CacheWriter.open(folder / "cache", manifest)
        for shard in writer.pending():
            rows = [self._sample(record, int(row)) for row in plan.rows_of(shard)]
            writer.write_shard(shard, rows, [], engine={}, seconds=0.0)

    def _sample(self, record: TopK, row: int) -> CapturedSample:
        image = ImageRecord(
            path="image.jpg", sha256="0" * 64, width=1, height=1, positions=np.arange(VISUAL, dtype=np.int32)
        )
        start = row * POSITIONS
        visual = rows_of(record, start, VISUAL, label=False)
        return CapturedSample(
            row=row,
            sample_id=str(row),
            input_ids=np.zeros(POSITIONS + 1, np.int32),
            label_spans=np.array([[VISUAL + 1, POSITIONS + 1]], np.int32),
            images=(CapturedImage(record=image, visual=visual),),
            response=rows_of(record, start + VISUAL, RESPONSE, label=True),
        )

    def read(self, folder: Path, order: np.random.Generator) -> Iterator[Pair]:
        cache = open_cache(folder / "cache")
        for shard in order.permutation(cache.shards).tolist():
            block = cache.read_shard(shard)
            for position in order.permutation(len(block)).tolist():
                sample = block.sample(position)
                assert sample.visual is not None
                assert sample.response is not None
                yield sample.visual.token_ids, sample.visual.logprobs
                yield sample.response.token_ids, sample.response.logprobs


class Memmap:
    """Raw arrays."""

    def write(self, folder: Path, record: TopK, samples: int) -> None:
        np.save(folder / "ids.npy", record.token_ids)
        np.save(folder / "logprobs.npy", record.logprobs)

    def read(self, folder: Path, order: np.random.Generator) -> Iterator[Pair]:
        ids = np.load(folder / "ids.npy", mmap_mode="r")
        logprobs = np.load(folder / "logprobs.npy", mmap_mode="r")
        for row in order.permutation(len(ids) // POSITIONS).tolist():
            rows = slice(row * POSITIONS, (row + 1) * POSITIONS)
            yield np.array(ids[rows]), np.array(logprobs[rows])


class DistillKit:
    """Bit-packed ids and quantised values, a row a sample."""

    width = int(np.ceil(np.log2(VOCAB)))

    def write(self, folder: Path, record: TopK, samples: int) -> None:
        self.k = record.token_ids.shape[1]
        bits = (record.token_ids[..., None] >> np.arange(self.width)) & 1
        packed = np.packbits(bits.astype(np.uint8).reshape(len(bits), -1), axis=1, bitorder="little")
        low, high = record.logprobs[:, -1:], record.logprobs[:, :1]
        levels = np.rint((record.logprobs - low) / np.maximum(high - low, 1e-6) * 255).astype(np.uint8)
        columns = {
            "ids": packed,
            "levels": levels,
            "range": np.concatenate([low, high], axis=1).astype(np.float16),
        }
        _write_rows(folder / "rows.arrow", columns, samples)

    def read(self, folder: Path, order: np.random.Generator) -> Iterator[Pair]:
        table = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()
        columns = [table[name].combine_chunks() for name in ("ids", "levels", "range")]
        powers = (1 << np.arange(self.width)).astype(np.float32)
        for row in order.permutation(table.num_rows).tolist():
            packed, levels, limits = (np.frombuffer(c[row].as_buffer(), np.uint8) for c in columns)
            bits = np.unpackbits(packed.reshape(POSITIONS, -1), axis=1, bitorder="little")
            bits = bits[:, : self.k * self.width].reshape(-1, self.width)
            ids = (bits.astype(np.float32) @ powers).astype(np.int32).reshape(POSITIONS, -1)
            low, high = limits.view(np.float16).astype(np.float32).reshape(POSITIONS, 2).T[:, :, None]
            yield ids, levels.reshape(POSITIONS, -1) * ((high - low) / 255) + low


class Axolotl:
    """Nested lists."""

    def write(self, folder: Path, record: TopK, samples: int) -> None:
        table = pa.table(
            {
                "target_token_ids": _nested(record.token_ids.astype(np.int64)),
                "target_logprobs": _nested(record.logprobs),
            }
        )
        with (
            pa.OSFile(str(folder / "rows.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=16)

    def read(self, folder: Path, order: np.random.Generator) -> Iterator[Pair]:
        reader = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow")))
        table = reader.read_all()
        for row in order.permutation(table.num_rows).tolist():
            ids, logprobs = (table[name][row].values.flatten().to_numpy() for name in table.column_names)
            yield ids.reshape(POSITIONS, -1).astype(np.int32), np.array(logprobs.reshape(POSITIONS, -1))


class Parquet:
    """Lists, compressed."""

    def write(self, folder: Path, record: TopK, samples: int) -> None:
        table = pa.table(
            {"ids": _flat(record.token_ids), "logprobs": _flat(record.logprobs.astype(np.float16))}
        )
        pq.write_table(table, folder / "rows.parquet", compression="zstd", row_group_size=16)

    def read(self, folder: Path, order: np.random.Generator) -> Iterator[Pair]:
        file = pq.ParquetFile(folder / "rows.parquet")
        for group in order.permutation(file.num_row_groups).tolist():
            table = file.read_row_group(group, use_threads=False).combine_chunks()
            for row in order.permutation(table.num_rows).tolist():
                ids, logprobs = (table[name][row].values.to_numpy() for name in ("ids", "logprobs"))
                yield ids.reshape(POSITIONS, -1), logprobs.reshape(POSITIONS, -1).astype(np.float32)


def _write_rows(path: Path, columns: dict[str, NDArray[Any]], samples: int) -> None:
    rows = {name: [part.tobytes() for part in np.split(values, samples)] for name, values in columns.items()}
    table = pa.table({name: pa.array(parts, pa.binary()) for name, parts in rows.items()})
    _write_arrow(path, table)


def _write_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=16)


def _flat(values: NDArray[Any]) -> pa.ListArray:
    ends = np.arange(0, len(values) + 1, POSITIONS, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values.ravel()))


def _nested(values: NDArray[Any]) -> pa.ListArray:
    inner_ends = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    inner = pa.ListArray.from_arrays(pa.array(inner_ends), pa.array(values.ravel()))
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, POSITIONS, dtype=np.int32)), inner)


def measure(layout: Any, record: TopK, samples: int) -> dict[str, Any]:
    """Bytes a position, samples/s of a core and MB/s of decoded ids and log-probabilities; best of 3."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.process_time()
        layout.write(folder, record, samples)
        wrote = time.process_time() - start
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        seconds, total = float("inf"), 0.0
        for seed in range(3):
            start, positions, total = time.process_time(), 0, 0.0
            for ids, logprobs in layout.read(folder, np.random.default_rng(seed)):
                positions += len(ids)
                total += float(ids[0, 0]) + float(logprobs[-1, -1])
            seconds = min(seconds, time.process_time() - start)
            assert positions == samples * POSITIONS
    return {
        "layout": type(layout).__name__.lower(),
        "bytes per position": size / samples / POSITIONS,
        "write samples/s": samples / wrote,
        "samples/s": samples / seconds,
        "MB/s": record.token_ids.nbytes * 2 / 1e6 / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=512, help="a multiple of 8")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    blosc.use_threads = False
    pa.set_cpu_count(1)
    record = targets(options.samples, options.top_k)
    rows = [measure(kind(), record, options.samples) for kind in (Memmap, Ours, DistillKit, Axolotl, Parquet)]
    print(" | ".join([*rows[0], "of memmap"]))
    for row in rows:
        row["of memmap"] = row["samples/s"] / rows[0]["samples/s"]
        print(" | ".join(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
