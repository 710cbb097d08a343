"""The dense objective with the teacher in memory, which the caches stand for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from cache_schema.format.spec import KINDS
from student.collate import Batch
from student.loss_weights import LossWeights
from student.model import DistilledStudent


def live_loss(
    student: DistilledStudent, teacher: LlavaForConditionalGeneration, batch: Batch, weights: LossWeights
) -> Tensor:
    """The loss of a batch from both models' own logits (B, T, V). Of the batch's targets only the positions
    are read. The relation is that of raw logits, 1 - cos(Z Z^T, Z' Z'^T)."""
    tokens = student.vocab_size
    with torch.no_grad():
        theirs = teacher(**batch.inputs).logits[..., :tokens]
    ours = student.model(**batch.inputs).logits
    length, samples = ours.shape[1], len(batch.labels)
    total = ours.new_zeros(())
    for place, labels in enumerate(batch.labels):
        total = total + weights.ce * nn.functional.cross_entropy(ours[place, :-1], labels[1:])
        for kind in KINDS:
            if not weights.by_target[kind] or batch.targets is None:
                continue
            record = batch.targets.positions[kind]
            at = record.positions[record.samples == place] - place * length
            if len(at):
                log_p = theirs[place, at].log_softmax(-1)
                log_q = ours[place, at].log_softmax(-1)[:, :tokens]
                kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
                total = total + weights.by_target[kind] * kl
    if weights.relation and batch.targets is not None:
        for image in batch.targets.relations:  # one an image, and one image a sample
            at = image.positions - image.sample * length
            wanted, made = theirs[image.sample, at], ours[image.sample, at, :tokens]
            wanted, made = wanted @ wanted.T, made @ made.T
            total = total + weights.relation * (1 - (wanted * made).sum() / wanted.norm() / made.norm())
    return total / samples
