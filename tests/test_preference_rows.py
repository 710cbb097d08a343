"""Rows with a chosen and a rejected answer: their forms, one cache of them, and a stage from it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cache_schema import TargetSpec, open_cache
from cache_schema.datasets.image_roots import open_root
from cache_schema.datasets.rows import open_dataset
from cache_schema.errors import RowRejected
from cache_schema.operations.verify import verify
from cache_schema.progress import Silent
from cache_schema.runs import read_metrics
from models.folder import load_model, load_processor
from pipeline.capture import BuildConfig, build
from student.answering import rows_to_ask
from student.order import StreamConfig
from student.pairs import PairStream, halves
from student.settings import TrainConfig
from student.stages import PD
from student.train import train
from tests.tiny_models import tiny_llava, write_png

QUESTION = "What is the colour of the circle?"


def said(*turns):
    names = ("human", "gpt")
    return [{"from": names[i % 2], "value": text} for i, text in enumerate(turns)]


def messages(*turns):
    names = ("user", "assistant")
    return [{"role": names[i % 2], "content": text} for i, text in enumerate(turns)]


FORMS = {
    "RLAIF-V": {"question": QUESTION, "chosen": "red", "rejected": "blue"},
    "a prompt of messages": {
        "prompt": messages(QUESTION),
        "chosen": [{"role": "assistant", "content": "red"}],
        "rejected": [{"role": "assistant", "content": "blue"}],
    },
    "whole messages": {
        "prompt": QUESTION,
        "chosen": messages(QUESTION, "red"),
        "rejected": messages(QUESTION, "blue"),
        "messages": messages(QUESTION, "red"),
    },
    "whole conversations": {"chosen": said(QUESTION, "red"), "rejected": said(QUESTION, "blue")},
    "objects": {
        "chosen": {"conversations": said(QUESTION, "red")},
        "rejected": {"messages": messages(QUESTION, "blue")},
    },
    "one turn after conversations": {
        "conversations": said(QUESTION),
        "chosen": {"from": "gpt", "value": "red"},
        "rejected": {"from": "gpt", "value": "blue"},
    },
    "beside an answered conversation": {
        "conversations": said(QUESTION, "red"),
        "chosen": "red",
        "rejected": "blue",
    },
    "JSON text": {
        "chosen": json.dumps(messages(QUESTION, "red")),
        "rejected": json.dumps(messages(QUESTION, "blue")),
    },
    "text that begins like JSON": {"question": QUESTION, "chosen": "[red", "rejected": "{}"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_pair_is_two_samples_of_one_prompt(form, tmp_path):
    row = {"id": "p", "image": "a.png", "score": 3, **FORMS[form]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "id": None}))
    dataset = open_dataset(tmp_path / "rows.jsonl")
    chosen, rejected, third, _ = dataset
    assert [each.sample_id for each in dataset] == ["p/chosen", "p/rejected", "1/chosen", "1/rejected"]
    assert [dataset.label_of(i) for i in range(4)] == [each.sample_id for each in dataset]
    assert [each.row for each in dataset] == [0, 1, 2, 3]
    answers = ["[red", "{}"] if "begins" in form else ["red", "blue"]
    assert [chosen.answers, rejected.answers] == [answers[:1], answers[1:]]
    assert chosen.messages[:-1] == rejected.messages[:-1]
    assert chosen.messages[0]["content"][-1] == {"type": "text", "text": QUESTION}
    assert chosen.images == rejected.images == third.images == ("a.png",)
    assert dict(chosen.extra) == {"score": 3}
    assert chosen.supervised == rejected.supervised == ()
    assert len(set(dataset.groups.tolist())) == 1


def test_answers_before_the_halves_differ_are_context(tmp_path):
    begin = ("one?", "1", "two?")
    row = {"chosen": said(*begin, "2", "three?", "3"), "rejected": said(*begin, "two", "three?", "4")}
    again = {"chosen": said("a?", "b"), "rejected": said("a?", "b"), "system": "not read"}
    whole = {"system": "Be short.", "prompt": "a?", "chosen": "b", "rejected": "c"}
    (tmp_path / "rows.json").write_text(json.dumps([row, again, whole]))
    dataset = open_dataset(tmp_path / "rows.json")
    assert [each.supervised for each in dataset] == [(False, True, True)] * 2 + [()] * 4
    assert [message["role"] for message in dataset[4].messages] == ["system", "user", "assistant"]
    assert len(set(dataset.groups.tolist())) == 3  # no image: a pair stands together all the same
    assert not dataset.first_images.any()


def test_parquet_rows_with_images_in_them(tmp_path):
    image = write_png(tmp_path / "a.png", seed=1).read_bytes()
    rows = [
        {
            "images": [{"bytes": image, "path": None}],
            "prompt": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "?"}]}
            ],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "no"}]}],
        }
        for answer in ("yes", "maybe")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    dataset = open_dataset(tmp_path / "rows.parquet")
    assert [each.answers for each in dataset] == [["yes"], ["no"], ["maybe"], ["no"]]
    assert len(set(dataset.first_images.tolist())) == 1
    assert dataset.first_images.all()
    assert [list(each.embedded.values()) for each in dataset] == [[image]] * 4


def test_what_is_no_pair_in_a_file_of_pairs_is_two_rejected_rows(tmp_path):
    good = {"question": "a?", "chosen": "b", "rejected": "c"}
    bad = [
        {"id": "x", "question": "a?", "chosen": "b"},
        {"chosen": "b", "rejected": "c"},
        {"question": "a?", "chosen": [{"x": 1}], "rejected": "c"},
    ]
    lines = [json.dumps(good), "{broken", *map(json.dumps, bad)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    dataset = open_dataset(tmp_path / "rows.jsonl")
    assert len(dataset) == 10
    found = {}
    for row in range(10):
        try:
            found[row] = dataset[row].sample_id
        except RowRejected as error:
            found[row] = error.reason
    assert found == {0: "0/chosen", 1: "0/rejected", 2: "broken_json", 3: "broken_json"} | {
        4: "no_pair", 5: "no_pair", 6: "no_turns", 7: "no_turns", 8: "broken_row", 9: "broken_row"
    }  # fmt: skip
    assert dataset.label_of(5) == "x/rejected"
    assert dataset.label_of(2) == "1/chosen"


class Told(Silent):
    """What was said."""

    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


def rows_of(count):
    """`count` pairs of different lengths about `count // 2` images, every fourth of text alone."""
    random = np.random.default_rng(0)
    words = ("red", "blue", "green", "grey", "circle", "small", "large")
    made = []
    for row in range(count):
        texts = [" ".join(random.choice(words, size=int(random.integers(1, 8)))) for _ in range(2)]
        made.append({"id": "same", "question": QUESTION, "chosen": texts[0] + " yes", "rejected": texts[1]})
        if row % 4 != 3:
            made[-1] |= {"image": f"{row // 2}.png"}
    made[2]["chosen"] = said("one?", "1", QUESTION, "red")
    made[2]["rejected"] = said("one?", "1", QUESTION, "blue")
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a teacher, a student, images and rows of 12 pairs, one of whose halves is too long; and
    the cache that `build` made of them."""
    folder = tmp_path_factory.mktemp("world")
    tiny_llava(folder / "teacher", seed=1, hidden=48)
    tiny_llava(folder / "student", seed=2)
    rows = rows_of(12)
    rows[5]["rejected"] = "blue " * 400
    for row in range(6):
        write_png(folder / "images" / f"{row}.png", seed=row)
    (folder / "rows.json").write_text(json.dumps(rows))
    config = BuildConfig(
        teacher=folder / "teacher",
        data=folder / "rows.json",
        image_root=folder / "images",
        out=str(folder / "cache"),
        spec=TargetSpec(targets=("response",), precision="full", top_k=8),
        shard_size=6,
        max_length=200,
        device="cpu",
    )
    told = Told()
    summary = build(config, told)
    assert "pairs of which one half alone is in quarantine, left out in training: 1" in told.lines
    assert (summary.captured, summary.quarantined) == (23, {"over_long": 1})
    return folder


