"""The fused kernel of pipeline.block_statistics against torch, in triton's interpreter: run with
TRITON_INTERPRET=1, which must be set before triton is loaded."""

import torch

from pipeline.block_kernel import fused_statistics
from pipeline.block_statistics import BLOCK, block_statistics


def main() -> None:
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


if __name__ == "__main__":
    main()
