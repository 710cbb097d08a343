"""How many tokens a batch of the teacher may have, from what a small one takes of a device's memory."""

from __future__ import annotations

import torch

from cache_schema.progress import Progress
from pipeline.engine import Engine
from pipeline.samples import PreparedSample
from pipeline.settings import BATCH_TOKENS

_STEP, _MOST = 1024, 32768  # more tokens than these run no faster, and their records come in larger lumps
_SHARE = 0.6  # of the free memory; the rest is for making targets, and for longer samples than the probe
_SAMPLES = 4


def batch_tokens_for(engine: Engine, sample: PreparedSample, progress: Progress) -> int:
    """Tokens per batch: on CUDA by the memory that a batch of copies of `sample` takes, elsewhere
    BATCH_TOKENS."""
    device = engine.head.weight.device
    if device.type != "cuda":
        return BATCH_TOKENS
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        engine.hidden_states([sample] * _SAMPLES)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        tokens = max(_STEP, len(sample))
        progress.message(f"batches of {tokens:,} tokens: {_SAMPLES} samples do not fit into the free memory")
        return tokens
    torch.cuda.synchronize(device)
    taken = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    tokens = fitting_tokens(free, taken, _SAMPLES * len(sample))
    progress.message(
        f"batches of {tokens:,} tokens: {free / 1e9:.1f} GB are free, and 1,000 tokens take "
        f"{taken / 1e3 / (_SAMPLES * len(sample)):.0f} MB"
    )
    return tokens


def fitting_tokens(free: int, taken: int, tokens: int) -> int:
    """Tokens per batch where `tokens` took `taken` bytes and `free` bytes are free."""
    fitting = int(_SHARE * free * tokens / max(taken, 1))
    return max(_STEP, min(_MOST, fitting - fitting % _STEP))
