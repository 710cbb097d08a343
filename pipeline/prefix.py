"""Shared visual prefixes: whether a teacher allows them, and which images have the same targets.

Under causal attention an image's hidden states depend only on what precedes its end, so rows about
the same image with the same text before it share their visual and relation targets.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from cache_schema.errors import RowRejected
from pipeline.engine import Engine, PackingEngine, same_states
from pipeline.packing import make_pack
from pipeline.samples import PreparedSample


def prefix_is_independent(engine: Engine, sample: PreparedSample) -> bool:
    """Whether the hidden states up to the end of the last image ignore all that follows it.

    Probed on one sample with an image: once with every later id changed, once with all of it cut off.
    """
    end = _end_of_images(sample)
    cut = replace(
        sample,
        input_ids=sample.input_ids[:end],
        token_inputs={name: value[:end] for name, value in sample.token_inputs.items()},
    )
    (reference,) = engine.hidden_states([sample])
    for variant in (_changed_after_images(sample), cut):
        (hidden,) = engine.hidden_states([variant])
        if not same_states(hidden[:end], reference[:end]):
            return False
    return True


def packing_is_exact(engine: Engine, sample: PreparedSample) -> bool:
    """Whether a pack of two samples about one image gives the hidden states of each on its own.

    False too for an engine or a model that cannot pack, and where token types change the attention, which a
    pack's mask ignores.
    """
    if (
        not isinstance(engine, PackingEngine)
        or not engine.can_pack
        or "token_type_ids" in sample.token_inputs
    ):
        return False
    pair = [sample, _changed_after_images(sample)]
    try:
        (packed,) = engine.packed_hidden_states([make_pack(pair)])
    except (RuntimeError, TypeError, ValueError, RowRejected):
        return False
    alone = [engine.hidden_states([each])[0] for each in pair]
    return all(same_states(hidden, single) for hidden, single in zip(packed, alone, strict=True))


def _changed_after_images(sample: PreparedSample) -> PreparedSample:
    """The sample with every id after its last image replaced."""
    end = _end_of_images(sample)
    ids = sample.input_ids.copy()
    ids[end:] = _other_ids(sample, end)
    return replace(sample, input_ids=ids)


def _end_of_images(sample: PreparedSample) -> int:
    """The end of the last image, with the processor's text around it: no text can differ before it."""
    end = int(sample.images[-1].positions[-1]) + 1
    return max([end, *(expansion.end for expansion in sample.expansions)])


def _other_ids(sample: PreparedSample, end: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """Replacement ids for those from `end` on: ordinary ids of the sample, each different from the
    original."""
    images = {int(position) for image in sample.images for position in image.positions}
    ordinary = np.unique([int(i) for t, i in enumerate(sample.input_ids) if t not in images])
    places = np.searchsorted(ordinary, sample.input_ids[end:])
    found: np.ndarray[tuple[int, ...], np.dtype[np.int32]] = ordinary[(places + 1) % len(ordinary)]
    return found.astype(np.int32)


def prefix_keys(sample: PreparedSample, fingerprint: str) -> list[str]:
    """One hex digest per image, of everything that its hidden states depend on.

    The teacher (by `fingerprint`), the ids through the image's end, the files and token counts of this
    and every earlier image, and how many images the row has (some processors cut single images finer).
    """
    keys = []
    state = hashlib.sha256(f"{fingerprint} {len(sample.images)}".encode())
    done = 0
    for image in sample.images:
        end = int(image.positions[-1]) + 1
        state.update(sample.input_ids[done:end].tobytes())
        state.update(f" {image.sha256} {image.width} {image.height} {len(image.positions)} ".encode())
        done = end
        keys.append(state.hexdigest())
    return keys
