"""Made-up batches with every kind of target, sample by sample and collated."""

from types import SimpleNamespace

import torch

from cache_schema.format.spec import KINDS
from student.losses import DistillationTargets, PositionTargets, RelationTargets
from tests.dense_twins import sparse_record

V, D, K = 24, 6, 5
SPANS = [
    ([[1, 2, 3, 4, 5]], 4),  # an image, a question, an answer
    ([], 6),  # text only
    ([[0, 1, 2], [4, 5]], 5),  # two images of different token counts
    ([[0, 1, 2, 3, 4, 5, 6]], 4),  # `<image>{caption}`: the last visual token is a response position
    ([[2, 3]], 0),  # nothing supervised
]
LENGTH = 11


def make_samples(generator, spans, length, draws=0, drawn_at=1.0):
    """Samples with the given images, each a list of positions; text after the images, response at the end.

    spans: for each sample (images, supervised): positions of its images, and how many tokens at the end are
    supervised. The last visual token is a response position where the response follows at once.
    """
    labels = torch.full((len(spans), length), -100)
    samples = []
    for b, (images, supervised) in enumerate(spans):
        if supervised:
            labels[b, length - supervised :] = torch.randint(V, (supervised,), generator=generator)
        teacher = torch.randn(length, V, generator=generator, dtype=torch.float64) * 2

        def part(positions, teacher=teacher):
            if not len(positions):
                return None
            at = torch.tensor(positions)
            record = sparse_record(
                teacher[at], K, (1.0, 2.0), draws=draws, sample_temperature=drawn_at, generator=generator
            )
            return SimpleNamespace(positions=at, record=record)

        response = list(range(length - supervised - 1, length - 1)) if supervised else []
        visual = [position for image in images for position in image]
        relations = []
        for image in images:
            factor = torch.randn(len(image), 2, generator=generator, dtype=torch.float64)
            relations.append((torch.tensor(image), factor @ factor.T))
        samples.append(
            SimpleNamespace(
                response=part(response),
                visual=part(visual),
                prompt=part([t for t in range(length) if t not in response and t not in visual]),
                relations=relations,
            )
        )
    return labels, samples


def collate(samples, length):
    """The samples' targets as one DistillationTargets."""

    def flat(kind):
        parts = [(b, getattr(s, kind)) for b, s in enumerate(samples) if getattr(s, kind) is not None]
        if not parts:
            return None
        first = parts[0][1].record
        drawn = first.sampled_ids is not None
        return PositionTargets(
            positions=torch.cat([part.positions + b * length for b, part in parts]),
            samples=torch.cat([torch.full_like(part.positions, b) for b, part in parts]),
            token_ids=torch.cat([part.record.token_ids for _, part in parts]),
            logprobs=torch.cat([part.record.logprobs for _, part in parts]),
            tail_logprob=torch.cat([part.record.tail_logprob for _, part in parts]),
            temperatures=first.temperatures,
            sampled_ids=torch.cat([part.record.sampled_ids for _, part in parts]) if drawn else None,
            sampled_counts=torch.cat([part.record.sampled_counts for _, part in parts]) if drawn else None,
            sample_temperature=first.sample_temperature,
        )

    relations = tuple(
        RelationTargets(positions=positions + b * length, sample=b, gram=gram)
        for b, sample in enumerate(samples)
        for positions, gram in sample.relations
    )
    flattened = {kind: flat(kind) for kind in KINDS}
    return DistillationTargets(
        positions={kind: target for kind, target in flattened.items() if target}, relations=relations
    )
