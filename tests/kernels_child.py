"""The kernels of pipeline.block_kernel against torch, in triton's interpreter: run with
TRITON_INTERPRET=1, which must be set before triton is loaded."""

import torch

from cache_schema.format.spec import TargetSpec
from models.head import Head
from pipeline.block_kernel import fused_fields, fused_statistics, selects
from pipeline.block_statistics import BLOCK, block_statistics
from pipeline.targets import TargetMaker


def main() -> None:
    statistics()
    fields()


def statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocab in (40, 64, 352, 2048, 5003):
        for padding in (0, 5, 64):  # rows apart by a stride; what lies between them counts for nothing
            rows = 30.0 * torch.randn(7, vocab + padding, generator=generator)
            rows[:, vocab:] = torch.nan
            logits = rows[:, :vocab]
            logits[2] = 4.0
            logits[3, :BLOCK] = -1e4
            for temperatures in ((1.0,), (0.5, 1.0, 3.0)):
                expected = block_statistics(logits, temperatures)
                found = fused_statistics(logits, temperatures, BLOCK)
                torch.testing.assert_close(found[0], expected.peak, rtol=0.0, atol=0.0)
                torch.testing.assert_close(found[1], expected.mass, rtol=1e-6, atol=0.0)
                torch.testing.assert_close(found[2], expected.moment, rtol=1e-5, atol=1e-5)


def fields() -> None:
    """From fewer blocks than entries, as many entries as tokens, equal logits, and blocks far below."""
    generator = torch.Generator().manual_seed(1)
    for vocab, k in ((40, 5), (40, 40), (128, 3), (352, 6), (352, 32), (5003, 20)):
        for temperatures in ((1.0,), (0.5, 1.0, 3.0)):
            logits = 8.0 * torch.randn(6, vocab, generator=generator)
            logits[1] *= 10.0  # the deepest tails
            logits[2] = logits[2].sort().values  # all in the same blocks
            logits[3, : vocab - k] = -1e4
            spec = TargetSpec(top_k=k, temperatures=temperatures)
            expected = TargetMaker(Head(weight=torch.zeros(vocab, 1)), spec)._group(logits)
            assert selects(vocab, k, BLOCK)
            found = fused_fields(
                logits, fused_statistics(logits, temperatures, BLOCK), temperatures, k, BLOCK
            )
            assert found.keys() == expected.keys()
            for name, values in expected.items():
                torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-5)
            # equal logits may stand in any order elsewhere; here the lower id first
            level = torch.full((1, vocab), 2.5)
            tied = fused_fields(level, fused_statistics(level, temperatures, BLOCK), temperatures, k, BLOCK)
            assert tied["token_ids"].tolist() == [list(range(k))]


if __name__ == "__main__":
    main()
