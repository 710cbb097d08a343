"""Which objective wins on the demo's data: python -m ablations.objectives --out DIR [--quick]

For each seed one student, with a language model pre-trained on text and a projector pre-trained on captions
without a teacher, is the start of every objective; each then trains the last stage for the same steps in the
same order. What is finished is not done again, also when objectives are added. Writes table.md.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from cache_schema.format.cache import open_cache
from cache_schema.output import write_text
from cache_schema.progress import Silent
from demo.easy_vqa import KINDS
from demo.story import DemoSettings, Story, train_text_model, unpack_teacher, write_data
from student.answering import load_for_answers
from student.calibration import calibration_error
from student.divergences import OF_LOGITS, PARAMETERS
from student.evaluate import evaluate
from student.heldout import held_out
from student.losses import LossWeights, sparse_kl
from student.model import DistilledStudent
from student.settings import EvaluateConfig, TrainConfig
from student.stages import Stage, stage_from
from student.train import train

OBJECTIVES = {
    "none": {"response": 0.0, "visual": 0.0, "relation": 0.0},
    **{name: {"divergence": name} for name in PARAMETERS if name not in OF_LOGITS},
    "forward_kl, dense": {"tail": "dense"},
    "taid, dense": {"divergence": "taid", "tail": "dense"},
    "binary_kl, dense": {"divergence": "binary_kl", "tail": "dense"},
    "binary_kl, dense, dual head": {"divergence": "binary_kl", "tail": "dense", "dual_head": True},
    "relation graph": {"relation_neighbours": 16},
    "dual head": {"dual_head": True},
    "fusion ratio": {"fusion_every": 5},
}
"""By name: what its `losses` have beside DFT's defaults."""

CALIBRATION_SAMPLES = 50
"""Held-out samples on which `first` calibrates the teacher; the others are measured."""

_BATCH = 25

COLUMNS = ("KL(p ‖ q)", "KL(q ‖ p)", "calibration error", "CPU s / step")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of the demo's data, and how long."""

    steps: int
    questions: int
    demo: DemoSettings
    start_epochs: float = 1.0


FULL = Sizes(
    steps=400,
    questions=300,
    demo=DemoSettings(test_images=400, language_model_steps=200, global_batch=8),
)
QUICK = Sizes(
    steps=4,
    questions=20,
    demo=DemoSettings(train_images=64, test_images=80, held_out_images=80, language_model_steps=5),
)


def run_objectives(out: Path, sizes: Sizes, seeds: int, names: Sequence[str]) -> str:
    """The table, as Markdown; each step of the way is kept in folder `out`."""
    settings = sizes.demo
    story = Story(out, asdict(sizes))
    data, teacher, tower = out / "data", out / "teacher", out / "vision-tower"
    images = data / "images"
    story.step("data: easy-VQA as LLaVA rows", lambda: write_data(data, settings))
    story.step("teacher: unpack the shipped one", lambda: unpack_teacher(teacher, tower))
    for name, rows, targets in (
        ("captions", "captions.json", "response"),
        ("conversations", "conversations.json", "response,visual,relation,hidden"),
        ("held-out", "held_out.json", "response"),
    ):
        template = ("--template", "plain") if name == "captions" else ()
        story.command(
            f"cache: build {name}",
            *("build", "--teacher", teacher, "--data", data / rows, "--image-root", images),
            *("--out", out / f"cache-{name}", "--dtype", "float32", "--targets", targets, *template),
        )
    text_model = out / "language-model"
    story.step(
        "language model of all students, from text alone",
        lambda: train_text_model(story, 0, settings, text_model, Silent()),
    )
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in range(seeds):
        start = _start(story, seed, sizes, text_model)
        for name in names:
            stage = stage_from({"base": "dft", "losses": OBJECTIVES[name]})
            run = out / f"seed-{seed}" / name.replace(", ", "-")
            measured[name].append(
                story.step(
                    f"seed {seed}: {name}",
                    lambda stage=stage, run=run, seed=seed, start=start: _one(
                        out, stage, run, seed, start, sizes
                    ),
                )
            )
    return table(measured)


def _start(story: Story, seed: int, sizes: Sizes, text_model: Path) -> Path:
    """The student of a seed that every objective starts from."""
    out, folder, settings = story.folder, story.folder / f"seed-{seed}", sizes.demo
    story.command(
        f"seed {seed}: assemble the student",
        *("new-student", "--vision-tower", out / "vision-tower"),
        *("--language-model", text_model, "--like", out / "cache-conversations"),
        *("--out", folder / "student", "--seed", str(seed)),
    )
    story.command(
        f"seed {seed}: PT",
        *("train", "--stage", "pt", "--student", folder / "student", "--cache", out / "cache-captions"),
        *("--image-root", out / "data" / "images", "--out", folder / "pt", "--seed", str(seed), "--resume"),
        *("--epochs", str(sizes.start_epochs), "--learning-rate", str(settings.dpt_learning_rate)),
        *("--global-batch", str(settings.global_batch), "--micro-batch", str(settings.global_batch)),
    )
    return folder / "pt" / "model"