def settings(folder, out, **changes):
    stage = {"global_batch": 11, "max_steps": 1, "learning_rate": 5e-3}
    stage |= {name: changes.pop(name) for name in list(changes) if name in stage}
    given = {"log_every": 1, "trackers": (), "workers": 1, "micro_batch": 4, "device": "cpu", **changes}
    return TrainConfig(
        stage=replace(PD, **stage),
        student=folder / "student",
        cache=str(folder / "cache"),
        image_root=str(folder / "images"),
        out=out,
        **given,
    )


def test_every_sample_is_accounted_for_and_pairs_are_found(world):
    cache = open_cache(str(world / "cache"))
    assert verify(world / "cache").problems == []
    assert sorted([*cache.index().row.tolist(), *(row.row for row in cache.quarantined())]) == list(range(24))
    assert next(cache.quarantined()).sample_id == "same/rejected"
    chosen, rejected = halves(cache)
    rows = cache.index().row
    assert rows[chosen].tolist() == [row for row in rows.tolist() if row % 2 == 0 and row != 10]
    assert (rows[rejected] == rows[chosen] + 1).all()
    stream = PairStream([cache], StreamConfig(global_batch=4, seed=2), micro_batch=4)
    assert stream.alone == 1
    read = [
        located.sample()
        for step in stream.read(0, stream.steps_per_epoch)
        for part in step.micro_batches
        for located in part
    ]
    assert sorted(sample.row for sample in read[::2]) == [row for row in range(0, 24, 2) if row != 10]
    assert [sample.row + 1 for sample in read[::2]] == [sample.row for sample in read[1::2]]
    kept = {sample.row: sample for sample in read}
    for row in (4, 5):  # the shared first answer is no label
        first = int(kept[row].response_positions[0])
        assert kept[row].response_positions.tolist() == list(range(first, len(kept[row].input_ids) - 1))
        assert first == kept[4].response_positions[0] > 40


