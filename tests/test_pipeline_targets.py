"""Targets against their definitions on full float64 logits."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cache_schema.errors import KdcacheError
from cache_schema.format.checks import topk_problems
from cache_schema.format.codecs.relation import RelationBlock, pack_relations
from cache_schema.format.codecs.topk import topk_at
from cache_schema.format.records import IGNORE_INDEX, StoredRelation, TopK
from cache_schema.format.spec import Kind, TargetSpec
from models.head import Head, _padded_product
from pipeline import relation_batch
from pipeline.draws import counted, tail_places, uniforms
from pipeline.entry_rules import fitted, limits_of
from pipeline.relation import groups_of, truncate, truncated
from pipeline.relation_batch import norm_of, quantised, start_of
from pipeline.relation_by_need import gram_of, quantised_by_need, times_lower
from pipeline.targets import Asked, TargetMaker

TEMPERATURES = (0.5, 1.0, 3.0)


def a_head(*, vocab: int, width: int, seed: int = 0, padding: int = 0, **rest: object) -> Head:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab + padding, width, generator=generator)
    weight[vocab:] = 50.0  # a padding row that is looked at would win everywhere
    return Head(weight=weight, vocab_size=vocab, **rest)


def some_hidden(n: int, width: int, *, size: float = 1.0, seed: int = 1) -> Tensor:
    return size * torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def dense_logits(head: Head, hidden: Tensor) -> Tensor:
    logits = hidden.double() @ head.weight[: head.vocab_size].double().T
    if head.bias is not None:
        logits += head.bias[: head.vocab_size].double()
    logits *= head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


HEADS = {
    "plain": {"vocab": 352, "width": 16},
    "padded": {"vocab": 350, "width": 16, "padding": 34},
    "blocks": {"vocab": 5003, "width": 16, "padding": 5},
    "scaled": {"vocab": 352, "width": 16, "logit_scale": 0.25},
    "capped": {"vocab": 352, "width": 16, "softcap": 3.0},
    "biased": {"vocab": 340, "width": 16, "padding": 12, "bias": torch.linspace(-3, 5, 352)},
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("size", [0.1, 1.0, 20.0])  # 20: tails far below what float32 sums can hold
def test_records_follow_their_definitions(name: str, size: float) -> None:
    head = a_head(**HEADS[name])
    spec = TargetSpec(top_k=8, temperatures=TEMPERATURES, targets=("response",))
    hidden = some_hidden(23, 16, size=size)
    labels = np.arange(23) * 7
    labels[3] = IGNORE_INDEX
    record = TargetMaker(head, spec, chunk_bytes=4 * head.vocab_size * 5).topk(hidden, labels)

    logits = dense_logits(head, hidden)
    scale = float(logits.abs().max())
    logprobs = logits.log_softmax(dim=1)
    values = logprobs.topk(8, dim=1).values
    assert record.token_ids.dtype == np.int32
    assert record.logprobs.dtype == record.tail_logprob.dtype == record.entropy.dtype == np.float32
    close = {"rtol": 1e-5, "atol": 1e-5 + 2e-6 * scale}
    np.testing.assert_allclose(record.logprobs, values, **close)
    ours = logprobs.gather(1, torch.from_numpy(record.token_ids).long())
    np.testing.assert_allclose(ours, values, **close)  # the k likeliest, ties in any order
    np.testing.assert_allclose(record.logsumexp, logits.logsumexp(dim=1), **close)
    np.testing.assert_allclose(record.entropy, -(logprobs.exp() * logprobs).sum(dim=1), **close)
    chosen = logprobs[torch.arange(23), torch.from_numpy(labels).clamp(min=0)].numpy()
    chosen[3] = 0.0
    np.testing.assert_allclose(record.label_logprob, chosen, **close)
    for column, temperature in enumerate(TEMPERATURES):
        kept = torch.from_numpy(record.token_ids).long()
        rest = logits.scatter(1, kept, -torch.inf) / temperature
        tail = rest.logsumexp(dim=1) - (logits / temperature).logsumexp(dim=1)
        wanted = {"rtol": 1e-5, "atol": 1e-5 + 4e-6 * scale / temperature}
        np.testing.assert_allclose(record.tail_logprob[:, column], tail, **wanted)


def test_the_likeliest_may_stand_anywhere() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocab in (64, 300, 1000, 1024, 1087):
        for place in (0, 63, vocab // 2, vocab - 1):
            weight = torch.rand(vocab, 1, generator=generator)
            weight[place] = 9.0
            maker = TargetMaker(
                Head(weight=weight, vocab_size=vocab), TargetSpec(top_k=3, targets=("response",))
            )
            record = maker.topk(torch.ones(2, 1))
            np.testing.assert_array_equal(record.token_ids, weight[:, 0].topk(3).indices.expand(2, 3))
            assert record.token_ids[0, 0] == place


def test_the_deepest_tails_are_finite() -> None:
    head = Head(weight=torch.eye(40), vocab_size=40)
    hidden = torch.zeros(1, 40)
    hidden[0, 0] = 500.0
    record = TargetMaker(head, TargetSpec(top_k=1, targets=("response",))).topk(hidden)
    np.testing.assert_allclose(record.tail_logprob, [[np.log(39) - 500.0]], rtol=1e-6)


def test_nothing_lies_outside_the_whole_vocabulary() -> None:
    head = a_head(vocab=12, width=4)
    record = TargetMaker(head, TargetSpec(top_k=12, targets=("response",))).topk(some_hidden(3, 4))
    assert np.isneginf(record.tail_logprob).all()
    np.testing.assert_allclose(np.exp(record.logprobs).sum(axis=1), 1.0, rtol=1e-5)
    with pytest.raises(KdcacheError, match="top_k 13"):
        TargetMaker(head, TargetSpec(top_k=13, targets=("response",)))


def test_buffers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that only a CPU's targets are made in: in several chunks, and a second time."""
    head = a_head(**HEADS["capped"])
    maker = TargetMaker(
        head, TargetSpec(top_k=4, temperatures=TEMPERATURES, targets=("response",)), chunk_bytes=352 * 4 * 7
    )
    hidden = some_hidden(50, 16)
    kept = [maker.topk(hidden[:9]), maker.topk(hidden)][1]
    monkeypatch.setattr(TargetMaker, "_scratch", lambda self, rows: None)
    fresh = maker.topk(hidden)
    for name in ("token_ids", "logprobs", "tail_logprob", "logsumexp", "entropy"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(fresh, name))


