"""The ten benchmarks: published files read, asked, written and scored; runs that are killed and go on."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

from cache_schema import KdcacheError
from cache_schema.datasets.images import open_image
from cache_schema.errors import WrongUsage
from cache_schema.progress import Silent
from student.benchmarks.paper import table
from student.benchmarks.questions import load_lines
from student.benchmarks.run import _ALL, _ready
from student.evaluate import evaluate
from student.settings import BENCHMARKS, EvaluateConfig
from tests.benchmark_files import COGNITION, LETTER, PERCEPTION, SHORT, document, lines, make_eval
from tests.tiny_models import tiny_llava
from views import benchmark_page, terminal
from views.benchmark_page import print_evaluation

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_eval(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("model"), seed=3)


def settings(data, *names, **changes):
    options = {"model": Path("model"), "data": data, "benchmarks": names, "out": Path("out"), "device": "cpu"}
    return EvaluateConfig(**{**options, **changes})


def scored(folder, name, answers, **changes):
    """Scores of given answers to the questions of a benchmark."""
    ready = _ready(_ALL[name], settings(folder, name, **changes))
    return ready.benchmark.score(ready.items, answers, ready.annotations)


def uploaded(folder, name, answers, out):
    ready = _ready(_ALL[name], settings(folder, name))
    return ready.benchmark.upload(ready.items, answers, ready.questions, ready.annotations, out / name)


# ---- what is asked ----


def asked(folder, name):
    return [(item.text, item.prompt, item.image) for item in _ready(_ALL[name], settings(folder, name)).items]


def test_questions_are_asked_as_llava_asks_them(folder):
    assert asked(folder, "gqa")[1] == (f"Which one 1?\n{SHORT}", f"Which one 1?\n{SHORT}", "g.png")
    assert asked(folder, "textvqa")[0][0] == f"What is written?\nReference OCR token: STOP, GO\n{SHORT}"
    question = f"Context: N/A\nWhich?\nA. one\nB. two\n{LETTER}"
    assert asked(folder, "sqa")[0] == (question, f"<image>\n{question}", "1/image.png")
    question = f"Which?\nA. one\nB. two\nC. three\n{LETTER}"
    assert asked(folder, "sqa")[1] == (question, question, None)
    english, chinese = asked(folder, "mmb"), asked(folder, "mmb-cn")
    assert english[0][:2] == (f"What is it?\nA. cat\nB. dog\n{LETTER}", "What is it?\nA. cat\nB. dog")
    # "None" is a missing value in pandas, and so for LLaVA's script
    assert english[1][1] == 'Look well.\nHow "many"?\nA. one\nB. two\nC. three'
    assert chinese[1][0] == 'Look well.\nHow "many"?\nA. one\nB. two\nC. three\n请直接回答选项字母。'
    assert english[1][2] == english[3][2] != english[0][2] == english[2][2]
    assert asked(folder, "pope")[0][0] == f"Is there a adversarial dog 0?\n{SHORT}"
    assert _ready(_ALL["mmmu"], settings(folder, "mmmu")).items[1].preset in ("A", "B", "C")


def test_popes_own_files_are_asked_with_llavas_words(folder):
    own = folder / "pope/coco/coco_pope_random.json"
    config = settings(own, "pope", image_root=folder / "pope/val2014")
    ready = _ready(_ALL["pope"], config)
    assert ready.items[1].text == f"Is there a random dog 1?\n{SHORT}"
    result = ready.benchmark.score(ready.items, ["yes", "no"], ready.annotations)
    assert result["by_category"]["random"]["recall"] == 0.5
    every = _ready(_ALL["pope"], settings(folder / "pope/coco", "pope", image_root=folder / "pope/val2014"))
    assert [item.text for item in every.items] == [text for text, _, _ in asked(folder, "pope")]


# ---- scores, worked out by hand ----


def test_scores_of_short_answers(folder, tmp_path):
    assert scored(folder, "gqa", ["Red.", "right", "T-shirt"])["value"] == pytest.approx(200 / 3)
    # 8 of 10 said stop, 2 go: 1 and (2 * 1/3 + 8 * 2/3) / 10
    assert scored(folder, "textvqa", ["Go!", "NOKIA.", "10:30"])["accuracy"] == pytest.approx((0.6 + 2) / 3)
    assert scored(folder, "vqav2", ["yes"] * 4) is None
    ten = [{"answer": "yes", "answer_id": i} for i in range(9)] + [{"answer": "a red-one", "answer_id": 9}]
    document(
        tmp_path / "vqa.json", {"annotations": [{"question_id": 10 + i, "answers": ten} for i in range(4)]}
    )
    said = ["Yes.", "no", "red one", "yes, yes"]
    result = scored(folder, "vqav2", said, annotations=tmp_path / "vqa.json")
    assert result["accuracy"] == pytest.approx((1 + 0 + 0.3 + 0) / 4)
    own = [{"answer": "soda", "answer_confidence": "yes"}] * 10
    document(tmp_path / "val.json", [{"image": f"VizWiz_test_{i}.png", "answers": own} for i in range(2)])
    assert scored(folder, "vizwiz", ["Soda.", "can"], annotations=tmp_path / "val.json")["value"] == 50.0


def test_scores_of_yes_and_no(folder):
    # adversarial yes, no; popular no, no; random yes, yes
    result = scored(folder, "pope", ["Yes", "No", "yes", "Not here", "yes", "no"])
    f1 = {name: each["f1"] for name, each in result["by_category"].items()}
    assert f1 == {"adversarial": 1.0, "popular": 0.0, "random": pytest.approx(2 / 3)}
    assert result["value"] == pytest.approx(100 * (1 + 2 / 3) / 3)
    assert result["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    categories = len(PERCEPTION) + len(COGNITION)
    right, half, other = ["Yes", "No, gone"], ["yes", "yes"], ["It is", "gone"]
    said = right + half + other + right * (categories - 3)
    result = scored(folder, "mme", said)
    assert result["by_category"]["existence"] == 200.0
    assert result["by_category"]["count"] == 50.0
    assert result["by_category"]["position"] == 0.0
    assert result["other"] == 2
    assert result["perception"] == 200 * 8 + 50
    assert result["cognition"] == 800.0
    assert result["value"] == (200 * 8 + 50) / 20


def test_scores_of_letters(folder):
    # problem 4 of the split is not asked: wrong, and without an image
    result = scored(folder, "sqa", ["B", "The answer is C.", "B. there"])
    assert result["accuracy"] == 2 / 4
    assert result["image_accuracy"] == 1 / 2
    assert result["value"] == 50.0
    result = scored(folder, "mmb", ["A", "two", "B. cat", "C"])
    assert result["row_accuracy"] == 3 / 4
    assert result["value"] == 50.0  # the second question is wrong in one order of its options
    assert result["by_category"] == {"animals": 1.0, "counting": 0.0}
    assert result["unread"] == 0
    assert scored(folder, "mmb", ["A", "perhaps", "B", "A"])["unread"] == 1
    items = _ready(_ALL["mmmu"], settings(folder, "mmmu")).items
    result = scored(folder, "mmmu", ["(A) or (B)", items[1].preset, "it is six", "no letter at all"])
    drawn = items[3].preset or items[1].preset
    assert drawn in ("A", "B", "C")
    assert result["drawn"] == 1
    assert result["not_asked"] == 1
    assert result["by_category"]["Art_Theory"] in (0.5, 1.0)  # as the draw of the last one has it
    again = scored(folder, "mmmu", ["(A) or (B)", items[1].preset, "it is six", "no letter at all"])
    assert again == result


# ---- uploads ----


def test_uploads_have_the_published_form(folder, tmp_path):
    path = uploaded(folder, "vqav2", ["T-shirt", "dont", "1,000", "The end."], tmp_path)
    assert json.loads(path.read_text()) == [
        {"question_id": 10, "answer": "t shirt"},
        {"question_id": 11, "answer": "don't"},
        {"question_id": 12, "answer": "1000"},
        {"question_id": 13, "answer": "end"},
        {"question_id": 99, "answer": ""},
    ]
    path = uploaded(folder, "gqa", ["Red.", "Left..", "A b."], tmp_path)
    assert json.loads(path.read_text())[1:] == [
        {"questionId": "201", "prediction": "left"},
        {"questionId": "202", "prediction": "a b"},
    ]
    path = uploaded(folder, "vizwiz", ["A can.", "unanswerable"], tmp_path)
    assert json.loads(path.read_text())[0] == {"image": "VizWiz_test_0.png", "answer": "can"}
    path = uploaded(folder, "mme", ["Yes", "No\tor\nyes"] * 14, tmp_path)
    assert len(list(path.iterdir())) == 14
    assert (path / "count.txt").read_text() == (
        "7.txt\tIs it there? Please answer yes or no.\tYes\tYes\n"
        "7.txt\tIs it gone? Please answer yes or no.\tNo\tNo or yes\n"
    )
    assert "Is it gone?  Please answer yes or no.\tNo" in (path / "existence.txt").read_text()
    path = uploaded(folder, "mmmu", ["(B)", "A", "six apples", "C"], tmp_path)
    assert json.loads(path.read_text())["validation_Art_Theory_1"] == "six apples"
    assert json.loads(path.read_text())["validation_Art_1"] == "B"


def test_the_workbook_for_mmbench_can_be_opened(folder, tmp_path):
    path = uploaded(folder, "mmb", ["A", "<B> & \x00 done", "C", ""], tmp_path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert "xl/workbook.xml" in archive.namelist()  # by which pandas tells a workbook
        sheet = archive.read("xl/worksheets/sheet1.xml").decode()
    header = ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    positions = [sheet.index(f">{name}<") for name in header]
    assert positions == sorted(positions)
    assert "&lt;B&gt; &amp;  done" in sheet
    assert "<v>1000241</v>" in sheet
    assert "Look well" not in sheet
    assert "None" not in sheet


# ---- whole runs ----


def test_all_ten_are_asked_written_and_scored(folder, model, tmp_path):
    config = settings(folder, "all", model=model, out=tmp_path / "out", max_new_tokens=4, batch_size=3)
    result = evaluate(config, Silent())
    assert tuple(result["benchmarks"]) == BENCHMARKS
    assert {name for name, each in result["benchmarks"].items() if "unscored" in each} == {"vqav2", "vizwiz"}
    assert result["table"][0]["model"] == model.name
    assert result["table"][0]["average of nine"] is None
    assert json.loads((tmp_path / "out/results.json").read_text())["table"] == result["table"]
    loaded = AutoModelForImageTextToText.from_pretrained(model).eval()
    processor = AutoProcessor.from_pretrained(model)
    for name in BENCHMARKS:
        ready = _ready(_ALL[name], settings(folder, name))
        answers = [
            json.loads(line) for line in (tmp_path / "out/answers" / f"{name}.jsonl").read_text().splitlines()
        ]
        assert [line["question_id"] for line in answers] == [item.question_id for item in ready.items]
        assert [line["prompt"] for line in answers] == [item.prompt for item in ready.items]
        assert len({line["answer_id"] for line in answers}) == len(answers)
        upload = result["benchmarks"][name].get("upload")
        assert (upload is not None) == (ready.benchmark.upload is not None)
        item, line = ready.items[-1], answers[-1]  # alone, through transformers
        root = tmp_path / "out/images" if item.content else ready.images
        images = [open_image(root, item.image).image] if item.image else None
        parts = [{"type": "image"}] * bool(images) + [{"type": "text", "text": item.text}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        inputs = processor(text=[text], images=images, return_tensors="pt")
        made = loaded.generate(**inputs, do_sample=False, max_new_tokens=4)
        said = processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert line["text"] == said, name


def command(folder, model, out, *options):
    words = [
        "evaluate",
        "--model",
        model,
        "--data",
        folder,
        "--benchmark",
        "mme,pope",
        "--out",
        out,
        "--json",
    ]
    return [
        sys.executable,
        "-m",
        "cli",
        *map(str, words),
        "--batch-size",
        "2",
        "--max-new-tokens",
        "6",
        *options,
    ]


def start(words, **environment):
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_run_goes_on_and_two_processes_give_the_same(folder, model, tmp_path):
    whole = evaluate(
        settings(folder, "mme", "pope", model=model, out=tmp_path / "whole", batch_size=2, max_new_tokens=6),
        Silent(),
    )
    parts = tmp_path / "killed/answers/mme.parts"
    first = start(command(folder, model, tmp_path / "killed"))
    until = time.monotonic() + 120
    while not any(part.stat().st_size for part in parts.glob("*.jsonl")) and first.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    part = next(parts.glob("*.jsonl"))
    kept = part.read_bytes()
    part.write_bytes(kept + b'[3, "half')  # a line that was not finished
    answered = kept.count(b"\n")
    assert 0 < answered < 28
    launcher = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(21000 + os.getpid() % 20000),
    }
    launcher |= {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    words = command(folder, model, tmp_path / "killed")
    ranks = [start(words, RANK=rank, LOCAL_RANK=rank, **launcher) for rank in ("0", "1")]
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    result = json.loads(said[0][0])
    assert said[1][0] == ""
    later = [path for path in parts.glob("*.jsonl") if path != part]
    counts = [path.read_bytes().count(b"\n") for path in later]
    assert sum(counts) == 28 - answered
    assert min(counts) > 0
    for name in ("mme", "pope"):
        files = [tmp_path / run / f"answers/{name}.jsonl" for run in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()
        paths = {"answers", "upload"}
        one, other = (run["benchmarks"][name] for run in (whole, result))
        assert {k: v for k, v in one.items() if k not in paths} == {
            k: v for k, v in other.items() if k not in paths
        }
    assert whole["table"] == result["table"]


# ---- refusals ----


def changed(path, change):
    """The JSON lines or the JSON list of a question file, changed in its first question."""
    text = path.read_text()
    rows = json.loads(text) if text.startswith("[") else list(map(json.loads, text.splitlines()))
    rows[0] |= change
    document(path, rows) if text.startswith("[") else lines(path, rows)


@pytest.mark.parametrize(
    ("name", "path", "content", "message"),
    [
        ("gqa", "gqa/llava_gqa_testdev_balanced.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("sqa", "scienceqa/llava_test_CQM-A.json", "[]", "has no questions"),
        ("mmmu", "MMMU/anns_for_eval.json", "{}", "has no questions"),
        ("mmb", "mmbench/mmbench_dev_20230712.tsv", "index\timage\n", "has no questions"),
        ("mmmu", "MMMU/anns_for_eval.json", {"image": 7}, "the image of question .* is no text"),
        ("sqa", "scienceqa/llava_test_CQM-A.json", {"image": ["a"]}, "the image of question 1 is no text"),
        ("pope", "pope/llava_pope_test.jsonl", {"text": "is \ud83d there?"}, "has not the form"),
    ],
)
def test_question_files_that_cannot_be_asked_are_told(tmp_path, name, path, content, message):
    folder = make_eval(tmp_path)
    if isinstance(content, dict):
        changed(folder / path, content)
    else:
        (folder / path).write_text(content)
    with pytest.raises(KdcacheError, match=message) as told:
        evaluate(settings(folder, name), Silent())
    assert Path(path).name in str(told.value)


def test_a_line_separator_within_a_question_ends_no_line(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": 1, "image": "q", "text": "a\u2028b\x85c"}\r\n', encoding="utf-8")
    assert [line["text"] for line in load_lines(path)] == ["a\u2028b\x85c"]


def test_an_image_that_cannot_be_read_is_told_with_its_question(tmp_path, model):
    folder = make_eval(tmp_path / "eval")
    (folder / "gqa/data/images/g.png").write_bytes(b"no image")
    with pytest.raises(KdcacheError, match=r"gqa, question 200: g\.png is not an image .* goes on"):
        evaluate(settings(folder, "gqa", model=model, out=tmp_path / "out"), Silent())


def test_annotations_without_answers_are_told(folder, model, tmp_path):
    entries = [{"image": f"VizWiz_test_{i}.png", "answers": []} for i in range(2)]
    document(tmp_path / "none.json", entries)
    config = settings(folder, "vizwiz", model=model, out=tmp_path / "out", annotations=tmp_path / "none.json")
    with pytest.raises(KdcacheError, match=r"none\.json has not the form .*; the answers are in"):
        evaluate(config, Silent())


def test_damaged_lines_of_answers_are_asked_again(folder, model, tmp_path):
    config = settings(folder, "pope", model=model, out=tmp_path / "out", max_new_tokens=4)
    evaluate(config, Silent())
    whole = (tmp_path / "out/answers/pope.jsonl").read_bytes()
    part = next((tmp_path / "out/answers/pope.parts").glob("*.jsonl"))
    kept = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(kept[0] + b"\0" * 40 + b"\n" + b"[1]\n3\n[2, null]\n\xff\n" + kept[3])
    evaluate(config, Silent())
    assert (tmp_path / "out/answers/pope.jsonl").read_bytes() == whole
    later = [path for path in part.parent.glob("*.jsonl") if path != part]
    assert [path.read_bytes().count(b"\n") for path in later] == [6 - 2]
    (part.parent / "run.json").write_text("[]")
    with pytest.raises(KdcacheError, match=r"run\.json is damaged; remove .*pope\.parts to ask again"):
        evaluate(config, Silent())


def test_answers_of_another_model_are_not_continued(folder, model, tmp_path):
    config = settings(folder, "gqa", model=model, out=tmp_path / "out", max_new_tokens=2)
    evaluate(config, Silent())
    with pytest.raises(KdcacheError, match="answers with other max_new_tokens; choose another --out"):
        evaluate(settings(folder, "gqa", model=model, out=tmp_path / "out", max_new_tokens=3), Silent())
    other = tiny_llava(tmp_path / "other", seed=4)
    with pytest.raises(KdcacheError, match="answers with other weights"):
        evaluate(settings(folder, "gqa", model=other, out=tmp_path / "out", max_new_tokens=2), Silent())


def test_missing_and_broken_files_are_told_before_anything_is_loaded(folder, tmp_path):
    with pytest.raises(KdcacheError, match=r"gqa: .*llava_gqa_testdev_balanced.jsonl does not exist"):
        evaluate(settings(tmp_path, "gqa"), Silent())
    path = tmp_path / "q.jsonl"
    lines(path, [{"question_id": 1, "text": "x"}])
    with pytest.raises(KdcacheError, match="has no `image`; give the published file"):
        evaluate(settings(path, "gqa"), Silent())
    path.write_text('{"question_id": 1}\n{')
    with pytest.raises(KdcacheError, match=r"q.jsonl, line 2: not JSON"):
        evaluate(settings(path, "gqa"), Silent())
    path.write_text("")
    with pytest.raises(KdcacheError, match="has no questions"):
        evaluate(settings(path, "gqa"), Silent())
    lines(path, [{"question_id": 1, "text": "x", "image": "gone.png"}])
    with pytest.raises(KdcacheError, match=r"gone.png does not exist; give the folder as --image-root"):
        evaluate(settings(path, "gqa"), Silent())
    with pytest.raises(KdcacheError, match=r"annotations nowhere\.json do not exist"):
        evaluate(settings(folder, "gqa", annotations=Path("nowhere.json")), Silent())
    document(tmp_path / "few.json", {"200": {"answer": "red"}})
    with pytest.raises(KdcacheError, match="has nothing of question 201"):
        scored(folder, "gqa", ["red"] * 3, annotations=tmp_path / "few.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmarks": ("vqa",)}, "benchmark must be vqav2, gqa"),
        ({"out": None}, "out is needed with benchmark"),
        ({"limit": 3}, "not for benchmark"),
        ({"benchmarks": ("gqa", "pope"), "image_root": Path()}, "several benchmarks need"),
        ({"benchmarks": (), "out": None}, "image_root is needed"),
        ({"benchmarks": (), "image_root": Path()}, "annotations and out are for benchmark"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(WrongUsage, match=message):
        settings(Path("eval"), "gqa", **changes)


# ---- the paper's rows ----


def test_the_rows_fit_a_terminal_and_move_no_cursor(capsys, monkeypatch):
    monkeypatch.setattr(benchmark_page, "results", Console(width=80, highlight=False))
    monkeypatch.setattr(terminal, "results", benchmark_page.results)
    scores = {"mmb": {"value": 100.0, "by_category": {"\x1b[2Jcats\x07": 1.0}}}
    model = "run/[red]a student with a name of fifty characters[/]\x1b[2J"
    print_evaluation({"benchmarks": scores, "table": table(model, {"mmb": 100.0, "mme": 75.49})})
    told = capsys.readouterr().out
    assert "\x1b" not in told.replace("\\x1b", "")
    shown = told.splitlines()
    start = shown.index("run/[red]a student with a name of fifty characters[/]\\x1b[2J")
    names = "vqav2 gqa vizwiz sqa textvqa mme mmb mmb-cn pope mmmu avg 9 avg 10"
    assert shown[start - 1].split() == names.split()
    assert shown[start + 1].split() == ["-"] * 5 + ["75.5", "100.0"] + ["-"] * 5
    assert shown[start + 2] == "LLaVA-1.5 (Vicuna-7B)"
    row = "78.5 62.0 50.0 66.8 58.2 75.5 64.3 58.3 85.9 34.4 66.6 63.4"
    assert shown[start + 3].split() == row.split()
    ends = [shown[start - 1].index(name) + len(name) for name in ("vqav2", "textvqa", "avg 10")]
    assert [shown[start + 3][:end].split()[-1] for end in ends] == ["78.5", "58.2", "63.4"]
    assert max(map(len, shown)) <= 80


def test_the_papers_averages_follow_from_its_rows():
    rows = {row["model"]: row for row in table("mine", {"gqa": 50.0})}
    assert rows["mine"]["gqa"] == 50.0
    assert rows["mine"]["average of nine"] is None
    known = {
        "LLaVA-1.5 (Vicuna-7B)": (66.6, None),
        "TinyLLaVA (Qwen1.5-4B)": (67.9, None),
        "TinyLLaVA (Qwen1.5-1.8B)": (59.3, None),
        "LLaVA-KD-2B (Qwen1.5-1.8B)": (65.2, None),
        "TinyLLaVA (Qwen1.5-0.5B)": (57.3, 54.7),
        "LLaVA-KD-1B (Qwen1.5-0.5B)": (61.0, 57.9),
    }
    for name, (nine, ten) in known.items():
        assert rows[name]["average of nine"] == pytest.approx(nine, abs=0.06)
        assert ten is None or rows[name]["average of ten"] == pytest.approx(ten, abs=0.06)
