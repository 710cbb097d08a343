"""The commands end to end on a tiny model, and what they say when something is wrong."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

import cli
from cache_schema.format.cache import open_cache
from cache_schema.version import VERSION
from tests.tiny_models import tiny_dataset, tiny_llava, write_png

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments, capsys):
    """(exit code, stdout, stderr) of a command, run in this process through `cli.main`."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv, hook = sys.argv, sys.excepthook
    sys.argv = ["kdcache", *map(str, arguments)]
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv, sys.excepthook = argv, hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, a dataset and, in `folder`, room for everything made of them."""
    folder = tmp_path_factory.mktemp("world")
    teacher = tiny_llava(folder / "teacher")
    data = tiny_dataset(folder / "data", rows=10)
    return SimpleNamespace(folder=folder, teacher=teacher, data=data.data, images=data.image_root)


def build_arguments(world, **other):
    options = {
        "teacher": world.teacher,
        "data": world.data,
        "image-root": world.images,
        "out": world.folder / "cache",
        "dtype": "float32",
        "shard-size": 4,
        **other,
    }
    return ["build", *(word for name, value in options.items() for word in (f"--{name}", value))]


@pytest.fixture(scope="module")
def cache(world):
    """The cache of the world, built by the command in a process of its own."""
    command = [sys.executable, "-m", "cli", *map(str, build_arguments(world)), "--json"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=240)
    summary = json.loads(done.stdout)
    assert summary["captured"] == 10
    assert not summary["already_done"]
    return world.folder / "cache"


@pytest.fixture(scope="module")
def student(world, cache):
    """A student of the cache: the teacher's tower and a smaller language model that knows nothing."""
    parts = world.folder / "words"
    open_cache(cache).write_assets(parts)
    vocab = json.loads((world.teacher / "config.json").read_text())["text_config"]["vocab_size"]
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(parts)
    (parts / "preprocessor_config.json").unlink(missing_ok=True)
    return parts


def test_the_whole_way(world, cache, student, capsys):
    def ok(*arguments):
        code, out, err = run(*arguments, "--json", capsys=capsys)
        assert code == 0, err
        return json.loads(out)

    assert ok(*build_arguments(world))["already_done"]
    assert ok("verify", cache)["ok"]
    assert ok("inspect", cache)["counts"]["samples"] == 10
    assert ok("inspect", cache, "--sample", "0")["row"] == 0
    assert ok("diff", cache, cache)["same"]
    selected = world.folder / "selected"
    assert ok("select", cache, "--where", "row < 4", "--out", selected)["samples"] == 4
    rest = world.folder / "rest"
    ok("select", cache, "--where", "row >= 4", "--out", rest)
    assert ok("merge", selected, rest, "--out", world.folder / "merged")["samples"] == 10
    assert ok("to-arrow", cache, "--out", world.folder / "arrow")["samples"] == 10

    made = world.folder / "student"
    ok(
        *("new-student", "--vision-tower", world.teacher, "--language-model", student),
        *("--like", cache, "--out", made),
    )
    shutil.rmtree(world.folder / "elsewhere", ignore_errors=True)
    world.teacher.rename(world.folder / "elsewhere")  # nothing below may read the teacher
    try:
        trained = ok(
            *("train", "--recipe", "llava-kd", "--student", made, "--cache", cache),
            *("--image-root", world.images, "--out", world.folder / "run"),
            *("--global-batch", 4, "--micro-batch", 4, "--max-steps", 2),
        )
        assert [stage["steps"] for stage in trained["stages"]] == [2, 2, 2]
        found = ok(
            *("evaluate", "--model", trained["model"], "--data", world.data),
            *("--image-root", world.images, "--cache", cache, "--max-new-tokens", 4),
        )
        assert found["questions"] > 10
        assert found["teacher"]["response_kl"] > 0
        exported = world.folder / "exported"
        ok("export", "--model", trained["model"], "--out", exported)
        assert (exported / "model.safetensors").exists()
        assert Path(ok("report", world.folder / "run")["report"]).exists()
    finally:
        (world.folder / "elsewhere").rename(world.teacher)