def test_chunks_change_nothing() -> None:
    head = a_head(vocab=1000, width=16)
    spec = TargetSpec(top_k=4, targets=("response",), tail_samples=6)
    rows, positions = np.full(50, 9), np.arange(50)
    hidden = some_hidden(50, 16)
    whole = TargetMaker(head, spec).topk(hidden, rows=rows, positions=positions)
    pieces = TargetMaker(head, spec, chunk_bytes=1).topk(hidden, rows=rows, positions=positions)
    np.testing.assert_array_equal(whole.token_ids, pieces.token_ids)
    np.testing.assert_allclose(whole.logprobs, pieces.logprobs, atol=1e-5)
    np.testing.assert_array_equal(whole.sampled_ids, pieces.sampled_ids)


@pytest.mark.parametrize(("rows", "columns"), [(130, 130), (200, 130), (128, 128), (140, 65)])
def test_products_in_padded_rows_are_those_of_the_tokens(rows: int, columns: int) -> None:
    """What a head on CUDA does, here with a float32 matrix on a CPU."""
    weight, hidden = some_hidden(rows, 16), some_hidden(7, 16)
    logits = _padded_product(hidden, weight, columns)
    assert logits.shape == (7, columns)
    assert logits.stride(0) % 64 == 0
    torch.testing.assert_close(logits, hidden @ weight[:columns].T)


