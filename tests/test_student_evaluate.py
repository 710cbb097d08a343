"""Answers and their scores, the distance to the teacher, new students, export and report."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cache_schema import KdcacheError, TargetSpec, open_cache
from cache_schema.datasets.image_roots import open_root
from cache_schema.datasets.images import open_image
from cache_schema.progress import Silent
from cache_schema.runs import read_metrics, read_result
from models.folder import load_model, load_processor
from student.answering import Answerer
from student.answers import Answered, score
from student.assemble import new_student as assemble
from student.collate import Collator
from student.evaluate import evaluate
from student.export import export
from student.heldout import HeldOut, measure_samples
from student.losses import LossWeights
from student.model import DistilledStudent
from student.pixels import PixelInputs
from student.recipe import train_recipe
from student.settings import EvaluateConfig, NewStudentConfig
from student.stages import DFT, DPT, SFT, Recipe, RecipeStage
from student.train import train
from tests.student_caches import fake_capture, make_world
from tests.test_student_train import settings
from tests.tiny_models import tiny_dataset, tiny_tokenizer
from views.run_curves import StageRun, draw_curves
from views.run_report import final_table, report


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def asked(kind, reference, prediction, *more):
    return Answered(kind=kind, references=(reference, *more), prediction=prediction)


# ---- scores ----


def test_scores_are_those_counted_by_hand():
    answered = [
        asked("colour", "red", "Red."),
        asked("colour", "red", "blue"),
        asked("colour", "blue", "blue"),
        asked("there", "yes", "yes, there is"),
        asked("there", "no", "yes"),
        asked("there", "yes", "no"),
        asked("there", "no", "No"),
        asked("there", "no", "perhaps"),
    ]
    result = score(answered)
    assert result["questions"] == 8
    assert result["exact_match"] == 3 / 8
    assert result["by_kind"]["colour"] == {
        "questions": 3,
        "exact_match": 2 / 3,
        "majority": {"answer": "red", "exact_match": 2 / 3},
    }
    assert result["by_kind"]["there"]["exact_match"] == 1 / 5
    assert result["by_kind"]["there"]["majority"] == {"answer": "no", "exact_match": 3 / 5}
    assert result["yes_no"] == {
        "questions": 5,
        "accuracy": 2 / 5,
        "precision": 1 / 3,
        "recall": 1 / 2,
        "f1": pytest.approx(2 / 5),
        "yes_share": 3 / 5,  # "perhaps" too: by POPE's rule everything without a no is a yes
    }
    assert result["rules"] == {"exact_match": "GQA", "yes_no": "POPE"}
    assert "vqa_soft" not in result


def test_a_model_that_never_says_yes_has_no_f1():
    result = score([asked("a", "yes", "no"), asked("a", "no", "no")])["yes_no"]
    assert (result["precision"], result["recall"], result["f1"]) == (0.0, 0.0, 0.0)


def test_several_references_are_scored_as_in_textvqa():
    references = ["2"] * 3 + ["3"] * 6 + ["many"]
    # two: leaving out one of its three leaves 2 (2/3), leaving out another leaves 3 (1)
    result = score([asked("n", *references[:1], "two", *references[1:])])
    assert result["vqa_soft"] == {"questions": 1, "accuracy": pytest.approx(0.9)}
    assert result["rules"] == {"exact_match": "GQA", "vqa_soft": "TextVQA"}


def exact(prediction, reference):
    return score([asked("a", reference, prediction)])["exact_match"] == 1.0


def yes_no(truth, prediction):
    return score([asked("a", truth, prediction)])["yes_no"]["accuracy"] == 1.0


def soft(prediction, *references):
    return score([asked("a", references[0], prediction, *references[1:])])["vqa_soft"]["accuracy"]


def test_exact_match_is_that_of_gqa():
    assert exact("Red.", "red")
    assert exact(" A red circle ", "a Red circle.")
    assert exact("3.5.", "3.5")
    assert not exact("red!", "red")
    assert not exact("the red", "red")
    assert not exact("two", "2")
    assert not exact("a  circle", "a circle")  # blanks within were single ones before version 0.2
    assert not exact("red .", "red")


def test_every_difference_of_version_0_1_to_the_published_rules_is_gone():
    """vqa_soft without contractions, hyphens and possessives; yes/no by the first word."""
    pairs = {
        "t-shirt": "t shirt",
        "T-shirt - blue": "tshirt blue",
        "dont": "don't",
        "9-5": "9 5",
        "dog's": "dog 's",
        "10:30": "10:30",
        "coca - cola": "coca cola",
        "x;y z; w": "xy z w",
        "hello; world;there": "hello worldthere",
        "no,yes": "noyes",
        "what?ever": "whatever",
        "5 oclock": "5 o'clock",
        "wont": "won't",
        "red / blue/green": "red bluegreen",
        "a_b _c": "ab c",
        "none": "0",
        "1,000": "1000",
    }
    assert {text: soft(text, form, form, form, form) for text, form in pairs.items()} == dict.fromkeys(
        pairs, 1.0
    )
    assert soft("10 30", "10:30", "10:30", "10:30", "10:30") == 0.0  # a colon is kept
    assert yes_no("no", "There is not a dog")  # was neither
    assert yes_no("yes", "It is")  # was neither
    assert yes_no("yes", "A dog, yes")
    assert not yes_no("no", "NO")  # POPE's script knows No and no alone
    assert yes_no("no", "yes, there is no dog")  # was yes


# ---- answers ----


def ask(world, data, **changes):
    options = {"model": world.student, "data": data.data, "image_root": data.image_root, "max_new_tokens": 6}
    return evaluate(EvaluateConfig(**{**options, **changes}), Silent())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data"), rows=20, images=5)


def test_answers_are_those_of_transformers_asked_one_by_one(world, data, tmp_path):
    """Neither the batch, nor its padding, nor sharing an image's beginning changes a word."""
    ask(world, data, batch_size=7, predictions=tmp_path / "all.jsonl")
    model = AutoModelForImageTextToText.from_pretrained(world.student).eval()
    processor = AutoProcessor.from_pretrained(world.student)
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    place = 0
    for row in data.rows:
        turns = row["conversations"]
        images = [open_image(data.image_root, row["image"]).image] if "image" in row else []
        for end in range(1, len(turns), 2):
            messages = [
                {
                    "role": "user" if turn["from"] == "human" else "assistant",
                    "content": [
                        *([{"type": "image"}] if "<image>" in turn["value"] else []),
                        {"type": "text", "text": turn["value"].removeprefix("<image>\n")},
                    ],
                }
                for turn in turns[:end]
            ]
            text = processor.apply_chat_template(messages, add_generation_prompt=True)
            inputs = processor(text=[text], images=images or None, return_tensors="pt")
            written = model.generate(**inputs, do_sample=False, max_new_tokens=6)
            answer = processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert lines[place]["prediction"] == answer.strip(), (row, end)
            assert lines[place]["references"] == [turns[end]["value"]]
            place += 1
    assert place == len(lines)
    assert len({line["prediction"] for line in lines}) > 5


