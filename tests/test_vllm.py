"""vLLM for real, in its own environment (`make test-vllm`): the cache of the transformers engine, to 1e-4."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from cache_schema import Cache, open_cache
from cache_schema.operations.divergence import relation_cosine
from cache_schema.progress import Silent
from student.export import export
from tests.tiny_families import qwen
from tests.tiny_models import IMAGE, tiny_dataset, tiny_llava

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = "response,visual,relation,prompt"
FIELDS = ("logprobs", "tail_logprob", "logsumexp", "entropy", "label_logprob")
# vLLM's attention on a CPU wants heads of at least 32.
MAKERS = {
    "llava": lambda folder: tiny_llava(folder, hidden=64),
    "qwen2_5_vl": lambda folder: qwen(folder, "Qwen2_5_VL", hidden=64),
}


class Setting:
    """A teacher, a data set with two rows that cannot be captured, and the caches made of them."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.name = name
        self.folder = folder
        self.teacher = folder / "teacher"
        MAKERS[name](self.teacher)
        made = tiny_dataset(folder, rows=14, images=4)
        rows = [*made.rows, {**made.rows[0], "id": "lost", "image": "pictures/none.png"}]
        turn = {"from": "human", "value": "a long story " * 60}
        rows.append({"id": "long", "conversations": [turn, {"from": "gpt", "value": "Yes."}]})
        made.data.write_text(json.dumps(rows))

    def started(self, out: str, *options: str, **environment: str) -> "subprocess.Popen[str]":
        command = ["build", "--teacher", self.teacher, "--data", self.folder / "data.json", "--out"]
        command += [self.folder / out, "--image-root", self.folder / "images", "--json", "--top-k", "8"]
        command += [
            "--precision",
            "full",
            "--shard-size",
            "4",
            "--batch-tokens",
            "300",
            "--max-length",
            "256",
        ]
        return subprocess.Popen(
            [sys.executable, "-m", "cli", *map(str, command), *options],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def build(self, out: str, *options: str) -> dict[str, Any]:
        return finished(self.started(out, *options))

    def diff(self, one: str, other: str) -> dict[str, Any]:
        command = [
            sys.executable,
            "-m",
            "cli",
            "diff",
            "--json",
            str(self.folder / one),
            str(self.folder / other),
        ]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
        assert run.returncode in (0, 1), run.stderr
        return json.loads(run.stdout)

    def cache(self, out: str) -> Cache:
        return open_cache(str(self.folder / out))


def finished(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """The one JSON object that a build prints."""
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr[-3000:]
    return json.loads(stdout)


@pytest.fixture(scope="module", params=list(MAKERS))
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    setting = Setting(request.param, tmp_path_factory.mktemp(request.param))
    summary = setting.build("plain", "--targets", EVERYTHING)
    assert summary["captured"] == 14
    assert summary["quarantined"] == {"missing_image": 1, "over_long": 1}
    return setting


def check_same(one: Cache, other: Cache, kinds: tuple[str, ...], fields: tuple[str, ...]) -> int:
    """Every number of the records agrees to 1e-4; how many positions there were."""
    positions = 0
    assert sorted(one.index().row) == sorted(other.index().row)
    place = {row: i for i, row in enumerate(other.index().row.tolist())}
    for left in (one[i] for i in range(len(one))):
        right = other[place[left.row]]
        np.testing.assert_array_equal(left.input_ids, right.input_ids)
        np.testing.assert_array_equal(left.labels, right.labels)
        for kind in kinds:
            a, b = getattr(left, kind), getattr(right, kind)
            assert (a is None) == (b is None)
            if a is None:
                continue
            positions += len(a)
            for name in fields:
                mine, theirs = getattr(a, name), getattr(b, name)
                assert (mine is None) == (theirs is None), name
                if mine is not None:
                    np.testing.assert_allclose(theirs, mine, atol=1e-4, rtol=1e-5, err_msg=f"{kind} {name}")
            assert (a.token_ids == b.token_ids).mean() > 0.999  # equal but where two entries nearly tie
    return positions


def test_hidden_states_make_the_cache_of_transformers(setting: Setting) -> None:
    """Two workers at once, as torchrun and accelerate start them, then a second run."""
    options = ("--targets", EVERYTHING, "--engine", "vllm")
    launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    workers = [
        setting.started("hidden", *options, RANK=rank, LOCAL_RANK=rank, **launcher) for rank in ("0", "1")
    ]
    for worker in workers:
        finished(worker)
    summary = setting.build("hidden", *options)
    assert summary["already_done"]
    assert summary["captured"] == 14
    assert summary["quarantined"] == {"missing_image": 1, "over_long": 1}
    check_all(setting, "hidden")


def test_extracted_hidden_states_make_the_cache_of_transformers(setting: Setting) -> None:
    """Conversations about one image have their beginning computed once, and nothing changes."""
    summary = setting.build(
        "extracted", "--targets", EVERYTHING, "--engine", "vllm", "--engine-mode", "extracted"
    )
    assert summary["captured"] == 14
    assert summary["quarantined"] == {"missing_image": 1, "over_long": 1}
    check_all(setting, "extracted")


def check_all(setting: Setting, mode: str) -> None:
    """The cache of a mode against that of transformers, every target."""
    difference = setting.diff("plain", mode)
    assert difference["same"], difference
    assert {entry["key"] for entry in difference["identity"]} == {"engine", "engine_mode"}
    assert max(kind["max"] for kind in difference["kl"].values()) <= 1e-5
    plain, hidden = setting.cache("plain"), setting.cache(mode)
    assert hidden.manifest.fingerprint.capture["sharing"] is True
    assert check_same(plain, hidden, ("response", "visual", "prompt"), FIELDS) > 500
    place = {row: i for i, row in enumerate(hidden.index().row.tolist())}
    for left in (plain[i] for i in range(len(plain))):
        right = hidden[place[left.row]]
        for one, other in zip(left.relations, right.relations, strict=True):
            assert 1.0 - relation_cosine(one, other) <= 1e-6
            assert abs(one.norm / other.norm - 1.0) <= 1e-4
    engines = [commit.engine for commit in hidden.commits.values()]
    assert all(engine["engine"] == "vllm" and engine["engine_mode"] == mode for engine in engines)
    assert all(engine["images"] == "as prepared" for engine in engines)


def test_logprobs_make_the_responses_of_transformers(setting: Setting) -> None:
    options = ("--targets", "response,prompt", "--engine", "vllm", "--engine-mode", "logprobs")
    summary = setting.build("logprobs", *options)
    assert summary["captured"] == 14
    assert summary["quarantined"] == {"missing_image": 1, "over_long": 1}
    difference = setting.diff("plain", "logprobs")
    assert difference["same_samples"]
    assert difference["targets_agree"]
    assert max(kind["max"] for kind in difference["kl"].values()) <= 1e-5
    assert "spec.without" in {entry["key"] for entry in difference["identity"]}
    fields = ("logprobs", "tail_logprob", "label_logprob")
    assert check_same(setting.cache("plain"), setting.cache("logprobs"), ("response", "prompt"), fields) > 300
    sample = setting.cache("logprobs")[0]
    assert sample.response.logsumexp is None
    assert sample.response.entropy is None


GENERATE = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams

folder, picture, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llm = LLM(
    model=folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_batched_tokens=512,
    limit_mm_per_prompt={"image": 1}, skip_mm_profiling=True,
)
image = Image.open(picture).convert("RGB")
asked = [{"prompt": text, "multi_modal_data": {"image": image}} for text in prompts]
said = llm.generate(asked, SamplingParams(temperature=0.0, max_tokens=16), use_tqdm=False)
print("ANSWERS" + json.dumps([output.outputs[0].text for output in said]))
"""


def test_an_exported_student_says_the_same_in_vllm(tmp_path: Path) -> None:
    student = tiny_llava(tmp_path / "student", hidden=64)
    folder = tmp_path / "exported"
    export(student, folder, Silent())
    picture = tmp_path / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    prompts = [
        f"USER: {IMAGE}\n{text} ASSISTANT:" for text in ("What is it?", "Is it red?", "Describe the shape.")
    ]
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", GENERATE, str(folder), str(picture), json.dumps(prompts)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    said = re.search(r"^ANSWERS(.*)$", run.stdout, re.MULTILINE)
    assert said, run.stdout[-2000:]
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.open(picture).convert("RGB")
    expected = []
    for text in prompts:
        inputs = processor(text=[text], images=[[image]], return_tensors="pt")
        with torch.inference_mode():
            made = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        new = made[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(new, skip_special_tokens=True))
    assert all(expected)
    assert json.loads(said[1]) == expected