def _one(out: Path, stage: Stage, run: Path, seed: int, start: Path, sizes: Sizes) -> dict[str, float]:
    """Trains one objective of one seed, and measures its student. The student's folder is not kept."""
    settings, images = sizes.demo, str(out / "data" / "images")
    shutil.rmtree(run, ignore_errors=True)
    needs_held_out = bool(stage.losses.uncalibrated or stage.losses.fusion_every)
    config = TrainConfig(
        stage=stage,
        student=start,
        cache=str(out / "cache-conversations"),
        image_root=images,
        out=run,
        seed=seed,
        max_steps=sizes.steps,
        learning_rate=settings.learning_rate,
        global_batch=settings.global_batch,
        micro_batch=settings.global_batch,
        eval_cache=str(out / "cache-held-out") if needs_held_out else None,
        eval_samples=CALIBRATION_SAMPLES,
        save_every=0,
        trackers=(),
        device="cpu",
    )
    began = time.process_time()
    train(config, Silent())
    seconds = (time.process_time() - began) / sizes.steps
    answered = evaluate(
        EvaluateConfig(
            model=run / "model",
            data=out / "data" / "test.json",
            image_root=images,
            limit=sizes.questions,
            device="cpu",
        ),
        Silent(),
    )
    right = {
        kind: 100 * answered["by_kind"][kind]["exact_match"] for kind in KINDS if kind in answered["by_kind"]
    }
    measured = _distances(run / "model", out / "cache-held-out", images)
    shutil.rmtree(run / "model")
    return {**right, **measured, COLUMNS[3]: seconds}


@torch.no_grad()
def _distances(model: Path, cache: Path, images: str) -> dict[str, float]:
    """At the response positions of the held-out samples that calibrate no teacher: both KL over the cache's
    events, and the student's calibration error on the labels."""
    loaded, processor = load_for_answers(model, "cpu")
    source = held_out(open_cache(str(cache)), loaded, processor, images)
    vocabulary = source.cache.manifest.fingerprint.training["vocab_size"]
    student = DistilledStudent(loaded, LossWeights(), vocab_size=vocabulary).eval()
    sums = dict.fromkeys(("forward_kl", "reverse_kl"), 0.0)
    confidence, right = [], []
    measured = range(CALIBRATION_SAMPLES, len(source.cache))
    for first in measured[::_BATCH]:
        batch = source.collator([source.cache[n] for n in measured if first <= n < first + _BATCH])
        assert batch.targets is not None
        target = batch.targets.positions["response"]
        states = student.hidden_states(batch.inputs)
        hidden = states.reshape(-1, states.shape[2])[target.positions]
        head = student.head
        for name in sums:
            options = {"bias": head.bias, "vocab_size": vocabulary, "divergence": name}
            sums[name] += len(hidden) * sparse_kl(hidden, head.weight, target, **options).item()
        most, token = head.logits(hidden).softmax(dim=1).max(dim=1)
        confidence.append(most.double().numpy())
        right.append((token == batch.labels.flatten()[target.positions + 1]).double().numpy())
    sure, hits = np.concatenate(confidence), np.concatenate(right)
    means = [value / len(sure) for value in sums.values()]
    return dict(zip(COLUMNS, (*means, calibration_error(sure, hits)), strict=False))


def table(measured: dict[str, list[dict[str, float]]]) -> str:
    """Mean ± standard deviation over seeds, one row per objective, as Markdown."""
    columns = (*KINDS, *COLUMNS)
    lines = ["| objective | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, runs in measured.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs]
            form = "{:.1f}" if column in KINDS else "{:.3f}"
            cells.append(form.format(statistics.mean(values)))
            if len(values) > 1:
                cells[-1] += " ± " + form.format(statistics.stdev(values))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run; what is finished in it stays"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few steps of each: whether all of it runs")
    parser.add_argument("--only", nargs="+", choices=list(OBJECTIVES), metavar="NAME", help="some objectives")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = QUICK if arguments.quick else FULL
    made = run_objectives(arguments.out, sizes, arguments.seeds, arguments.only or list(OBJECTIVES))
    write_text(arguments.out / "table.md", made)
    print(made)


if __name__ == "__main__":
    main()
