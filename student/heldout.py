"""The distance of the student to its teacher on a held-out cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cache_schema.format.cache import Cache
from cache_schema.progress import Progress, Silent, task
from student.collate import Collator
from student.loader import load_ahead
from student.losses import Denominators, LossWeights
from student.model import DistilledStudent
from student.stream import Stream, StreamConfig

# The order of the sums that ranks add up.
_TERMS = ("ce", "response_kl", "visual_kl", "prompt_kl", "relation", "response_top1", "visual_top1")


def measure_cache(
    student: DistilledStudent,
    cache: Cache,
    collator: Collator,
    *,
    device: torch.device,
    micro_batch: int = 8,
    samples: int | None = None,
    workers: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    add_up: Callable[[Tensor], Tensor] = lambda sums: sums,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Means over the first `samples` samples (None: all) of what `collator.targets` gives.

    ce, response_kl, visual_kl, prompt_kl: nats per token; relation: 1 - cos per image; response_top1,
    visual_top1: share of positions where the student's most likely token is the teacher's; and the counts
    samples, tokens. Keys without any position are omitted. add_up sums a tensor over the ranks, which share
    the samples. The model is in eval mode meanwhile.
    """
    progress = progress or Silent()
    batch = micro_batch * world_size
    config = StreamConfig(global_batch=batch, shuffle=False)
    stream = Stream(
        cache, config, micro_batch=micro_batch, targets=collator.targets, rank=rank, world_size=world_size
    )
    steps = -(-min(samples or len(stream), len(stream)) // batch)
    sums = torch.zeros(len(_TERMS), dtype=torch.float64)
    counts = Denominators()
    training = student.training
    student.eval()
    with task(progress, "evaluating on the held-out cache", steps):
        for step, batches in load_ahead(stream.read(0, steps), collator, workers=workers):
            for made in batches:
                counts = counts + made.denominators
                moved = made.to(device)  # an idle batch too: with sharded weights the other ranks need it
                parts, same = student.measure(moved.inputs, moved.labels, moved.targets)
                terms = parts.by_term.values()
                sums += torch.stack([*terms, same.response, same.visual]).cpu().double()
            progress.update(step + 1)
    student.train(training)
    both = add_up(torch.cat([sums, counts.to_tensor()]))
    counts = Denominators.from_tensor(both[len(_TERMS) :])
    over = dict(
        zip(
            _TERMS,
            (
                counts.ce_tokens,
                counts.response_tokens,
                counts.visual_tokens,
                counts.prompt_tokens,
                counts.images,
                counts.response_tokens,
                counts.visual_tokens,
            ),
            strict=True,
        )
    )
    means = {
        name: float(value) / over[name]
        for name, value in zip(_TERMS, both[: len(_TERMS)].tolist(), strict=True)
        if over[name]
    }
    return {**means, "samples": counts.samples, "tokens": counts.ce_tokens}


def weighted(measured: dict[str, float], weights: LossWeights) -> float:
    """The stage's loss from held-out means: what early stopping watches."""
    return sum(weight * measured.get(name, 0.0) for name, weight in weights.by_term.items())
