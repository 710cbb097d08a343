"""`kdcache answers`: a model's own answers as rows."""

import json

import pytest

from cache_schema.datasets.rows import open_dataset
from cache_schema.errors import KdcacheError, WrongUsage
from cache_schema.progress import Silent
from student.answering import Answerer
from student.own_answers import write_answers
from student.settings import AnswersConfig
from tests.tiny_models import tiny_llava, write_png


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_png(folder / "images" / "a.png", seed=1)
    write_png(folder / "images" / "b.png", seed=2)
    turns = [
        {"from": "human", "value": "<image>\nwhat colour?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "and here?\n<image>"},
        {"from": "gpt", "value": "blue"},
    ]
    rows = [
        {"id": "two", "images": ["a.png", "b.png"], "conversations": turns},
        {"id": "text", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
        {"id": "lost", "image": "nowhere.png", "conversations": turns[:2]},
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    tiny_llava(folder / "model", seed=2)
    return folder


def answers(world, out, **options):
    given = {"model": world / "model", "data": world / "rows.json", "image_root": world / "images"}
    config = AnswersConfig(**{**given, "out": out, "max_new_tokens": 4, **options})
    return write_answers(config, Silent())


def test_every_question_follows_the_models_own_answers(world, tmp_path, monkeypatch):
    prompts = []

    def spoken(self, questions, image_root):
        prompts.extend(question.prompt for question in questions)
        yield {place: f"own{len(question.images)}" for place, question in enumerate(questions)}

    monkeypatch.setattr(Answerer, "answer", spoken)
    found = answers(world, tmp_path / "rows.jsonl")
    assert {key: found[key] for key in ("rows", "answers", "skipped")} == {
        "rows": 2,
        "answers": 3,
        "skipped": {"missing_image": 1},
    }
    assert ["own1" in prompt for prompt in prompts] == [False, False, True]
    assert not any("red" in prompt or "blue" in prompt for prompt in prompts)
    dataset = open_dataset(tmp_path / "rows.jsonl", Silent())
    assert [dataset[row].answers for row in range(2)] == [["own1", "own2"], ["own0"]]
    assert [dataset[row].sample_id for row in range(2)] == ["two", "text"]
    assert dataset[0].images == ("a.png", "b.png")


def test_an_empty_answer_ends_the_conversation(world, tmp_path, monkeypatch):
    def spoken(self, questions, image_root):
        yield {place: "own" if len(question.images) == 1 else "" for place, question in enumerate(questions)}

    monkeypatch.setattr(Answerer, "answer", spoken)
    found = answers(world, tmp_path / "rows.jsonl")
    assert (found["rows"], found["cut_at_empty_answers"], found["without_answers"]) == (1, 2, 1)
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert row["images"] == ["a.png"]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_draws_are_those_of_the_seed(world, tmp_path):
    def written(name, **options):
        answers(world, tmp_path / name, **options)
        return (tmp_path / name).read_text()

    greedy = written("greedy")
    assert written("again", seed=5) == greedy
    drawn = written("drawn", temperature=2.0, seed=1)
    assert drawn != greedy
    assert written("same", temperature=2.0, seed=1) == drawn
    assert written("other", temperature=2.0, seed=2) != drawn


def test_what_cannot_be_done_is_told(world, tmp_path):
    (tmp_path / "there.jsonl").write_text("mine")
    with pytest.raises(WrongUsage, match="top_p needs a temperature"):
        answers(world, tmp_path / "new.jsonl", top_p=0.5)
    with pytest.raises(KdcacheError, match="exists; choose another --out"):
        answers(world, tmp_path / "there.jsonl")
    assert (tmp_path / "there.jsonl").read_text() == "mine"
    (tmp_path / "lost.json").write_text(json.dumps(json.loads((world / "rows.json").read_text())[2:]))
    with pytest.raises(KdcacheError, match=r"no row of .*lost\.json can be asked: .*nowhere\.png"):
        answers(world, tmp_path / "new.jsonl", data=tmp_path / "lost.json")
    assert not (tmp_path / "new.jsonl").exists()
