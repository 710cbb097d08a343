"""Differences between caches are found and measured."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cache_schema import TargetSpec, open_cache
from cache_schema.format.records import HiddenStates, Relation, TopK
from cache_schema.operations.diff import DiffReport, diff
from cache_schema.operations.divergence import kl, relation_cosine
from cache_schema.operations.select import select
from cache_schema.operations.settings import DiffConfig
from tests import cache_teacher
from tests.cache_teacher import EVERYTHING, build_cache, make_hidden
from tests.fake_caches import by_row, make_cache
from views.diff_page import print_difference

COMPACT = TargetSpec(top_k=8, temperatures=(1.0, 2.0))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return tmp_path / "images"


def test_a_cache_is_the_same_as_itself_in_other_shards(tmp_path: Path, pictures: Path) -> None:
    a = make_cache(tmp_path / "a", pictures, rows=10, shard_size=4)
    b = make_cache(tmp_path / "b", pictures, rows=10, shard_size=3, order=range(9, -1, -1))
    report = diff(a, b)
    assert report.same
    assert report.samples == 10
    assert report.kl["response"].max < 1e-6
    assert report.relation["least_cosine"] > 1 - 1e-9
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["same"] is True
    assert document["kl"]["visual"]["positions"] == 7 * 9


def test_noise_is_measured_and_its_worst_row_named(tmp_path: Path, pictures: Path) -> None:
    full = replace(COMPACT, top_k=320, precision="full", targets=("response",))
    a = make_cache(tmp_path / "a", pictures, rows=6, spec=full)
    b = make_cache(tmp_path / "b", pictures, rows=6, spec=full, noise=0.1)
    report = diff(a, b)
    dense, others = {}, by_row(b)
    for row, x in by_row(a).items():
        y = others[row]
        p, q = np.zeros((2, len(x.response), 320))
        np.put_along_axis(p, x.response.token_ids, x.response.logprobs.astype(np.float64), axis=1)
        np.put_along_axis(q, y.response.token_ids, y.response.logprobs.astype(np.float64), axis=1)
        dense[row] = (np.exp(p) * (p - q)).sum(axis=1)
    everything = np.concatenate(list(dense.values()))
    found = report.kl["response"]
    assert found.mean == pytest.approx(everything.mean(), rel=1e-4)
    assert found.p99 == pytest.approx(np.quantile(everything, 0.99), rel=1e-4)
    assert found.worst_row == max(dense, key=lambda row: dense[row].mean())
    assert found.top1_agreement < 1.0
    assert not report.targets_agree
    assert report.same_identity
    assert not report.same


def test_missing_rows_and_other_inputs_are_listed(tmp_path: Path, pictures: Path) -> None:
    a = make_cache(tmp_path / "a", pictures, rows=8, identity={"dtype": "bfloat16"})
    select(str(tmp_path / "a"), "row not in [2, 3]", str(tmp_path / "b"))
    report = diff(a, open_cache(tmp_path / "b"))
    assert (report.only_in_a, report.only_in_b, report.same) == ([2, 3], [], False)
    other = make_cache(tmp_path / "c", pictures, rows=9, patches=(4,))
    report = diff(a, other)
    assert report.only_in_b == [8]
    assert report.other_inputs == [0, 1, 3, 4, 6, 7], "the rows with an image have other token counts"
    assert report.samples == 8
    assert [d["key"] for d in report.identity if d["blocks"] == "resume"] == ["dtype"]
    assert not report.same_identity


def test_engines_are_no_difference_but_are_told(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a parity test of engines uses it: only what wrote the shards differs."""
    a = make_cache(tmp_path / "a", pictures, rows=5)
    monkeypatch.setattr("tests.fake_caches.ENGINE", {"name": "other", "version": "1"})
    b = make_cache(tmp_path / "b", pictures, rows=5)
    report = diff(a, b)
    assert report.same
    assert report.engines == {
        "a": [{"name": "fake", "version": "1"}],
        "b": [{"name": "other", "version": "1"}],
    }
    page = printed(report)
    assert "the same" in page.splitlines()[0]
    assert "engine: name" in page
    assert "engine: version" not in page
    assert diff(a, a).engines == {}