def test_a_page_and_a_sample_are_shown(world, cache, capsys):
    page = world.folder / "page.html"
    assert run("inspect", cache, "--html", page, "--samples", 2, capsys=capsys)[0] == 0
    assert "<html" in page.read_text(encoding="utf-8")
    assert run("inspect", cache, "--html", page, "--sample", 1, capsys=capsys)[0] == 0
    text = page.read_text(encoding="utf-8")
    data = text.partition('id="data">')[2].partition("</script>")[0]
    assert [shown["row"] for shown in json.loads(data)["samples"]] == [1]
    code, out, _ = run("inspect", cache, "--sample", "row-1", "--image-root", world.images, capsys=capsys)
    assert code == 0
    assert "row-1" in out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"teacher": "nowhere"}, "nowhere"),
        ({"data": "no.json"}, "no.json"),
        ({"image-root": "no-images"}, "no-images"),
    ],
)
def test_what_cannot_go_on_says_so_in_one_line_and_leaves_nothing(world, tmp_path, capsys, change, says):
    arguments = build_arguments(world, out=tmp_path / "cache", **change)
    code, out, err = run(*arguments, capsys=capsys)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 1
    assert len(errors) == 1
    assert says in errors[0]
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "cache").exists()


def test_another_teacher_is_refused_and_the_cache_stays(world, cache, tmp_path, capsys):
    other = tiny_llava(tmp_path / "other", seed=1)
    code, _, err = run(*build_arguments(world, teacher=other), capsys=capsys)
    assert code == 1
    assert "teacher_weights" in err
    assert run("verify", cache, capsys=capsys)[0] == 0


def test_bad_rows_are_quarantined_with_a_reason_each(world, tmp_path, capsys):
    images = tmp_path / "images"
    write_png(images / "good.png", seed=0)
    whole = write_png(images / "cut.png", seed=1).read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    write_png(tmp_path / "outside.png", seed=2)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A circle."}]
    rows = [
        {"id": "good", "image": "good.png", "conversations": turns},
        {"id": "missing", "image": "none.png", "conversations": turns},
        {"id": "cut", "image": "cut.png", "conversations": turns},
        {"id": "climbs", "image": "../outside.png", "conversations": turns},
        {"id": "no-turns", "image": "good.png", "conversations": []},
        {"id": "silent", "image": "good.png", "conversations": turns[:1]},
        {"id": "long", "conversations": [{"from": "human", "value": "a " * 900}, turns[1]]},
        {"id": "text", "conversations": [{"from": "human", "value": "Say it."}, turns[1]]},
    ]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    options = {"data": data, "image-root": images, "out": tmp_path / "cache", "max-length": 400}
    code, out, err = run(*build_arguments(world, **options), "--json", capsys=capsys)
    assert code == 0, err
    summary = json.loads(out)
    assert summary["captured"] == 2
    assert sum(summary["quarantined"].values()) == 6
    quarantined = {row.sample_id: row for row in open_cache(tmp_path / "cache").quarantined()}
    assert set(quarantined) == {"missing", "cut", "climbs", "no-turns", "silent", "long"}
    assert len({row.reason for row in quarantined.values()}) >= 5
    assert all(row.detail for row in quarantined.values())


def test_a_student_with_another_tokenizer_is_refused(world, cache, tmp_path, capsys):
    other = tiny_llava(tmp_path / "other", words=330)
    code, _, err = run(
        *("train", "--stage", "sft", "--student", other, "--cache", cache),
        *("--image-root", world.images, "--out", tmp_path / "run"),
        capsys=capsys,
    )
    assert code == 1
    assert "tokenizer" in err
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("arguments", [["build"], ["train", "--stage", "none"], ["no-such-command"]])
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    assert run(*arguments, capsys=capsys)[0] == 2


