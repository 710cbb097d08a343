"""Makes the demo's teacher from easy-VQA's training split: python -m demo.train_teacher --out demo/teacher.

Five phases, each kept in the work folder and skipped when it is there with the same settings: the vision
tower learns attributes; a language model learns the text; the projector learns captions; projector and
language model learn captions and conversations, then many questions per image, tower frozen. The test split
is used for measuring only.
"""

import argparse
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    Qwen2ForCausalLM,
    SiglipVisionModel,
)

from cache_schema.progress import Progress
from demo.easy_vqa import MOST_TURNS, Described, Picture, load_pictures
from demo.language_model import LanguageSize, train_language_model
from demo.measure_teacher import answer_accuracy, mean_entropy
from demo.phases import Lines, WorkFolder, train_phase
from demo.teacher_model import assemble, make_processor, save_teacher
from demo.teacher_texts import Row, Texts
from demo.tokenizer import train_tokenizer, training_texts, turn_text
from demo.vision_tower import (
    TowerTraining,
    load_images,
    normalized,
    shifted,
    train_tower,
)

HELD_OUT = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTraining:
    """The teacher's size and schedule. Batches count images."""

    tower: TowerTraining = field(default_factory=TowerTraining)
    hidden_size: int = 160
    layers: int = 4
    heads: int = 5
    text_steps: int = 150
    caption_steps: int = 100
    caption_learning_rate: float = 3e-3
    instruction_steps: int = 1200
    instruction_learning_rate: float = 1e-3
    question_steps: tuple[int, ...] = (400, 450)  # two rounds: yes/no is at 93% after one
    question_learning_rate: float = 1e-3
    batch: int = 32
    weight_decay: float = 0.05
    seed: int = 0


def caption_batches(
    pictures: Sequence[Described], texts: Texts, batch: int, steps: int, rng: random.Random
) -> Iterator[tuple[list[int], list[Row]]]:
    """(picture numbers, rows) for each step, captions only."""
    for _ in range(steps):
        chosen = [rng.randrange(len(pictures)) for _ in range(batch)]
        yield chosen, [texts.caption(rng.choice(pictures[row].captions)) for row in chosen]


def instruction_batches(
    pictures: Sequence[Described], texts: Texts, batch: int, steps: int, rng: random.Random
) -> Iterator[tuple[list[int], list[Row]]]:
    """Batches of one kind each: captions (a tenth), single questions (half, twice the rows), conversations.

    Single questions keep the model looking at the image: in a conversation, earlier answers reveal later
    ones.
    """
    for _ in range(steps):
        draw = rng.random()
        count = 2 * batch if draw < 0.6 else batch
        chosen = [rng.randrange(len(pictures)) for _ in range(count)]
        rows = []
        for row in chosen:
            questions = pictures[row].questions
            if draw < 0.1:
                rows.append(texts.caption(rng.choice(pictures[row].captions)))
            elif draw < 0.6:
                rows.append(texts.conversation([rng.choice(questions)]))
            else:
                rows.append(texts.conversation(rng.sample(questions, min(len(questions), MOST_TURNS))))
        yield chosen, rows


def question_batches(
    pictures: Sequence[Picture], texts: Texts, batch: int, steps: int, rng: random.Random
) -> Iterator[tuple[list[int], list[Row]]]:
    """As `instruction_batches`, but mostly (seven tenths) many questions packed behind one image.

    About half of these name what is in the picture: most of the set's questions about a color name an absent
    one, and a teacher trained on the raw distribution learns that bias.
    """
    for _ in range(steps):
        draw = rng.random()
        chosen = [rng.randrange(len(pictures)) for _ in range(batch)]
        rows = []
        for row in chosen:
            picture = pictures[row]
            if draw < 0.1:
                rows.append(texts.caption(rng.choice(picture.captions)))
            elif draw < 0.3:
                rows.append(texts.conversation(rng.sample(picture.questions, min(len(picture.questions), 8))))
            else:
                truth = {picture.attributes.shape, picture.attributes.color}
                named = [pair for pair in picture.questions if truth & set(pair[0].rstrip("?").split())]
                others = [pair for pair in picture.questions if pair not in named]
                kept = [rng.sample(pairs, min(len(pairs), 5)) for pairs in (named, others)]
                rows.append(texts.questions([*kept[0], *kept[1]]))
        yield chosen, rows


def augmented(images: Tensor, seed: int) -> Callable[[list[int]], Tensor]:
    """Pixel values of images by their numbers, each time mirrored and moved anew."""
    generator = torch.Generator().manual_seed(seed)
    return lambda chosen: normalized(shifted(images[chosen], generator))


