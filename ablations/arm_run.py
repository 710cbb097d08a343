"""One arm with one seed: a student from text alone, its stages, and its answers on the way and at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, Qwen2ForCausalLM, SiglipVisionModel

from ablations.arms import SIZES, Arm, Size
from ablations.features import FeatureCollator, GivenFeatures
from ablations.live import live_loss
from ablations.measure import Answers, answers_of
from ablations.question_sets import QuestionSet
from cache_schema.datasets.image_roots import open_root
from cache_schema.format.cache import open_cache
from cache_schema.progress import Silent
from demo.language_model import LanguageSize, conversation_texts, train_language_model
from demo.phases import WorkFolder
from demo.teacher_model import assemble
from demo.teacher_texts import Texts
from student.collate import Batch
from student.loader import load_ahead
from student.model import DistilledStudent
from student.stages import Stage
from student.stream import Stream, StreamConfig

CURVE_POINTS = 5
CURVE_IMAGES = 60


class Bench:
    """A set as arms need it: everything that is the same for all of them, read once."""

    def __init__(self, found: QuestionSet, text_steps: int) -> None:
        self.found, self._text_steps = found, text_steps
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = found.tokenizer()
        self.features = {split: found.features(split) for split in found.described}
        self.texts = Texts(self.tokenizer, self.features["train"].shape[1])
        teacher = found.teacher()
        self.tower: SiglipVisionModel = teacher.model.vision_tower
        teacher.model.vision_tower = GivenFeatures()
        self.teacher: LlavaForConditionalGeneration = teacher.to(self.device)
        self.of_teacher = {split: self.answers(teacher, split) for split in ("validation", "test")}

    def answers(self, model: LlavaForConditionalGeneration, split: str, images: int | None = None) -> Answers:
        """Of the split's first `images` images; None: of all."""
        described, features = self.found.described[split][:images], self.features[split][:images]
        return answers_of(model, self.texts, described, features, self.found.kind_of)

    def language_model(self, size: Size, seed: int) -> Path:
        """The folder of a language model that has seen the conversations without their images."""
        rows = json.loads((self.found.folder / "conversations.json").read_text(encoding="utf-8"))

        def make(path: Path) -> None:
            train_language_model(
                conversation_texts(rows, self.tokenizer),
                self.tokenizer,
                path,
                LanguageSize(*SIZES[size]),
                steps=self._text_steps,
                seed=seed,
            )

        settings = {"size": [*SIZES[size]], "seed": seed, "steps": self._text_steps}
        folder = WorkFolder(self.found.folder / "language-models", Silent())
        return folder.phase(f"{size}-{seed}", settings, make)

    def start(self, size: Size, seed: int) -> LlavaForConditionalGeneration:
        """The initial student of a seed."""
        text = Qwen2ForCausalLM.from_pretrained(self.language_model(size, seed))
        model = assemble(self.tower, text, self.tokenizer, seed=seed)
        model.model.vision_tower = GivenFeatures()
        return model.to(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An arm, a seed, and what its learning rates are multiplied by."""

    arm: Arm
    seed: int
    factor: float


def run_arm(bench: Bench, job: Job) -> dict[str, Any]:
    """Trains and measures; a JSON object. Deterministic on one machine with one thread."""
    began = time.process_time()
    model = bench.start(job.arm.size, job.seed)
    curve: list[tuple[int, float]] = []
    stages = job.arm.stages(bench.found.budget, job.factor)
    steps = 0
    for rows, stage in stages:
        seen = sum(samples for samples, _ in curve[-1:])

        def note(samples: int, before: int = seen) -> None:
            found = bench.answers(model, "test", CURVE_IMAGES).accuracy()["mean"]
            curve.append((before + samples, found))

        steps += _train(bench, model, job, rows, stage, note if rows == "conversations" else None)
    validation, test = (bench.answers(model, split) for split in ("validation", "test"))
    return {
        "arm": job.arm.name,
        "seed": job.seed,
        "factor": job.factor,
        "validation": validation.accuracy()["mean"],
        "test": test.accuracy(),
        "agreement": test.agreement(bench.of_teacher["test"]),
        "calibration": test.calibration_error(),
        "curve": curve,
        "steps": steps,
        "seconds": round(time.process_time() - began, 1),
    }


def _train(
    bench: Bench,
    model: LlavaForConditionalGeneration,
    job: Job,
    rows: str,
    stage: Stage,
    note: Callable[[int], None] | None,
) -> int:
    """One stage with AdamW, on the batches that `kdcache train` would form; its steps. `note` is called with
    the number of samples seen."""
    arm, found = job.arm, bench.found
    cache = open_cache(str(found.cache(rows, arm.source)))
    student = DistilledStudent(
        model, stage.losses, vocab_size=len(bench.tokenizer), trainable=stage.trainable
    )
    student.needs_mask = False  # padding is on the right, attention causal
    collator = FeatureCollator(
        features=bench.features["train"],
        places={path: place for place, path in enumerate(found.paths("train"))},
        image_root=open_root(found.folder / "images"),
        pad_token_id=bench.tokenizer.pad_token_id,
        image_token_id=model.config.image_token_id,
        targets=stage.targets,
        losses=stage.losses,
    )
    order = StreamConfig(seed=job.seed, global_batch=stage.global_batch, samples=arm.images)
    stream = Stream(cache, order, micro_batch=stage.global_batch, targets=stage.targets)
    total = stage.total_steps(stream.steps_per_epoch)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay)

    def loss_of(batch: Batch) -> Tensor:
        if arm.source == "live" and stage.targets:
            return live_loss(student, bench.teacher, batch, stage.losses)
        return student(batch.inputs, batch.labels, batch.targets, batch.denominators).total

    samples = 0
    due = [round(total * (point + 1) / CURVE_POINTS) for point in range(CURVE_POINTS)]
    student.train()
    for step, (_, batches) in enumerate(load_ahead(stream.read(0, total), collator, workers=0)):
        batch = batches[0].to(bench.device)
        loss_of(batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, stage.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate_at(step, total)
        optimizer.step()
        optimizer.zero_grad()
        samples += len(batch.rows)
        if note is not None and step + 1 in due:
            note(samples)
    return total
