"""What must hold for a teacher of any family: targets, positions and inputs are its own."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from cache_schema import Sample, TargetSpec, open_cache
from cache_schema.datasets.image_roots import open_root
from cache_schema.datasets.rows import Conversation, open_dataset
from cache_schema.progress import Silent
from models.known import KnownMask, PlacedIds, known_mask
from pipeline.capture import BuildConfig, build
from pipeline.transformers_engine import TransformersEngine
from student.checks import check_student
from student.collate import Batch, Collator
from student.pixels import PixelInputs
from student.prepare import checkpoint_activations
from student.stages import DFT
from tests.tiny_families import make
from tests.tiny_models import write_png
from views.sample_document import sample_document

SIZES = {"wide.png": (60, 36), "tall.png": (34, 62), "even.png": (40, 40), "second.png": (44, 38)}
ALONE = ("wide.png", "tall.png", "even.png")
"""The others stand beside another image only."""

SPEC = TargetSpec(targets=("response", "visual", "relation", "prompt"), precision="full", top_k=8)
UNSHARED = ("paligemma",)
MASKED = ("paligemma", "gemma3", "gemma3_capped")
"""Attention from image to image in both directions, which reads the mask."""
WAITING = ("idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Their towers drop padding or lay out grids by numbers that are on the device."""
UNPACKED = ("paligemma", "gemma3", "gemma3_capped")


def rows_for(name: str) -> list[dict[str, Any]]:
    def row(*turns: str, images: tuple[str, ...] = ()) -> dict[str, Any]:
        sides = ("human", "gpt")
        said = [{"from": sides[i % 2], "value": text} for i, text in enumerate(turns)]
        return {"images": list(images), "conversations": said}

    rows = [row("<image>\nWhat is it?", "A red circle.", images=(image,)) for image in ALONE]
    rows.append(row("<image>\nIs it blue?", "No, it is green.", images=("wide.png",)))
    if name == "paligemma":  # one answer, one image
        return rows
    rows.append(row("<image>\nA?", "Yes.", "And now?", "No, there are two.", images=("tall.png",)))
    rows.append(row("<image><image>\nSame?", "They differ.", images=("wide.png", "second.png")))
    rows.append(row("No picture at all?", "None."))
    return rows


