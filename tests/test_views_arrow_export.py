"""The Parquet export reads with stock pyarrow and holds what the cache holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest

from cache_schema import Cache, KdcacheError, TargetSpec, open_cache
from cache_schema.operations.arrow_export import to_arrow
from tests.cache_teacher import EVERYTHING, build_cache
from tests.fake_caches import make_cache

SPEC = TargetSpec(
    targets=("response", "visual", "relation", "prompt"), top_k=6, temperatures=(0.5, 1.0), tail_samples=2
)


def read(out: Path) -> pa.Table:
    return pyarrow.dataset.dataset(out / "data", format="parquet").to_table()


@pytest.mark.parametrize("form", ["factor", "exact"])
def test_every_column_is_the_cache_decoded(tmp_path: Path, form: str) -> None:
    cache = make_cache(
        tmp_path / "a",
        tmp_path / "i",
        rows=8,
        spec=replace(SPEC, relation=form),
        patches=(4, 6),
        bad={4: "no_turns"},
    )
    told = to_arrow(str(tmp_path / "a"), tmp_path / "out")
    table = read(tmp_path / "out")
    assert (told["samples"], told["files"], table.num_rows) == (7, 2, 7)
    for line, i in zip(table.to_pylist(), range(len(cache)), strict=True):
        sample = cache[i]
        assert (line["row"], line["sample_id"], line["tokens"]) == (
            sample.row,
            sample.sample_id,
            len(sample.labels),
        )
        for name in ("input_ids", "labels", "response_positions", "visual_positions", "prompt_positions"):
            assert line[name] == getattr(sample, name).tolist(), name
        for kind in ("response", "visual", "prompt"):
            record = getattr(sample, kind)
            for name in ("token_ids", "logprobs", "tail_logprob", "logsumexp", "entropy", "sampled_ids"):
                expected = [] if record is None else getattr(record, name).tolist()
                assert line[f"{kind}_{name}"] == expected, (kind, name)
        assert line["response_label_logprob"] == sample.response.label_logprob.tolist()
        assert [image["path"] for image in line["images"]] == [image.path for image in sample.images]
        assert [image["positions"] for image in line["images"]] == [
            i.positions.tolist() for i in sample.images
        ]
        matrices = [r.factor if form == "factor" else r.gram for r in sample.relations]
        found = line["relation_factor" if form == "factor" else "relation_gram"]
        assert found == [matrix.tolist() for matrix in matrices]
        assert line["relation_residual"] == [relation.residual for relation in sample.relations]
        first = np.exp(sample.response.logprobs[:, 0].astype(np.float64)).mean()
        assert line["confidence"] == pytest.approx(first)


def test_hidden_states_are_columns(tmp_path: Path) -> None:
    build_cache(tmp_path / "a", EVERYTHING, rows=8)
    to_arrow(str(tmp_path / "a"), tmp_path / "out")
    cache, table = open_cache(tmp_path / "a"), read(tmp_path / "out")
    assert table.schema.field("visual_hidden").type == pa.list_(pa.list_(pa.float32()))
    for line, sample in zip(table.to_pylist(), cache, strict=True):
        for kind in ("response", "visual"):
            expected = sample.hidden[kind].tolist() if kind in sample.hidden else []
            assert line[f"{kind}_hidden"] == expected
            assert len(expected) == len(sample.positions[kind])
    assert sum(map(len, table["visual_hidden"].to_pylist())) > 0


def test_all_files_have_one_schema(tmp_path: Path) -> None:
    """Shards with and without images, with and without supervised tokens."""
    make_cache(tmp_path / "a", tmp_path / "i", rows=9, shard_size=1, spec=SPEC)
    to_arrow(str(tmp_path / "a"), tmp_path / "out")
    files = sorted((tmp_path / "out" / "data").iterdir())
    assert len(files) == 9
    schemas = [pyarrow.parquet.read_schema(file) for file in files]
    assert all(schema.equals(schemas[0], check_metadata=True) for schema in schemas)
    assert json.loads(schemas[0].metadata[b"kdcache"])["spec"]["temperatures"] == [0.5, 1.0]


def test_it_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cache(tmp_path / "a", tmp_path / "i", rows=8)
    read_shard = Cache.read_shard

    def failing(self: Cache, shard: int) -> object:
        if shard == 1:
            raise OSError(28, "No space left on device")
        return read_shard(self, shard)

    monkeypatch.setattr(Cache, "read_shard", failing)
    with pytest.raises(KdcacheError, match="No space left"):
        to_arrow(str(tmp_path / "a"), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "i"]
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    assert to_arrow(str(tmp_path / "a"), tmp_path / "out")["samples"] == 8
    with pytest.raises(KdcacheError, match="not empty"):
        to_arrow(str(tmp_path / "a"), tmp_path / "out")