def test_what_may_differ_is_named_by_the_caller(tmp_path: Path, pictures: Path) -> None:
    a = make_cache(tmp_path / "a", pictures, rows=5)
    b = make_cache(tmp_path / "b", pictures, rows=5, identity={"dtype": "bfloat16"})
    assert not diff(a, b).same
    report = diff(a, b, config=DiffConfig(may_differ=("dtype",)))
    assert report.same
    assert "but for dtype, as allowed" in printed(report)
    other = make_cache(tmp_path / "c", pictures, rows=5, spec=replace(COMPACT, top_k=16))
    assert not diff(a, other, config=DiffConfig(may_differ=("spec.relation",))).same_identity
    assert diff(a, other, config=DiffConfig(may_differ=("spec",))).same
    noisy = make_cache(tmp_path / "d", pictures, rows=5, noise=0.3)
    assert not diff(a, noisy, config=DiffConfig(kl_bound=1e-9)).targets_agree
    assert diff(a, noisy, config=DiffConfig(kl_bound=9.0)).kl["visual"].p99 > 0


def test_hidden_states_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_cache(tmp_path / "a", EVERYTHING, rows=8)
    a = open_cache(tmp_path / "a")
    report = diff(a, open_cache(tmp_path / "a"))
    assert report.same
    assert {kind: found.max for kind, found in report.hidden.items()} == {"response": 0.0, "visual": 0.0}

    def shifted(key: int, positions: int) -> HiddenStates:
        states = make_hidden(key, positions)
        return replace(states, scales=states.scales * np.float32(1.5))

    monkeypatch.setattr(cache_teacher, "make_hidden", shifted)
    build_cache(tmp_path / "b", EVERYTHING, rows=8)
    b = open_cache(tmp_path / "b")
    report = diff(a, b)
    assert not report.same
    assert not report.targets_agree
    assert all(kind.max == 0.0 for kind in report.kl.values())
    rows = {row: (sample, by_row(b)[row]) for row, sample in by_row(a).items()}
    for kind in ("response", "visual"):
        apart = {}
        for row, others in rows.items():
            x, y = (sample.hidden.get(kind) for sample in others)
            if x is not None and len(x):
                apart[row] = np.linalg.norm(x - y, axis=1) / np.linalg.norm(x, axis=1)
        found, everything = report.hidden[kind], np.concatenate(list(apart.values()))
        assert found.positions == len(everything)
        assert found.mean == pytest.approx(everything.mean(), rel=1e-4)
        assert found.p99 == pytest.approx(np.quantile(everything, 0.99), rel=1e-4)
        assert found.worst_row == max(apart, key=lambda row: apart[row].mean())
        assert found.worst_row_mean == pytest.approx(apart[found.worst_row].mean(), rel=1e-4)
    page = printed(report, 80)
    assert f"{found.worst_row} ({found.worst_row_mean:.1e})" in page
    assert "hidden |a-b|/|a|" in page
    wide = DiffConfig(hidden_bound=float(max(kind.mean for kind in report.hidden.values())) + 0.01)
    assert diff(a, b, config=wide).same


@pytest.mark.parametrize("width", [80, 120])
def test_the_page_of_a_difference_fits_and_names_the_worst(
    tmp_path: Path, pictures: Path, width: int
) -> None:
    a = make_cache(tmp_path / "a", pictures, rows=7)
    b = make_cache(tmp_path / "b", pictures, rows=9, noise=0.5, identity={"dtype": "[red]\x1b[31m"})
    report = diff(a, b)
    page = printed(report, width)
    assert all(len(line) <= width for line in page.splitlines()[1:])
    assert "…" not in page
    for told in ("not the same", "dtype", "[red]\\x1b[31m", "2 only in b (rows 7, 8)", "do not agree"):
        assert told in page, told
    for kind in ("response", "visual"):
        assert f"{report.kl[kind].worst_row} ({report.kl[kind].worst_row_mean:.1e})" in page
    assert "\x1b" not in page