def test_models_that_cannot_share_a_beginning_answer_the_same(world, data, tmp_path, monkeypatch):
    first = ask(world, data, predictions=tmp_path / "shared.jsonl")
    prepare = Answerer.__init__

    def without(self, *arguments):
        prepare(self, *arguments)
        self.shares = False

    monkeypatch.setattr(Answerer, "__init__", without)
    second = ask(world, data, predictions=tmp_path / "whole.jsonl")
    assert (tmp_path / "shared.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_kinds_and_references_come_from_the_rows(world, tmp_path, data):
    image = data.rows[0]["image"]
    turns = [
        {"from": "human", "value": "<image>\nred?"},
        {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "what?"},
        {"from": "gpt", "value": "circle"},
    ]
    rows = [
        {"id": "a", "image": image, "kind": ["there", "shape"], "conversations": turns},
        {"id": "b", "image": image, "kind": "shape", "answers": ["x", "y"], "conversations": turns[:2]},
        {"id": "c", "image": image, "kind": ["one"], "conversations": turns},
        {"id": "d", "image": "gone.png", "conversations": turns},
        {"id": "e", "conversations": []},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    result = evaluate(
        EvaluateConfig(
            model=world.student,
            data=path,
            image_root=data.image_root,
            max_new_tokens=2,
            predictions=tmp_path / "out.jsonl",
        ),
        Silent(),
    )
    assert {kind: scores["questions"] for kind, scores in result["by_kind"].items()} == {
        "shape": 2,
        "there": 1,
    }
    assert result["skipped"] == {"annotations": 1, "missing_image": 1, "no_turns": 1}
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["references"] for line in lines] == [["yes"], ["circle"], ["x", "y"]]
    path.write_text(json.dumps(rows[3:]))
    with pytest.raises(KdcacheError, match=r"no row of .* can be used"):
        evaluate(EvaluateConfig(model=world.student, data=path, image_root=data.image_root), Silent())


def test_a_limit_draws_the_same_rows_every_time(world, data):
    first, again, other = (ask(world, data, limit=4, seed=seed) for seed in (0, 0, 3))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert first["majority"] != other["majority"] or first["questions"] != other["questions"]


# ---- the distance to the teacher ----


def test_the_distance_is_the_dense_kl_and_relation(tmp_path):
    """With every entry of the vocabulary in the record, against logits that are written out."""
    spec = TargetSpec(top_k=340, precision="full", targets=("response", "visual", "relation", "prompt"))
    world = make_world(tmp_path, rows=9, spec=spec)
    cache = open_cache(world.cache)
    teacher, model = (load_model(folder).eval() for folder in (tmp_path / "teacher", world.student))
    processor = load_processor(world.student)
    terms = {name: [] for name in ("ce", "response_kl", "visual_kl", "prompt_kl", "relation")}
    same = {"response": [], "visual": []}
    collator = Collator(
        pixels=PixelInputs(processor),
        image_root=open_root(world.image_root),
        pad_token_id=1,
        image_token_id=2,
    )
    for index in range(len(cache)):
        sample = cache[index]
        inputs = {
            "input_ids": torch.tensor(sample.input_ids)[None].long(),
            **collator.images([sample.images]),
        }
        with torch.no_grad():
            p, padded = (each(**inputs).logits[0].double() for each in (teacher, model))
        p, q = p[:, :340], padded[:, :340]
        # The student's padding is in its softmax, and nowhere else.
        log_p, log_q = torch.log_softmax(p, -1), torch.log_softmax(padded, -1)[:, :340]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        for kind in ("response", "visual", "prompt"):
            terms[f"{kind}_kl"] += kl[sample.positions[kind]].tolist()
        for kind, values in same.items():
            at = sample.positions[kind]
            values += (p[at].argmax(-1) == q[at].argmax(-1)).tolist()
        at = sample.response_positions
        terms["ce"] += (-log_q[at, sample.labels[at + 1]]).tolist()
        for image in sample.images:
            a, b = ((z[image.positions] @ z[image.positions].T).flatten() for z in (p, q))
            terms["relation"].append(1 - float(torch.cosine_similarity(a, b, dim=0)))
    expected = {name: sum(values) / len(values) for name, values in terms.items()}
    expected |= {f"{kind}_top1": sum(values) / len(values) for kind, values in same.items()}
    result = evaluate(
        EvaluateConfig(
            model=world.student,
            data=_rows(world, tmp_path),
            image_root=world.image_root,
            cache=str(world.cache),
            max_new_tokens=1,
        ),
        Silent(),
    )["teacher"]
    assert result.pop("samples") == 9
    assert result.pop("tokens") == len(terms["ce"])
    # A relation is stored within 1 - cos = 1e-5, an angle of 4.5e-3.
    assert result.pop("relation") == pytest.approx(expected.pop("relation"), abs=4.5e-3)
    assert result == pytest.approx(expected, rel=2e-4)


def _rows(world, folder):
    image = next((world.image_root / "pictures").iterdir()).relative_to(world.image_root)
    turns = [{"from": "human", "value": "<image>\nred?"}, {"from": "gpt", "value": "yes"}]
    (folder / "rows.json").write_text(json.dumps([{"image": str(image), "conversations": turns}]))
    return folder / "rows.json"


def test_a_student_equal_to_its_teacher_is_as_far_as_its_padding_has_mass(world, tmp_path):
    cache = open_cache(fake_capture(tmp_path / "cache", world.student, world.image_root, rows=6))
    model, processor = load_model(world.student).eval(), load_processor(world.student)
    expected = {"response": [], "visual": []}
    pixels = PixelInputs(processor)
    for index in range(len(cache)):
        sample = cache[index]
        images = [[open_image(world.image_root, image.path).image for image in sample.images]]
        with torch.no_grad():
            ids = torch.tensor(sample.input_ids)[None].long()
            log_q = model(input_ids=ids, **pixels(images)).logits[0].double().log_softmax(-1)
        for kind, values in expected.items():
            values += (-log_q[sample.positions[kind], :340].logsumexp(-1)).tolist()
    collator = Collator(
        pixels=PixelInputs(processor),
        image_root=open_root(world.image_root),
        pad_token_id=1,
        image_token_id=2,
        targets=("response", "visual", "relation"),
    )
    measured = measure_samples(
        DistilledStudent(model, LossWeights(), vocab_size=340),
        *HeldOut(cache=cache, collator=collator).samples(),
        collator,
        device=torch.device("cpu"),
    )
    for kind, values in expected.items():
        assert measured[f"{kind}_kl"] == pytest.approx(sum(values) / len(values), abs=1e-5)
        assert measured[f"{kind}_kl"] > 1e-3
    assert abs(measured["relation"]) < 1e-5
    assert measured["response_top1"] == measured["visual_top1"] == 1.0


# ---- new students ----


def tiny_language_model(folder, *, rows=352, tokenizer=None):
    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def new_student(**options):
    return assemble(NewStudentConfig(**options))


def test_a_new_student_like_a_cache_fits_it(world, tmp_path):
    teacher = world.student.parent / "teacher"
    words = tiny_language_model(tmp_path / "words", tokenizer=tiny_tokenizer())
    made = new_student(
        vision_tower=teacher, language_model=words, out=tmp_path / "new", like=str(world.cache), seed=1
    )
    assert made["visual_tokens"] == 16
    model, tower = load_model(tmp_path / "new"), load_model(teacher).model.vision_tower
    own = dict(model.model.vision_tower.named_parameters())
    assert all(torch.equal(own[name], tensor) for name, tensor in tower.named_parameters())
    theirs = Qwen2ForCausalLM.from_pretrained(words).state_dict()
    for name, tensor in model.model.language_model.state_dict().items():
        assert torch.equal(tensor, theirs[f"model.{name}"])
    assert torch.equal(model.lm_head.weight, theirs["lm_head.weight"])
    train(settings(world, tmp_path / "run", student=tmp_path / "new"), Silent())
    again = {"vision_tower": teacher, "language_model": words, "like": str(world.cache)}
    for seed, equal in ((1, True), (2, False)):
        new_student(**again, out=tmp_path / f"again-{seed}", seed=seed)
        other = load_model(tmp_path / f"again-{seed}").model.multi_modal_projector.linear_1.weight
        assert torch.equal(other, model.model.multi_modal_projector.linear_1.weight) == equal
    with pytest.raises(KdcacheError, match="is not empty"):
        new_student(**again, out=tmp_path / "new")


def test_a_new_student_without_a_cache_gains_an_image_token(world, tmp_path):
    folder = tmp_path / "tower"
    load_model(world.student).model.vision_tower.save_pretrained(folder)
    load_processor(world.student).image_processor.save_pretrained(folder)
    words = tiny_tokenizer()
    words.chat_template = load_processor(world.student).chat_template
    language = tiny_language_model(tmp_path / "words", tokenizer=words)
    made = new_student(vision_tower=folder, language_model=language, out=tmp_path / "new")
    assert made["image_token_id"] == words.convert_tokens_to_ids("<image>")
    assert (made["vision_feature_layer"], made["vision_feature_select_strategy"]) == (-2, "full")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 300}, "has 300 embedding rows, the cache .* has 340 tokens"),
        (
            {"tokenizer": tiny_tokenizer(specials=["<|more|>"])},
            r"another tokenizer than the cache.*at other ids",
        ),
    ],
    ids=["rows", "tokenizer"],
)
def test_a_language_model_with_other_words_is_refused(world, tmp_path, options, message):
    words = tiny_language_model(tmp_path / "words", **options)
    with pytest.raises(KdcacheError, match=message):
        new_student(
            vision_tower=world.student, language_model=words, out=tmp_path / "new", like=str(world.cache)
        )
    assert not (tmp_path / "new").exists()


