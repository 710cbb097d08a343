"""lmms-eval on an export, in its own environment (`make test-lmms`): the accuracy of `kdcache evaluate`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cache_schema.progress import Silent
from student.evaluate import evaluate
from student.export import export
from student.settings import EvaluateConfig
from tests.tiny_models import tiny_llava, write_png

pytestmark = pytest.mark.lmms

TASK = """
task: kdcache_local
dataset_path: json
dataset_kwargs: {data_files: {test: DOCS}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8}
process_results: !function utils.process_results
metric_list: [{metric: exact, aggregation: mean, higher_is_better: true}]
"""
FUNCTIONS = """
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def process_results(doc, results):
    said, wanted = (text.strip().rstrip(".").lower() for text in (results[0], doc["answer"]))
    return {"exact": float(said == wanted)}
"""


TRANSFORMERS = ("llava_hf", "pretrained={folder},device_map=cpu", "--device", "cpu")
VLLM = (
    "vllm",
    "model={folder},dtype=float32,enforce_eager=True,max_model_len=256,max_num_batched_tokens=512,"
    "disable_log_stats=True,max_new_tokens=8",
)


@pytest.mark.parametrize(
    "model",
    [TRANSFORMERS, (*TRANSFORMERS, "--force_simple"), VLLM],
    ids=["llava_hf-parts", "llava_hf-text", "vllm"],
)
def test_lmms_eval_gets_the_accuracy_of_evaluate(tmp_path: Path, model: tuple[str, ...]) -> None:
    folder, images, task = tmp_path / "exported", tmp_path / "images", tmp_path / "task"
    export(tiny_llava(tmp_path / "student", seed=2, hidden=64), folder, Silent())
    images.mkdir()
    task.mkdir()
    for number in range(4):
        write_png(images / f"{number}.png", seed=number)
    asked = [{"question": f"What is number {i}?", "image": f"{i % 4}.png", "answer": ""} for i in range(12)]

    def accuracy() -> float:
        rows = []
        for row in asked:
            turns = [("human", f"<image>\n{row['question']}"), ("gpt", row["answer"])]
            conversations = [{"from": role, "value": text} for role, text in turns]
            rows.append({"image": row["image"], "conversations": conversations})
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        config = EvaluateConfig(
            model=folder,
            data=tmp_path / "rows.json",
            image_root=images,
            max_new_tokens=8,
            device="cpu",
            predictions=tmp_path / "said.jsonl",
        )
        return evaluate(config, Silent())["exact_match"]

    accuracy()
    said = [json.loads(line)["prediction"] for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert len(set(said)) > 2
    for number, row in enumerate(asked):  # what the student says is right for two of three questions
        row["answer"] = said[number] if number % 3 else "something else"
    expected = accuracy()
    assert expected == 8 / 12

    docs = [json.dumps({**row, "image": str(images / row["image"])}) + "\n" for row in asked]
    (task / "docs.jsonl").write_text("".join(docs))
    (task / "kdcache_local.yaml").write_text(TASK.replace("DOCS", json.dumps(str(task / "docs.jsonl"))))
    (task / "utils.py").write_text(FUNCTIONS)
    name, arguments, *options = model
    command = [sys.executable, "-m", "lmms_eval", "--model", name, "--tasks", "kdcache_local", *options]
    command += ["--model_args", arguments.format(folder=folder), "--include_path", str(task)]
    command += ["--batch_size", "1", "--log_samples", "--output_path", str(tmp_path / "out")]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "CUDA_VISIBLE_DEVICES": "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    run = subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("*_results.json")).read_text())
    assert results["results"]["kdcache_local"]["exact,none"] == pytest.approx(expected)
    lines = next((tmp_path / "out").rglob("*_samples_*.jsonl")).read_text().splitlines()
    samples = {sample["doc_id"]: sample for sample in map(json.loads, lines)}
    answers = [str(samples[number]["filtered_resps"]) for number in range(len(asked))]
    assert all(text in answer for text, answer in zip(said, answers, strict=True)), answers
