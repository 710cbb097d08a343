"""A cache as the Parquet columns that axolotl and DistillKit read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache_schema.errors import WrongUsage
from cache_schema.format.cache import open_cache
from cache_schema.format.records import Float32, Int32, Sample
from cache_schema.format.spec import TargetSpec
from cache_schema.operations.arrow_export import lists, to_arrow
from cache_schema.operations.settings import ArrowConfig
from cache_schema.progress import Progress

MASKED = -1e9
"""axolotl's log-probability of what its target_mask leaves out."""
ABSENT = -1e4
"""The log-probability of an entry without mass for DistillKit, finite in 16 bits too: it takes 0 * -inf."""


def export(cache: str, config: ArrowConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Write `cache` to the new folder `config.out` as `to_arrow` does, with the columns of `config.layout`.

    axolotl: see `axolotl_table`; distillkit: see `distillkit_table`, with `logprob_compressor`, what goes
    under that key of DistillKit's configuration. `left_out`: what of the cache the layout cannot carry.
    WrongUsage for a cache without response targets; KdcacheError as `to_arrow`.
    """
    if config.layout == "kdcache":
        return to_arrow(cache, config.out, progress)
    manifest = open_cache(cache).manifest
    if "response" not in manifest.spec.targets:
        raise WrongUsage(f"{cache} has no response targets, which the layout {config.layout} is made of")
    entries, vocab = manifest.spec.rule("response").most, manifest.vocab_size
    told: dict[str, Any] = {}
    if config.layout == "axolotl":
        made = to_arrow(cache, config.out, progress, partial(axolotl_table, entries=entries))
    else:
        table = partial(distillkit_table, entries=entries, vocab_size=vocab)
        made = to_arrow(cache, config.out, progress, table)
        told["logprob_compressor"] = compressor(entries, vocab)
    return made | told | {"left_out": _left_out(manifest.spec, config.layout)}


def axolotl_table(samples: Sequence[Sample], entries: int) -> pa.Table:
    """The columns that axolotl's KD trainer has after its own preparation of a dataset.

    input_ids, attention_mask, labels (T); target_token_ids, target_logprobs, target_mask (T, K). Row t is of
    the token after t: mask 0 where labels[t + 1] is not supervised, and at what fills a row up to K. The
    log-probabilities are normalised over the entries, at temperature 1. Source: "Target alignment" in the
    README of axolotl's integrations/kd.
    """
    parts = [_axolotl_rows(sample, entries) for sample in samples]
    return pa.table(
        {
            "input_ids": lists([sample.input_ids for sample in samples], np.int32),
            "attention_mask": lists([np.ones(len(sample.labels)) for sample in samples], np.int8),
            "labels": lists([sample.labels for sample in samples], np.int32),
            "target_token_ids": lists([ids for ids, _, _ in parts], np.int32, ndim=2),
            "target_logprobs": lists([logprobs for _, logprobs, _ in parts], np.float32, ndim=2),
            "target_mask": lists([mask for _, _, mask in parts], np.int8, ndim=2),
        }
    )


def distillkit_table(samples: Sequence[Sample], entries: int, vocab_size: int) -> pa.Table:
    """The columns of DistillKit's compressed logits, without loss.

    input_ids, labels (T); compressed_logprobs (T, 4 K) uint8: K float32 in the machine's little-endian bytes;
    bytepacked_indices (T, bytes) uint8: K ids of `index_bits` bits each, the highest bit first. Row t is of
    the token after t. DistillKit takes rows where labels[t] is supervised, one place later than they are
    meant, so every row has a distribution: of the response, else of the prompt where the cache has it, else
    the whole mass on the token that follows. Source: distillkit/compression of its repository.
    """
    parts = [_distillkit_rows(sample, entries, vocab_size) for sample in samples]
    bits = index_bits(vocab_size)
    return pa.table(
        {
            "input_ids": lists([sample.input_ids for sample in samples], np.uint64),
            "labels": lists([sample.labels for sample in samples], np.int64),
            "compressed_logprobs": lists(
                [logprobs.astype("<f4").view(np.uint8) for _, logprobs in parts], np.uint8, ndim=2
            ),
            "bytepacked_indices": lists([_packed(ids, bits) for ids, _ in parts], np.uint8, ndim=2),
        }
    )


def compressor(entries: int, vocab_size: int) -> dict[str, Any]:
    """DistillKit's `logprob_compressor` that reads the columns back."""
    return {
        "d": vocab_size,
        "k": entries,
        "exact_k": entries,
        "exact_dtype": "float32",
        "polynomial_terms": [],
        "residual_bins": [],
        "delta_encoding": False,
        "error_diffusion": False,
    }


def index_bits(vocab_size: int) -> int:
    """Bits of a token id in DistillKit's columns."""
    return int(np.ceil(np.log2(np.float32(vocab_size))))


def _axolotl_rows(sample: Sample, entries: int) -> tuple[Int32, Float32, NDArray[np.int8]]:
    shape = (len(sample.labels), entries)
    ids, logprobs = np.zeros(shape, np.int32), np.full(shape, MASKED, np.float32)
    mask = np.zeros(shape, np.int8)
    record = sample.records["response"]
    if record is not None:
        where, width, there = sample.positions["response"], record.token_ids.shape[1], record.there
        ids[where, :width] = record.token_ids
        whole = np.logaddexp.reduce(record.logprobs, axis=1, keepdims=True, where=there, initial=-np.inf)
        logprobs[where, :width] = np.where(there, record.logprobs - whole, MASKED)
        mask[where, :width] = there
    return ids, logprobs, mask


def _distillkit_rows(sample: Sample, entries: int, vocab_size: int) -> tuple[Int32, Float32]:
    tokens = len(sample.labels)
    ids, logprobs = np.zeros((tokens, entries), np.int32), np.full((tokens, entries), ABSENT, np.float32)
    ids[:, 0], logprobs[:, 0] = np.append(sample.input_ids[1:], sample.input_ids[-1]), 0.0
    counts = np.ones(tokens, np.int64)
    for kind in ("prompt", "response"):
        record = sample.records[kind]
        if record is not None:
            where, width = sample.positions[kind], min(entries, record.token_ids.shape[1])
            there = record.there[:, :width]
            ids[where, :width] = record.token_ids[:, :width]
            logprobs[where, :width] = np.where(there, record.logprobs[:, :width], ABSENT)
            counts[where] = there.sum(axis=1)
    # Ids that fill a row up differ from its own: the student's mass is summed over a row.
    some = np.arange(min(2 * entries, vocab_size))
    for row in np.flatnonzero(counts < entries):
        free = np.setdiff1d(some, ids[row, : counts[row]])
        ids[row, counts[row] :] = free[: entries - counts[row]]
    return ids, logprobs


def _packed(ids: Int32, bits: int) -> NDArray[np.uint8]:
    """(T, ceil(K bits / 8)): the bits of each row's ids one after the other, zeros after the last."""
    single = (ids[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(single.astype(np.uint8).reshape(len(ids), ids.shape[1] * bits), axis=1)


def _left_out(spec: TargetSpec, layout: str) -> str:
    carried = {"response"} | ({"prompt"} if layout == "distillkit" else set())
    targets = [f"{target} targets" for target in spec.targets if target not in carried]
    return ", ".join(["images", *targets, "the mass outside the entries"])
