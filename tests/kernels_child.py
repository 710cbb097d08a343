"""The kernels of pipeline.block_kernel against torch, in triton's interpreter: run with
TRITON_INTERPRET=1, which must be set before triton is loaded."""

import numpy as np
import pytest
import torch

from cache_schema.format.records import TopK
from cache_schema.format.spec import TargetSpec
from models.head import Head
from pipeline import block_kernel, targets
from pipeline.block_kernel import fused_fields, fused_statistics, selects
from pipeline.block_statistics import BLOCK, block_statistics
from pipeline.entry_rules import kept, limits_of, narrow
from pipeline.targets import TargetMaker


def main() -> None:
    statistics()
    fields()
    limited_fields()
    whole_records()


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
            assert selects(vocab, k, BLOCK, limited=False)
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


def limited_fields() -> None:
    """Thresholds down to the widest records, most entries, and both with a fixed number at other rows."""
    generator = torch.Generator().manual_seed(2)
    for vocab, k, least in ((40, 16, 0.05), (5003, 256, 0.001), (5003, 128, 0.0078), (20000, 200, 0.003)):
        assert selects(vocab, k, BLOCK, limited=True)
        for temperatures in ((1.0,), (0.5, 1.0, 3.0)):
            logits = 3.0 * torch.randn(6, vocab, generator=generator)
            logits[1] *= 10.0  # one sure token
            logits[2] = 0.01 * logits[2]  # none reaches the least
            logits[3, : vocab - 3] = -1e4
            logits[4] = logits[4].sort().values
            limits = torch.tensor([[k, least]] * 4 + [[5, least], [7, 0.0]])
            limits[:, 1].log_()
            spec = TargetSpec(top_k=k, temperatures=temperatures)
            maker = TargetMaker(Head(weight=torch.zeros(vocab, 1)), spec)
            every = maker._group(logits)
            expected = narrow(every, kept(every["logprobs"], limits), temperatures)
            statistics = fused_statistics(logits, temperatures, BLOCK)
            given = fused_fields(logits, statistics, temperatures, k, BLOCK, limits)
            found = narrow(given, kept(given["logprobs"], limits), temperatures)
            assert found["counts"].tolist() == expected["counts"].tolist()
            assert found["counts"][2] == 1
            assert found["counts"][4] <= 5
            assert found["counts"][5] == 7
            assert k < 17 or given["logprobs"][2, 1:].isneginf().all()  # not looked for
            assert vocab < 100 or found["counts"].max() > 7
            for name, values in expected.items():
                torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-5)


def whole_records() -> None:
    """Draws from the tail never hit an entry that is kept, whatever was not looked for."""
    generator = torch.Generator().manual_seed(3)
    hidden = 3.0 * torch.randn(9, 12, generator=generator)
    head = Head(weight=torch.randn(700, 12, generator=generator))
    spec = TargetSpec(entries={"response": 0.004, "visual": 0.1}, tail_samples=8)
    limits = limits_of(["response", "visual"], [5, 4], spec)
    places = np.arange(9)
    expected = TargetMaker(head, spec).topk(hidden, rows=places, positions=places, limits=limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "kernels", lambda device: block_kernel)
        found = TargetMaker(head, spec).topk(hidden, rows=places, positions=places, limits=limits)
    for name in TopK.__dataclass_fields__:
        values = getattr(expected, name)
        if values is not None:
            np.testing.assert_allclose(getattr(found, name), values, rtol=1e-5, atol=1e-5, err_msg=name)


if __name__ == "__main__":
    main()
