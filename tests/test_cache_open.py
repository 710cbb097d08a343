"""Stock libraries open every file, and caches of every version stay readable for ever.

The reader here is written after docs/cache-format.md and uses nothing of kdcache. The golden caches under
tests/golden were written once; they and the numbers beside them must never be made again.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
import zarr
from numcodecs import Blosc

from cache_schema import Cache, Sample, TargetSpec, TopK, open_cache
from cache_schema.format.archive import unpack
from cache_schema.format.codecs.topk import topk_at
from cache_schema.operations.verify import verify
from models.stored_head import head_of
from tests.cache_teacher import EVERYTHING, build_cache, holding

GOLDEN = Path(__file__).parent / "golden" / "cache-v1"
TARGETS = ("response", "visual", "relation", "prompt")


def unsealed(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    at = data.rindex(b'"digest": "') + len(b'"digest": "')
    blank = data[:at] + b"0" * 64 + data[at + 64 :]
    assert hashlib.sha256(blank).hexdigest() == data[at : at + 64].decode()
    return json.loads(data)


def topk(group: zarr.Group, rows: slice, at_one: int) -> dict[str, np.ndarray]:
    found = {name: array[:] for name, array in group.arrays()}
    tail = found["tail_logprob"][:, rows].astype(np.float64)
    if "counts" in found:
        ids, logprobs = entries(found, rows, tail[at_one])
        if "label_rank" in found:
            label = labels(found, logprobs, rows)
            found["label_logprob"] = np.concatenate([np.zeros(rows.start), label])
    elif "token_ids" in found:
        ids, logprobs = found["token_ids"][rows], found["logprobs"][rows]
    else:
        ids = found["vocabulary"][found["ids"][rows]]
        steps = found["steps"][:, rows].astype(int)
        level = np.vstack([np.zeros((1, steps.shape[1]), int), np.cumsum(steps, axis=0)])
        fall = found["drop"][rows].astype(np.float64) * (level / 255) ** 2
        logprobs = (np.log(1 - np.exp(tail[at_one])) - np.log(np.exp(-fall).sum(axis=0)) - fall).T
    names = {"logsumexp", "entropy", "label_logprob", "sampled_counts", "counts"} & found.keys()
    others = {name: found[name][rows] for name in names}
    return {"token_ids": ids, "logprobs": logprobs, "tail_logprob": tail.T} | others


def entries(found: dict[str, np.ndarray], rows: slice, tail: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities, (N, most entries of any row), of positions by a threshold."""
    counts = found["counts"].astype(int)
    ends = np.cumsum(counts)
    mine = range(*rows.indices(len(counts)))
    width = max((counts[n] for n in mine), default=1)
    ids, logprobs = np.zeros((len(mine), width), int), np.full((len(mine), width), -np.inf)
    rank_starts = np.cumsum([0] + [(counts > rank).sum() for rank in range(1, max(counts, default=1))])
    for row, n in enumerate(mine):
        flat = slice(ends[n] - counts[n], ends[n])
        if "token_ids" in found:
            ids[row, : counts[n]], logprobs[row, : counts[n]] = (
                found["token_ids"][flat],
                found["logprobs"][flat],
            )
            continue
        ids[row, : counts[n]] = found["vocabulary"][found["ids"][flat]]
        # the step to entry `rank` stands behind those of all earlier rows that have such an entry
        level = [0]
        for rank in range(1, counts[n]):
            level.append(level[-1] + found["steps"][rank_starts[rank - 1] + (counts[:n] > rank).sum()])
        fall = float(found["drop"][n]) * (np.array(level) / 127) ** 2
        logprobs[row, : counts[n]] = np.log(1 - np.exp(tail[row])) - np.log(np.exp(-fall).sum()) - fall
    return ids, logprobs


def labels(found: dict[str, np.ndarray], logprobs: np.ndarray, rows: slice) -> np.ndarray:
    """The log-probability of each label: of the entry of that rank, or apart."""
    rank = found["label_rank"].astype(int)
    apart = found["label_rest"].astype(float)
    return np.array(
        [
            logprobs[row, rank[n] - 1] if rank[n] else apart[(rank[:n] == 0).sum()]
            for row, n in enumerate(range(*rows.indices(len(rank))))
        ]
    )


