"""Every codec and document against its definition, over generated inputs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import zarr
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from zarr.core.buffer import default_buffer_prototype

from cache_schema.errors import CacheDamaged
from cache_schema.format.codecs.ids import decode_ids, encode_ids
from cache_schema.format.codecs.logprobs import decode_logprobs, encode_logprobs, encode_tail
from cache_schema.format.codecs.relation import RelationBlock, encode_relation, pack_relations
from cache_schema.format.codecs.topk import decode_topk, encode_topk
from cache_schema.format.documents import Counts
from cache_schema.format.groups import read_groups, write_groups
from cache_schema.format.identity import Fingerprint, compare, digest_of, tokenizer_digest
from cache_schema.format.manifest import CommitRecord, Manifest, Plan, StoredFile
from cache_schema.format.records import Relation, StoredRelation, TopK
from cache_schema.format.sealed import seal, unseal
from cache_schema.format.shard import positions_of, response_count, spans_of
from cache_schema.format.spec import KINDS, TargetSpec
from cache_schema.format.statistics import relation_statistics
from tests.cache_teacher import make_manifest, make_topk

settings.register_profile("quick", max_examples=60, deadline=None)
settings.load_profile("quick")

SHAPES = st.tuples(st.integers(0, 12), st.integers(1, 9))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(hnp.arrays(np.int32, SHAPES, elements=st.integers(0, 200_000)))
def test_ids_round_trip(ids: np.ndarray) -> None:
    vocabulary, index = encode_ids(ids)
    assert index.dtype == np.uint16
    np.testing.assert_array_equal(decode_ids(vocabulary, index), ids)
    counts = np.bincount(ids.ravel(), minlength=1)[vocabulary]
    assert (np.diff(counts) <= 0).all()


def test_more_ids_than_16_bits_round_trip() -> None:
    ids = np.random.default_rng(0).permutation(151_936).astype(np.int32).reshape(-1, 32)
    vocabulary, index = encode_ids(ids)
    assert index.dtype == np.uint32
    np.testing.assert_array_equal(decode_ids(vocabulary, index), ids)
    assert encode_ids(ids.ravel()[: 1 << 16])[1].dtype == np.uint16
    arrays = read_groups(write_groups({"response": {"vocabulary": vocabulary, "ids": index}}, {}))["response"]
    np.testing.assert_array_equal(decode_ids(arrays["vocabulary"], arrays["ids"]), ids)


@st.composite
def curves(draw) -> tuple[np.ndarray, np.ndarray]:
    """Falling log-probabilities (N, K) with the log of the mass outside (N,), summing to 1."""
    shape = draw(SHAPES)
    spread = draw(st.sampled_from([1e-4, 0.1, 1.0, 10.0, 100.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = -np.sort(rng.exponential(spread, size=(shape[0], shape[1] + 1)).cumsum(axis=1), axis=1)
    logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
    outside = rng.integers(0, shape[1] + 1, size=shape[0])[:, None]  # the tail may hold most of the mass
    tail = np.take_along_axis(logits, outside, 1)[:, 0]
    kept = np.sort(logits[np.arange(shape[1] + 1) != outside].reshape(shape), axis=1)[:, ::-1]
    return kept.astype(np.float32), tail.astype(np.float32)


@given(curves())
def test_logprobs_keep_their_bound(curve: tuple[np.ndarray, np.ndarray]) -> None:
    logprobs, tail = curve
    assume((tail < -1e-6).all())  # float16 holds no smaller mass of the K entries
    stored = encode_tail(tail)
    steps, drop = encode_logprobs(logprobs)
    assert (steps.dtype, drop.dtype, steps.shape) == (
        np.uint8,
        np.float16,
        (logprobs.shape[1] - 1, len(logprobs)),
    )
    found = decode_logprobs(steps, drop, stored)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert (np.diff(found, axis=1) <= 0).all()
    mass = np.exp(found.astype(np.float64)).sum(axis=1) + np.exp(stored.astype(np.float64))
    np.testing.assert_allclose(mass, 1.0, atol=2e-6)
    width = logprobs[:, 0] - logprobs[:, -1]
    # half a step at the far end and float16 of the drop, twice (the curve is placed by its sum); the tail
    error = np.abs(found - logprobs).max(axis=1, initial=0.0)
    assert (error <= 2 * width * (1 / 255 + 2**-11) + np.maximum(1e-3, 6e-8 / -np.expm1(tail))).all()
    # the exact fall from the first entry is within half a step where the entry stands
    level = 255 * np.sqrt((logprobs[:, :1] - logprobs) / np.maximum(width, 1e-9)[:, None])
    fall = np.abs((found[:, :1] - found) - (logprobs[:, :1] - logprobs))
    assert (fall <= width[:, None] * ((level + 1) / 255**2 + 2**-10) + 1e-5).all()


def test_the_tail_of_a_whole_vocabulary_is_empty() -> None:
    logprobs = np.log(np.array([[0.5, 0.25, 0.25]], np.float32))
    tail = encode_tail(np.array([-np.inf], np.float32))
    assert np.isneginf(tail).all()
    np.testing.assert_allclose(decode_logprobs(*encode_logprobs(logprobs), tail), logprobs, atol=1e-3)
    assert encode_tail(np.array([0.0, -1e9], np.float32)).tolist() == [-(2.0**-24), -65504.0]


@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 12),
    st.integers(1, 40),
    st.sampled_from([(1.0,), (0.5, 1.0, 4.0)]),
    st.integers(0, 3),
    st.sampled_from(["compact", "full"]),
)
def test_topk_round_trips(seed: int, positions: int, k: int, temperatures, samples: int, precision) -> None:
    spec = TargetSpec(
        top_k=k, temperatures=temperatures, tail_samples=samples if k < 40 else 0, precision=precision
    )
    given_ = make_topk(np.random.default_rng(seed), positions, spec, vocab=40)
    arrays = read_groups(write_groups({"visual": encode_topk(given_, precision)}, {}))["visual"]
    for rows in (slice(0, positions), np.arange(positions)[::2]):
        found = decode_topk(arrays, rows, given_.temperatures)
        np.testing.assert_array_equal(found.token_ids, given_.token_ids[rows])
        np.testing.assert_array_equal(found.logsumexp, given_.logsumexp[rows])
        for name in ("sampled_ids", "sampled_counts"):
            value = getattr(given_, name)
            np.testing.assert_array_equal(getattr(found, name), None if value is None else value[rows])
        for name in ("logprobs", "tail_logprob", "entropy", "label_logprob"):
            value, expected = getattr(found, name), getattr(given_, name)[rows]
            assert value.dtype == np.float32
            if precision == "full":
                np.testing.assert_array_equal(value, expected)
            else:
                np.testing.assert_allclose(value, expected, atol=0.06, rtol=1e-3)


@st.composite
def relations(draw) -> Relation:
    """A factor (P, r) of orthogonal columns that fall in norm, at any scale that float32 holds."""
    tokens = draw(st.integers(1, 30))
    width = draw(st.integers(1, tokens))
    scale = 10.0 ** draw(st.integers(-15, 18))
    exponent = draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    columns = (
        np.linalg.qr(rng.normal(size=(tokens, width)))[0] * scale * (1.0 + np.arange(width)) ** -exponent
    )
    factor = columns.astype(np.float32)
    return Relation(residual=0.0, norm=float(np.linalg.norm(gram(factor))), factor=factor)


def gram(factor: np.ndarray) -> np.ndarray:
    return factor.astype(np.float64) @ factor.T.astype(np.float64)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@given(relations(), st.sampled_from([1e-2, 1e-4, 1e-5, 1e-7]), st.sampled_from(["compact", "full"]))
def test_a_relation_keeps_its_bound_as_stored(relation: Relation, bound: float, precision) -> None:
    spec = TargetSpec(relation_bound=bound, precision=precision)
    arrays = pack_relations([encode_relation(relation, spec)])
    found = RelationBlock(read_groups(write_groups({"relation": arrays}, {}))["relation"])[0]
    assert found.factor is not None
    assert found.factor.dtype == np.float32
    assert found.residual <= bound
    exact = 1 - cosine(gram(relation.factor), gram(found.factor))
    assert found.residual == pytest.approx(exact, abs=1e-3 * bound)  # float32 of what is read
    assert found.norm == relation.norm


@given(relations(), st.sampled_from(["compact", "full"]), st.booleans())
def test_the_exact_triangle(relation: Relation, precision, as_gram: bool) -> None:
    matrix = gram(relation.factor)
    assume(np.abs(matrix).max() < 1e38)
    given_ = (
        Relation(residual=0.0, norm=relation.norm, gram=matrix.astype(np.float32)) if as_gram else relation
    )
    stored = encode_relation(given_, TargetSpec(relation="exact", precision=precision))
    found = RelationBlock(pack_relations([stored]))[0]
    assert found.factor is None
    np.testing.assert_allclose(
        found.gram, matrix, rtol=1e-6 if precision == "full" else 6e-4, atol=1e-7 * np.abs(matrix).max()
    )
    np.testing.assert_array_equal(found.gram, found.gram.T)
    assert found.residual <= 1e-6
    if as_gram and precision == "full":
        np.testing.assert_array_equal(found.gram, given_.gram)


def test_relations_of_a_block_keep_apart() -> None:
    rng = np.random.default_rng(0)
    given_ = []
    for tokens in (3, 1, 20, 7):
        columns = np.linalg.qr(rng.normal(size=(tokens, tokens)))[0] * 10.0 ** -np.arange(tokens)
        factor = columns.astype(np.float32)
        given_.append(Relation(residual=0.0, norm=float(np.linalg.norm(gram(factor))), factor=factor))
    given_.append(Relation(residual=0.0, norm=0.0, factor=np.zeros((4, 2), np.float32)))
    found = list(RelationBlock(pack_relations([encode_relation(r, TargetSpec()) for r in given_])))
    for a, b in zip(found[:-1], given_, strict=False):
        assert 1 - cosine(gram(a.factor), gram(b.factor)) <= 1e-5
    assert (found[-1].factor == 0).all()
    assert found[-1].factor.shape[0] == 4


def test_a_factor_is_its_steps_times_their_scales() -> None:
    """The formula of docs/cache-format.md, for every step there is, bit by bit."""
    steps = np.arange(1 << 16, dtype=np.int64).reshape(256, 256)
    scales = np.random.default_rng(0).random(256, np.float32)
    stored = StoredRelation(
        tokens=256,
        residual=0.0,
        norm=1.0,
        scales=scales,
        columns=steps.astype(np.uint16),
        triangle=np.zeros(0, np.float16),
    )
    found = RelationBlock(pack_relations([stored]))[0].factor
    signed = np.where(steps % 2, -(steps + 1) // 2, steps // 2).astype(np.float32)
    np.testing.assert_array_equal(found, (signed * scales[:, None]).T)
    assert found.flags.c_contiguous
    # A single column is not turned; what is stored must not change.
    one = replace(stored, columns=np.ones((1, 256), np.float32), scales=np.full(1, 2.0, np.float32))
    block = RelationBlock(pack_relations([one]))
    assert [block[0].factor[0, 0], block[0].factor[0, 0]] == [2.0, 2.0]


def test_a_relation_given_as_gram_matrix_is_factored() -> None:
    factor = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0] * 0.5 ** np.arange(12)
    matrix = gram(factor)
    given_ = Relation(residual=0.0, norm=float(np.linalg.norm(matrix)), gram=matrix.astype(np.float32))
    stored = encode_relation(given_, TargetSpec())
    assert 0 < stored.rank < 12
    assert stored.residual <= 1e-5


def test_the_largest_rank_bounds_a_relation_and_the_residual_tells() -> None:
    factor = np.linalg.qr(np.random.default_rng(1).normal(size=(40, 40)))[0].astype(np.float32)
    given_ = Relation(residual=0.0, norm=float(np.linalg.norm(gram(factor))), factor=factor)
    for precision in ("compact", "full"):
        spec = TargetSpec(relation_max_rank=10, precision=precision)
        stored = encode_relation(given_, spec)
        assert stored.rank == 10
        assert stored.residual == pytest.approx(0.5, abs=0.02)


@given(st.dictionaries(st.text().filter(lambda key: key != "digest"), JSON, max_size=4), st.data())
def test_a_sealed_document_gives_away_any_flipped_bit(document: dict, data) -> None:
    sealed = seal(document)
    assert unseal(sealed, "x") == document
    assert list(json.loads(sealed))[-1] == "digest"
    bit = data.draw(st.integers(0, 8 * len(sealed) - 1))
    altered = bytearray(sealed)
    altered[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CacheDamaged):
        unseal(bytes(altered), "x")
    with pytest.raises(CacheDamaged):
        unseal(sealed[: data.draw(st.integers(0, len(sealed) - 1))], "x")


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_a_digest_does_not_depend_on_the_order_of_keys(document: dict) -> None:
    assert digest_of(document) == digest_of(dict(reversed(document.items())))
    assert digest_of(document) != digest_of(document | {"more": 1}) or document.get("more") == 1


def test_fingerprints_are_compared_by_class_and_nested_key() -> None:
    ours = Fingerprint(capture={"spec": {"k": 32}, "a": 1}, training={"t": "x"}, recorded={"v": "1"})
    theirs = Fingerprint(capture={"spec": {"k": 64}, "a": 1}, training={}, recorded={"v": "2"})
    found = compare(ours, theirs)
    assert [(d.key, d.ours, d.theirs, d.blocks) for d in found] == [
        ("spec.k", 32, 64, "resume"), ("t", "x", None, "training"), ("v", "1", "2", "nothing")
    ]  # fmt: skip
    assert ours.digest != theirs.digest
    assert ours.digest == Fingerprint(capture=ours.capture, training=ours.training, recorded={}).digest
    special = {"eos": "</s>", "pad": None}
    assert tokenizer_digest({"a": 0, "b": 1}, special) == tokenizer_digest({"b": 1, "a": 0}, special)
    assert tokenizer_digest({"a": 0, "b": 1}, special) != tokenizer_digest({"a": 1, "b": 0}, special)


@given(st.sets(st.integers(0, 60)))
def test_spans_are_the_runs_of_positions(positions: set[int]) -> None:
    given_ = np.array(sorted(positions), np.int32)
    spans = spans_of(given_)
    np.testing.assert_array_equal(positions_of(spans), given_)
    assert (spans[1:, 0] > spans[:-1, 1]).all()


@given(st.lists(st.integers(0, 20), min_size=0, max_size=6, unique=True).map(sorted))
def test_responses_are_counted_as_labels_are(edges: list[int]) -> None:
    from cache_schema.format.records import labels_of, positions_by_kind

    spans = np.array(edges[: len(edges) // 2 * 2], np.int32).reshape(-1, 2)
    ids = np.arange(21, dtype=np.int32)
    assert response_count(spans) == len(positions_by_kind(labels_of(ids, spans), ())["response"])


def test_documents_round_trip() -> None:
    manifest = make_manifest(TargetSpec(temperatures=(1.0, 2.0)))
    again = Manifest.from_bytes(manifest.to_bytes())
    assert again.to_bytes() == manifest.to_bytes()
    assert again.assets == manifest.assets
    assert again.identity == manifest.identity
    np.testing.assert_array_equal(again.plan.order, manifest.plan.order)
    record = CommitRecord(
        cache=manifest.identity,
        shard=3,
        attempt="0123456789ab",
        counts=dict.fromkeys(Counts.__annotations__, 4),
        statistics={
            "longest": [[3, 17]],
            "slowest": [[3, 0.25]],
            "supervised_tokens": 9,
            "quarantined": {"broken image": 1},
            **{kind: {"positions": 0} for kind in KINDS},
            "relation": relation_statistics([2, 3], [1e-6, 0.0]),
            "bytes": {"samples": 3},
        },
        files=(StoredFile(path="samples/x.arrow", bytes=3, sha256="0" * 64),),
        engine={"engine": "stand-in"},
        seconds=1.25,
        created="2026-01-01T00:00:00+00:00",
    )
    assert CommitRecord.from_bytes(record.to_bytes(), "x") == record


def test_a_plan_is_a_permutation_in_shards() -> None:
    plan = Plan(rows=5, shard_size=2, order=np.array([4, 0, 3, 1, 2]))
    assert [plan.rows_of(i).tolist() for i in range(plan.shards)] == [[4, 0], [3, 1], [2]]
    with pytest.raises(ValueError, match="no shard 3"):
        plan.rows_of(3)
    with pytest.raises(ValueError, match="distinct row numbers"):
        Plan(rows=3, shard_size=2, order=np.array([0, 0, 1]))


def test_the_joined_record_is_the_records_in_order() -> None:
    from cache_schema.format.codecs.topk import join_topk

    spec = TargetSpec(top_k=3)
    parts = [make_topk(np.random.default_rng(i), i, spec) for i in range(3)]
    joined = join_topk(parts)
    assert isinstance(joined, TopK)
    assert len(joined) == 3
    np.testing.assert_array_equal(joined.token_ids[1:], parts[2].token_ids)
    assert joined.sampled_ids is None


@pytest.mark.parametrize("precision", ["compact", "full"])
def test_arrays_read_here_are_those_that_zarr_reads(precision, monkeypatch) -> None:
    """Of whole chunks, of several with a last one that is filled up, and encoded by another program."""
    spec = TargetSpec(top_k=6, temperatures=(1.0, 2.0), tail_samples=3, precision=precision)
    arrays = encode_topk(make_topk(np.random.default_rng(0), 50, spec, vocab=40), precision)
    arrays["empty"] = np.zeros((0, 3), np.float16)
    for size in (1 << 20, 130):
        monkeypatch.setattr("cache_schema.format.groups.CHUNK_BYTES", size)
        files = write_groups({"visual": arrays}, {})
        root = zarr.open_group(_store(files), mode="r")
        found = read_groups(files)["visual"]
        assert found.keys() == arrays.keys()
        for name, values in found.items():
            np.testing.assert_array_equal(values, arrays[name])
            np.testing.assert_array_equal(values, root[f"visual/{name}"][...])
            assert values.dtype == arrays[name].dtype
    assert any(path.startswith("visual/logsumexp/c/1") for path in files)
    monkeypatch.setattr("cache_schema.format.groups.CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr("cache_schema.format.groups.COLUMN_CHUNK_BYTES", 130)
    columns = np.arange(200, dtype=np.uint16)
    wide = write_groups({"relation": {"columns": columns, "norm": np.ones(200)}}, {})
    np.testing.assert_array_equal(read_groups(wide)["relation"]["columns"], columns)
    np.testing.assert_array_equal(zarr.open_group(_store(wide))["relation/columns"][...], columns)
    chunks = [path.rpartition("/c/")[0] for path in wide if "/c/" in path]
    assert (chunks.count("relation/columns"), chunks.count("relation/norm")) == (4, 1)
    other: dict = {}
    zarr.open_group(zarr.storage.MemoryStore(other), mode="w").create_array(
        "visual/entropy", data=np.arange(12.0).reshape(3, 4), chunks=(2, 3)
    )
    foreign = {path: buffer.to_bytes() for path, buffer in other.items()}
    np.testing.assert_array_equal(read_groups(foreign)["visual"]["entropy"], np.arange(12.0).reshape(3, 4))
    for stored, path in ((files, "visual/logsumexp/c/1"), (foreign, "visual/entropy/c/1/1")):
        lacking = {name: data for name, data in stored.items() if name != path}
        with pytest.raises(CacheDamaged, match=r"of \d+ chunks are present"):
            read_groups(lacking)
    bent = bytearray(files["visual/logsumexp/c/1"])
    bent[20] ^= 1
    with pytest.raises(ValueError, match=r"visual/logsumexp: chunk 1 does not decode"):
        read_groups({**files, "visual/logsumexp/c/1": bytes(bent)})


def _store(files: dict[str, bytes]) -> zarr.storage.MemoryStore:
    prototype = default_buffer_prototype()
    return zarr.storage.MemoryStore({path: prototype.buffer.from_bytes(data) for path, data in files.items()})
