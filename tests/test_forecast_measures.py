"""What `plan` measures, against the same things worked out densely in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cache_schema.format.codecs.relation import encode_relation
from cache_schema.format.codecs.topk import topk_at
from cache_schema.format.manifest import Plan
from cache_schema.format.records import Relation, TopK
from cache_schema.format.spec import EntryRule, TargetSpec
from models.head import Head
from pipeline.entry_rules import cut
from pipeline.forecast.choice import choose, chosen_spec
from pipeline.forecast.fidelity import Agreement, as_stored, compare, noise_of_kl, relation_angle
from pipeline.forecast.footprint import relation_footprint, topk_footprint
from pipeline.forecast.stand_in import NoisyTeacher, Picked, agreement_at, kl_between
from pipeline.forecast.workload import MeasuredSample, Speed, break_even, workload_of
from pipeline.shard_plan import plan_rows
from pipeline.targets import TargetMaker

VOCAB, WIDTH, POSITIONS = 700, 24, 60
TEMPERATURES = (0.5, 1.0, 4.0)


def a_head(*, vocab: int = VOCAB, seed: int = 0, **rest: object) -> Head:
    weight = torch.randn(vocab, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Head(weight=weight, vocab_size=vocab, **rest)


def some_hidden(n: int = POSITIONS, *, seed: int = 1, size: float = 0.6) -> Tensor:
    return size * torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))


def record_of(head: Head, hidden: Tensor, k: int, temperatures: tuple[float, ...] = (1.0,)) -> TopK:
    spec = TargetSpec(top_k=k, targets=("response",), temperatures=temperatures)
    return TargetMaker(head, spec).topk(hidden)


@pytest.mark.parametrize("size", [0.2, 1.0, 6.0])
def test_a_narrowed_record_is_what_a_capture_with_fewer_entries_gives(size: float) -> None:
    head, hidden = a_head(), some_hidden(size=size)
    wide = record_of(head, hidden, 128, TEMPERATURES)
    for k in (1, 8, 127, 128):
        direct, narrow = record_of(head, hidden, k, TEMPERATURES), cut(wide, EntryRule(most=k))
        np.testing.assert_array_equal(narrow.token_ids, direct.token_ids)
        np.testing.assert_allclose(narrow.logprobs, direct.logprobs, atol=1e-5)
        np.testing.assert_allclose(narrow.tail_logprob, direct.tail_logprob, rtol=2e-5, atol=2e-5)


def test_a_record_of_the_whole_vocabulary_narrows_too() -> None:
    head, hidden = a_head(vocab=40), some_hidden()
    wide = record_of(head, hidden, 40, TEMPERATURES)
    assert np.isneginf(wide.tail_logprob).all()
    np.testing.assert_allclose(
        cut(wide, EntryRule(most=5)).tail_logprob,
        record_of(head, hidden, 5, TEMPERATURES).tail_logprob,
        atol=2e-5,
    )
    assert np.isneginf(cut(wide, EntryRule(most=40)).tail_logprob).all()


def dense_agreement(log_p: Tensor, log_q: Tensor, record: TopK) -> Agreement:
    """The same sums with every gradient as a whole (N, V) array in float64; s by autograd of its loss."""
    p, q = log_p.exp(), log_q.exp()
    logits = log_q.clone().requires_grad_()
    log_s = logits.log_softmax(dim=1)
    ids = torch.from_numpy(record.token_ids.astype(np.int64))
    counts = getattr(record, "counts", None)
    places = torch.arange(ids.shape[1]).expand_as(ids)
    there = places < (ids.shape[1] if counts is None else torch.from_numpy(counts)[:, None])
    inside = torch.zeros_like(p).scatter_add_(1, ids, there.double()) > 0
    kept = torch.from_numpy(record.logprobs.astype(np.float64))
    tail = torch.from_numpy(record.tail_logprob[:, 0].astype(np.float64))
    rest = log_s.masked_fill(inside, -torch.inf).logsumexp(dim=1)
    kept, log_in = kept.masked_fill(~there, -torch.inf), log_s.gather(1, ids)
    loss = (kept.exp() * (kept.masked_fill(~there, 0.0) - log_in)).sum() + (tail.exp() * (tail - rest)).sum()
    (sparse,) = torch.autograd.grad(loss, logits)
    dense = q - p
    return Agreement(
        positions=len(p),
        dot=float((dense * sparse).sum()),
        dense=float(dense.square().sum()),
        sparse=float(sparse.square().sum()),
        dense_kl=float((p * (log_p - log_q)).sum()),
        record_kl=float(loss.detach()),
    )


@pytest.mark.parametrize("precision", ["compact", "full"])
@pytest.mark.parametrize(
    "rule", [EntryRule(most=1), EntryRule(most=8), EntryRule(most=64), EntryRule(most=64, least_p=0.01)]
)
def test_an_agreement_is_that_of_the_dense_gradients(rule: EntryRule, precision: str) -> None:
    head, hidden = a_head(), some_hidden()
    states = hidden + 0.2 * some_hidden(seed=5, size=1.0)
    wide = record_of(head, hidden, 64)
    records = {
        "asked": as_stored(cut(wide, rule), precision),
        "other": as_stored(cut(wide, EntryRule(most=64)), "compact"),
    }
    found = compare(head.logits(hidden), head.logits(states), records)["asked"]
    log_p, log_q = ((h.double() @ head.weight.double().T).log_softmax(dim=1) for h in (hidden, states))
    wanted = dense_agreement(log_p, log_q, records["asked"])
    for name in ("positions", "dot", "dense", "sparse", "dense_kl", "record_kl"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=2e-5), name
    assert found.angle == pytest.approx(wanted.angle, abs=0.01)
    assert 0.0 < found.angle < 90.0
    assert found.unseen_kl > 0.0  # fewer events never show more of a KL


def test_agreements_of_chunks_add_up_to_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden = a_head(), some_hidden()
    picked = Picked(positions={"response": hidden}, images=[])
    student = NoisyTeacher(head, picked, kl=0.7, seed=3)
    records = {8: as_stored(record_of(head, hidden, 8), "compact")}
    told: list[int] = []
    whole = agreement_at(head, hidden, student, "response", records, told.append)[8]
    assert told == [POSITIONS]
    assert whole.mean_kl == pytest.approx(0.7, rel=0.02)
    monkeypatch.setattr("pipeline.forecast.stand_in._CHUNK_BYTES", 4 * VOCAB * 7)
    parts = agreement_at(head, hidden, student, "response", records, told.append)[8]
    assert told[1:] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert parts.angle == pytest.approx(whole.angle, abs=1e-3)
    assert parts.record_kl == pytest.approx(whole.record_kl, rel=1e-5)


@pytest.mark.parametrize("size", [0.3, 1.0, 8.0])  # 8: nearly all mass on one token, where KL leaps
def test_the_noise_reaches_the_kl_that_was_asked_for(size: float) -> None:
    head, hidden = a_head(), some_hidden(400, size=size)
    student = NoisyTeacher(head, Picked(positions={"visual": hidden}, images=[hidden]), kl=0.7, seed=0)
    assert kl_between(head, hidden, head, lambda rows: student.at("visual", rows)) == pytest.approx(
        0.7, rel=0.011
    )
    again = student.at("visual", slice(10, 20))
    torch.testing.assert_close(again, student.at("visual", slice(0, 400))[10:20])
    assert not torch.equal(student.image(0), hidden)


def test_noise_that_moves_nothing_is_no_noise() -> None:
    assert noise_of_kl(lambda size: 0.0, 0.7, 1.0, rounds=5) == 0.0
    flat = Head(weight=torch.ones(10, WIDTH), vocab_size=10)
    picked = Picked(positions={"response": some_hidden()}, images=[])
    student = NoisyTeacher(flat, picked, kl=0.7, seed=0)
    records = {2: record_of(flat, some_hidden(), 2)}
    sums = agreement_at(flat, some_hidden(), student, "response", records, lambda done: None)
    assert np.isfinite(sums[2].angle)


def test_the_angle_of_a_relation_is_that_of_its_gradient() -> None:
    generator = torch.Generator().manual_seed(2)
    teacher = torch.randn(20, 6, generator=generator).double()
    student = teacher + 0.3 * torch.randn(20, 6, generator=generator)
    exact, of_student = teacher @ teacher.T, student @ student.T
    left, sizes, _ = torch.linalg.svd(teacher, full_matrices=False)
    factor = (left * sizes)[:, :3]

    def gradient(target: Tensor) -> Tensor:
        ours = of_student.clone().requires_grad_()
        loss = 1 - (ours * target).sum() / (ours.norm() * target.norm())
        return torch.autograd.grad(loss, ours)[0].flatten()

    wanted = torch.nn.functional.cosine_similarity(gradient(exact), gradient(factor @ factor.T), dim=0)
    given = [
        Relation(residual=0.0, norm=float(exact.norm()), gram=exact.float().numpy()),
        Relation(residual=0.0, norm=float(exact.norm()), factor=factor.float().numpy()),
        Relation(residual=0.0, norm=float(of_student.norm()), gram=of_student.float().numpy()),
    ]
    found = relation_angle(*given)
    assert found > 1.0
    assert found == pytest.approx(float(torch.rad2deg(torch.arccos(wanted))), abs=0.01)
    assert relation_angle(given[0], given[0], given[2]) == pytest.approx(0.0, abs=0.05)
    assert relation_angle(given[0], given[0], given[0]) == 0.0


@pytest.mark.parametrize("precision", ["compact", "full"])
def test_a_footprint_foretells_larger_shards(precision: str) -> None:
    head = a_head(vocab=5000)
    record = record_of(head, some_hidden(2400), 16)
    small = topk_footprint(topk_at(record, slice(400)), precision, 5000)
    for count, shards in ((2400, 1), (2400, 3)):
        parts = [
            topk_at(record, slice(start, start + count // shards))
            for start in range(0, count, count // shards)
        ]
        real = sum(topk_footprint(part, precision, 5000).total(len(part), 1) for part in parts)
        assert small.total(count, shards) == pytest.approx(real, rel=0.04)
    assert small.total(0, 1) == 0.0


def test_a_footprint_of_relations_foretells_more_images() -> None:
    generator = np.random.default_rng(0)
    spec = TargetSpec(relation_bound=1e-4)
    stored = []
    for _ in range(24):
        left = np.linalg.qr(generator.normal(size=(60, 12)))[0] * 100 * np.arange(1, 13) ** -1.0
        norm = float(np.linalg.norm(left.T @ left))
        stored.append(
            encode_relation(Relation(residual=0.0, norm=norm, factor=left.astype(np.float32)), spec)
        )
    small, real = relation_footprint(stored[:8]), relation_footprint(stored)
    assert small.total(24, 1) == pytest.approx(real.total(24, 1), rel=0.05)


def measured(tokens: int, image: int = 0, response: int = 5) -> MeasuredSample:
    return MeasuredSample(
        tokens=tokens,
        prefix=image + 3 if image else 0,
        images=(image,) if image else (),
        positions={"response": response, "prompt": 0},
    )


def test_a_workload_counts_shared_images_once_a_shard() -> None:
    keys = np.array(
        [7, 7, 7, 7, 8, 9, 0, 0], np.int64
    )  # an image with four rows, two alone, two rows of text
    samples = [measured(40, 16), measured(40, 16), measured(20)]
    drawn = {True: 2, False: 1}
    plan = plan_rows(keys, shard_size=8, seed=0)
    found = workload_of(plan, keys, drawn, samples, ["response", "visual"], sharing=1.0, packing=True)
    assert (found.rows, found.with_image, found.text_only, found.groups) == (8, 6, 2, 3)
    assert found.stored_images == pytest.approx(3)
    assert found.positions["visual"] == pytest.approx(3 * 16)
    assert found.positions["response"] == pytest.approx(8 * 5)
    assert found.tokens == pytest.approx(6 * 40 + 2 * 20)
    assert found.computed_tokens == pytest.approx(found.tokens - 3 * 19)
    split = plan_rows(keys, shard_size=2, seed=0)  # the group of four stands in two shards
    assert workload_of(split, keys, drawn, samples, ["visual"], sharing=1.0, packing=True).groups == 4
    alone = workload_of(plan, keys, drawn, samples, ["visual"], sharing=0.0, packing=False)
    assert alone.stored_images == pytest.approx(6)
    assert alone.computed_tokens == alone.tokens


def test_bad_rows_make_a_workload_smaller() -> None:
    keys = np.arange(1, 101)
    plan = Plan(rows=100, shard_size=10, order=np.arange(100))
    found = workload_of(
        plan, keys, {True: 4, False: 0}, [measured(40, 16)] * 3, ["visual"], sharing=1.0, packing=True
    )
    assert found.captured == pytest.approx(75)
    assert found.stored_images == pytest.approx(75)


def test_break_even_is_where_both_have_taken_as_long() -> None:
    keys = np.repeat(np.arange(1, 51), 2)
    plan = plan_rows(keys, shard_size=100, seed=0)
    samples = [measured(40, 27)] * 4
    work = workload_of(plan, keys, {True: 4, False: 0}, samples, ["visual"], sharing=1.0, packing=True)
    speed = Speed(seconds=4.0, tokens=160, preparing=0.001, threads=2)
    found = break_even(speed, work)
    assert found["teacher_seconds_per_epoch"] == pytest.approx(100 * 40 * 4 / 160)
    assert found["capture_seconds"] == pytest.approx((100 * 40 - 50 * 30) * 4 / 160)
    assert found["epochs"] * found["teacher_seconds_per_epoch"] == pytest.approx(found["capture_seconds"])
    slow = Speed(seconds=4.0, tokens=160, preparing=4.0, threads=2)  # decoding images is what takes long
    assert break_even(slow, work)["capture_seconds"] == pytest.approx(100 * 4.0 / 2)


def a_row(target: str, rule: str, precision: str, angle: float, kl: float, size: float) -> dict[str, object]:
    return {
        "target": target,
        "rule": rule,
        "precision": precision,
        "angle": angle,
        "kl": kl,
        "dataset_bytes": size,
    }


def test_the_smallest_setting_within_the_bounds_is_chosen() -> None:
    positions = [
        a_row("response", "8", "compact", 4.0, 1e-5, 10),
        a_row("visual", "8", "compact", 9.0, 1e-5, 10),
        a_row("response", "16", "compact", 2.0, 1e-5, 20),
        a_row("visual", "16", "compact", 4.5, 1e-5, 20),
        a_row("response", "8", "full", 4.0, 0.0, 30),
        a_row("visual", "8", "full", 4.4, 0.0, 30),
    ]
    relations = [
        {"relation": 1e-4, "precision": "compact", "angle": 7.0, "dataset_bytes": 5},
        {"relation": 1e-5, "precision": "compact", "angle": 3.0, "dataset_bytes": 9},
        {"relation": 1e-4, "precision": "full", "angle": 3.0, "dataset_bytes": 90},
    ]
    five = dict.fromkeys(("response", "visual", "relation"), 5.0)
    best = choose(positions, relations, max_angle=five, max_kl=1e-4)
    assert best["rules"] == {"response": "8", "visual": "16"}, "each kind its own"
    assert (best["precision"], best["relation"]) == ("compact", 1e-5)
    assert best["within_bounds"]
    assert best["target_bytes"] == 39
    smaller = a_row("visual", "p>=0.01", "compact", 4.9, 1e-5, 15)
    least = choose([*positions, smaller], relations, max_angle=five, max_kl=1e-4)
    assert least["rules"] == {"response": "8", "visual": "p>=0.01"}
    spec = chosen_spec(TargetSpec(), least)
    assert (spec.rule("response"), spec.rule("visual").least_p) == (EntryRule(most=8), 0.01)
    loose = choose(positions, relations, max_angle={**five, "visual": 10.0, "relation": 8.0}, max_kl=1e-4)
    assert loose["rules"] == {"response": "8", "visual": "8"}
    assert loose["relation"] == 1e-4
    exact = choose(positions, relations, max_angle=five, max_kl=1e-9)
    assert exact["precision"] == "full"
    assert exact["rules"] == {"response": "8", "visual": "8"}
    none = choose(positions, relations, max_angle=dict.fromkeys(five, 1.0), max_kl=1e-4)
    assert not none["within_bounds"]
    assert none["rules"] == {"response": "16", "visual": "16"}
    assert any(miss.startswith("visual: 4.5 degrees") for miss in none["misses"])


def test_choices_need_no_relations_and_no_positions() -> None:
    one = [a_row("response", "8", "compact", 4.0, 1e-5, 10)]
    bounds = {"response": 5.0, "relation": 5.0}
    assert choose(one, [], max_angle=bounds, max_kl=1e-4)["relation"] is None
    relation = [{"relation": "exact", "precision": "compact", "angle": 0.1, "dataset_bytes": 5}]
    found = choose([], relation, max_angle=bounds, max_kl=1e-4)
    assert (found["rules"], found["relation"]) == ({}, "exact")
