"""Private spans: no record of a cache holds the distribution of a private token (Swing)."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema import TargetSpec, open_cache
from cache_schema.errors import IdentityMismatch, WrongUsage
from cache_schema.format.checks import topk_problems
from cache_schema.format.records import TopK
from cache_schema.operations.verify import verify
from cache_schema.progress import Silent
from pipeline.capture import BuildConfig, build
from pipeline.private_spans import PrivateSpans, Veil, private_spans
from tests.tiny_models import tiny_dataset, tiny_llava

SPEC = TargetSpec(
    targets=("response", "visual", "prompt"), precision="full", top_k=8, temperatures=(1.0, 2.0)
)


def veil_over(private, ids, *, tokens=40, temperature=4.0, noise=1.0, row=3):
    spans = PrivateSpans(
        pattern=None, field=None, temperature=temperature, noise=noise, tokens=tokens, seed=0
    )
    return Veil(spans=spans, row=row, ids=np.array(ids, np.int32), private=np.array(private))


def record_of(random, positions, k=6, tokens=40):
    logits = random.normal(scale=4.0, size=(positions, tokens))
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    order = np.argsort(-logprobs, axis=1)[:, :k]
    temperatures = np.array([1.0, 2.0], np.float32)
    left = np.ones((positions, tokens), bool)
    np.put_along_axis(left, order, False, axis=1)
    tails = []
    for temperature in temperatures:
        cold = logits / temperature - np.logaddexp.reduce(logits / temperature, axis=1, keepdims=True)
        tails.append(np.logaddexp.reduce(np.where(left, cold, -np.inf), axis=1))
    return TopK(
        token_ids=order.astype(np.int32),
        logprobs=np.take_along_axis(logprobs, order, axis=1).astype(np.float32),
        tail_logprob=np.stack(tails, axis=1).astype(np.float32),
        temperatures=temperatures,
        logsumexp=np.ones(positions, np.float32),
        entropy=np.ones(positions, np.float32),
        label_logprob=np.zeros(positions, np.float32),
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.lists(st.booleans(), min_size=8, max_size=8), st.sampled_from([0.0, 1.0, 5.0])
)
def test_a_private_token_leaves_its_record_and_others_keep_their_bits(seed, private, noise):
    random = np.random.default_rng(seed)
    positions = np.arange(7)
    record = record_of(random, 7)
    # Half of the private tokens are the likeliest, which an attacker would look for.
    ids = np.append(0, np.where(random.random(7) < 0.5, record.token_ids[:, 0], random.integers(0, 40, 7)))
    changed = veil_over(private, ids, noise=noise).over(record, positions)
    assert topk_problems(changed, "response", TargetSpec(top_k=6, temperatures=(1.0, 2.0)), 40) == []
    for place in positions:
        for name in ("token_ids", "logprobs", "tail_logprob", "logsumexp", "entropy", "label_logprob"):
            ours, theirs = getattr(changed, name)[place], getattr(record, name)[place]
            if not private[place + 1]:
                assert np.array_equal(ours, theirs), name
        if private[place + 1]:
            assert ids[place + 1] not in changed.token_ids[place]
            assert len(set(changed.token_ids[place].tolist())) == 6
            each = changed.tail_logprob[place, 0] - np.log(40 - 6)
            assert changed.label_logprob[place] == pytest.approx(each, abs=1e-4)
    again = veil_over(private, ids, noise=noise).over(record, positions)
    assert np.array_equal(again.logprobs, changed.logprobs)


def test_without_noise_it_is_the_temperature():
    record = record_of(np.random.default_rng(0), 1)
    outside = next(token for token in range(40) if token not in record.token_ids)
    changed = veil_over([False, True], [0, outside], noise=0.0, temperature=2.0).over(record, np.array([0]))
    each = (record.tail_logprob[0, 0] - np.log(34)) / 2
    whole = np.logaddexp.reduce([*(record.logprobs[0] / 2), each + np.log(34)])
    assert changed.logprobs[0] == pytest.approx(record.logprobs[0] / 2 - whole, abs=1e-5)
    assert np.array_equal(changed.token_ids, record.token_ids)


def test_where_every_token_is_an_entry_the_private_one_is_the_least_likely():
    record = record_of(np.random.default_rng(0), 1, k=6, tokens=6)
    label = int(record.token_ids[0, 0])
    changed = veil_over([False, True], [0, label], tokens=6, noise=0.0).over(record, np.array([0]))
    assert sorted(changed.token_ids[0].tolist()) == list(range(6))
    assert changed.token_ids[0, -1] == label


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("private")
    teacher = tiny_llava(folder / "teacher")
    tiny_dataset(folder, rows=8, images=2)
    rows = json.loads((folder / "data.json").read_text())
    for row in rows:
        row["secrets"] = [row["conversations"][1]["value"].split()[0]]
    (folder / "data.json").write_text(json.dumps(rows))
    return teacher, folder, rows


def built(setting, out, **changes):
    teacher, folder, _ = setting
    config = BuildConfig(
        teacher=teacher,
        data=folder / "data.json",
        image_root=folder,
        out=str(out),
        spec=SPEC,
        device="cpu",
        **changes,
    )
    build(config, Silent())
    return open_cache(str(out))


@pytest.mark.parametrize("way", ["pattern", "field"])
def test_a_cache_does_not_hold_what_is_private(setting, tmp_path, way):
    rows = setting[2]
    plain = built(setting, tmp_path / "plain")
    secrets = sorted({row["secrets"][0] for row in rows})
    changes = (
        {"private": "|".join(map(re.escape, secrets))} if way == "pattern" else {"private_field": "secrets"}
    )
    cache = built(setting, tmp_path / "private", **changes)
    assert verify(tmp_path / "private").ok
    changed = kept = 0
    for number in range(len(cache)):
        sample, before = cache[number], plain[number]
        before_it = changed
        for name in ("response", "prompt"):
            record, theirs = getattr(sample, name), getattr(before, name)
            for place, position in enumerate(getattr(sample, f"{name}_positions").tolist()):
                if np.array_equal(record.logprobs[place], theirs.logprobs[place]):
                    kept += 1
                    assert np.array_equal(record.token_ids[place], theirs.token_ids[place])
                else:
                    changed += 1
                    assert int(sample.input_ids[position + 1]) not in record.token_ids[place]
        assert changed > before_it, "every first answer begins with a private word"
    assert kept > changed
    with pytest.raises(IdentityMismatch, match="private"):
        built(setting, tmp_path / "private")


def test_what_does_not_go_together_is_refused(setting, tmp_path):
    with pytest.raises(WrongUsage, match=r"--private '\(' is not a regular expression"):
        built(setting, tmp_path / "a", private="(")
    for empty in ({"private": ""}, {"private": "x", "private_field": ""}):
        with pytest.raises(WrongUsage, match="private and private_field must not be empty"):
            built(setting, tmp_path / "a", **empty)
    with pytest.raises(WrongUsage, match="hidden states, which hold every distribution"):
        BuildConfig(
            teacher=setting[0],
            data=setting[1],
            image_root=setting[1],
            out="x",
            private="a",
            spec=TargetSpec(targets=("response", "hidden")),
        )
    assert private_spans(None, None, temperature=4.0, noise=1.0, tokens=9, seed=0) is None
