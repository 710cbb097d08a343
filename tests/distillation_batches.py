"""Made-up batches with every kind of target, sample by sample and collated."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from cache_schema.format.spec import KINDS
from student.losses import DistillationTargets, PositionTargets, RelationTargets
from tests.dense_twins import ragged_record, sparse_record

V, D, K = 24, 6, 5
SPANS = [
    ([[1, 2, 3, 4, 5]], 4),  # an image, a question, an answer
    ([], 6),  # text only
    ([[0, 1, 2], [4, 5]], 5),  # two images of different token counts
    ([[0, 1, 2, 3, 4, 5, 6]], 4),  # `<image>{caption}`: the last visual token is a response position
    ([[2, 3]], 0),  # nothing supervised
]
LENGTH = 11


def make_samples(generator, spans, length, draws=0, drawn_at=1.0, ragged=False):
    """Samples with the given images, each a list of positions; text after the images, response at the end.

    spans: for each sample (images, supervised): positions of its images, and how many tokens at the end are
    supervised. The last visual token is a response position where the response follows at once. ragged: 1 to
    K entries at each position, not K.
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
            entries = torch.randint(1, K + 1, (len(at),), generator=generator) if ragged else K
            record = (ragged_record if ragged else sparse_record)(
                teacher[at],
                entries,
                (1.0, 2.0),
                draws=draws,
                sample_temperature=drawn_at,
                generator=generator,
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
        width = max(part.record.token_ids.shape[1] for _, part in parts)

        def entries(name, fill):
            values = [getattr(part.record, name) for _, part in parts]
            return torch.cat([F.pad(value, (0, width - value.shape[1]), value=fill) for value in values])

        token_ids, logprobs = entries("token_ids", -1), entries("logprobs", -math.inf)
        return PositionTargets(
            positions=torch.cat([part.positions + b * length for b, part in parts]),
            samples=torch.cat([torch.full_like(part.positions, b) for b, part in parts]),
            token_ids=token_ids.masked_fill(logprobs == -math.inf, -1),
            logprobs=logprobs,
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
