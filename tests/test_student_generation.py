"""Ends of answers, padding columns that are never generated, references, and what an export says."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, GenerationConfig, LogitsProcessor

from cache_schema import KdcacheError, TargetSpec, open_cache
from cache_schema.errors import RowRejected
from cache_schema.progress import Silent
from models.folder import load_model, load_processor
from pipeline.capture import BuildConfig, build
from student.answers import references_of
from student.assemble import new_student
from student.evaluate import evaluate
from student.export import export
from student.folder import save_folder
from student.generation import answer_ends, end_ids, padding_ids
from student.settings import EvaluateConfig, NewStudentConfig
from student.stages import DFT, SFT
from student.train import train
from tests.student_caches import World, make_world
from tests.test_student_evaluate import tiny_language_model
from tests.test_student_train import Said, settings
from tests.tiny_models import CHAT_TEMPLATE, tiny_dataset, tiny_llava, tiny_tokenizer

END = "<|im_end|>"
# Answers end in END and a line end, as Qwen's templates write them; the tokenizer's eos is another.
TEMPLATE = CHAT_TEMPLATE.replace("<|endoftext|>", f"{END}\n").replace("OPEN", "{% generation %}")
TEMPLATE = TEMPLATE.replace("CLOSE", "{% endgeneration %}")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def rows_file(folder, rows):
    path = Path(folder) / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def ask(model, data, progress=None, **changes):
    options = {"model": model, "data": data, "image_root": Path(data).parent, "max_new_tokens": 12}
    return evaluate(EvaluateConfig(**{**options, **changes}), progress or Said())


QUESTION = {"conversations": [{"from": "human", "value": "What colour?"}, {"from": "gpt", "value": "red"}]}


# ---- padding columns ----


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_padding_columns_are_never_generated(world, tmp_path, tied):
    """Rows beyond the tokenizer so large that they win everywhere: in evaluation and in the export."""
    folder = tiny_llava(tmp_path / "student", tie_word_embeddings=tied)
    model, processor = load_model(folder), load_processor(folder)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[340:] = 50.0 * torch.randn(12, head.shape[1], generator=torch.Generator().manual_seed(3))
    save_folder(model, processor, folder)
    assert padding_ids(model, processor) == list(range(340, 352))
    data = rows_file(tmp_path, [{**QUESTION, "id": str(i)} for i in range(3)])
    inputs = processor.tokenizer("USER: What colour? ASSISTANT:", return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    own = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert (own.generate(**inputs, **options)[0] >= 340).any(), "it would, if it were let"

    ask(folder, data, predictions=tmp_path / "own.jsonl")
    export(folder, tmp_path / "export", Silent())
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "export").eval()
    written = exported.generate(**inputs, **options)[0]
    assert (written < 340).all()
    expected = exported.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    answer = processor.tokenizer.decode(expected, skip_special_tokens=True).strip()
    lines = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == [answer] * 3, "evaluation stops as the export does"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_export_has_no_padding_to_emit(world, tmp_path, tied):
    """Without the generation config, which other engines need not read: columns after the last token are
    gone, and one between tokens is never the most likely. All other logits are as they were."""
    folder = tiny_llava(tmp_path / "student", tie_word_embeddings=tied)
    model, processor = load_model(folder), load_processor(folder)
    holes = [345, 346]
    processor.tokenizer.add_tokens([f"<extra{number}>" for number in range(9)])  # 340 to 348
    vocabulary = {
        token: place for token, place in processor.tokenizer.get_vocab().items() if place not in holes
    }
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[[*holes, 349, 350, 351]] = 50.0
    model.generation_config.suppress_tokens = [9, 351]
    save_folder(model, processor, folder)
    exported_to, original = tmp_path / "export", load_model(folder).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerFast.get_vocab", lambda self: vocabulary)
        export(folder, exported_to, Silent())
    made = load_model(exported_to).eval()
    assert made.config.get_text_config().vocab_size == 349 == len(made.get_input_embeddings().weight)
    assert GenerationConfig.from_pretrained(exported_to).suppress_tokens == [9, *holes]
    ids = torch.arange(340).reshape(10, 34)
    tokens = [token for token in range(349) if token not in holes]
    with torch.no_grad():
        before, after = original(input_ids=ids).logits, made(input_ids=ids).logits
    torch.testing.assert_close(after[..., tokens], before[..., tokens])
    assert (before.argmax(-1) >= 345).any()
    assert not torch.isin(after.argmax(-1), torch.tensor(holes)).any()
    assert after[..., holes].amax() < after.amax(-1).min()


def test_training_pushes_padding_down(world, tmp_path):
    folder = tiny_llava(tmp_path / "student", tie_word_embeddings=False)
    model, processor = load_model(folder), load_processor(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight[340:] *= 3.0
    save_folder(model, processor, folder)
    cache = open_cache(world.cache)
    samples = [cache[index] for index in range(len(cache)) if not cache[index].images]

    def padding_mass(where):
        trained, masses = load_model(where).eval(), []
        for sample in samples:
            ids = torch.tensor(sample.input_ids)[None].long()
            with torch.no_grad():
                logits = trained(input_ids=ids).logits[0, sample.positions["response"]]
            masses.append(float(logits.softmax(-1)[:, 340:].sum(-1).mean()))
        return sum(masses) / len(masses)

    assert padding_mass(folder) > 0.5
    for stage in (SFT, DFT):
        changes = {"student": folder, "max_steps": 20, "learning_rate": 3e-3}
        train(settings(world, tmp_path / stage.name, stage, **changes), Said())
        assert padding_mass(tmp_path / stage.name / "model") < 0.1, stage.name


# ---- ends of answers ----


def test_the_token_that_ends_the_answers_is_an_end_token_of_all_that_follows(tmp_path):
    """Answers end in `<|im_end|>`, which no generation config names, and the tokenizer's eos is another."""
    tokenizer = tiny_tokenizer(words=341, specials=[END])
    end, eos = tokenizer.convert_tokens_to_ids(END), tokenizer.eos_token_id
    folder = tiny_llava(tmp_path / "teacher", words=341)
    processor = load_processor(folder)
    processor.tokenizer, processor.chat_template = tokenizer, TEMPLATE
    processor.save_pretrained(folder)
    data = tiny_dataset(tmp_path / "data", rows=8)
    options = {"teacher": folder, "data": data.data, "image_root": data.image_root}
    build(BuildConfig(**options, out=str(tmp_path / "cache"), spec=TargetSpec(top_k=4)), Silent())
    cache = open_cache(tmp_path / "cache")
    assert answer_ends(cache, tokenizer) == {end}
    model = load_model(folder)
    assert model.generation_config.eos_token_id == eos
    assert end_ids(model, load_processor(folder)) == {eos, end}, "as the chat template says"

    world = World(student=folder, image_root=data.image_root, cache=tmp_path / "cache")
    run = train(settings(world, tmp_path / "run", max_steps=1, global_batch=2), Said())
    export(Path(run["model"]), tmp_path / "export", Silent())
    words = tiny_language_model(tmp_path / "words", tokenizer=tokenizer)
    made = {"vision_tower": folder, "language_model": words, "out": tmp_path / "new"}
    new_student(NewStudentConfig(**made, like=str(tmp_path / "cache")))
    for name in ("run/model", "export", "new"):
        assert GenerationConfig.from_pretrained(tmp_path / name).eos_token_id == sorted([eos, end]), name
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "What?"}]}], add_generation_prompt=True
    )
    inputs = tokenizer(text, return_tensors="pt")
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "export").eval()
    forced = ForcedTokens([5, 6, end, 7, 8])
    written = exported.generate(**inputs, max_new_tokens=5, logits_processor=[forced])
    assert written[0, inputs["input_ids"].shape[1] :].tolist() == [5, 6, end]