def test_no_position_is_an_empty_record() -> None:
    record = TargetMaker(a_head(vocab=90, width=4), TargetSpec(targets=("response",))).topk(
        torch.empty(0, 4), np.empty(0, dtype=np.int64)
    )
    assert record.token_ids.shape == (0, 32)
    assert record.tail_logprob.shape == (0, 1)
    assert record.label_logprob.shape == (0,)


def test_low_precision_states_give_float32_targets() -> None:
    head = a_head(vocab=300, width=64)
    half = Head(weight=head.weight.bfloat16(), vocab_size=300)
    hidden = some_hidden(9, 64).bfloat16()
    spec = TargetSpec(top_k=5, targets=("response", "relation"))
    exact = dense_logits(half, hidden)
    record = TargetMaker(half, spec).topk(hidden)
    np.testing.assert_allclose(record.logsumexp, exact.logsumexp(dim=1), rtol=1e-5)
    relation = TargetMaker(half, spec).relation(hidden)
    np.testing.assert_allclose(relation.norm, float((exact @ exact.T).norm()), rtol=1e-5)


# ---- tail draws ----


def test_draws_depend_on_seed_row_and_position_alone() -> None:
    rows, positions = np.array([3, 3, 4]), np.array([0, 1, 0])
    numbers = uniforms(5, seed=1, rows=rows, positions=positions)
    again = uniforms(5, seed=1, rows=rows[::-1], positions=positions[::-1])
    np.testing.assert_array_equal(numbers, again[::-1])
    assert len(np.unique(numbers)) == 15
    assert not np.isin(uniforms(5, seed=2, rows=rows, positions=positions), numbers).any()
    many = uniforms(20_000, seed=0, rows=np.array([0]), positions=np.array([0]))
    assert many.min() >= 0.0
    assert many.max() < 1.0
    assert abs(many.mean() - 0.5) < 0.01
    assert np.abs(np.histogram(many, 20, (0, 1))[0] / 1000 - 1).max() < 0.15


def test_draws_follow_the_tail_at_their_temperature() -> None:
    head = a_head(vocab=30, width=8)
    spec = TargetSpec(
        top_k=4, tail_samples=40_000, temperatures=(1.0, 2.0), sample_temperature=2.0, targets=("response",)
    )
    hidden = some_hidden(2, 8)
    record = TargetMaker(head, spec).topk(hidden, rows=np.array([0, 0]), positions=np.array([0, 1]))
    logits = dense_logits(head, hidden)
    logits.scatter_(1, torch.from_numpy(record.token_ids).long(), -torch.inf)
    expected = (logits / 2.0).softmax(dim=1).numpy()
    for row in range(2):
        found = np.bincount(record.sampled_ids[row], record.sampled_counts[row], minlength=30)
        assert found.sum() == 40_000
        assert not np.isin(
            record.token_ids[row], record.sampled_ids[row][record.sampled_counts[row] > 0]
        ).any()
        np.testing.assert_allclose(found / 40_000, expected[row], atol=0.012)


def test_what_has_no_weight_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, -torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    for number, drawn in ((0.0, 2), (0.499, 2), (0.5, 4), (1.0 - 2.0**-53, 4)):
        numbers = torch.full((1, 2), number, dtype=torch.float64)
        ids, counts = counted(tail_places(logits, numbers).numpy())
        assert (ids.tolist(), counts.tolist()) == ([[drawn, 0]], [[2, 0]])


def test_an_empty_tail_draws_nothing() -> None:
    nothing = torch.full((1, 9), -torch.inf)
    ids, counts = counted(tail_places(nothing, torch.rand(1, 4, dtype=torch.float64)).numpy())
    assert not ids.any()
    assert not counts.any()


# ---- relation ----


def cosine_gap(gram: np.ndarray, factor: np.ndarray) -> float:
    other = factor.astype(np.float64) @ factor.astype(np.float64).T
    return 1.0 - float((gram * other).sum() / np.linalg.norm(gram) / np.linalg.norm(other))


