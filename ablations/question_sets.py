"""The two sets, each in a folder: images with questions, a teacher, its caches, its tower's features."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, float32
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from ablations.arms import Budget
from ablations.features import encode
from ablations.mosaic_teacher import MosaicTeacher, images_of, train_mosaic_teacher
from ablations.mosaics import draw_mosaics, load_items
from ablations.mosaics import question_kind as mosaic_kind
from cache_schema.format.spec import TargetSpec, read_entries
from cache_schema.output import write_text
from cache_schema.progress import Progress
from demo.easy_vqa import DESCRIBE, MOST_TURNS, Described, llava_row, load_pictures
from demo.easy_vqa import question_kind as easy_kind
from demo.story import SHIPPED_TEACHER
from demo.train_teacher import HELD_OUT
from demo.vision_tower import load_images
from pipeline.capture import BuildConfig, build

Kinds = Callable[[str, str], str]
SPLITS = ("train", "validation", "test")
CACHES = ("captions", "conversations")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of a set is used, beside the training images of its budget."""

    validation: int = 100
    test: int = 250
    mosaic_teacher: MosaicTeacher = field(default_factory=MosaicTeacher)


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """A split: what is known of its images (N), and their pixels (N, 3, 64, 64) uint8."""

    described: Sequence[Described]
    pixels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionSet:
    """A prepared set in `folder`."""

    name: str
    folder: Path
    budget: Budget
    described: dict[str, Sequence[Described]]
    kind_of: Kinds

    def cache(self, rows: str, source: str) -> Path:
        """The cache of `rows` (one of CACHES) that an arm with this source learns from."""
        return self.folder / f"cache-{rows}-{'compact' if source == 'live' else source}"

    def features(self, split: str) -> Tensor:
        """(N, P, D) of the split's images, in their order."""
        return load_file(self.folder / "features.safetensors")[split]

    def paths(self, split: str) -> list[str]:
        """The images of a split as the caches name them."""
        return [f"{split}/{place}.png" for place in range(len(self.described[split]))]

    def teacher(self) -> LlavaForConditionalGeneration:
        """In float32, with its tower."""
        return LlavaForConditionalGeneration.from_pretrained(self.folder / "teacher", dtype=float32).eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.folder / "teacher")


def open_set(name: str, folder: Path, budget: Budget, sizes: Sizes) -> QuestionSet:
    """The set as it stands or will stand in `folder`: what is known of its images, and nothing written."""
    if name == "easy-vqa":
        pictures = load_pictures("train")
        drawn = random.Random("ablations").sample(pictures[:-HELD_OUT], budget.images)
        described: dict[str, Sequence[Described]] = {
            "train": drawn,
            "validation": pictures[-HELD_OUT:][: sizes.validation],
            "test": load_pictures("test")[: sizes.test],
        }
        kind_of: Kinds = lambda question, answer: easy_kind(answer)  # noqa: E731
    else:
        train, test = load_items("train"), load_items("test")
        described = {
            "train": draw_mosaics(train, budget.images, "train"),
            "validation": draw_mosaics(train, sizes.validation, "validation"),
            "test": draw_mosaics(test, sizes.test, "test"),
        }
        kind_of = lambda question, answer: mosaic_kind(question)  # noqa: E731
    return QuestionSet(name=name, folder=folder, budget=budget, described=described, kind_of=kind_of)


def prepare(found: QuestionSet, sizes: Sizes, sources: Sequence[str], progress: Progress) -> None:
    """Makes teacher, rows, images, features and the caches of `sources` in the set's folder. What is there is
    kept."""
    folder = found.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "teacher" / "config.json").exists():
        if found.name == "easy-vqa":
            shutil.copytree(SHIPPED_TEACHER, folder / "teacher")
        else:
            items = load_items("train")
            train_mosaic_teacher(folder / "teacher", folder / "work", items, sizes.mosaic_teacher, progress)
    if not (folder / "features.safetensors").exists():
        _write_images(found)
    spec = TargetSpec(targets=("response", "visual", "relation", "prompt"))
    specs = {
        "compact": spec,
        "full": replace(spec, top_k=len(found.tokenizer()), precision="full", relation="exact"),
        "threshold": replace(spec, entries=read_entries("p>=0.003")),
    }
    for rows in CACHES:
        for source in sources:
            config = BuildConfig(
                teacher=folder / "teacher",
                data=folder / f"{rows}.json",
                image_root=str(folder / "images"),
                out=str(found.cache(rows, source)),
                spec=specs[source],
                template="plain" if rows == "captions" else None,
                dtype="float32",
            )
            build(config, progress)


def _write_images(found: QuestionSet) -> None:
    """Images and rows of the training split, and the features of every split, which are written last."""
    tower = found.teacher().model.vision_tower
    features = {}
    for split in SPLITS:
        pixels = _pixels(found, split)
        features[split] = encode(tower, pixels)
        if split == "train":
            captions, conversations = [], []
            (found.folder / "images" / split).mkdir(parents=True, exist_ok=True)
            for place, (image, path) in enumerate(
                zip(found.described[split], found.paths(split), strict=True)
            ):
                Image.fromarray(np.asarray(pixels[place].permute(1, 2, 0))).save(
                    found.folder / "images" / path
                )
                rng = random.Random(f"row-{place}")
                captions.append(llava_row(f"caption-{place}", path, [(DESCRIBE, rng.choice(image.captions))]))
                turns = rng.sample(image.questions, min(MOST_TURNS, len(image.questions)))
                conversations.append(llava_row(f"conversation-{place}", path, turns))
            for name, rows in (("captions", captions), ("conversations", conversations)):
                write_text(found.folder / f"{name}.json", json.dumps(rows, indent=1))
    save_file(features, found.folder / "features.safetensors")


def _pixels(found: QuestionSet, split: str) -> Tensor:
    if found.name == "easy-vqa":
        return load_images(found.described[split])  # type: ignore[arg-type]
    return images_of(found.described[split], load_items("test" if split == "test" else "train"))  # type: ignore[arg-type]
