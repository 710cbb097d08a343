"""Records with a number of entries of their own at each position: rules, codec, files, joined shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema.errors import CacheDamaged, WrongUsage
from cache_schema.format.checks import topk_problems
from cache_schema.format.codecs.ragged import Rows, by_rank
from cache_schema.format.codecs.topk import (
    decode_topk,
    decode_whole,
    encode_records,
    encode_topk,
    join_stored,
    join_topk,
    prepare_topk,
    topk_at,
)
from cache_schema.format.groups import read_groups, write_groups
from cache_schema.format.records import TopK
from cache_schema.format.spec import (
    EntryRule,
    TargetSpec,
    read_entries,
    read_top_k,
    write_entries,
    write_top_k,
)
from cache_schema.operations.divergence import kl
from pipeline.entry_rules import cut
from tests.cache_teacher import make_topk

settings.register_profile("quick", max_examples=60, deadline=None)
settings.load_profile("quick")

FIELDS = ("token_ids", "logprobs", "tail_logprob", "logsumexp", "entropy", "label_logprob", "counts")
COUNTS = st.lists(st.integers(1, 9), max_size=12).map(lambda counts: np.array(counts, np.int64))


@st.composite
def records(draw: st.DrawFn) -> tuple[TopK, TargetSpec]:
    """A softmax of random logits by a threshold: flat ones, ties, sure ones, and no tail at all."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vocab, positions = draw(st.sampled_from([2, 7, 40])), draw(st.integers(0, 10))
    spec = TargetSpec(
        targets=("response",),
        entries={"response": draw(st.sampled_from([1e-4, 0.01, 0.2, 0.9]))},
        max_entries=draw(st.sampled_from([1, 3, 40])),
        temperatures=draw(st.sampled_from([(1.0,), (0.5, 1.0, 4.0)])),
        precision=draw(st.sampled_from(["compact", "full"])),
    )
    logits = rng.normal(size=(positions, vocab)) * rng.choice([0.0, 1.0, 8.0, 60.0], size=(positions, 1))
    logits = np.round(logits * 4) / 4  # with ties
    whole = np.sort(logits, axis=1)[:, ::-1]
    logsumexp = np.logaddexp.reduce(whole, axis=1)
    logprobs = (whole - logsumexp[:, None]).astype(np.float32)
    wide = TopK(
        token_ids=np.argsort(-logits, axis=1, kind="stable").astype(np.int32),
        logprobs=logprobs,
        tail_logprob=np.full((positions, len(spec.temperatures)), -np.inf, np.float32),
        temperatures=np.array(spec.temperatures, np.float32),
        logsumexp=logsumexp.astype(np.float32),
        entropy=-(np.exp(logprobs) * logprobs).sum(axis=1),
        label_logprob=logprobs[np.arange(positions), rng.integers(0, vocab, positions)],
    )
    return cut(wide, spec.rule("response")), spec


@given(records())
def test_a_rule_keeps_what_it_says(given_: tuple[TopK, TargetSpec]) -> None:
    record, spec = given_
    rule = spec.rule("response")
    assert record.counts is not None
    assert rule.least_p is not None
    assert topk_problems(record, "response", spec, 40) == []
    assert (record.counts >= 1).all()
    assert (record.counts <= rule.most).all()
    kept = record.logprobs[:, 1:][record.there[:, 1:]]
    assert (kept >= np.float32(np.log(rule.least_p))).all()
    mass = np.exp(record.logprobs.astype(np.float64)).sum(axis=1)
    at_one = spec.temperatures.index(1.0)
    np.testing.assert_allclose(mass + np.exp(record.tail_logprob[:, at_one]), 1.0, atol=1e-5)