def test_folders_that_are_something_else_are_refused(world, tmp_path):
    words = tiny_language_model(tmp_path / "words", tokenizer=tiny_tokenizer())
    for tower, language in ((words, words), (world.student, tmp_path), (tmp_path, words)):
        with pytest.raises(KdcacheError, match=r"not a vision tower|is not a (causal language|vision) model"):
            new_student(vision_tower=tower, language_model=language, out=tmp_path / "new")


# ---- recipes, export, report ----


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("recipe")
    stages = tuple(RecipeStage(stage=stage) for stage in (DPT, SFT, DFT))
    config = settings(world, out, eval_cache=str(world.cache))
    return out, train_recipe(Recipe(name="llava-kd", stages=stages), config, Silent()), stages, config


def test_a_recipe_runs_its_stages_in_a_row_and_skips_those_done(world, trained):
    out, result, stages, config = trained
    assert [path.name for path in sorted(out.iterdir()) if path.is_dir()] == ["1-dpt", "2-sft", "3-dft"]
    assert [stage["stage"] for stage in result["stages"]] == ["dpt", "sft", "dft"]
    first, second = (load_file(out / name / "model/model.safetensors") for name in ("1-dpt", "2-sft"))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    again = train_recipe(Recipe(name="llava-kd", stages=stages), config, Silent())
    assert all(stage["already_done"] for stage in again["stages"])
    with pytest.raises(KdcacheError, match="has no stage sftt; it has dpt, sft, dft"):
        train_recipe(Recipe(name="llava-kd", stages=stages), config, Silent(), caches={"sftt": "x"})


