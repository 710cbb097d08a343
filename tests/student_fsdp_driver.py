"""Two ranks on the CPU: steps of the student sharded by FSDP2 against the same steps of a whole student.

Called as `python student_fsdp_driver.py STUDENT CACHE IMAGES OUT` with the environment of torch.distributed.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from cache_schema import open_cache
from cache_schema.datasets.image_roots import open_root
from models.folder import load_model, load_processor
from student.collate import Collator
from student.heldout import HeldOut, measure_samples
from student.losses import Denominators, LossWeights
from student.losses.products import KeptMatrix
from student.model import DistilledStudent, unsharded
from student.pixels import PixelInputs
from tests.dense_twins import imitate_wide_products

STEPS = 3
MICRO_BATCH = 3


def main() -> None:
    student, url, images, out = map(Path, sys.argv[1:])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    cache = open_cache(url)
    collator = Collator(
        pixels=PixelInputs(load_processor(student)),
        image_root=open_root(images),
        pad_token_id=1,
        image_token_id=2,
        targets=tuple(cache.spec.targets),
    )
    alone = DistilledStudent(
        load_model(student, torch.float32),
        LossWeights(),
        vocab_size=340,
        trainable=("projector", "language_model"),
    ).train()
    sharded = copy.deepcopy(alone)
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    register_fsdp_forward_method(sharded, "measure")
    optimizers = [
        torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-3)
        for each in (alone, sharded)
    ]
    # Rank 1's micro-batches: images, text alone, none at all.
    samples = [cache[index] for index in range(len(cache))]
    text = [sample for sample in samples if not sample.images]
    seen = [sample for sample in samples if sample.images]
    plan = [[seen[:2], seen[2:4]], [seen[4:6], text[:2]], [seen[6:9], []]]
    for step in range(STEPS):
        batches = [collator(part) for part in plan[step]]
        counts = sum((batch.denominators for batch in batches), Denominators())
        for batch in batches:
            alone(batch.inputs, batch.labels, batch.targets, counts).total.backward()
        mine = batches[rank]
        sharded(mine.inputs, mine.labels, mine.targets, counts, 2).total.backward()
        norms = [
            float(unsharded(torch.nn.utils.clip_grad_norm_(each.parameters(), 1.0)))
            for each in (alone, sharded)
        ]
        assert abs(norms[0] - norms[1]) < 1e-3 * norms[0], norms
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    micro_batches_of_a_step_share_the_heads_matrix(alone, sharded, [collator(seen[:2]), collator(seen[2:5])])
    for optimizer in optimizers:
        optimizer.zero_grad()
    expected, found = alone.trained(), sharded.trained()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-4)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(sharded, optimizers[1], options=options)
    if rank == 0:  # a checkpoint, which every rank reads
        assert len(state["state"]) == len(expected)
        torch.save(state, out / "optimizer.pt")
    dist.barrier()
    state = torch.load(out / "optimizer.pt", weights_only=True)
    set_optimizer_state_dict(sharded, optimizers[1], state, options=options)
    batch = collator(seen[:3])
    parts, same = sharded.measure(batch.inputs, batch.labels, batch.targets)
    expected_parts, expected_same = alone.measure(batch.inputs, batch.labels, batch.targets)
    torch.testing.assert_close(parts.kl["response"], expected_parts.kl["response"], rtol=1e-3, atol=1e-3)
    assert float(same.visual) == float(expected_same.visual)
    # One sample more than the ranks can share: the last micro-batch of rank 1 is idle.
    assert len(cache) % (2 * MICRO_BATCH) == 1
    options = {"device": torch.device("cpu"), "micro_batch": MICRO_BATCH}
    among = HeldOut(cache=cache, collator=collator).samples()
    both, whole_cache = (
        measure_samples(student, *among, collator, **options, **shared)
        for student, shared in (
            (sharded, {"rank": rank, "world_size": 2, "add_up": add_up}),
            (alone, {}),
        )
    )
    assert both == pytest.approx(whole_cache, rel=1e-3)
    (out / f"rank-{rank}").write_text("done")
    dist.destroy_process_group()


def micro_batches_of_a_step_share_the_heads_matrix(alone, sharded, batches) -> None:
    """In bfloat16, on a device whose products take it: it is made once, and gradients are right."""
    counts = sum((batch.denominators for batch in batches), Denominators())
    every, make = [], KeptMatrix.of

    def of(kept, weight, dtype):
        every.append(make(kept, weight, dtype))
        return every[-1]

    with pytest.MonkeyPatch.context() as patch:
        imitate_wide_products(patch)
        patch.setattr(KeptMatrix, "of", of)
        for student in (alone, sharded):
            every.clear()
            with student.one_step():
                for batch in batches:
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        parts = student(batch.inputs, batch.labels, batch.targets, counts)
                    parts.total.backward()
            assert len(every) == 2
            assert every[0] is every[1]
            assert every[0].dtype == torch.bfloat16
    theirs = dict(alone.named_parameters())
    for name, parameter in sharded.named_parameters():
        if parameter.requires_grad:
            expected = theirs[name].grad
            error = (unsharded(parameter.grad) - expected).norm()
            assert error < 0.02 * expected.norm() + 1e-4, name


def add_up(values: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(values)
    return values


if __name__ == "__main__":
    main()
