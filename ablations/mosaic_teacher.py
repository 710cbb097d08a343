"""The teacher of the mosaics: a tower that learns what stands in each cell, and a language model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    LlavaForConditionalGeneration,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from ablations.features import GivenFeatures, encode
from ablations.mosaics import ITEMS, SIDE, Items, Mosaic, draw_mosaics
from cache_schema.progress import Progress, task
from demo.language_model import LanguageSize, train_language_model
from demo.phases import WorkFolder, train_phase
from demo.teacher_model import assemble, save_teacher
from demo.teacher_texts import Row, Texts
from demo.tokenizer import train_tokenizer, training_texts, turn_text
from demo.train_teacher import caption_batches
from demo.vision_tower import FEATURE_LAYER, IMAGE_SIZE, normalized, one_cycle

PATCH = 16
_CELL_TOKENS = SIDE // PATCH

Phase = tuple[str, Callable[..., Iterator[tuple[list[int], list[Row]]]], int, tuple[str, ...]]
"""Name, batches, steps, and the parts that it trains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MosaicTeacher:
    """The teacher's size and schedule. Batches count mosaics."""

    tower_size: int = 96
    tower_layers: int = 4
    tower_steps: int = 1500
    tower_learning_rate: float = 1e-3
    mosaics: int = 8000
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    text_steps: int = 150
    caption_steps: int = 100
    question_steps: tuple[int, ...] = (1000, 1500)
    learning_rate: float = 2e-3
    batch: int = 32
    seed: int = 0


def images_of(mosaics: Sequence[Mosaic], items: Items) -> Tensor:
    """Pixels (B, 3, 64, 64) uint8."""
    return torch.from_numpy(np.stack([mosaic.pixels(items) for mosaic in mosaics])).permute(0, 3, 1, 2)


def train_mosaic_teacher(
    out: Path, work: Path, items: Items, settings: MosaicTeacher, progress: Progress
) -> None:
    """Runs or resumes all phases on photographs of the training split, and saves the teacher in `out`."""
    folder = WorkFolder(work, progress)
    mosaics = draw_mosaics(items, settings.mosaics, f"teacher-{settings.seed}")
    tokenizer = train_tokenizer(training_texts(mosaics))
    texts = Texts(tokenizer, (2 * _CELL_TOKENS) ** 2)

    def make_tower(path: Path) -> None:
        train_tower(items, settings, progress).save_pretrained(path)

    def make_language_model(path: Path) -> None:
        lines = []
        for mosaic in mosaics:
            lines.append("".join(turn_text(question, answer) for question, answer in mosaic.questions))
            lines += [f"{caption}\n" for caption in mosaic.captions]
        train_language_model(
            lines,
            tokenizer,
            path,
            LanguageSize(settings.hidden_size, settings.layers, settings.heads),
            steps=settings.text_steps,
            seed=settings.seed,
            tied=False,
            progress=progress,
        )

    def taught(
        start: Callable[[], LlavaForConditionalGeneration], phases: Sequence[Phase], seed: int
    ) -> Callable[[Path], None]:
        """Makes a folder of the model that `phases` make of the one that `start` gives."""

        def make(path: Path) -> None:
            model = start()
            tower = model.model.vision_tower
            features = encode(tower, images_of(mosaics, items))
            model.model.vision_tower = GivenFeatures()
            rng = random.Random(seed)
            for name, made, steps, parts in phases:
                train_phase(
                    name,
                    model,
                    features.__getitem__,
                    made(mosaics, texts, settings.batch, steps, rng),
                    trained=[model.get_submodule(part) for part in parts],
                    steps=steps,
                    learning_rate=settings.learning_rate,
                    weight_decay=0.05,
                    progress=progress,
                )
            model.model.vision_tower = tower
            model.save_pretrained(path)

        return make

    def assembled() -> LlavaForConditionalGeneration:
        tower = SiglipVisionModel.from_pretrained(tower_folder).eval()
        return assemble(tower, Qwen2ForCausalLM.from_pretrained(text_folder), tokenizer, seed=settings.seed)

    # A later phase's settings contain the earlier ones', so that a change invalidates it too.
    every = asdict(settings)
    chain = {name: value for name, value in every.items() if name.startswith("tower") or name == "seed"}
    tower_folder = folder.phase("tower", chain, make_tower)
    chain = {name: value for name, value in every.items() if not name.startswith("question")}
    text_folder = folder.phase("text", chain, make_language_model)
    projector = ("model.multi_modal_projector",)
    rest = (*projector, "model.language_model", "lm_head")
    captions: Phase = ("projector on captions", caption_batches, settings.caption_steps, projector)
    newest = text_folder
    for number, steps in enumerate(settings.question_steps):
        start = assembled
        if number:
            start = partial(LlavaForConditionalGeneration.from_pretrained, newest, dtype=torch.float32)
        questions: Phase = (f"questions, round {number + 1}", question_batches, steps, rest)
        phases = (questions,) if number else (captions, questions)
        chain = {**chain, f"question_steps_{number + 1}": steps}
        make = taught(start, phases, settings.seed + number)
        newest = folder.phase(f"taught-{number + 1}", chain, make)
    save_teacher(newest, out, tokenizer)