def test_an_export_generates_the_same_text(world, trained, data, tmp_path):
    out, *_ = trained
    made = export(out / "3-dft", tmp_path / "export", Silent())
    assert made["stages"] == ["dpt", "sft", "dft"]
    for model, name in ((out / "3-dft/model", "run"), (tmp_path / "export", "export")):
        ask(world, data, model=model, predictions=tmp_path / f"{name}.jsonl")
    assert (tmp_path / "run.jsonl").read_bytes() == (tmp_path / "export.jsonl").read_bytes()
    with safe_open(tmp_path / "export/model.safetensors", framework="pt") as file:
        keys = list(file.keys())
    tower = [key for key in keys if "vision_tower" in key]
    assert tower
    assert all(key.startswith("vision_tower.vision_model.") for key in tower)
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert {
        "generation_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "processor_config.json",
    } <= names
    card = (tmp_path / "export/README.md").read_text()
    identity = open_cache(world.cache).manifest.identity
    for word in ("Stage 1: dpt", "Stage 3: dft", identity, "held out: response_kl", "learning_rate"):
        assert word in card
    with pytest.raises(KdcacheError, match="is not empty"):
        export(out / "3-dft", tmp_path / "export", Silent())
    small = export(out / "3-dft/model", tmp_path / "small", Silent(), dtype="bfloat16")
    assert small["dtype"] == "bfloat16"
    with pytest.raises(KdcacheError, match="int8 is not a floating-point type"):
        export(out / "3-dft", tmp_path / "other", Silent(), dtype="int8")


