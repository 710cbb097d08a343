"""The layouts for axolotl and DistillKit hold the cache's targets by those trainers' documented rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pytest

from cache_schema import Sample, TargetSpec, open_cache
from cache_schema.errors import WrongUsage
from cache_schema.operations.settings import ArrowConfig
from cache_schema.operations.trainer_layouts import MASKED, _packed, export, index_bits
from tests.cache_teacher import build_cache
from tests.fake_caches import make_cache

FIXED = TargetSpec(targets=("response", "visual", "relation", "prompt"), top_k=6)
COUNTED = TargetSpec(targets=("response", "visual"), entries={"response": 0.05}, max_entries=12)


def made(folder: Path, layout: str, spec: TargetSpec) -> tuple[dict[str, Any], list[tuple[Any, Sample]]]:
    if spec.entries:
        build_cache(folder / "a", spec, rows=8)
    else:
        make_cache(folder / "a", folder / "i", rows=8, spec=spec)
    told = export(str(folder / "a"), ArrowConfig(out=folder / "out", layout=layout))
    lines = pyarrow.dataset.dataset(folder / "out" / "data", format="parquet").to_table().to_pylist()
    return told, list(zip(lines, open_cache(folder / "a"), strict=True))


@pytest.mark.parametrize("spec", [FIXED, COUNTED])
def test_axolotl_rows_are_of_the_next_token_and_masked_elsewhere(tmp_path: Path, spec: TargetSpec) -> None:
    told, pairs = made(tmp_path, "axolotl", spec)
    entries = spec.rule("response").most
    assert told["samples"] == len(pairs) > 0
    for line, sample in pairs:
        tokens = len(sample.labels)
        assert list(line) == [
            "input_ids",
            "attention_mask",
            "labels",
            "target_token_ids",
            "target_logprobs",
            "target_mask",
        ]
        assert line["input_ids"] == sample.input_ids.tolist()
        assert line["labels"] == sample.labels.tolist()
        assert line["attention_mask"] == [1] * tokens
        ids, logprobs, mask = (np.array(line[f"target_{name}"]) for name in ("token_ids", "logprobs", "mask"))
        assert ids.shape == logprobs.shape == mask.shape == (tokens, entries)
        supervised = np.append(sample.labels[1:] != -100, False)
        assert (mask.any(axis=1) == supervised).all()
        assert (logprobs[mask == 0] == MASKED).all()
        for row, position in enumerate(sample.response_positions):
            kept = sample.response.there[row]
            there = mask[position] == 1
            assert ids[position][there].tolist() == sample.response.token_ids[row][kept].tolist()
            p = np.exp(sample.response.logprobs[row][kept].astype(np.float64))
            assert np.exp(logprobs[position][there]) == pytest.approx(p / p.sum(), abs=1e-6)


@pytest.mark.parametrize("spec", [FIXED, COUNTED])
def test_distillkit_reads_back_the_same_bits(tmp_path: Path, spec: TargetSpec) -> None:
    """By DistillKit's rules: little-endian float32 values, ids of ceil(log2 d) bits, the highest first."""
    told, pairs = made(tmp_path, "distillkit", spec)
    config = told["logprob_compressor"]
    bits, entries = index_bits(config["d"]), config["k"]
    assert config["exact_k"] == entries == spec.rule("response").most
    for line, sample in pairs:
        assert list(line) == ["input_ids", "labels", "compressed_logprobs", "bytepacked_indices"]
        logprobs = np.frombuffer(b"".join(map(bytes, line["compressed_logprobs"])), "<f4")
        logprobs = logprobs.reshape(len(sample.labels), entries)
        streams = ["".join(f"{byte:08b}" for byte in row) for row in line["bytepacked_indices"]]
        ids = [[int(stream[i * bits : (i + 1) * bits], 2) for i in range(entries)] for stream in streams]
        assert all(len(set(row)) == entries for row in ids)
        expected = {
            int(t): (record, row)
            for kind in ("prompt", "response")
            if (record := sample.records[kind]) is not None
            for row, t in enumerate(sample.positions[kind])
        }
        for t in range(len(sample.labels)):
            if t in expected:
                record, row = expected[t]
                kept = record.there[row]
                own, values = record.token_ids[row][kept].tolist(), record.logprobs[row][kept].tolist()
            else:
                own, values = [sample.input_ids[min(t + 1, len(sample.labels) - 1)]], [0.0]
            assert ids[t][: len(own)] == own
            assert logprobs[t].tolist() == values + [-1e4] * (entries - len(own))


def test_the_bits_are_those_of_distillkit() -> None:
    """Made with `pack_to_bytes` of DistillKit at 0a61c2e: 5, 300, 17 in 9 bits each."""
    assert _packed(np.array([[5, 300, 17]], np.int32), 9).tolist() == [[2, 203, 2, 32]]
    assert [index_bits(d) for d in (256, 257, 49_152, 151_936)] == [8, 9, 16, 18]


def test_what_a_layout_cannot_carry_is_told(tmp_path: Path) -> None:
    told, _ = made(tmp_path, "axolotl", FIXED)
    left = "images, visual targets, relation targets, prompt targets, the mass outside the entries"
    assert told["left_out"] == left
    build_cache(tmp_path / "b", TargetSpec(targets=("visual",), top_k=4), rows=4)
    with pytest.raises(WrongUsage, match="no response targets, which the layout distillkit"):
        export(str(tmp_path / "b"), ArrowConfig(out=tmp_path / "no", layout="distillkit"))
    assert not (tmp_path / "no").exists()