@given(records(), st.integers(0, 2**32 - 1))
def test_counted_records_round_trip(given_: tuple[TopK, TargetSpec], seed: int) -> None:
    record, spec = given_
    arrays = read_groups(write_groups({"response": encode_topk(record, spec.precision)}, {}))["response"]
    prepared = prepare_topk(arrays)
    picked = np.random.default_rng(seed).permutation(len(record))[: len(record) // 2 + 1]
    for places in (slice(0, len(record)), slice(1, 3), picked):
        expected = topk_at(record, places)
        for stored in (arrays, prepared):
            found = decode_topk(stored, places, record.temperatures)
            assert found.counts is not None
            assert expected.counts is not None
            np.testing.assert_array_equal(found.counts, expected.counts)
            width = found.token_ids.shape[1]
            assert width == max(expected.counts.max(initial=1), 1)
            np.testing.assert_array_equal(found.token_ids, expected.token_ids[:, :width])
            np.testing.assert_array_equal(np.isneginf(found.logprobs), ~found.there)
            if spec.precision == "full":
                for name in FIELDS:
                    if name not in ("token_ids", "logprobs"):
                        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
                np.testing.assert_array_equal(found.logprobs, expected.logprobs[:, :width])
                continue
            assert topk_problems(found, "response", spec, 40) == []
            np.testing.assert_allclose(found.logsumexp, expected.logsumexp, rtol=1e-6, atol=2.0**-11)
            np.testing.assert_allclose(found.entropy, expected.entropy, atol=2.0**-8 + 2e-3)
            np.testing.assert_allclose(found.tail_logprob, expected.tail_logprob, rtol=2.0**-8, atol=1e-3)
            label = np.maximum(np.abs(expected.label_logprob), 1.0)
            assert (np.abs(found.label_logprob - expected.label_logprob) <= 0.03 * label).all()
            # KL over entries and tail of what is read, clipped where a position is all tail or has none
            assert (kl(expected, found) <= 2e-3).all()


@given(records(), st.integers(0, 2**32 - 1))
def test_joined_blocks_hold_the_same_values(given_: tuple[TopK, TargetSpec], seed: int) -> None:
    record, spec = given_
    rng = np.random.default_rng(seed)
    blocks = [
        encode_topk(record, spec.precision),
        encode_topk(topk_at(record, slice(2, None)), spec.precision),
    ]
    places = [np.flatnonzero(rng.random(count) < 0.6) for count in (len(record), max(len(record) - 2, 0))]
    joined = join_stored(list(zip(blocks, places, strict=True)))
    found = decode_topk(joined, slice(None), record.temperatures)
    parts = [decode_topk(b, p, record.temperatures) for b, p in zip(blocks, places, strict=True)]
    expected = join_topk(parts)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_records_are_encoded_one_after_the_other_without_the_widest_of_all() -> None:
    spec = TargetSpec(targets=("response",), entries={"response": 1e-3})
    rng = np.random.default_rng(0)
    wide = make_topk(rng, 30, TargetSpec(top_k=60), vocab=60)
    parts = [cut(topk_at(wide, slice(i, i + 10)), spec.rule("response")) for i in (0, 10, 20)]
    one, many = encode_topk(join_topk(parts), "compact"), encode_records(parts, "compact")
    assert one.keys() == many.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, many[name])
    whole = decode_whole(many, wide.temperatures)
    np.testing.assert_array_equal(whole[0].token_ids, join_topk(parts).token_ids)


def test_draws_go_with_counted_records() -> None:
    spec = TargetSpec(top_k=6, tail_samples=3)
    wide = make_topk(np.random.default_rng(0), 9, spec, vocab=50)
    record = replace(
        cut(wide, EntryRule(most=6, least_p=0.1)),
        sampled_ids=wide.sampled_ids,
        sampled_counts=wide.sampled_counts,
    )
    for precision in ("compact", "full"):
        found = decode_topk(encode_topk(record, precision), slice(2, 8), record.temperatures)
        np.testing.assert_array_equal(found.sampled_ids, wide.sampled_ids[2:8])
        np.testing.assert_array_equal(found.sampled_counts, wide.sampled_counts[2:8])


def test_counts_that_do_not_fit_are_refused() -> None:
    record = cut(make_topk(np.random.default_rng(0), 5, TargetSpec()), EntryRule(most=8, least_p=0.01))
    arrays = encode_topk(record, "compact")
    for broken in (arrays["counts"][:-1], arrays["counts"] * 0, arrays["counts"] + 1):
        with pytest.raises(CacheDamaged, match="counts of"):
            prepare_topk(arrays | {"counts": broken})


@given(COUNTS)
def test_rows_of_varying_length(counts: np.ndarray) -> None:
    lists = [[10 * n + rank for rank in range(count)] for n, count in enumerate(counts)]
    flat = np.array([entry for row in lists for entry in row], np.int64)
    rows = Rows.of(counts)
    picked = np.arange(len(counts))[::-2]
    assert flat[rows.at(picked).entries].tolist() == [entry for n in picked for entry in lists[n]]
    assert rows.ranks.tolist() == [rank for row in lists for rank in range(len(row))]
    by = [row[rank] for rank in range(9) for row in lists if rank < len(row)]
    assert flat[by_rank(counts)].tolist() == by