def test_a_report_is_one_file_with_every_stage(trained, tmp_path):
    out, *_ = trained
    page = report(out).read_text()
    assert report(out) == out / "report.html"
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    for word in (
        "<h2>dpt</h2>",
        "<h2>sft</h2>",
        "<h2>dft</h2>",
        "held out",
        "KL, response",
        "data wait",
        "finished",
        "data:image/svg+xml;base64,",
    ):
        assert word in page
    held_out = json.loads((out / "3-dft/result.json").read_text())["evaluation"]
    assert f"<td class=number>{held_out['response_kl']:.4f}</td>" in page, "the final table"
    picture = report(out / "3-dft", tmp_path / "curves.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KdcacheError, match="give a file that can be written"):
        report(out, tmp_path)
    with pytest.raises(KdcacheError, match="holds no training run"):
        report(tmp_path)


def test_runs_of_older_versions_still_report(trained, tmp_path):
    """Their training lines call the KL terms by the kind of position alone."""
    out, *_ = trained
    shutil.copytree(out / "3-dft", tmp_path / "old", ignore=shutil.ignore_patterns("checkpoints", "model"))
    path, now = tmp_path / "old/metrics.jsonl", read_metrics(out / "3-dft")
    then = [
        {n.removesuffix("_kl") if line["group"] == "train" else n: value for n, value in line.items()}
        for line in now
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in then))
    result = json.loads((tmp_path / "old/result.json").read_text())
    result["train"] = {name.removesuffix("_kl"): value for name, value in result["train"].items()}
    (tmp_path / "old/result.json").write_text(json.dumps(result))
    assert "response" in then[0]
    assert read_metrics(tmp_path / "old") == now
    assert read_result(tmp_path / "old") == read_result(out / "3-dft")
    figure = f"{[line['response_kl'] for line in now if line['group'] == 'train'][-1]:.4f}"
    assert figure in report(tmp_path / "old").read_text()


