"""Batches are launched while the records of earlier ones are still on their way to the host."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cache_schema.format.records import CapturedSample, ImageRecord, QuarantinedRow
from cache_schema.format.spec import TargetSpec
from models.head import Head
from pipeline.extract import Extractor
from pipeline.samples import PreparedSample
from pipeline.shard_capture import ShardCapture

SPEC = TargetSpec(targets=("response", "visual"), top_k=2)
WAIT = 30.0


def a_sample(row: int, image: str) -> PreparedSample:
    """Tokens 7, four of the image, and two of an answer."""
    places = np.arange(1, 5, dtype=np.int32)
    return PreparedSample(
        row=row,
        sample_id=str(row),
        input_ids=np.array([7, 2, 2, 2, 2, 3 + row, 4], dtype=np.int32),
        label_spans=np.array([[5, 7]], dtype=np.int32),
        images=(ImageRecord(path=image, sha256=image, width=2, height=2, positions=places),),
        token_inputs={},
        pixel_inputs={},
        answers_kept=1,
    )


class Engine:
    """Hidden states that depend on ids; broken: rows whose states are not finite."""

    can_pack = False

    def __init__(self, broken: Sequence[int] = ()) -> None:
        self.broken = broken
        self.description: dict[str, str] = {}
        self.head = Head(weight=torch.randn(11, 3, generator=torch.Generator().manual_seed(0)), vocab_size=11)
        self.launched: list[list[int]] = []

    def hidden_states(self, samples: Sequence[PreparedSample]) -> list[Tensor]:
        self.launched.append([sample.row for sample in samples])
        states = [
            torch.from_numpy(sample.input_ids).float()[:, None] / torch.tensor([1.0, 2, 3])
            for sample in samples
        ]
        return [
            torch.full_like(each, torch.nan) if sample.row in self.broken else each
            for sample, each in zip(samples, states, strict=True)
        ]


def extractor_of(engine: Engine, **options: object) -> Extractor:
    settings = {"fingerprint": "", "share": False, "pack": False, "batch_tokens": 7, **options}
    return Extractor(engine, engine.head, SPEC, **settings)  # type: ignore[arg-type]


def test_the_next_batch_is_launched_before_the_records_of_the_last_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But no more than two ahead, so that memory is bounded."""
    engine = Engine()
    extractor = extractor_of(engine)
    fetch, may_fetch = extractor._fetch, threading.Event()

    def late(*arguments: object) -> object:
        assert may_fetch.wait(WAIT)
        return fetch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(extractor, "_fetch", late)
    shard = ShardCapture(extractor)
    launching = shard.launch([a_sample(row, "a") for row in range(5)])
    assert next(launching) == []
    assert next(launching) == []
    assert engine.launched == [[0], [1]]
    third = threading.Thread(target=lambda: next(launching), daemon=True)
    third.start()
    third.join(0.2)
    assert third.is_alive(), "a third batch was launched over two that are not fetched"
    assert engine.launched == [[0], [1]]
    may_fetch.set()
    third.join(WAIT)
    for _ in launching:
        pass
    shard.finish()
    assert not shard.orphans()
    assert engine.launched == [[row] for row in range(5)]
    assert list(shard.results) == [0, 1, 2, 3, 4]
    assert all(isinstance(result, CapturedSample) for result in shard.results.values())


def test_what_an_uncapturable_sample_was_to_bring_another_brings() -> None:
    """Images that are shared: row 0 is to bring that of a, and its states are not finite."""
    samples = [a_sample(0, "a"), a_sample(1, "a"), a_sample(2, "b"), a_sample(3, "a")]
    engine = Engine(broken=[0])
    shard = ShardCapture(extractor_of(engine, share=True, batch_tokens=28))
    found = shard.run(samples)
    assert engine.launched == [[0, 1, 2, 3], [1, 3]]
    assert isinstance(found[0], QuarantinedRow)
    assert found[0].reason == "not_finite"
    brings = {row: found[row].images[0].visual is not None for row in (1, 2, 3)}  # type: ignore[union-attr]
    assert brings == {1: True, 2: True, 3: False}
    alone = ShardCapture(extractor_of(Engine(), share=True)).run([replace(samples[1], row=1)])
    np.testing.assert_array_equal(
        found[1].images[0].visual.logprobs,  # type: ignore[union-attr]
        alone[1].images[0].visual.logprobs,  # type: ignore[union-attr]
    )


def test_a_sample_for_which_records_in_transfer_leave_no_memory_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine()
    extractor = extractor_of(engine)
    states, fetch = engine.hidden_states, extractor._fetch

    def fits_alone(samples: Sequence[PreparedSample]) -> list[Tensor]:
        if not all(future.done() for future in extractor._flying) or samples[0].row == 3:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return states(samples)

    def late(*arguments: object) -> object:
        time.sleep(0.05)
        return fetch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "hidden_states", fits_alone)
    monkeypatch.setattr(extractor, "_fetch", late)
    found = ShardCapture(extractor).run([a_sample(row, "a") for row in range(4)])
    assert [isinstance(found[row], CapturedSample) for row in range(4)] == [True, True, True, False]
    assert found[3].reason == "out_of_memory"  # type: ignore[union-attr]


def test_an_error_on_the_host_is_raised_where_samples_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = extractor_of(Engine())

    def fails(*_: object) -> None:
        raise ValueError("a record that is none")

    monkeypatch.setattr(extractor, "_fetch", fails)
    with pytest.raises(ValueError, match="a record that is none"):
        ShardCapture(extractor).run([a_sample(row, "a") for row in range(4)])