TRAINING = ("--student", "student", "--out", "run")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--stage dft --cache sft=c --image-root i", "'sft=c' names no stage of this run (dft)"),
        ("--stage dft --cache dtf=c --image-root i", "'dtf=c' names no stage of this run (dft)"),
        ("--stage dft --cache dft=c --cache dft=d --image-root i", "given twice for stage dft"),
        ("--stage dft --image-root i", "stage dft has no cache to learn from"),
        ("--stage dft --cache c --image-root sft=i", "names no stage of this run (dft)"),
        ("--recipe llava-kd --cache c --image-root dft=i", "none for stage dpt, sft"),
        ("--recipe llava-kd --cache dft=c --image-root i", "stage dpt, sft has no cache"),
        ("--stage sft --targets response --cache c --image-root i", "has no loss on response"),
        ("--stage dft --targets , --cache c --image-root i", "targets must be some of"),
        ("--stage dft --early-stop 0 --cache c --image-root i", "early_stop must be at least 1"),
        ("--stage dft --eval-every -1 --cache c --image-root i", "eval_every must be at least 0"),
        ("--stage dft --save-every -3 --cache c --image-root i", "save_every must be at least 0"),
        (
            "--stage dft --tracker none --tracker a --cache c --image-root i",
            "trackers cannot be none and others",
        ),
    ],
)
def test_a_run_that_cannot_be_is_wrong_usage(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("train", *words.split(), *TRAINING, capsys=capsys)
    assert (code, out) == (2, ""), err
    assert said in " ".join(err.split())
    assert not (tmp_path / "run").exists()


def test_folders_with_an_equals_sign_are_paths(world, cache, tmp_path, capsys, monkeypatch):
    """Hive-style folders, absolute and relative to the working directory; and no tracker."""
    data = tmp_path / "date=2026-01-01"
    data.mkdir()
    (data / "cache").symlink_to(cache)
    (data / "images").symlink_to(world.images)
    monkeypatch.chdir(tmp_path)
    for number, (cache_path, root) in enumerate(
        [(data / "cache", data / "images"), ("date=2026-01-01/cache", "dft=date=2026-01-01/images")]
    ):
        code, _, err = run(
            *("train", "--stage", "dft", "--student", world.teacher, "--cache", cache_path),
            *("--image-root", root, "--out", tmp_path / f"run-{number}", "--max-steps", "1"),
            *("--global-batch", "2", "--tracker", "none"),
            capsys=capsys,
        )
        assert code == 0, err
        assert not (tmp_path / f"run-{number}/tensorboard").exists()
    assert yaml.safe_load((tmp_path / "run-1/recipe.yaml").read_text())["cache"] == "date=2026-01-01/cache"


@pytest.mark.parametrize("command", ["select", "merge", "to-arrow"])
def test_a_new_cache_inside_its_source_is_refused(cache, command, tmp_path, capsys):
    before = sorted(Path(cache).rglob("*"))
    more = {"select": ["--where", "tokens > 0"], "merge": [cache], "to-arrow": []}[command]
    code, _, err = run(command, cache, *more, "--out", Path(cache) / "sub/new", capsys=capsys)
    assert code == 2, err
    assert f"lies inside the cache {cache}; give another --out" in err
    assert sorted(Path(cache).rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--dtype", "int3"), "dtype must be one of auto, float32, bfloat16, float16, not 'int3'"),
        (("--quantization", "3bit"), "quantization must be one of 8bit, 4bit, not '3bit'"),
        (("--targets", "foo"), "targets must be some of"),
        (("--template", "nofile"), "template nofile is neither a file nor one of plain, llava_v1"),
        (("--rank", "2"), "give both"),
        (("--engine-mode", "logprobs"), "add --engine vllm"),
        (("--seed", "-1"), "seed must be at least 0, not -1"),
        (("--top-k", "0"), "top_k must be at least 1"),
        (("--shard-size", "0"), "shard_size must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_wrong_usage(world, tmp_path, words, said, capsys):
    code, out, err = run(*build_arguments(world, out=tmp_path / "c"), *words, capsys=capsys)
    assert (code, out) == (2, "")
    assert err == f"error: {err[7:].strip()}\n"
    assert said in err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--learning-rate", "-1"), "learning_rate must be positive, not -1.0"),
        (("--learning-rate", "nan"), "learning_rate must be a finite number, not nan"),
        (("--epochs", "0"), "epochs must be positive, not 0.0"),
        (("--workers", "-1"), "workers must be at least 0, not -1"),
        (("--eval-every", "-1"), "eval_every must be at least 0, not -1"),
        (("--save-every", "-3"), "save_every must be at least 0, not -3"),
        (("--early-stop", "0"), "early_stop must be at least 1, not 0"),
        (("--precision", "fp8"), "precision must be one of fp32, bf16, fp16, not 'fp8'"),
        (("--micro-batch", "two"), "'--micro-batch'"),
        (("--targets", "sound"), "targets must be some of"),
        (("--image-root", "sft=other"), "without its name"),
        (("--no-such-option",), "--no-such-option"),
    ],
)
def test_settings_of_training_that_cannot_be_are_wrong_usage(tmp_path, words, said, capsys):
    known = ("--student", "s", "--cache", "c", "--image-root", "i", "--out", tmp_path / "run")
    code, out, err = run("train", "--stage", "sft", *known, *words, capsys=capsys)
    assert (code, out) == (2, "")
    assert err == f"error: {err[7:].strip()}\n"
    assert said in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--seeds", "0"),
        ("inspect", "c", "--samples", "0"),
        ("diff", "a", "b", "--kl-bound", "nan"),
        ("new-student", "--vision-tower", "v", "--language-model", "l", "--out", "o", "--seed", "-1"),
        ("evaluate", "--model", "m", "--data", "d", "--image-root", "i", "--limit", "0"),
    ],
)
def test_every_command_refuses_settings_out_of_range(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments, capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{arguments[-2][2:].replace('-', '_')} must be " in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("select", "CACHE", "--where", "nonsense < 3", "--out", "o"), "no field 'nonsense'"),
        (("select", "CACHE", "--where", "tokens <", "--out", "o"), "is not a condition: invalid syntax;"),
        (("select", "CACHE", "--by", "id", "--sample", "2", "--out", "o"), "'id' is not a number field"),
        (("merge", "CACHE", "--out", "o"), "give at least two caches"),
        (("build", "DATA", "--workers", "2"), "workers and gpus_per_worker need cluster"),
        (("build", "DATA", "--device", "none"), "device none cannot be used here"),
        (
            ("score", "CACHE", "--model", "TEACHER", "--image-root", "IMAGES", "--device", "none"),
            "device none",
        ),
        (("train", "DATA", "--tracker", "paper"), "accelerate refuses precision fp32 with trackers paper"),
    ],
)
def test_values_that_only_the_work_can_judge_are_wrong_usage_too(
    world, cache, arguments, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    data = ["--teacher", world.teacher, "--data", world.data, "--image-root", world.images, "--out", "o"]
    if arguments[0] == "train":
        data = ["--stage", "dft", "--student", world.teacher, "--cache", cache, *data[4:]]
    named = {"CACHE": [cache], "TEACHER": [world.teacher], "IMAGES": [world.images], "DATA": data}
    words = [each for word in arguments for each in named.get(word, [word])]
    code, out, err = run(*words, capsys=capsys)
    assert (code, out) == (2, ""), err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert not (tmp_path / "o").exists()


def test_answers_of_an_image_root_that_does_not_exist_are_refused(world, tmp_path, capsys):
    words = ("--model", world.teacher, "--data", world.data, "--image-root", tmp_path / "no")
    for command, out in (("answers", ("--out", tmp_path / "a.jsonl")), ("evaluate", ())):
        code, _, err = run(command, *words, *out, capsys=capsys)
        assert code == 1
        assert f"image root {tmp_path / 'no'} is not a folder" in err
    assert not list(tmp_path.iterdir())


def test_a_stage_out_of_range_in_a_recipe_is_wrong_usage(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages: [{base: dpt, epochs: 0}]")
    words = ("--student", "s", "--cache", "c", "--image-root", "i", "--out", tmp_path / "run")
    code, _, err = run("train", "--recipe", recipe, *words, capsys=capsys)
    assert code == 2
    assert err == f"error: recipe {recipe}: stage dpt: epochs must be positive, not 0; correct the file\n"
    for path, text in ((recipe, "[" * 5000), (tmp_path / "deep.toml", "a = " + "[" * 5000)):
        path.write_text(text)
        code, _, err = run("train", "--recipe", path, *words, capsys=capsys)
        assert code == 2
        assert err.startswith(f"error: recipe {path}: maximum recursion depth exceeded")


def test_a_fault_of_the_program_says_so_and_debug_shows_where(world, cache, monkeypatch, capsys):
    """An error of a library is not the user's mistake."""

    def broken(*_, **__):
        raise ValueError("of a\nlibrary")

    monkeypatch.setattr("cache_schema.operations.summary.summarise", broken)
    code, out, err = run("inspect", cache, capsys=capsys)
    assert (code, out) == (1, "")
    fault = "an internal error of kdcache (ValueError: of a library)"
    assert err == f"error: {fault}; --debug shows the traceback\n"
    with pytest.raises(ValueError, match="of a"):
        run("inspect", cache, "--debug", capsys=capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "--model", "MODEL", "--out", "FILE"), "is not a folder that can be written to"),
        (("export", "--model", "BROKEN", "--out", "new"), "BROKEN/model.safetensors is cut off or damaged"),
        (("verify", "nothing://cache"), "Protocol not known"),
        (
            ("new-student", "--vision-tower", "BROKEN", "--language-model", "MODEL", "--out", "new"),
            "fetch it again",
        ),
        (("demo", "--out", "FILE"), "is not a folder that can be written to"),
    ],
)
def test_errors_of_libraries_are_told_where_they_arise(world, arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("a file")
    (tmp_path / "MODEL").symlink_to(world.teacher)
    shutil.copytree(world.teacher, tmp_path / "BROKEN")
    (tmp_path / "BROKEN" / "model.safetensors").write_bytes(b"cut")
    code, out, err = run(*arguments, capsys=capsys)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert (code, out, len(errors)) == (1, "", 1)
    assert said in errors[0]
    assert "internal error" not in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "--model", "TEACHER", "--out"),
        ("build", "--teacher", "TEACHER", "--data", "DATA", "--image-root", "IMAGES", "--out"),
        (
            "train",
            "--stage",
            "dft",
            "--student",
            "TEACHER",
            "--cache",
            "CACHE",
            "--image-root",
            "IMAGES",
            "--out",
        ),
        ("select", "CACHE", "--where", "tokens > 9", "--out"),
        ("to-arrow", "CACHE", "--out"),
        ("new-student", "--vision-tower", "TEACHER", "--language-model", "TEACHER", "--out"),
        ("inspect", "CACHE", "--html"),
        ("plan", "--teacher", "TEACHER", "--data", "DATA", "--image-root", "IMAGES", "--write"),
        ("evaluate", "--model", "TEACHER", "--data", "DATA", "--image-root", "IMAGES", "--predictions"),
        ("demo", "--out"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_places_that_cannot_be_made_are_refused_before_the_work(world, cache, arguments, capsys):
    """/proc says that root may write to it, and makes nothing."""
    names = {"TEACHER": world.teacher, "CACHE": cache, "DATA": world.data, "IMAGES": world.images}
    known = [names.get(word, word) for word in arguments]
    for place in ("/proc/nope/x", "/proc/x"):
        code, out, err = run(*known, place, capsys=capsys)
        assert (code in (1, 2), out) == (True, "")
        (line,) = [line for line in err.splitlines() if line.startswith("error:")]
        assert "/proc" in line
        assert "internal error" not in line
    code, out, err = run(*known, "n" * 300, capsys=capsys)
    assert (code in (1, 2), out) == (True, "")
    assert "too long" in err
    assert "internal error" not in err


def test_derive_makes_other_targets_of_stored_hidden_states(world, cache, tmp_path, capsys):
    words = build_arguments(world, out=tmp_path / "source", targets="response,visual,relation,hidden")
    assert run(*words, "--top-k", 4, capsys=capsys)[0] == 0
    wish = ("--targets", "response,relation", "--top-k", 12, "--temperatures", "1,2", "--json")
    code, out, err = run("derive", tmp_path / "source", *wish, "--out", tmp_path / "made", capsys=capsys)
    assert code == 0, err
    told = json.loads(out)
    made = open_cache(tmp_path / "made")
    assert (told["samples"], told["already_there"]) == (len(made), 0)
    assert made.spec.targets == ("response", "relation")
    assert (made.spec.top_k, made.spec.temperatures) == (12, (1.0, 2.0))
    built = {sample.row: sample for sample in open_cache(tmp_path / "source")}
    for sample in made:
        here, there = sample.response, built[sample.row].response
        assert here.token_ids.shape[1] == 12
        np.testing.assert_allclose(here.logprobs[:, 0], there.logprobs[:, 0], atol=0.05)
    assert run("verify", tmp_path / "made", capsys=capsys)[0] == 0
    assert run("derive", tmp_path / "source", *wish, "--out", tmp_path / "made", capsys=capsys)[0] == 0
    code, out, err = run("derive", cache, "--out", tmp_path / "none", capsys=capsys)
    assert (code, out) == (1, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "has no hidden states" in line
    assert not (tmp_path / "none").exists()


def test_version(capsys):
    assert run("--version", capsys=capsys) == (0, f"kdcache {VERSION}\n", "")
