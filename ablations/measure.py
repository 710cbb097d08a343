"""Answers of a model to single questions: right or not, how sure, and the same as another's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from demo.easy_vqa import Described
from demo.language_model import IGNORE, padded
from demo.teacher_texts import Texts, attention_of

_IMAGES = 32
_BINS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Of N questions: their kind, whether greedy decoding would answer exactly as the reference does, the
    probability of its first token, and that token."""

    kinds: NDArray[np.str_]
    right: NDArray[np.bool_]
    confidence: NDArray[np.float32]
    first: NDArray[np.int64]

    def accuracy(self) -> dict[str, float]:
        """By kind, and their mean as `mean`."""
        found = {str(kind): float(self.right[self.kinds == kind].mean()) for kind in np.unique(self.kinds)}
        return {**found, "mean": float(np.mean(list(found.values())))}

    def agreement(self, other: Answers) -> float:
        """The mean over kinds of the share of questions with the same first token."""
        same = self.first == other.first
        return float(np.mean([same[self.kinds == kind].mean() for kind in np.unique(self.kinds)]))

    def calibration_error(self) -> float:
        """The expected calibration error: 15 bins of equal width (Guo et al. 2017, arXiv 1706.04599)."""
        bins = np.minimum((self.confidence * _BINS).astype(int), _BINS - 1)
        gaps = [
            abs(self.right[bins == place].mean() - self.confidence[bins == place].mean())
            * (bins == place).mean()
            for place in np.unique(bins)
        ]
        return float(sum(gaps))


@torch.no_grad()
def answers_of(
    model: LlavaForConditionalGeneration,
    texts: Texts,
    images: Sequence[Described],
    features: Tensor,
    kind_of: Callable[[str, str], str],
) -> Answers:
    """The model's answers to every question of `images`, of which features (N, P, D) stand in their order.

    The questions of an image share its visual tokens and see nothing of each other. With the reference's
    tokens given, an answer is right where every token, its end included, is the most likely one: greedy
    decoding then writes exactly that.
    """
    was_training = model.training
    model.eval()
    kinds: list[str] = []
    right: list[bool] = []
    sure: list[Tensor] = []
    first: list[Tensor] = []
    for start in range(0, len(images), _IMAGES):
        part = images[start : start + _IMAGES]
        rows = [texts.questions(image.questions) for image in part]
        ids = padded([row.ids for row in rows], model.config.text_config.pad_token_id)
        labels = padded([row.labels for row in rows], IGNORE)
        mask, positions = attention_of(rows)
        device = model.device
        hidden = model.model(
            input_ids=ids.to(device),
            pixel_values=features[start : start + _IMAGES].to(device),
            attention_mask={"full_attention": mask.to(device)},
            position_ids=positions.to(device),
        ).last_hidden_state
        asked = labels[:, 1:] != IGNORE  # (B, T - 1)
        logits = model.lm_head(hidden[:, :-1][asked.to(device)]).float().cpu()[:, : texts.vocabulary]
        wanted = labels[:, 1:][asked]
        parts = padded([row.parts for row in rows], -1)[:, 1:][asked]
        owners = asked.nonzero()[:, 0]
        begins = torch.ones(len(parts), dtype=torch.bool)
        begins[1:] = (parts[1:] != parts[:-1]) | (owners[1:] != owners[:-1])
        likely = logits.softmax(-1).max(-1)
        question = begins.cumsum(0) - 1
        wrong = torch.zeros(int(begins.sum())).index_add_(0, question, (likely.indices != wanted).float())
        right += (wrong == 0).tolist()
        sure.append(likely.values[begins])
        first.append(likely.indices[begins])
        kinds += [kind_of(question, answer) for image in part for question, answer in image.questions]
    model.train(was_training)
    return Answers(
        kinds=np.array(kinds),
        right=np.array(right),
        confidence=torch.cat(sure).numpy(),
        first=torch.cat(first).numpy(),
    )