def printed(report: DiffReport, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_difference(report.to_json(), "a", "b", console)
    return console.file.getvalue()


def record(logits: np.ndarray, k: int) -> TopK:
    full = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    order = np.argsort(-full, axis=1)
    rest = np.take_along_axis(full, order[:, k:], axis=1)
    tail = np.logaddexp.reduce(rest, axis=1) if rest.shape[1] else np.full(len(full), -np.inf)
    zeros = np.zeros(len(full), np.float32)
    return TopK(
        token_ids=order[:, :k].astype(np.int32),
        logprobs=np.take_along_axis(full, order[:, :k], axis=1).astype(np.float32),
        tail_logprob=tail[:, None].astype(np.float32),
        temperatures=np.ones(1, np.float32),
        logsumexp=zeros,
        entropy=zeros,
    )


@pytest.mark.parametrize(("k_a", "k_b"), [(40, 40), (8, 8), (4, 16), (16, 4), (1, 1)])
def test_kl_is_that_of_the_events_both_know(k_a: int, k_b: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 40)) * 2
    y = x + rng.normal(size=x.shape)
    a, b = record(x, k_a), record(y, k_b)
    p, q = (np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True)) for z in (x, y))
    for n, value in enumerate(kl(a, b)):
        both = np.intersect1d(a.token_ids[n], b.token_ids[n])
        events_p = np.append(p[n, both], 1 - p[n, both].sum()).clip(0)
        events_q = np.append(q[n, both], 1 - q[n, both].sum()).clip(1e-30)
        expected = sum(s * np.log(s / t) for s, t in zip(events_p, events_q, strict=True) if s > 1e-12)
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_kl_is_finite_where_one_side_has_no_mass() -> None:
    a, b = record(np.array([[0.0, 0.0, -1.0]]), 1), record(np.array([[5.0, -900.0, -900.0]]), 3)
    assert np.isfinite(kl(a, b)).all()
    with pytest.raises(ValueError, match="1 positions against 2"):
        kl(a, record(np.zeros((2, 3)), 1))


def test_relation_cosine_is_that_of_the_matrices() -> None:
    rng = np.random.default_rng(1)
    u, v = rng.normal(size=(30, 5)).astype(np.float32), rng.normal(size=(30, 3)).astype(np.float32)
    r, s = (m.astype(np.float64) @ m.T for m in (u, v))
    expected = (r * s).sum() / np.linalg.norm(r) / np.linalg.norm(s)
    as_factor = [Relation(residual=0, norm=1, factor=m) for m in (u, v)]
    as_gram = [Relation(residual=0, norm=1, gram=m.astype(np.float32)) for m in (r, s)]
    for x, y in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        found = relation_cosine((as_factor, as_gram)[x][0], (as_factor, as_gram)[y][1])
        assert found == pytest.approx(expected, rel=1e-5)


def test_names_that_only_one_cache_has_move_no_cursor(tmp_path: Path, pictures: Path) -> None:
    caches = [make_cache(tmp_path / name, pictures, rows=2) for name in "ab"]
    document = diff(*caches).to_json()
    named = "\x1b[2J[bold]library[/]"
    document["identity"] = [{"key": named, "a": named, "b": None, "blocks": "nothing"}]
    document["engines"] = {side: [{named: side}] for side in "ab"}
    told = io.StringIO()
    print_difference(document, named, "b", Console(file=told, width=200))
    assert {c for c in told.getvalue() if not c.isprintable()} == {"\n"}
    assert told.getvalue().count("\\x1b[2J[bold]library[/]") == 4
