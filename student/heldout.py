"""The distance of the student to its teacher on a held-out cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cache_schema.datasets.image_roots import ImageRoot
from cache_schema.errors import KdcacheError
from cache_schema.format.cache import Cache
from cache_schema.format.identity import digest_of
from cache_schema.format.spec import TARGETS
from cache_schema.progress import Progress, Silent, task
from models.tokens import pad_token_id_of
from student.checks import check_student
from student.collate import Collator
from student.loader import load_ahead
from student.loss_weights import TERMS
from student.losses import Denominators, LossWeights
from student.model import EVERY_TERM, DistilledStudent
from student.order import Catalogue, EpochOrder, Int64, StreamConfig
from student.pixels import PixelInputs
from student.ranks import AddUp, summed
from student.stream import OrderedStream

_SUMS = (*TERMS, "response_top1", "visual_top1")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """A cache to measure on, and the collator that makes batches of it for this student."""

    cache: Cache
    collator: Collator

    def samples(self, limit: int | None = None) -> tuple[Catalogue, Int64]:
        """The first `limit` samples (None: all): their catalogue, and their numbers in it."""
        catalogue = Catalogue([self.cache])
        return catalogue, catalogue.samples_of(0)[:limit]

    @property
    def identity(self) -> str:
        """Digest of what is measured: evaluations of another one cannot be compared."""
        attempts = [[shard, self.cache.commits[shard].attempt] for shard in self.cache.shards]
        return digest_of([self.cache.manifest.identity, attempts])


def held_out(
    cache: Cache, model: Any, processor: Any, image_root: ImageRoot, *, adopt_template: bool = False
) -> HeldOut:
    """A cache that the student can be measured on. IdentityMismatch, as for a cache to learn from.

    Where the student sees an image in another number of tokens than the teacher, what hangs on these tokens
    is left out, and the response terms remain.
    """
    placeholders = check_student(cache, model, processor, image_root, None, adopt_template=adopt_template)
    targets = TARGETS if placeholders is None else ("response",)
    collator = Collator(
        pixels=PixelInputs(processor),
        image_root=image_root,
        pad_token_id=pad_token_id_of(processor.tokenizer),
        image_token_id=cache.manifest.fingerprint.training["image_token_id"],
        targets=tuple(name for name in targets if name in cache.spec.targets),
        sample_temperature=cache.spec.sample_temperature,
        placeholders=placeholders,
        losses=EVERY_TERM,
    )
    return HeldOut(cache=cache, collator=collator)


def measure_samples(
    student: DistilledStudent,
    catalogue: Catalogue,
    among: Int64,
    collator: Collator,
    *,
    device: torch.device,
    micro_batch: int = 8,
    workers: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    add_up: AddUp = lambda sums: sums,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Means of what `collator.targets` gives over the samples of a catalogue that have the numbers `among`.

    ce, response_kl, visual_kl, prompt_kl: nats per token; relation: 1 - cos per image; response_top1,
    visual_top1: share of positions where the student's most likely token is the teacher's; and the counts
    samples, tokens. Keys without any position are omitted. add_up sums a tensor over the ranks, which
    share the samples. The model is in eval mode meanwhile. An error in the data of one rank is raised there
    once all ranks are through; the others get KdcacheError.
    """
    config = StreamConfig(global_batch=micro_batch * world_size, shuffle=False)
    stream = OrderedStream(
        catalogue,
        EpochOrder(catalogue, config, among),
        micro_batch=micro_batch,
        targets=collator.targets,
        rank=rank,
        world_size=world_size,
    )
    steps = stream.steps_per_epoch
    sums = torch.zeros(len(_SUMS), dtype=torch.float64)
    counts = Denominators()
    fault: Exception | None = None
    training = student.training
    student.eval()
    batches = load_ahead(stream.read(0, steps), collator, workers=workers)
    with task(progress or Silent(), "evaluating on the held-out cache", steps):
        for step in range(steps):
            try:
                made = [collator([])] if fault else next(batches)[1]
            except (KdcacheError, OSError) as error:
                # With sharded weights the other ranks wait for this one: it goes on with idle batches.
                fault, made = error, [collator([])]
            for batch in made:
                counts = counts + batch.denominators
                moved = batch.to(device)
                parts, same = student.measure(moved.inputs, moved.labels, moved.targets)
                terms = parts.by_term.values()
                sums += torch.stack([*terms, same.response, same.visual]).cpu().double()
            if progress is not None:
                progress.update(step + 1)
    batches.close()
    student.train(training)
    ours = {**dict(zip(_SUMS, sums.tolist(), strict=True)), **counts.by_name}
    total = summed({**ours, "failed": fault is not None}, add_up)
    if fault is not None:
        raise fault
    if total["failed"]:
        raise KdcacheError("another process of this run could not read its part of the held-out cache")
    counts = Denominators.from_names(total)
    over = {
        **counts.by_term,
        "response_top1": counts.tokens["response"],
        "visual_top1": counts.tokens["visual"],
    }
    means = {name: total[name] / over[name] for name in _SUMS if over[name]}
    return {**means, "samples": counts.samples, "tokens": counts.ce_tokens}


def weighted(measured: dict[str, float], weights: LossWeights) -> float:
    """The stage's loss from held-out means: what early stopping watches."""
    return sum(weight * measured.get(name, 0.0) for name, weight in weights.by_term.items())