def train_teacher(out: Path, work: Path, settings: TeacherTraining, progress: Progress) -> dict[str, Any]:
    """Runs or resumes all phases, saves model and processor in `out`, and measures what was saved.

    Returns:
        The content of `out`/TRAINING.json.
    """
    folder = WorkFolder(work, progress)
    pictures = load_pictures("train")
    images = load_images(pictures)
    seen, held_out = pictures[:-HELD_OUT], pictures[-HELD_OUT:]
    tokenizer = train_tokenizer(training_texts(seen))
    texts = Texts(tokenizer)

    def make_tower(path: Path) -> None:
        attributes = [picture.attributes for picture in pictures]
        tower, _ = train_tower(
            images, attributes, HELD_OUT, settings.tower, seed=settings.seed, progress=progress
        )
        tower.save_pretrained(path)

    def make_language_model(path: Path) -> None:
        rng = random.Random(settings.seed)
        lines = []
        for picture in seen:
            turns = rng.sample(picture.questions, len(picture.questions))
            lines.append("".join(turn_text(question, answer) for question, answer in turns))
            lines += [f"{caption}\n" for caption in picture.captions]
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

    def make_aligned(path: Path) -> None:
        model = assemble(
            SiglipVisionModel.from_pretrained(tower_folder),
            Qwen2ForCausalLM.from_pretrained(text_folder),
            tokenizer,
            seed=settings.seed,
        )
        train_phase(
            "projector on captions",
            model,
            augmented(images, settings.seed),
            caption_batches(
                seen, texts, settings.batch, settings.caption_steps, random.Random(settings.seed)
            ),
            trained=[model.model.multi_modal_projector],
            steps=settings.caption_steps,
            learning_rate=settings.caption_learning_rate,
            weight_decay=0.0,
            progress=progress,
        )
        model.save_pretrained(path)

    def train_all_but_the_tower(
        name: str,
        start: Path,
        path: Path,
        batches: Iterator[tuple[list[int], list[Row]]],
        steps: int,
        rate: float,
        seed: int,
    ) -> None:
        model = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
        processor = make_processor(tokenizer)

        def check() -> str:
            found = answer_accuracy(model, processor, held_out[:100])
            return "held-out " + ", ".join(f"{kind} {value['accuracy']:.4f}" for kind, value in found.items())

        train_phase(
            name,
            model,
            augmented(images, seed),
            batches,
            trained=[model.model.multi_modal_projector, model.model.language_model, model.lm_head],
            steps=steps,
            learning_rate=rate,
            weight_decay=settings.weight_decay,
            progress=progress,
            check=check,
        )
        model.to(torch.bfloat16).save_pretrained(path)

    def make_instructed(path: Path) -> None:
        steps, rate = settings.instruction_steps, settings.instruction_learning_rate
        batches = instruction_batches(seen, texts, settings.batch, steps, random.Random(settings.seed))
        train_all_but_the_tower("instructions", aligned_folder, path, batches, steps, rate, settings.seed)

    def make_questioned(number: int, start: Path) -> Callable[[Path], None]:
        steps, rate = settings.question_steps[number], settings.question_learning_rate
        name, seed = f"packed questions, round {number + 1}", settings.seed + number
        batches = question_batches(seen, texts, settings.batch, steps, random.Random(seed))
        return lambda path: train_all_but_the_tower(name, start, path, batches, steps, rate, seed)

    # A later phase's settings contain the earlier ones', so that a change invalidates it too.
    chain: dict[str, Any] = {"seed": settings.seed, "tower": asdict(settings.tower)}
    tower_folder = folder.phase("tower", chain, make_tower)
    language = {"hidden_size": settings.hidden_size, "layers": settings.layers, "heads": settings.heads}
    chain = {**chain, **language, "text_steps": settings.text_steps}
    text_folder = folder.phase("text", chain, make_language_model)
    chain = {**chain, **{k: v for k, v in asdict(settings).items() if k.startswith("caption")}}
    aligned_folder = folder.phase("aligned", chain, make_aligned)
    chain = {k: v for k, v in asdict(settings).items() if not k.startswith("question")}
    instructed_folder = folder.phase("instructed", chain, make_instructed)
    folders = [tower_folder, text_folder, aligned_folder, instructed_folder]
    for number, steps in enumerate(settings.question_steps):
        name = f"questioned-{number + 1}"
        chain = {**chain, name: [steps, settings.question_learning_rate]}
        folders.append(folder.phase(name, chain, make_questioned(number, folders[-1])))
    seconds = {path.name: json.loads((path / "seconds.json").read_text()) for path in folders}
    save_teacher(folders[-1], out, tokenizer)
    record = measure(out, progress)
    record = {"settings": asdict(settings), "seconds": seconds, **record}
    (out / "TRAINING.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def measure(out: Path, progress: Progress) -> dict[str, Any]:
    """Loads the shipped teacher in float32, as a user would, and measures it on the test split."""
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(out)
    pictures = load_pictures("test")
    started = time.monotonic()
    accuracy = answer_accuracy(model, processor, pictures)
    entropy = mean_entropy(model, Texts(processor.tokenizer), pictures, load_images(pictures))
    for kind, found in accuracy.items():
        progress.message(f"test {kind}: {found['accuracy']:.4f} (majority {found['majority']:.4f})")
    parts = {
        "vision_tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language_model": model.model.language_model,
        "head": model.lm_head,
    }
    weights = out / "model.safetensors"
    return {
        "test": accuracy,
        "test_entropy_nats": entropy,
        "test_seconds": round(time.monotonic() - started, 1),
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "bytes": sum(path.stat().st_size for path in out.iterdir()),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished teacher; replaced")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/demo-teacher"), help="finished phases are kept here"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    train_teacher(arguments.out, arguments.work, TeacherTraining(seed=arguments.seed), Lines())


if __name__ == "__main__":
    main()