@pytest.mark.parametrize("name", [*HEADS, "singular"])
@pytest.mark.parametrize("tokens", [5, 40])
def test_relation_is_the_gram_matrix_of_raw_logits(name: str, tokens: int) -> None:
    head = a_head(vocab=7, width=16) if name == "singular" else a_head(**HEADS[name])
    hidden = some_hidden(tokens, 16)
    logits = dense_logits(head, hidden)
    gram = (logits @ logits.T).numpy()
    record = TargetMaker(head, TargetSpec(top_k=4)).relation(hidden)
    assert record.gram is None
    assert record.factor.dtype == np.float32
    assert cosine_gap(gram, record.factor) <= 1e-5
    np.testing.assert_allclose(record.norm, np.linalg.norm(gram), rtol=1e-5)
    np.testing.assert_allclose(record.residual, cosine_gap(gram, record.factor), atol=1e-6)
    inner = record.factor.T.astype(np.float64) @ record.factor
    sizes = np.diag(inner)
    np.testing.assert_allclose(inner - np.diag(sizes), 0.0, atol=1e-5 * sizes[0])
    assert (np.diff(sizes) <= 1e-5 * sizes[0]).all()
    exact = TargetMaker(head, TargetSpec(top_k=4, relation="exact")).relation(hidden)
    np.testing.assert_allclose(exact.gram, gram, rtol=1e-4, atol=1e-5 * np.abs(gram).max())


def test_truncation_is_nearly_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(300, 300, generator=generator)).Q
    sizes = torch.arange(1, 301).float() ** -0.4
    exact = (left * sizes) @ torch.linalg.qr(torch.randn(400, 300, generator=generator)).Q.T
    energy = sizes.double().pow(4)
    gram = exact @ exact.T
    factor, residual, norm = truncate(gram, bound=1e-12, max_rank=64)
    best = 1.0 - float((energy[:64].sum() / energy.sum()).sqrt())
    assert factor.shape == (300, 64)
    assert best <= residual + 1e-6 <= 1.05 * best
    np.testing.assert_allclose(norm, float(energy.sum().sqrt()), rtol=1e-5)
    # a looser bound is content with less, a tighter one takes more
    assert truncate(gram, bound=0.5, max_rank=256)[0].shape == (300, 64)
    assert truncate(gram, bound=best / 3, max_rank=256)[0].shape[1] > 64
    assert truncate(gram, bound=1e-12, max_rank=1000)[1] < 1e-6


def test_factors_in_full_of_a_batch_are_those_of_its_images() -> None:
    generator = torch.Generator().manual_seed(0)
    bases = torch.linalg.qr(torch.randn(5, 300, 300, generator=generator)).Q
    sizes = torch.stack([torch.arange(1, 301).float() ** -power for power in (2.0, 0.1, 0.5, 2.0)])
    grams = torch.cat([(bases[:4] * sizes[:, None] ** 2) @ bases[:4].mT, torch.zeros(1, 300, 300)])
    grams[0] *= 1e6
    factor, rank, residual, norm = truncated(grams, bound=1e-3, max_rank=1000)
    assert rank.tolist() == [64, 300, 256, 64, 64]
    assert (residual[:4] <= 1e-3).all()
    for place, gram in enumerate(grams):
        alone, missing, size = truncate(gram, bound=1e-3, max_rank=1000)
        assert alone.shape[1] == rank[place]
        assert not factor[place, :, rank[place] :].any()
        mine, theirs = (one.double() @ one.double().T for one in (factor[place], alone))
        assert torch.linalg.norm(mine - theirs) <= 1e-5 * norm[place]
        np.testing.assert_allclose([float(residual[place]), float(norm[place])], [missing, size], rtol=1e-3)


