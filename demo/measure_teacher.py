"""Measures the demo teacher: accuracy of freely generated answers, and entropy of its distributions."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from cache_schema.format.records import positions_by_kind
from demo.easy_vqa import KINDS, Picture, question_kind
from demo.teacher_texts import Texts
from demo.vision_tower import normalized


@torch.no_grad()
def answer_accuracy(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pictures: Sequence[Picture],
    *,
    batch: int = 128,
) -> dict[str, dict[str, float]]:
    """Greedy free generation of every answer through the chat template; exact match.

    Returns:
        By kind: accuracy, questions, majority (share of the most frequent answer) and confidence (mean
        probability of the first generated token).
    """
    was_training = model.training
    model.eval()
    asked = [(picture, question, answer) for picture in pictures for question, answer in picture.questions]
    asked.sort(key=lambda item: len(item[1]))
    right: Counter[str] = Counter()
    confidence: Counter[str] = Counter()
    answers: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
            )
            for _, question, _ in part
        ]
        images = [Image.open(picture.path).convert("RGB") for picture, _, _ in part]
        inputs = processor(
            text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt"
        )
        output = model.generate(**inputs, return_dict_in_generate=True, output_logits=True)
        generated = output.sequences[:, inputs["input_ids"].shape[1] :]
        first = output.logits[0].float().softmax(-1).max(-1).values
        texts = processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
        for (_, _, answer), text, probability in zip(part, texts, first.tolist(), strict=True):
            kind = question_kind(answer)
            answers[kind][answer] += 1
            right[kind] += text.strip() == answer
            confidence[kind] += probability
    model.train(was_training)
    return {
        kind: {
            "accuracy": right[kind] / counts.total(),
            "questions": counts.total(),
            "majority": max(counts.values()) / counts.total(),
            "confidence": confidence[kind] / counts.total(),
        }
        for kind, counts in answers.items()
    }


@torch.no_grad()
def mean_entropy(
    model: LlavaForConditionalGeneration, texts: Texts, pictures: Sequence[Picture], images: Tensor
) -> dict[str, float]:
    """Mean entropy, in nats, of the next token at visual and at response positions of the conversations."""
    sums = {"visual": 0.0, "response": 0.0}
    counts = {"visual": 0, "response": 0}
    for row, picture in enumerate(pictures):
        row_texts = texts.conversation(picture.questions)
        ids, labels = row_texts.ids, row_texts.labels
        logits = model(input_ids=torch.tensor([ids]), pixel_values=normalized(images[row : row + 1])).logits[
            0
        ]
        logprobs = logits[:, : texts.vocabulary].log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        image = np.flatnonzero(np.array(ids) == model.config.image_token_id)
        positions = positions_by_kind(np.array(labels, np.int32), [image.astype(np.int32)])
        for name in sums:
            sums[name] += entropy[torch.from_numpy(positions[name])].sum().item()
            counts[name] += len(positions[name])
    return {name: sums[name] / counts[name] for name in sums}