@torch.no_grad()
def likelihood(model, processor, conversation, root, tokens):
    """The log-likelihood of a conversation's last answer, by the first `tokens` of a model's own logits."""
    messages = [{**message, "content": list(message["content"])} for message in conversation.messages]
    first = messages[0]["content"]
    if conversation.images:
        first[0] = {"type": "image", "path": str(root / conversation.images[0])}
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    learned = inputs.pop("assistant_masks")[0].numpy()
    start = int(np.flatnonzero(np.diff(learned, prepend=0) == 1)[-1])
    logq = torch.log_softmax(model(**inputs).logits[0, :, :tokens].double(), dim=-1)
    ids = inputs["input_ids"][0]
    return sum(logq[t - 1, ids[t]].item() for t in range(start, len(ids)) if learned[t])


def test_a_stage_from_rows_to_its_first_loss_is_that_of_dense_logits(world, tmp_path):
    """11 pairs in one step: the mean of -log sigmoid of the margin, from both models' own logits."""
    told = Told()
    train(settings(world, tmp_path / "run"), told)
    assert (
        f"1 of 23 samples of {open_cache(str(world / 'cache')).url} have no partner and are left out"
        in told.lines
    )
    dataset = open_dataset(world / "rows.json")
    assert len(load_processor(world / "teacher").tokenizer) == 340
    found = {}
    for name, tokens in (("student", None), ("teacher", 340)):  # the student's padding counts
        model, processor = load_model(world / name, torch.float32), load_processor(world / name)
        found[name] = np.array(
            [
                likelihood(model, processor, dataset[row], world / "images", tokens)
                for row in range(24)
                if row // 2 != 5
            ]
        )
    rewards = PD.preference * (found["student"] - found["teacher"])
    margins = rewards[::2] - rewards[1::2]
    (line,) = (line for line in read_metrics(tmp_path / "run") if line["group"] == "train")
    assert line["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-5)
    assert line["reward_margin"] == pytest.approx(margins.mean(), abs=1e-5)
    assert line["reward_accuracy"] == pytest.approx((margins > 0).mean(), abs=1e-6)


def test_the_example_of_the_docs_is_three_pairs(tmp_path):
    page = (Path(__file__).parent.parent / "docs/building.md").read_text(encoding="utf-8")
    (tmp_path / "pairs.json").write_text(page.split("### Pairs")[1].split("```json")[1].split("```")[0])
    dataset = open_dataset(tmp_path / "pairs.json")
    assert [each.answers for each in dataset] == [["A cat."], ["A dog."]] * 3
    assert {each.images for each in dataset} == {("cat.jpg",)}
    assert len({str(each.messages[:-1]) for each in dataset}) == 1


def test_the_question_of_a_pair_is_asked_once(world):
    asked = list(rows_to_ask(world / "rows.json", open_root(world / "images"), None, 0, Silent()))
    assert [row for row, _ in asked] == list(range(0, 24, 2))
    assert {conversation.sample_id for _, conversation in asked} == {"same/chosen"}
    few = list(rows_to_ask(world / "rows.json", open_root(world / "images"), 5, 0, Silent()))
    assert len(few) == 5
    assert not any(row % 2 for row, _ in few)
