"""Pixels go to the teacher as bytes: it sees the bits that the processor itself would make."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from cache_schema import TargetSpec
from cache_schema.progress import Silent
from pipeline.capture import BuildConfig
from pipeline.job import Job, open_job
from pipeline.packing import Pack
from pipeline.samples import PreparedSample
from pipeline.transformers_engine import TransformersEngine, load_engine
from tests.tiny_models import tiny_llava, write_png


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> BuildConfig:
    folder = tmp_path_factory.mktemp("world")
    for number in range(3):
        write_png(folder / f"{number}.png", seed=number, size=(30 + 10 * number, 20))
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A circle."}]
    two = [{"from": "human", "value": "<image><image>\nSame?"}, {"from": "gpt", "value": "No."}]
    none = [{"from": "human", "value": "Well?"}, {"from": "gpt", "value": "Yes."}]
    rows = [{"image": "0.png", "conversations": said}, {"images": ["1.png", "2.png"], "conversations": two}]
    (folder / "data.json").write_text(json.dumps([*rows, {"conversations": none}]))
    return BuildConfig(
        teacher=tiny_llava(folder / "teacher"),
        data=folder / "data.json",
        image_root=folder,
        out=str(folder / "cache"),
        spec=TargetSpec(),
        device="cpu",
    )


def prepared(config: BuildConfig) -> tuple[Job, list[PreparedSample]]:
    job = open_job(config, Silent())
    return job, [job.preparer.prepare(row) for row in job.dataset]


def test_a_batch_of_bytes_becomes_the_processors_own_values(config: BuildConfig) -> None:
    job, samples = prepared(config)
    processor = AutoProcessor.from_pretrained(config.teacher)
    expected = []
    for row in job.dataset:
        for path in row.images:
            image = Image.open(config.image_root / path).convert("RGB")
            expected.append(processor.image_processor([image], return_tensors="pt")["pixel_values"])
    assert [sample.pixel_inputs["pixel_values"].dtype for sample in samples[:2]] == [torch.uint8] * 2
    assert [sample.pixel_bytes for sample in samples] == [3 * 32 * 32 * 4, 2 * 3 * 32 * 32 * 4, 0]
    for dtype in ("float32", "bfloat16"):
        engine = engine_of(config, job, dtype)
        pixels = engine._inputs([Pack(samples=(sample,)) for sample in samples])["pixel_values"]
        assert pixels.is_contiguous()
        assert torch.equal(pixels, torch.cat(expected).to(getattr(torch, dtype)))
        assert "pixel_values" not in engine._inputs([Pack(samples=(samples[2],))])


def engine_of(config: BuildConfig, job: Job, dtype: str) -> TransformersEngine:
    return load_engine(
        config.teacher, vocab_size=job.vocab_size, pad_token_id=job.pad_token_id, dtype=dtype, device="cpu"
    )


def test_an_engine_that_processes_images_itself_gets_values(config: BuildConfig) -> None:
    values = replace(config, engine="vllm")
    _, plain = prepared(values)
    _, narrow = prepared(config)
    for ours, theirs in zip(narrow[:2], plain[:2], strict=True):
        assert theirs.pixel_table is None
        assert theirs.pixel_inputs["pixel_values"].dtype == torch.float32
        assert theirs.pixel_bytes == ours.pixel_bytes  # windows end at the same rows