def curves_of(figure):
    """Of every panel with a title: title -> {label: points}."""
    return {
        axes.get_title(loc="left"): {
            line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
            for line in axes.lines
        }
        for axes in figure.axes
        if axes.get_title(loc="left")
    }


def test_training_and_held_out_share_a_panel():
    train = [{"step": s, "loss": 9 / s, "ce": 4 / s, "relation": 0.0, "lr": 0.1} for s in (1, 2, 3)]
    held_out = [{"step": 3, "ce": 1.5, "response_top1": 0.25, "loss": None}]
    one = draw_curves([StageRun(name="dpt", train=train, held_out=held_out)])
    assert curves_of(one) == {
        "loss": {"training": [(1, 9.0), (2, 4.5), (3, 3.0)]},
        "cross entropy, nats per token": {
            "training": [(1, 4.0), (2, 2.0), (3, 4 / 3)],
            "held out": [(3, 1.5)],
        },
        "most likely token is the teacher's": {"held out, response": [(3, 0.25)]},
        "learning rate": {"training": [(1, 0.1), (2, 0.1), (3, 0.1)]},
    }
    never = [{"step": 3, "response_top1": 0.0}]
    at_zero = draw_curves([StageRun(name="dpt", train=[], held_out=never)])
    assert curves_of(at_zero) == {"most likely token is the teacher's": {"held out, response": [(3, 0.0)]}}
    stage = StageRun(name="dpt", settings={}, result={}, train=train, held_out=never)
    assert dict(final_table([stage]))["most likely token is the teacher's, response"] == ["0.0000"]
    assert "relation, 1 - cos" not in dict(final_table([stage])), "not in this stage's loss"
    two = draw_curves([StageRun(name=name, train=train, held_out=[]) for name in ("dpt", "sft")])
    assert len(two.axes) == 6, "one row per quantity, one column per stage"
    assert draw_curves([StageRun(name="new", train=[], held_out=[])]).axes[0].texts[0].get_text()