def question_batches(
    mosaics: Sequence[Mosaic], texts: Texts, batch: int, steps: int, rng: random.Random
) -> Iterator[tuple[list[int], list[Row]]]:
    """(mosaic numbers, rows) for each step: captions (a tenth), conversations (three tenths), or
    the questions of each mosaic side by side, none seeing another."""
    for _ in range(steps):
        draw = rng.random()
        chosen = [rng.randrange(len(mosaics)) for _ in range(batch)]
        if draw < 0.1:
            rows = [texts.caption(rng.choice(mosaics[number].captions)) for number in chosen]
        elif draw < 0.4:
            turns = [mosaics[number].questions for number in chosen]
            rows = [texts.conversation(rng.sample(each, len(each))) for each in turns]
        else:
            rows = [texts.questions(mosaics[number].questions) for number in chosen]
        yield chosen, rows


def train_tower(items: Items, settings: MosaicTeacher, progress: Progress) -> SiglipVisionModel:
    """Learns the item of every cell from the mean over the cell's visual tokens, on mosaics drawn anew for
    each step."""
    torch.manual_seed(settings.seed)
    random_numbers = np.random.default_rng(settings.seed)
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=settings.tower_size,
            intermediate_size=4 * settings.tower_size,
            num_hidden_layers=settings.tower_layers,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            vision_use_head=False,
        )
    )
    classify = nn.Sequential(nn.LayerNorm(settings.tower_size), nn.Linear(settings.tower_size, len(ITEMS)))
    parameters = [*tower.parameters(), *classify.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.tower_learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: one_cycle(step, settings.tower_steps)
    )
    right = 0.0
    with task(progress, "mosaic tower", settings.tower_steps):
        for step in range(1, settings.tower_steps + 1):
            numbers = random_numbers.integers(len(items.labels), size=(64, 4))
            drawn = [
                Mosaic(photographs=tuple(row), labels=(0, 0, 0, 0), questions=()) for row in numbers.tolist()
            ]
            labels = torch.from_numpy(items.labels[numbers].astype(np.int64))  # (64, 4)
            states = tower(normalized(images_of(drawn, items)), output_hidden_states=True).hidden_states
            grid = states[FEATURE_LAYER].unflatten(1, (2, _CELL_TOKENS, 2, _CELL_TOKENS))
            logits = classify(grid.mean(dim=(2, 4)).flatten(1, 2))  # (64, 4, 10)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            right = 0.98 * right + 0.02 * (logits.argmax(-1) == labels).float().mean().item()
            progress.update(step, loss=f"{loss.item():.3f}", right=f"{right:.3f}")
    return tower.eval()