def gram(group: zarr.Group, image: int) -> np.ndarray:
    found = {name: array[:] for name, array in group.arrays()}
    tokens, ranks = found["tokens"].astype(int), found["rank"].astype(int)
    size, rank = tokens[image], ranks[image]
    scale = found["scales"][np.maximum(ranks, 1)[:image].sum() :][: max(rank, 1)].astype(np.float64)
    if rank == 0:
        sizes = np.where(ranks == 0, tokens * (tokens + 1) // 2, 0)
        upper = np.zeros((size, size))
        upper[np.triu_indices(size)] = found["triangles"][sizes[:image].sum() :][: sizes[image]] * scale[0]
        return upper + np.triu(upper, 1).T
    columns = found["columns"][(tokens * ranks)[:image].sum() :][: size * rank].reshape(rank, size)
    if columns.dtype == np.uint16:
        q = columns.astype(int)
        columns = np.where(q % 2 == 0, q // 2, -(q + 1) // 2)
    factor = (columns * scale[:, None]).T
    return factor @ factor.T


def states(group: zarr.Group, rows: slice) -> np.ndarray:
    """The hidden states of some positions, (N, D)."""
    found = {name: array[:] for name, array in group.arrays()}
    mean, unit = np.moveaxis(found["channels"][found["channel_of"][rows]].astype(np.float64), 1, 0)
    return mean + unit * found["scales"][rows, None] * found["values"][rows]


def read_head(root: Path, head: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of the teacher's head: safetensors is a length, a JSON header, and the numbers."""
    data = (root / "head" / f"{head['sha256']}.safetensors").read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (head["size"], head["sha256"])
    begin = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, told in json.loads(data[8:begin]).items():
        start, end = (begin + offset for offset in told["data_offsets"])
        assert told["dtype"] == {"bfloat16": "BF16"}[head["dtype"]]
        numbers = np.frombuffer(data[start:end], "<u2").astype(np.uint32) << 16
        tensors[name] = numbers.view(np.float32).reshape(told["shape"])
    assert tensors["weight"].shape == (head["rows"], head["width"])
    assert ("bias" in tensors) == head["bias"]
    return tensors


def stock_targets(root: Path, name: str, version: int) -> zarr.Group:
    if version == 1:
        return zarr.open_group(root / "targets" / f"{name}.zarr", mode="r")
    path = root / "targets" / f"{name}.zarr.zip"
    return zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")


def read_stock(root: Path) -> list[dict[str, Any]]:
    """Every sample of a cache, by json, hashlib, pyarrow and zarr alone."""
    manifest = unsealed(root / "manifest.json")
    at_one = manifest["spec"]["temperatures"].index(1.0)
    samples = []
    for path in sorted((root / "commits").glob("*.json")):
        record = unsealed(path)
        assert record["cache"] == manifest["identity"]
        assert record["format_version"] == manifest["format_version"]
        for file in record["files"]:
            data = (root / file["path"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == file["sha256"]
            for part in file.get("parts", {}).values():
                assert hashlib.sha256(data[part["start"] : part["end"]]).hexdigest() == part["sha256"]
        name = f"{record['shard']:05d}-{record['attempt']}"
        targets = stock_targets(root, name, manifest["format_version"])
        with pa.OSFile(str(root / "samples" / f"{name}.arrow")) as source:
            table = pa.ipc.open_file(source).read_all()
        files = {}
        if manifest["spec"].get("embed_images"):
            with pa.OSFile(str(root / "images" / f"{name}.arrow")) as source:
                rows = pa.ipc.open_file(source).read_all().to_pylist()
            files = {row["sha256"]: row["data"] for row in rows}
            assert all(hashlib.sha256(data).hexdigest() == digest for digest, data in files.items())
        hidden_kinds = manifest["spec"].get("hidden", {"kinds": ()})["kinds"]
        for row in table.to_pylist():
            supervised = [t - 1 for a, b in row["label_spans"] for t in range(a, b) if t > 0]
            visual = [t for image in row["images"] for a, b in image["spans"] for t in range(a, b)]
            rest = set(range(row["tokens"])) - set(supervised) - set(visual)
            sample = {
                "row": row["row"],
                "input_ids": row["input_ids"],
                "response_positions": supervised,
                "visual_positions": visual,
                "prompt_positions": sorted(rest),
            }
            for kind, count in (("response", len(supervised)), ("prompt", len(rest))):
                if (start := row[f"{kind}_start"]) is not None:
                    sample[kind] = topk(targets[kind], slice(start, start + count), at_one)
            sample["visual"] = []
            sample["hidden"] = {kind: [] for kind in hidden_kinds}
            sample["files"] = [files.get(image["sha256"]) for image in row["images"]]
            if "response" in hidden_kinds:
                start = row["response_start"]
                sample["hidden"]["response"].append(
                    states(targets["hidden_response"], slice(start, start + len(supervised)))
                )
            sample["relations"] = []
            for image in row["images"]:
                count = sum(b - a for a, b in image["spans"])
                if (start := image["visual_start"]) is not None:
                    here = slice(start, start + count)
                    sample["visual"].append(topk(targets["visual"], here, at_one))
                    if "visual" in hidden_kinds:
                        sample["hidden"]["visual"].append(states(targets["hidden_visual"], here))
                if image["relation"] is not None:
                    sample["relations"].append(gram(targets["relation"], image["relation"]))
            samples.append(sample)
    return samples


def assert_same(found: TopK, stock: dict[str, np.ndarray]) -> None:
    width = stock["token_ids"].shape[1]  # of the widest position; other images may have wider ones
    np.testing.assert_array_equal(found.token_ids[:, :width], stock["token_ids"])
    np.testing.assert_allclose(found.logprobs[:, :width], stock["logprobs"], atol=5e-6)
    assert np.isneginf(found.logprobs[:, width:]).all()
    by_rank = "counts" in stock
    for name in ("tail_logprob", "logsumexp", "entropy", "label_logprob", "sampled_counts", "counts"):
        if name in stock:
            rounding = 5e-6 if by_rank and name == "label_logprob" else 0.0
            np.testing.assert_allclose(getattr(found, name), stock[name], rtol=0.0, atol=rounding)


def assert_sample(found: Sample, stock: dict[str, Any]) -> None:
    assert found.row == stock["row"]
    for name in ("input_ids", "response_positions", "visual_positions", "prompt_positions"):
        assert getattr(found, name).tolist() == list(stock[name])
    for kind in ("response", "prompt"):
        assert (getattr(found, kind) is None) == (kind not in stock)
        if kind in stock:
            assert_same(getattr(found, kind), stock[kind])
    if stock["visual"]:
        start = 0
        for part in stock["visual"]:
            assert_same(topk_at(found.visual, slice(start, start + len(part["token_ids"]))), part)
            start += len(part["token_ids"])
        assert start == len(found.visual)
    assert found.hidden.keys() == {kind for kind, parts in stock["hidden"].items() if parts}
    for kind, values in found.hidden.items():
        expected = np.concatenate(stock["hidden"][kind])
        assert len(values) == len(found.positions[kind])
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    assert [image.content for image in found.images] == stock["files"]
    assert len(found.relations) == len(stock["relations"])
    for relation, expected in zip(found.relations, stock["relations"], strict=True):
        kept = relation.gram if relation.factor is None else relation.factor @ relation.factor.T
        np.testing.assert_allclose(kept, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def assert_stock_reads(root: Path) -> None:
    cache, stock = open_cache(root), read_stock(root)
    assert len(stock) == len(cache)
    for index, sample in enumerate(stock):
        assert_sample(cache[index], sample)
    assert_head(cache, root)


def assert_head(cache: Cache, root: Path) -> None:
    """A head is there where hidden states are, and a stranger reads the same logits from it."""
    told = unsealed(root / "manifest.json").get("head")
    assert (told is None) == (not cache.spec.hidden)
    if told is None:
        return
    tensors, ours = read_head(root, told), head_of(cache)
    np.testing.assert_array_equal(tensors["weight"], ours.weight.float().numpy())
    np.testing.assert_array_equal(tensors["bias"], ours.bias.float().numpy())
    assert (told["softcap"], told["logit_scale"]) == (ours.softcap, ours.logit_scale)
    hidden = next(s.hidden[told_kind] for s in cache for told_kind in s.hidden)
    z = told["logit_scale"] * (hidden @ tensors["weight"].T + tensors["bias"])
    z = told["softcap"] * np.tanh(z / told["softcap"])
    np.testing.assert_allclose(ours.logits(torch.from_numpy(hidden)).numpy(), z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "spec",
    [
        TargetSpec(targets=TARGETS, top_k=5, temperatures=(0.5, 1.0, 2.0), tail_samples=2),
        TargetSpec(targets=TARGETS, top_k=5, precision="full", relation="exact"),
        TargetSpec(targets=("relation",), relation="exact"),
        TargetSpec(
            targets=TARGETS,
            entries={"response": 0.01, "visual": 0.02},
            top_k={"prompt": 3},
            temperatures=(0.5, 1.0),
        ),
        TargetSpec(targets=TARGETS, entries={"response": 0.01, "visual": 0.02}, precision="full"),
    ],
    ids=["compact", "full", "relation", "entries", "entries in full"],
)
def test_stock_libraries_read_what_is_written(tmp_path: Path, spec: TargetSpec, version: int) -> None:
    build_cache(tmp_path, spec, share=True, version=version)
    assert_stock_reads(tmp_path)


@pytest.mark.parametrize(
    "spec",
    [
        EVERYTHING,
        replace(EVERYTHING, hidden=("visual",), precision="full", embed_images=False, tail_samples=2),
    ],
    ids=["all", "visual states"],
)
def test_stock_libraries_read_all_that_version_2_can_hold(tmp_path: Path, spec: TargetSpec) -> None:
    build_cache(tmp_path, spec, share=True)
    assert_stock_reads(tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_every_array_carries_a_checksum(tmp_path: Path, version: int) -> None:
    build_cache(tmp_path, TargetSpec(targets=TARGETS, top_k=5, tail_samples=2), version=version)
    arrays = 0
    for record in open_cache(tmp_path).commits.values():
        for _, array in stock_targets(tmp_path, record.name, version).members(max_depth=None):
            if isinstance(array, zarr.Array):
                arrays += 1
                assert type(array.compressors[-1]).__name__ == "Crc32cCodec"
                assert array.metadata.zarr_format == 3
    assert arrays == 5 * (3 * 9 + 2 + 7)
    path = holding(tmp_path, 0, "response/steps/c/0/0")
    data = bytearray(path.read_bytes())
    chunk = data if version == 1 else bytes(unpack(bytes(data))["response/steps/c/0/0"])
    data[data.index(chunk) + len(chunk) // 2] ^= 8
    path.write_bytes(data)
    with pytest.raises((ValueError, zipfile.BadZipFile), match=r"checksum|Bad CRC"):
        stock_targets(tmp_path, open_cache(tmp_path).commits[0].name, version)["response/steps"][:]


def test_a_shard_of_version_2_is_few_files_which_ranges_and_urls_open(tmp_path: Path) -> None:
    """As docs/cache-format.md tells: a zip through fsspec, and one array by a range of its file."""
    spec = TargetSpec(targets=TARGETS, top_k=5, tail_samples=2)
    build_cache(tmp_path, spec, share=True)
    assert [len(list(tmp_path.glob(f"*/{shard:05d}*"))) for shard in range(5)] == [4] * 5
    cache = open_cache(tmp_path)
    record, (_, groups) = cache.commits[0], cache.stored_shard(0, spec.targets)
    files = fsspec.filesystem("memory")
    files.pipe("/few/targets.zarr.zip", (tmp_path / record.targets).read_bytes())
    remote = zarr.open_group("zip::memory://few/targets.zarr.zip", mode="r")
    assert remote.attrs["temperatures"] == [1.0]
    for group, arrays in groups.items():
        for name, values in arrays.items():
            np.testing.assert_array_equal(remote[f"{group}/{name}"][:], values)
    with zipfile.ZipFile(tmp_path / record.targets) as archive:
        listed = {entry.filename: entry for entry in archive.infolist()}
    assert {(e.compress_type, e.file_size - e.compress_size) for e in listed.values()} == {(0, 0)}
    chunk = listed["response/logsumexp/c/0"]
    start = chunk.header_offset + 30 + len(chunk.filename)
    stored = files.cat_file("/few/targets.zarr.zip", start, start + chunk.file_size)
    assert zlib.crc32(stored) == chunk.CRC
    values = np.frombuffer(Blosc().decode(stored[:-4]), "<f4")
    np.testing.assert_array_equal(values, groups["response"]["logsumexp"])


def test_equal_arrays_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_cache(tmp_path / name, TargetSpec(targets=TARGETS, top_k=5), share=True)
    a, b = (open_cache(tmp_path / name).commits.values() for name in ("a", "b"))
    assert [file.sha256 for r in a for file in r.files] == [file.sha256 for r in b for file in r.files]
    assert len({record.attempt for record in (*a, *b)}) == 10


def numbers_of(sample: Sample) -> dict[str, Any]:
    """What a golden cache is held to: sums over everything, and a few values themselves."""
    numbers: dict[str, Any] = {
        "row": sample.row,
        "sample_id": sample.sample_id,
        "input_ids": sample.input_ids.tolist(),
        "supervised": int((sample.labels >= 0).sum()),
        "images": [[image.path, image.sha256[-4:], image.positions.tolist()] for image in sample.images],
        "model_inputs": {name: values.tolist() for name, values in sample.model_inputs.items()},
        "relations": [
            [r.norm, r.residual, float(np.abs(r.factor if r.gram is None else r.gram).sum())]
            for r in sample.relations
        ],
    }
    for kind, values in sample.hidden.items():
        numbers[f"hidden_{kind}"] = [values[0].tolist(), float(np.abs(values).sum(dtype=np.float64))]
    for image in sample.images:
        if image.content is not None:
            numbers.setdefault("files", []).append(image.content.decode())
    for kind in ("response", "visual", "prompt"):
        record = getattr(sample, kind)
        if record is not None:
            numbers[kind] = {
                "first": record.logprobs[0][record.there[0]].tolist(),
                **{
                    name: float(
                        (values[record.there] if name == "logprobs" else values).sum(dtype=np.float64)
                    )
                    for name in TopK.__dataclass_fields__
                    if (values := getattr(record, name)) is not None
                },
            }
    return numbers


def assert_numbers(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_numbers(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_numbers(found[number], value, f"{where}/{number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5), where
    else:
        assert found == expected, where


@pytest.mark.parametrize(
    ("name", "version"),
    [("compact", 1), ("full", 1), ("compact", 2), ("full", 2), ("entries", 2), ("everything", 2)],
)
def test_golden_caches_hold_what_they_held(name: str, version: int) -> None:
    """`compact` and `full` of version 2 are those of version 1, repacked once: the same numbers."""
    golden = GOLDEN.with_name(f"cache-v{version}") / name
    report = verify(golden)
    assert report.problems == []
    cache = open_cache(golden)
    assert cache.manifest.format_version == version
    numbers_file = golden if name in ("entries", "everything") else GOLDEN / name
    expected = json.loads(numbers_file.with_suffix(".json").read_text())
    assert len(cache) == len(expected["samples"])
    assert cache.manifest.identity == expected["identity"]
    assert cache.manifest.fingerprint.digest == expected["fingerprint"]
    assert [row.row for row in cache.quarantined()] == expected["quarantined"]
    for index, numbers in enumerate(expected["samples"]):
        assert_numbers(numbers_of(cache[index]), numbers, f"{name}/{index}")
    assert_stock_reads(golden)
