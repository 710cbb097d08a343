"""A dataset as large as wished, and a whole `build` of it with a teacher that takes no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks._scale_cache import RESPONSE, SHARD, SPEC, VISUAL, image_of, write_shards
from benchmarks._smollm2 import IMAGE_TOKEN
from benchmarks._stand_in import StandInEngine, StoredTargets, stand_in_folder
from cache_schema.format.writer import CacheWriter
from cache_schema.progress import Silent
from models.folder import load_processor
from pipeline import capture, extract, job
from pipeline.capture import BuildConfig, BuildSummary, build
from pipeline.fingerprint import weights_digest
from pipeline.teachers import Teacher

SIDE = 27  # pixels of an image and visual tokens of it, along one edge
_FOLDER = 1000  # images of a folder


def write_data(folder: Path, rows: int) -> None:
    """The teacher's folder, and LLaVA rows of about a kilobyte each. Every second image has two rows, whose
    system prompts differ, so that they share no targets."""
    teacher = stand_in_folder(folder / "teacher", side=SIDE, patch=1)
    (folder / "images").mkdir()
    words = _single_tokens(teacher, RESPONSE - 1)  # and the end token
    with (folder / "data.json").open("w", encoding="utf-8") as file:
        for row in range(rows):
            image, turned = _image_path(image_of(row)), row % len(words)
            turns = [
                {"from": "system", "value": f"Conversation {row}."},
                {"from": "human", "value": "<image>\nWhat is in this picture?"},
                {"from": "gpt", "value": " ".join(words[turned:] + words[:turned])},
            ]
            document = {"id": f"sample-{row}", "image": image, "conversations": turns}
            file.write(("[" if row == 0 else ",\n") + json.dumps(document))
        file.write("]")


def _single_tokens(teacher: Path, count: int) -> list[str]:
    """Different words, each one token after a blank."""
    tokenizer = load_processor(teacher, "teacher").tokenizer
    marked = [word[1:] for word in tokenizer.get_vocab() if word[0] == "\u0120" and word[1:].isalpha()]
    return sorted(word for word in marked if word.isascii() and word.islower())[:count]


def _image_path(number: int) -> str:
    return f"{number // _FOLDER:04d}/{number:09d}.ppm"


def leave(folder: Path, rows: int) -> None:
    """Leaves so many rows to the capture, in whole shards spread over the cache: makes their images, and
    writes all other shards without a capture."""
    of = job.open_job(_config(folder), Silent())
    plan, weights = of.plan, weights_digest(folder / "teacher").result()
    writer = CacheWriter.open(folder / "cache", of.manifest(True, weights))
    left = np.linspace(0, plan.shards - 1, min(-(-rows // SHARD), plan.shards)).astype(np.int64)
    for row in np.concatenate([plan.rows_of(int(shard)) for shard in left]).tolist():
        _write_image(folder / "images" / _image_path(image_of(row)), image_of(row))
    write_shards(writer, np.setdiff1d(np.arange(plan.shards), left).tolist())


def _write_image(path: Path, number: int) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(f"P6 {SIDE} {SIDE} 255\n".encode() + number.to_bytes(3, "big") * SIDE**2)  # a PPM file


class SwiftProcessor:
    """A Llava processor for rows of one image without the time of transformers' own: the text around the mark
    is tokenised, the mark's tokens are given, and pixels are zeros."""

    def __init__(self, processor: Any, **_: Any) -> None:
        self.tokenizer = processor.tokenizer
        self._image_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._pixels = torch.zeros(1, 3, SIDE, SIDE)

    def __call__(self, images: Any, text: list[str], **_: Any) -> dict[str, Any]:
        before, mark, after = text[0].partition(IMAGE_TOKEN)
        encode = self.tokenizer.backend_tokenizer.encode
        first, last = (encode(part, add_special_tokens=False) for part in (before, after))
        starts = len(before) + len(mark) * np.arange(VISUAL + 1)
        offsets = [
            np.array(first.offsets).reshape(-1, 2),
            np.stack([starts[:-1], starts[1:]], axis=1),
            np.array(last.offsets).reshape(-1, 2) + starts[-1],
        ]
        span, new_span = (len(before), len(before) + len(mark)), (len(before), int(starts[-1]))
        return {
            "input_ids": [[*first.ids, *[self._image_id] * VISUAL, *last.ids]],
            "offset_mapping": [np.concatenate(offsets)],
            "text_replacement_offsets": [[{"span": span, "new_span": new_span}]],
            "pixel_values": self._pixels,
        }


def build_all(folder: Path, *, rank: int = 0, world_size: int = 1) -> BuildSummary:
    """`build` of the data in `folder`; its processor, engine and target maker are stand-ins."""
    engine, targets = StandInEngine(0.0), StoredTargets(SPEC, rank=1)
    teacher = Teacher(engine=engine, head=engine.head, sharing=True, packing=False, batch_tokens=16384)
    with (
        patch.object(job, "with_table", SwiftProcessor),
        patch.object(capture, "load_teacher", lambda of, progress: teacher),
        patch.object(extract, "TargetMaker", lambda head, spec: targets),
    ):
        return build(_config(folder, rank, world_size), Silent())


def _config(folder: Path, rank: int = 0, world_size: int = 1) -> BuildConfig:
    return BuildConfig(
        teacher=folder / "teacher",
        data=folder / "data.json",
        image_root=str(folder / "images"),
        out=str(folder / "cache"),
        spec=SPEC,
        device="cpu",
        shard_size=SHARD,
        rank=rank,
        world_size=world_size,
        prepare_threads=1,
    )
