"""Entries by number and by threshold: bytes per position against the angle of the gradient.

    python -m benchmarks.entries [--tokens 2048] [--images 3] [--pictures 300] [--json FILE]

On real SmolLM2 logits of English text, on the visual model of `benchmarks.codecs`, and at the answers of the
demo's teacher (package easy-vqa). Bytes are those of the files of one group, compact, metadata and checksums
included. The angle is that of `benchmarks.codecs`, of what is read back from the cache: over all positions as
one vector, the student the teacher with noise before its last norm at a mean KL of 0.7.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._teachers import Teacher, language_teacher, topk_of, visual_teacher
from benchmarks.codecs import gradient_angles, table, whole_record
from cache_schema.format.records import TopK
from cache_schema.format.spec import EntryRule
from cache_schema.progress import Silent
from demo.easy_vqa import write_dataset
from demo.story import SHIPPED_TEACHER
from models.folder import load_model
from pipeline.entry_rules import cut
from pipeline.job import open_job
from pipeline.settings import BuildConfig
from pipeline.transformers_engine import TransformersEngine

WIDEST = 256
NUMBERS = (4, 8, 16, 32, 64)
LEAST = (0.02, 0.01, 0.005, 0.004, 0.0035, 0.003, 0.002, 0.001)


def answers_teacher(pictures: int) -> Teacher:
    """The demo's teacher at the response positions of conversations about `pictures` training images."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_dataset(Path(folder), train_images=pictures, test_images=1, held_out_images=1)
        config = BuildConfig(
            teacher=SHIPPED_TEACHER,
            data=data.conversations,
            image_root=data.image_root,
            out=str(Path(folder) / "cache"),
        )
        job = open_job(config, Silent())
        model = load_model(SHIPPED_TEACHER, torch.float32)
        engine = TransformersEngine(model, vocab_size=job.vocab_size, pad_token_id=job.pad_token_id)
        norm = model.model.language_model.norm
        before: list[torch.Tensor] = []
        norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0][0]))
        states, labels = [], []
        for row in job.plan.order.tolist():
            sample = job.preparer.prepare(job.dataset[row])
            engine.hidden_states([sample])
            at = sample.positions["response"]
            states.append(before.pop()[at].numpy())
            labels.append(sample.input_ids[at + 1])
    last_layer = np.concatenate(states)

    def normed(given: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(norm(torch.from_numpy(given)).numpy())

    weight = model.get_output_embeddings().weight.detach()[: job.vocab_size].numpy()
    return Teacher(
        name=f"the demo's teacher at its answers, {pictures} images",
        last_layer=last_layer,
        norm=normed,
        hidden=normed(last_layer),
        weight=weight,
        bias=np.zeros(len(weight), np.float32),
        labels=np.concatenate(labels).astype(np.int64),
        length=len(last_layer),
    )


def rules_of(widest: int) -> dict[str, EntryRule]:
    """The rules that are compared, by name."""
    numbers = {f"{number} entries": EntryRule(most=number) for number in NUMBERS if number <= widest}
    least = {f"p >= {p:g}": EntryRule(most=min(widest, int(1 / p)), least_p=p) for p in LEAST}
    return numbers | least


def compare_rules(teacher: Teacher, *, label: bool, seed: int = 0) -> list[dict[str, Any]]:
    """One row per rule: entries, mass outside, bytes per position, angle of exact and stored record."""
    widest = min(WIDEST, len(teacher.weight) - 1)
    whole = topk_of(teacher, widest)
    whole = whole if label else replace(whole, label_logprob=None)
    records: dict[str, TopK] = {"widest": whole}
    rows = []
    for name, rule in rules_of(widest).items():
        exact = cut(whole, rule)
        measured = whole_record(exact)
        records |= {name: exact, f"{name}, stored": measured["stored"]}
        rows.append(
            {
                "rule": name,
                "mean K": float(exact.there.sum(axis=1).mean()),
                "largest K": int(exact.there.sum(axis=1).max()),
                "mass outside": float(np.exp(exact.tail_logprob).mean()),
                "bytes": measured["bytes"],
                "arrays": {key: round(value, 2) for key, value in measured["arrays"].items()},
            }
        )
    angles = gradient_angles(teacher, records, seed, "before the norm")
    for row in rows:
        row |= {"angle": angles[row["rule"]], "angle as stored": angles[f"{row['rule']}, stored"]}
    print(f"\n{teacher.name}: {len(whole)} positions, noise of mean KL {angles['kl']:.3f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048, help="positions of English text; 0: none")
    parser.add_argument("--images", type=int, default=3, help="images of the visual model; 0: none")
    parser.add_argument("--pictures", type=int, default=300, help="images of the demo's teacher; 0: none")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    makers = (
        (options.tokens, language_teacher, True),
        (options.images, visual_teacher, False),
        (options.pictures, answers_teacher, True),
    )
    for size, make, label in makers:
        if size:
            teacher = make(size)
            rows = compare_rules(teacher, label=label)
            figures[teacher.name] = rows
            table("rules", [{key: value for key, value in row.items() if key != "arrays"} for row in rows])
            table(
                "bytes by array",
                [{"rule": row["rule"], **row["arrays"]} for row in rows[: len(NUMBERS)][-2:]],
            )
            table("bytes by array", [{"rule": row["rule"], **row["arrays"]} for row in rows[-len(LEAST) :]])
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
