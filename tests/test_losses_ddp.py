"""Two processes give the gradients of one, with samples that differ in what they have."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from student.losses import Denominators, DistillationLoss, Head, LossWeights
from tests.distillation_batches import LENGTH, SPANS, D, V, collate, make_samples

WEIGHTS = LossWeights(prompt=0.3)
SAMPLES = ((0, 1), (2, 3, 4))  # of rank 0 and 1; sample 1 is text only, sample 4 is not supervised
STEPS = 2


class Student(nn.Module):
    """A tied language model and its losses, as one module."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V + 3, D, dtype=torch.float64)
        self.mix = nn.Linear(D, D, dtype=torch.float64)
        self.loss = DistillationLoss(WEIGHTS)

    def forward(self, ids, labels, targets, denominators, world_size):
        hidden = torch.tanh(self.mix(self.embedding(ids))) * 3
        head = Head(weight=self.embedding.weight, vocab_size=V)
        return self.loss(hidden, labels, targets, head, denominators, world_size)


def global_batch():
    generator = torch.Generator().manual_seed(0)
    labels, samples = make_samples(generator, SPANS, LENGTH)
    return torch.randint(V, (len(SPANS), LENGTH), generator=generator), labels, samples


def train(ranks_samples, rank, wrap):
    """STEPS steps of SGD, one sample a micro-batch; the parameters as lists, and the losses of all ranks."""
    torch.manual_seed(0)
    student = Student()
    model = wrap(student)
    world_size = len(ranks_samples)
    ids, labels, samples = global_batch()
    mine = [(b, collate([samples[b]], LENGTH)) for b in ranks_samples[rank]]
    local = sum((Denominators.of(labels[b : b + 1], targets) for b, targets in mine), Denominators()).by_name
    counts = torch.tensor(list(local.values()), dtype=torch.float64)
    if world_size > 1:
        dist.all_reduce(counts)
    denominators = Denominators.from_names(dict(zip(local, counts.tolist(), strict=True)))
    optimizer, losses = torch.optim.SGD(student.parameters(), lr=0.02), []
    for _ in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for b, targets in mine:
            row = slice(b, b + 1)
            last = b == mine[-1][0]
            # The ranks differ in their number of micro-batches: gradients are reduced with the last.
            with nullcontext() if last or world_size == 1 else model.no_sync():
                parts = model(ids[row], labels[row], targets, denominators, world_size)
                parts.total.backward()
            total += parts.total.detach() / world_size
        if world_size > 1:
            dist.all_reduce(total)
        losses.append(total.item())
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "parameters": [p.detach().flatten().tolist() for p in student.parameters()]}


def test_two_processes_equal_one(tmp_path):
    alone = train((tuple(range(len(SPANS))),), 0, lambda student: student)
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.test_losses_ddp", str(rank), rendezvous],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [json.loads(rank.communicate(timeout=120)[0].splitlines()[-1]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for result in results:
        for name, values in result.items():
            for ours, theirs in zip(values, alone[name], strict=True):
                assert torch.allclose(
                    torch.tensor(ours, dtype=torch.float64),
                    torch.tensor(theirs, dtype=torch.float64),
                    rtol=1e-10,
                    atol=1e-12,
                ), name
    assert alone["losses"][1] < alone["losses"][0]


def main(rank, rendezvous):
    """One of two ranks."""
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    print(json.dumps(train(SAMPLES, rank, DistributedDataParallel)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