class ForcedTokens(LogitsProcessor):
    """Lets a model say these tokens one after the other."""

    def __init__(self, tokens):
        self.tokens = iter(tokens)

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self.tokens)] = 0.0
        return forced


def test_evaluation_is_not_bent_by_a_generation_config(world, tmp_path):
    data = rows_file(tmp_path, [QUESTION])
    plainly = ask(world.student, data, predictions=tmp_path / "plain.jsonl")
    assert "set_aside" not in plainly
    bent = tmp_path / "bent"
    shutil.copytree(world.student, bent)
    config = json.loads((bent / "generation_config.json").read_text())
    config |= {"min_new_tokens": 9, "num_beams": 4, "repetition_penalty": 5.0, "suppress_tokens": [7, 8]}
    (bent / "generation_config.json").write_text(
        json.dumps({**config, "temperature": 0.7, "do_sample": True})
    )
    said = Said()
    result = ask(bent, data, said, predictions=tmp_path / "bent.jsonl")
    assert (tmp_path / "plain.jsonl").read_bytes() == (tmp_path / "bent.jsonl").read_bytes()
    named = {"min_new_tokens 9", "num_beams 4", "repetition_penalty 5.0", "suppress_tokens [7, 8]"}
    assert set(result["set_aside"]) == named
    assert any("answers are greedy, without" in line and "num_beams 4" in line for line in said.lines)