def test_an_image_of_zeros_has_a_zero_relation() -> None:
    record = TargetMaker(a_head(vocab=90, width=8), TargetSpec()).relation(torch.zeros(6, 8))
    assert record.norm == record.residual == 0.0
    assert not record.factor.any()


# ---- batches ----


def asked_of(images: list[np.ndarray], places: int = 0) -> Asked:
    numbers = np.arange(places)
    return Asked(places=numbers, labels=numbers, rows=numbers, positions=numbers, images=images)


def stored_grams(relations: list) -> list[np.ndarray]:
    assert all(isinstance(relation, StoredRelation) for relation in relations)
    read = RelationBlock(pack_relations(relations))
    return [factor.astype(np.float64) @ factor.astype(np.float64).T for factor in (r.factor for r in read)]


def test_the_kernel_is_what_torch_says() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "error", "-m", "tests.kernels_child"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rules", [{"top_k": 8}, {"top_k": 8, "entries": {"visual": 0.02}}])
def test_a_batch_is_what_its_parts_are(rules: dict[str, Any]) -> None:
    head = a_head(**HEADS["biased"])
    spec = TargetSpec(**rules, tail_samples=5)
    limits = limits_of(["visual", "response"], [3, 1], spec)
    assert (limits is None) == ("entries" not in rules)
    states = some_hidden(90, 16)
    places, images = np.array([3, 80, 3, 17]), [np.arange(20, 60), np.array([1, 2, 5]), np.arange(20, 60)]
    labels, rows = np.array([7, IGNORE_INDEX, 9, 0]), np.array([4, 4, 5, 6])
    maker = TargetMaker(head, spec)
    found = maker.batch(
        states, Asked(places=places, labels=labels, rows=rows, positions=places, images=images, limits=limits)
    ).wait()
    alone = maker.topk(states[torch.from_numpy(places)], labels, rows=rows, positions=places, limits=limits)
    for name in TopK.__dataclass_fields__:
        if name != "counts" or limits is not None:
            np.testing.assert_allclose(getattr(found.topk, name), getattr(alone, name), rtol=1e-5, atol=1e-5)
    assert (found.topk.counts is None) == (alone.counts is None) == (limits is None)
    assert found.finite.all()
    assert found.images_finite.all()
    logits = dense_logits(head, states).numpy()
    for image, relation, made in zip(images, found.relations, stored_grams(found.relations), strict=True):
        gram = logits[image] @ logits[image].T
        assert relation.residual <= spec.relation_bound
        np.testing.assert_allclose(relation.residual, matrix_gap(gram, made), atol=1e-9)
        np.testing.assert_allclose(relation.norm, np.linalg.norm(gram), rtol=1e-5)
    first, _, again = found.relations
    np.testing.assert_array_equal(first.columns, again.columns)
    np.testing.assert_array_equal(first.scales, again.scales)


Maker = Callable[..., dict[str, Tensor]]
MAKERS = [quantised_by_need, quantised]  # of a CPU and of a device


def matrix_gap(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.square(one / np.linalg.norm(one) - other / np.linalg.norm(other)).sum() / 2)


@pytest.mark.parametrize("targets", [("response",), ("relation",)])
def test_what_is_not_finite_spoils_nothing_else(targets: tuple) -> None:
    head = a_head(**HEADS["plain"])
    states = some_hidden(30, 16)
    images = [np.arange(0, 9), np.arange(9, 20), np.arange(20, 30)]
    asked = asked_of(images if targets == ("relation",) else [], places=30)
    maker = TargetMaker(head, TargetSpec(top_k=4, targets=targets))
    clean = maker.batch(states, asked).wait()
    states[11, 3], states[12, 0] = torch.nan, torch.inf
    found = maker.batch(states, asked).wait()
    assert np.flatnonzero(~found.finite).tolist() == [11, 12]
    np.testing.assert_array_equal(found.topk.logprobs[found.finite], clean.topk.logprobs[found.finite])
    if targets == ("relation",):
        assert found.images_finite.tolist() == [True, False, True]
        for image in (0, 2):
            np.testing.assert_array_equal(found.relations[image].columns, clean.relations[image].columns)