def reference_inputs(
    name: str, processor: Any, conversation: Conversation, root: Path
) -> dict[str, torch.Tensor]:
    """The inputs that the processor itself makes of a conversation."""
    if name == "paligemma":
        images = [[Image.open(root / path) for path in conversation.images]]
        suffix = [conversation.answers[0] + "\n"]
        made = processor(text=["<image>"], images=images, suffix=suffix, return_tensors="pt")
        return {key: value for key, value in made.items() if key != "labels"}
    paths = iter(conversation.images)
    messages = [
        {
            "role": message["role"],
            "content": [
                part | {"image": Image.open(root / next(paths))} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in conversation.messages
    ]
    return dict(processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt"))


def check_family(name: str, folder: Path) -> None:
    """Builds a cache with the tiny teacher `name` and compares all of it with single plain forwards."""
    teacher = make(name, folder / "teacher")
    root = folder / "images"
    for number, (image, size) in enumerate(SIZES.items()):
        write_png(root / image, seed=number, size=size)
    data = folder / "data.json"
    data.write_text(json.dumps(rows_for(name)))
    config = BuildConfig(
        teacher=teacher,
        data=data,
        image_root=root,
        out=str(folder / "cache"),
        spec=SPEC,
        template="plain" if name == "paligemma" else None,
        batch_tokens=400,
        device="cpu",
    )
    whole = TransformersEngine.packed_hidden_states
    with mock.patch.object(
        TransformersEngine, "packed_hidden_states", autospec=True, side_effect=whole
    ) as packed:
        summary = build(config, Silent())
    assert summary.quarantined == {}, summary
    assert (packed.call_count > 1) is (name not in UNPACKED)  # the first call is the probe's
    cache = open_cache(config.out)
    assert cache.manifest.fingerprint.capture["sharing"] is (name not in UNSHARED)
    processor = AutoProcessor.from_pretrained(teacher)
    model = AutoModelForImageTextToText.from_pretrained(teacher).eval()
    dataset = open_dataset(data)
    assert len(cache) == len(dataset)
    assert check_student(cache, model, processor, root, DFT) is None
    collator = Collator(
        pixels=PixelInputs(processor),
        image_root=open_root(root),
        pad_token_id=processor.tokenizer.pad_token_id,
        image_token_id=model.config.image_token_id,
    )
    samples = [cache[i] for i in range(len(cache))]
    pictured = [sample for sample in samples if sample.images]
    with torch.inference_mode():
        together = model(**collator(pictured).inputs).logits
    check_placeholders(model, collator(pictured), name)
    for sample in samples:
        inputs = reference_inputs(name, processor, dataset[sample.row], root)
        check_inputs(sample, inputs, model.config)
        check_rebuilt(collator([sample]).inputs, inputs)
        with torch.inference_mode():
            logits = model(**inputs).logits[0, :, : len(processor.tokenizer)].double()
        check_targets(sample, logits)
        if sample.images:  # what a student makes of a whole batch from the cache
            batched = together[pictured.index(sample), : len(logits), : logits.shape[1]].double()
            np.testing.assert_allclose(batched, logits, rtol=1e-4, atol=1e-4)
        for image in sample_document(cache, sample.row, top=1)["images"]:
            assert image["layout"]["note"] is None, "a page lays its tokens over the picture"


def check_placeholders(model: Any, batch: Batch, name: str) -> None:
    """Ids that know their placeholders give the states and gradients of plain ones, bit by bit, and their
    forward and backward pass wait for nothing: there are no values on the meta device."""
    plain = {key: getattr(value, "plain", value) for key, value in batch.inputs.items()}
    assert {type(value) for value in batch.inputs.values()} == {PlacedIds, KnownMask, torch.Tensor}
    assert {type(value) for value in plain.values()} == {torch.Tensor}
    model.train()

    def run(model: Any, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        states = model.base_model(**inputs, use_cache=False).last_hidden_state
        states.square().sum().backward()
        found = [states.detach(), *(each.grad for each in model.parameters() if each.grad is not None)]
        model.zero_grad()
        return found

    ours, theirs = run(model, batch.inputs), run(model, plain)
    assert len(ours) == len(theirs) > 10
    assert all(map(torch.equal, ours, theirs))
    away = dict(batch.to(torch.device("meta")).inputs)
    if name not in MASKED:  # as a student without a need of it
        ones = torch.ones_like(away["attention_mask"])
        away["attention_mask"] = known_mask(ones, ones.numel())
    nowhere = copy.deepcopy(model).to("meta")
    if name in WAITING:
        with pytest.raises((RuntimeError, NotImplementedError)):
            run(nowhere, away)
    else:
        assert run(nowhere, away)[0].shape == ours[0].shape
        checkpoint_activations(SimpleNamespace(model=nowhere))
        assert run(nowhere, away)[0].shape == ours[0].shape
    with pytest.raises((RuntimeError, NotImplementedError)):
        run(nowhere, away | {key: plain[key].to("meta") for key in ("input_ids", "attention_mask")})
    model.eval()


def check_inputs(sample: Sample, inputs: dict[str, torch.Tensor], config: Any) -> None:
    np.testing.assert_array_equal(sample.input_ids, inputs["input_ids"][0])
    by_token = {
        key
        for key, value in inputs.items()
        if value.shape == inputs["input_ids"].shape and key != "attention_mask"
    }
    assert set(sample.model_inputs) == by_token - {"input_ids"}
    for key, value in sample.model_inputs.items():
        np.testing.assert_array_equal(value, inputs[key][0])
    placeholders = np.flatnonzero(sample.input_ids == config.image_token_id)
    np.testing.assert_array_equal(sample.visual_positions, placeholders)
    np.testing.assert_array_equal(
        np.concatenate([[], *(image.positions for image in sample.images)]), placeholders
    )
    assert all(len(image.positions) for image in sample.images)


def check_rebuilt(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The student's inputs from the cache are the processor's own: ids, types, pixels, grids, sizes."""
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=0, check_dtype=value.is_floating_point())


def check_targets(sample: Sample, logits: torch.Tensor) -> None:
    logprobs = logits.log_softmax(dim=1)
    for record, positions in (
        (sample.response, sample.response_positions),
        (sample.visual, sample.visual_positions),
        (sample.prompt, sample.prompt_positions),
    ):
        assert (record is None) == (len(positions) == 0)
        if record is None:
            continue
        at = torch.from_numpy(positions).long()
        ids = torch.from_numpy(record.token_ids).long()
        close = {"rtol": 1e-5, "atol": 1e-5}
        np.testing.assert_allclose(record.logprobs, logprobs[at].topk(8).values, **close)
        np.testing.assert_allclose(record.logprobs, logprobs[at].gather(1, ids), **close)
        np.testing.assert_allclose(record.logsumexp, logits[at].logsumexp(1), **close)
        tail = logprobs[at].scatter(1, ids, -torch.inf).logsumexp(1)
        np.testing.assert_allclose(record.tail_logprob[:, 0], tail, **close)
    following = logprobs[
        torch.from_numpy(sample.response_positions).long(), sample.labels[sample.response_positions + 1]
    ]
    np.testing.assert_allclose(sample.response.label_logprob, following, rtol=1e-5, atol=1e-5)
    assert len(sample.relations) == len(sample.images)
    for relation, image in zip(sample.relations, sample.images, strict=True):
        part = logits[torch.from_numpy(image.positions).long()]
        gram = (part @ part.T).numpy()
        ours = relation.factor.astype(np.float64) @ relation.factor.T
        assert 1 - (gram * ours).sum() / np.linalg.norm(gram) / np.linalg.norm(ours) <= 1.1e-5
        np.testing.assert_allclose(relation.norm, np.linalg.norm(gram), rtol=2e-5)