# ---- exports ----


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("said", [True, False], ids=["config tied", "config untied"])
def test_an_export_says_tied_as_the_weights_are(tmp_path, tied, said):
    folder = tiny_llava(tmp_path / "student", tie_word_embeddings=tied)
    model, processor = load_model(folder), load_processor(folder)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = said
    save_folder(model, processor, tmp_path / "saved")
    document = json.loads((tmp_path / "saved/config.json").read_text())
    assert document["tie_word_embeddings"] == tied
    assert document["text_config"]["tie_word_embeddings"] == tied
    again = load_model(tmp_path / "saved")
    assert torch.equal(again.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


def test_a_card_tells_all_stages_from_any_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = replace(settings(world, Path("runs/1-sft"), SFT, max_steps=2), seed=5)
    train(first, Said())
    second = settings(world, Path("runs/2-dft"), student=Path("runs/1-sft/model"), max_steps=3)
    train(second, Said())
    shutil.copytree("runs/2-dft/model", "elsewhere")
    shutil.move("runs", "moved")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for number, source in enumerate(("elsewhere", "moved/2-dft", "moved/2-dft/model")):
        made = export(tmp_path / source, tmp_path / f"export-{number}", Silent())
        assert made["stages"] == ["sft", "dft"], source
        card = (tmp_path / f"export-{number}/README.md").read_text()
        for words in (
            "Stage 1: sft",
            "Stage 2: dft",
            "2 steps of 8 samples",
            "3 steps of 8 samples",
            "seed 5",
        ):
            assert words in card, (source, words)
    assert export(tmp_path / "export-0", tmp_path / "again", Silent())["stages"] == ["sft", "dft"]
    for model in ("1-sft", "2-dft"):  # as version 0.1 left them
        (tmp_path / f"moved/{model}/model/training.json").unlink()
    shutil.move(tmp_path / "moved", tmp_path / "runs")
    assert export(tmp_path / "runs/2-dft", tmp_path / "old", Silent())["stages"] == ["sft", "dft"]


# ---- references ----


@pytest.mark.parametrize(
    ("value", "questions", "expected"),
    [
        ("red", 1, [("red",)]),
        (2, 1, [("2",)]),
        (2.0, 1, [("2",)]),
        (2.5, 1, [("2.5",)]),
        (["red", "scarlet"], 1, [("red", "scarlet")]),
        ([2], 1, [("2",)]),
        ([["red", 2]], 1, [("red", "2")]),
        ([["red"], ["yes", "y"]], 2, [("red",), ("yes", "y")]),
        ([{"answer": "red", "answer_confidence": "yes"}], 1, [("red",)]),
        ([{"answer": f"a{i}", "answer_id": i} for i in range(10)], 1, [tuple(f"a{i}" for i in range(10))]),
        ([[{"answer": "red"}], ["no"]], 2, [("red",), ("no",)]),
        (["red", "no"], 2, [("red",), ("no",)]),
    ],
)
def test_references_of_a_row(value, questions, expected):
    assert references_of(value, questions) == expected


@pytest.mark.parametrize(
    ("value", "questions", "message"),
    [
        (None, 1, "its `answers` hold null: give strings or numbers"),
        ({"answer": "red"}, 1, "hold dict"),
        ([], 1, "are an empty list"),
        ([None], 1, "hold null"),
        ([True], 1, "hold bool"),
        ([{"text": "red"}], 1, "hold dict"),
        ([float("nan")], 1, "hold float"),
        ([["red"], []], 2, "are an empty list"),
        ("red", 2, "are 1 for 2 questions"),
        ([["a"], ["b"], ["c"]], 2, "are 3 for 2 questions"),
    ],
)
def test_references_that_say_nothing_are_refused_in_words(value, questions, message):
    with pytest.raises(RowRejected, match=message) as caught:
        references_of(value, questions)
    assert caught.value.reason == "annotations"


def test_rows_that_could_not_be_asked_are_told(world, tmp_path):
    rows = [QUESTION, {**QUESTION, "answers": None}, {**QUESTION, "answers": {"answer": "red"}}]
    said = Said()
    result = ask(world.student, rows_file(tmp_path, rows), said)
    assert result["questions"] == 1
    assert result["skipped"] == {"annotations": 2}
    assert [line["row"] for line in result["skipped_rows"]] == [1, 2]
    assert "hold null" in result["skipped_rows"][0]["reason"]
    assert (
        "2 rows were not asked: annotations 2; first, row 1: annotations: its `answers` hold null"
        in said.lines[-1]
    )
    with pytest.raises(
        KdcacheError, match=r"no row of .* can be used: annotations 1; first, row 0: .*hold dict"
    ):
        ask(world.student, rows_file(tmp_path, rows[2:]))