def test_stock_zarr_reads_counted_records(tmp_path: Path) -> None:
    """As docs/cache-format.md has it, without any of our code."""
    record = cut(
        make_topk(np.random.default_rng(1), 40, TargetSpec(top_k=90)), EntryRule(most=90, least_p=0.004)
    )
    for path, data in write_groups({"response": encode_topk(record, "compact")}, {}).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    group: Any = zarr.open_group(tmp_path, mode="r")["response"]
    counts, ids, steps = (group[name][:] for name in ("counts", "ids", "steps"))
    vocabulary, drop, tail = (group[name][:] for name in ("vocabulary", "drop", "tail_logprob"))
    rank, rest = list(group["label_rank"][:]), iter(group["label_rest"][:])
    table = np.zeros((max(counts) - 1, len(counts)), int)
    place = iter(steps)
    for k, n in np.ndindex(table.shape):
        if k + 1 < counts[n]:
            table[k, n] = next(place)
    start = 0
    for n, count in enumerate(counts.tolist()):
        mine = vocabulary[ids[start : start + count]]
        start += count
        level = np.concatenate([[0], np.cumsum(table[: count - 1, n])])
        fall = float(drop[n]) * (level / 127) ** 2
        logprobs = np.log(1 - np.exp(float(tail[0, n]))) - np.log(np.exp(-fall).sum()) - fall
        np.testing.assert_array_equal(mine, record.token_ids[n, :count])
        np.testing.assert_allclose(logprobs, record.logprobs[n, :count], atol=0.02 + float(drop[n]) / 64)
        label = logprobs[rank[n] - 1] if rank[n] else next(rest)
        assert label == pytest.approx(record.label_logprob[n], abs=0.02 + float(drop[n]) / 64)


def test_rules_are_read_and_written_as_text() -> None:
    assert read_top_k("32") == 32
    assert read_top_k("response=16,visual=64") == {"response": 16, "visual": 64}
    assert read_entries("p>=0.003") == dict.fromkeys(("response", "visual", "prompt"), 0.003)
    assert read_entries(" response : p >= 0.003, visual:p>=1e-2") == {"response": 0.003, "visual": 0.01}
    assert read_entries("") == {}
    for text in ("p>0.1", "response=0.1", "response:p>=x", "response:p>=0.1,response:p>=0.2"):
        with pytest.raises(ValueError, match=r".*"):
            read_entries(text)
    for text in ("response", "response=x", "response=1,response=2"):
        with pytest.raises(ValueError, match=r".*"):
            read_top_k(text)
    for value in (32, {"response": 16, "visual": 64}):
        assert read_top_k(write_top_k(value)) == value
    for rules in ({}, {"visual": 0.01}):
        assert read_entries(write_entries(rules)) == rules


def test_a_spec_of_rules() -> None:
    spec = TargetSpec(
        targets=("response", "visual", "prompt"), top_k={"visual": 64}, entries={"response": 0.003}
    )
    assert spec.rule("response") == EntryRule(most=256, least_p=0.003)
    assert spec.rule("visual") == EntryRule(most=64)
    assert spec.rule("prompt") == EntryRule(most=32)
    assert spec.entry_words == "response p >= 0.003, at most 256, visual top 64, prompt top 32"
    assert TargetSpec.from_json(spec.to_json()) == spec
    assert spec.to_json()["entries"] == {"response": 0.003}
    assert "max_entries" not in spec.to_json()
    # no more entries than the threshold allows, and one form of equal rules
    assert TargetSpec(entries=read_entries("p>=0.1")).rule("visual").most == 10
    assert TargetSpec(entries=read_entries("p>=0.1")).entries == {"response": 0.1, "visual": 0.1}
    assert TargetSpec(top_k={"response": 8, "visual": 8}) == TargetSpec(top_k=8)
    assert "entries" not in TargetSpec().to_json()
    for wrong, told in (
        ({"entries": {"prompt": 0.1}}, "entries names prompt, not among the targets"),
        ({"top_k": {"prompt": 8}}, "top_k names prompt, not among the targets"),
        ({"entries": {"response": 0.1}, "top_k": {"response": 8}}, "top_k and entries both name response"),
        ({"entries": {"response": 1.0}}, r"entries of response must lie in \(0, 1\)"),
        ({"entries": {"relation": 0.1}}, "entries must be one of response, visual, prompt"),
        ({"top_k": {"response": 0}}, "top_k of response must be at least 1"),
        ({"top_k": {"response": 1.5}}, "top_k of response must be a whole number"),
        ({"max_entries": 0}, "max_entries must lie in"),
    ):
        with pytest.raises(WrongUsage, match=told):
            TargetSpec(**wrong)