@pytest.mark.parametrize("form", [{"relation": "exact"}, {"precision": "full"}])
def test_a_batch_of_relations_in_full(form: dict) -> None:
    head = a_head(**HEADS["capped"])
    states = some_hidden(60, 16)
    images = [np.arange(0, 40), np.arange(40, 60)]
    found = TargetMaker(head, TargetSpec(top_k=4, **form)).batch(states, asked_of(images)).wait()
    logits = dense_logits(head, states).numpy()
    for image, relation in zip(images, found.relations, strict=True):
        gram = logits[image] @ logits[image].T
        made = relation.gram if relation.factor is None else relation.factor @ relation.factor.T
        assert matrix_gap(gram, made.astype(np.float64)) <= 1e-5
        np.testing.assert_allclose(relation.norm, np.linalg.norm(gram), rtol=1e-5)


def factor_in(found: dict[str, Tensor], image: int) -> np.ndarray:
    """The factor (P, r) float64 of an image of a batch, as it is read back."""
    rank = int(found["rank"][image])
    stored = found["columns"][image, :rank].numpy().view(np.uint16).astype(np.int64)
    steps = np.where(stored & 1, -(stored >> 1) - 1, stored >> 1)
    return (steps * found["scales"][image, :rank, None].numpy().astype(np.float64)).T


PLACES = np.arange(1.0, 301.0)
SPECTRA = {
    "flat": PLACES**0,
    "nearly flat": PLACES**-0.25,
    "one large": np.where(PLACES == 1, 60.0, 1.0),
    "slow": PLACES**-0.5,
    "middle": PLACES**-1.0,
    "fast": PLACES**-2.0,
    "geometric": 0.8**PLACES,
    "ill-conditioned": 10.0 ** -(PLACES / 15),
    "rank 3": np.where(PLACES <= 3, PLACES**-1.0, 0.0),
    "rank 1": np.where(PLACES <= 1, 1.0, 0.0),
}


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("bound", [1e-3, 1e-5, 1e-7])
def test_stored_relations_keep_their_bound_on_every_spectrum(bound: float, scale: float) -> None:
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(300, 300)))[0]
    grams = [scale * (turn * values) @ turn.T for values in SPECTRA.values()]
    given = torch.from_numpy(np.stack(grams)).float()
    tokens = torch.full((len(grams),), 300)
    norms = norm_of(given)
    for make in MAKERS:
        found = make(given, tokens, norms, bound=bound, max_rank=1024)
        for image, gram in enumerate(grams):
            factor = factor_in(found, image)
            gap = matrix_gap(gram, factor @ factor.T)
            assert gap <= 1.01 * bound + 1e-12
            np.testing.assert_allclose(float(found["residual"][image]), gap, rtol=0.01, atol=1e-12)
            np.testing.assert_allclose(np.linalg.norm(factor @ factor.T), np.linalg.norm(gram), rtol=0.05)


@pytest.mark.parametrize("tokens", [1, 2, 64, 65, 80, 300])
@pytest.mark.parametrize("make", MAKERS)
def test_matrices_without_any_noise_are_stored(make: Maker, tokens: int) -> None:
    """Tokens all alike, one that is not zero, repeated ones, groups, none; whatever came before."""
    states = some_hidden(-(-tokens // 4), 8).repeat(4, 1)[:tokens]
    blocks = (torch.arange(tokens)[:, None] // 7 == torch.arange(tokens) // 7).float()
    alone = torch.zeros(tokens, tokens)
    alone[0, 0] = 1.0
    whole = torch.ones(tokens, tokens)
    grams = torch.stack([whole, alone, states @ states.T, blocks, torch.zeros(tokens, tokens)])
    counts, norms = torch.full((5,), tokens), norm_of(grams)
    found = make(grams, counts, norms, bound=1e-5, max_rank=1024)
    for image, gram in enumerate(grams[:4].double().numpy()):
        factor = factor_in(found, image)
        assert matrix_gap(gram, factor @ factor.T) <= 1.01e-5
    assert not found["columns"][4].any()
    make(
        whole.new_ones(1, 900, 900),
        torch.tensor([900]),
        torch.tensor([900.0]).double(),
        bound=1e-5,
        max_rank=1024,
    )
    again = make(grams, counts, norms, bound=1e-5, max_rank=1024)
    assert all(torch.equal(values, again[name]) for name, values in found.items())


def test_starts_of_many_sizes_are_kept_once() -> None:
    longest = start_of(1500, 80, torch.device("cpu"))
    assert torch.equal(start_of(7, 80, torch.device("cpu")), longest[:7])
    kept = len(relation_batch._starts)
    for rows in range(1, 1500, 100):
        start_of(rows, 80, torch.device("cpu"))
    assert len(relation_batch._starts) == kept


def test_what_a_cpu_stores_by_need_takes_no_more_bits() -> None:
    """Entropy of the steps, of spectra that 64 columns are enough for."""
    turn = torch.linalg.qr(torch.randn(300, 300, generator=torch.Generator().manual_seed(0))).Q
    names = ("middle", "fast", "geometric", "rank 3", "rank 1")
    grams = torch.stack([(turn * torch.from_numpy(SPECTRA[name]).float()) @ turn.T for name in names])
    tokens, norms = torch.full((5,), 300), norm_of(grams)
    bits = []
    for make in MAKERS:
        columns = make(grams, tokens, norms, bound=1e-5, max_rank=1024)["columns"]
        shares = [one.unique(return_counts=True)[1] / 300 for image in columns for one in image]
        bits.append(sum(float(-(share * share.log2()).sum()) for share in shares))
    assert bits[0] <= 1.01 * bits[1]


@pytest.mark.parametrize("make", MAKERS)
def test_images_of_unlike_sizes_in_a_batch_are_as_alone(make: Maker) -> None:
    grams = torch.zeros(3, 200, 200)
    sizes = torch.tensor([200, 90, 130])
    for place, size in enumerate(sizes.tolist()):
        states = torch.randn(size, 40, generator=torch.Generator().manual_seed(place)) / torch.arange(1, 41)
        grams[place, :size, :size] = states @ states.T
    found = make(grams, sizes, norm_of(grams), bound=1e-5, max_rank=1024)
    for place, size in enumerate(sizes.tolist()):
        own = grams[place : place + 1, :size, :size]
        alone = make(own, sizes[place : place + 1], norm_of(own), bound=1e-5, max_rank=1024)
        assert not found["columns"][place, :, size:].any()
        mine, theirs = factor_in(found, place)[:size], factor_in(alone, 0)
        assert matrix_gap(mine @ mine.T, own[0].numpy()) <= 1.01e-5
        assert matrix_gap(theirs @ theirs.T, own[0].numpy()) <= 1.01e-5


def test_products_of_halves_are_the_whole() -> None:
    exact = some_hidden(2 * 500, 400).unflatten(0, (2, 500))
    gram = gram_of(exact)
    torch.testing.assert_close(gram, exact @ exact.mT, rtol=1e-4, atol=1e-3)
    assert torch.equal(gram, gram.mT)
    lower = some_hidden(400, 400).tril()
    torch.testing.assert_close(times_lower(exact, lower), exact @ lower, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("make", MAKERS)
def test_a_bounded_rank_is_kept_and_the_residual_tells(make: Maker) -> None:
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(150, 150)))[0]
    gram = torch.from_numpy(turn @ (PLACES[:150, None] ** -0.5 * turn.T)).float()[None]
    found = make(gram, torch.tensor([150]), norm_of(gram), bound=1e-5, max_rank=70)
    assert int(found["rank"]) == 70
    best = 1 - np.sqrt((PLACES[:70] ** -1).sum() / (PLACES[:150] ** -1).sum())
    assert best - 1e-6 <= float(found["residual"]) <= 1.1 * best


def test_images_of_alike_sizes_are_worked_on_together() -> None:
    groups = groups_of([729, 700, 256, 729, 10_000])
    assert [group.images.tolist() for group in groups] == [[4], [0, 3, 1], [2]]
    assert [group.tokens.tolist() for group in groups] == [[10_000], [729, 729, 700], [256]]


@pytest.mark.parametrize("temperatures", [(1.0,), (0.5, 1.0, 3.0)])
@pytest.mark.parametrize("cap", [256, 7])
def test_entries_by_the_rule_of_their_kind(temperatures: tuple[float, ...], cap: int) -> None:
    """Against the softmax in float64: what a threshold keeps, what a number keeps, and the tails outside."""
    head = a_head(vocab=352, width=16)
    hidden = some_hidden(40, 16)
    hidden[5] *= 20.0  # sure of one token
    hidden[6] *= 0.0  # every token alike: the threshold keeps none but the first
    spec = TargetSpec(
        targets=("response", "visual", "prompt"),
        top_k={"prompt": 5},
        entries={"response": 0.01, "visual": 0.05},
        max_entries=cap,
        temperatures=temperatures,
    )
    kinds: list[Kind] = ["response", "prompt", "visual"]
    limits = limits_of(kinds, [20, 8, 12], spec)
    found = TargetMaker(head, spec, chunk_bytes=4 * 352 * 9).topk(hidden, limits=limits)
    logits = dense_logits(head, hidden).double().numpy()
    log_p = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    for kind, rows in zip(kinds, (slice(0, 20), slice(20, 28), slice(28, 40)), strict=True):
        record, rule = fitted(topk_at(found, rows), spec.rule(kind)), spec.rule(kind)
        assert topk_problems(record, kind, replace(spec, tail_samples=0), 352) == []
        for n, row in enumerate(log_p[rows]):
            above = rule.most if rule.least_p is None else max(int((np.exp(row) >= rule.least_p).sum()), 1)
            ids = np.argsort(-row, kind="stable")[: min(above, rule.most)]
            mine = record.token_ids[n][record.there[n]]
            assert len(mine) == len(ids)
            np.testing.assert_allclose(record.logprobs[n][record.there[n]], row[ids], atol=1e-4)
            outside = np.delete(np.arange(352), mine)
            for column, temperature in enumerate(temperatures):
                scaled = logits[rows][n] / temperature
                tail = np.logaddexp.reduce(scaled[outside]) - np.logaddexp.reduce(scaled)
                np.testing.assert_allclose(record.tail_logprob[n, column], tail, rtol=1e-4, atol=1e-5)


def test_draws_come_from_outside_the_entries_that_are_kept() -> None:
    """Dropped entries belong to the tail, so draws hit them as often as their mass says."""
    head = a_head(vocab=90, width=4)
    spec = TargetSpec(targets=("response",), entries={"response": 0.05}, max_entries=60, tail_samples=40_000)
    hidden = some_hidden(2, 4)
    limits = limits_of(["response"], [2], spec)
    record = TargetMaker(head, spec).topk(
        hidden, rows=np.array([0, 0]), positions=np.array([0, 1]), limits=limits
    )
    log_p = dense_logits(head, hidden).log_softmax(1).numpy()
    assert record.sampled_ids is not None
    assert record.sampled_counts is not None
    for n in range(2):
        kept_ids = record.token_ids[n][record.there[n]]
        used = record.sampled_counts[n] > 0
        drawn = record.sampled_ids[n][used]
        assert not set(drawn) & set(kept_ids)
        share = record.sampled_counts[n][used] / 40_000
        np.testing.assert_allclose(share, np.exp(log_p[n, drawn] - record.tail_logprob[n, 0]), atol=0.01)
        # more is left out than 60 entries would leave out: the dropped ones are drawn from
        assert len(drawn) > 30
