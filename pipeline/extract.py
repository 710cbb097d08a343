"""From prepared samples to captured ones: batches are launched one after the other, records are fetched
concurrently."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from cache_schema.datasets.conversations import writable
from cache_schema.errors import KdcacheError, RowRejected, first_line
from cache_schema.format.records import (
    QuarantinedRow,
)
from cache_schema.format.spec import TargetSpec
from models.head import Head
from pipeline.assemble import Captured, asked_of, captured_by_engine, captured_of
from pipeline.download import Download
from pipeline.engine import Engine, PackingEngine, RecordEngine, release_memory
from pipeline.packing import Pack, Wanted, batches, pack_samples
from pipeline.prefix import prefix_keys
from pipeline.samples import PreparedSample
from pipeline.targets import PendingRecords, TargetMaker

_DEVICE_FAULTS = ("CUDA error", "device-side assert", "HIP error", "CUBLAS", "CUDNN", "NCCL", "MPS backend")
_FLYING = 2  # batches whose records may be in transfer to the host while the next one is launched

Launched = tuple[list[Pack], "Future[list[Captured]]"]
"""Packs, and their samples as captured, once their records are on the host."""


class Extractor:
    """Launches batches of samples on one engine; a separate thread brings their records to the host.

    head: turns the engine's hidden states into logits; None for an engine that gives records itself.
    share: images with equal prefix keys (under `fingerprint`) get their visual and relation records once.
    pack: conversations about the same images are also computed as one sequence (needs share). batch_tokens:
    padded tokens per batch; halved for the rest of the run when memory runs out.
    """

    def __init__(
        self,
        engine: Engine | RecordEngine,
        head: Head | None,
        spec: TargetSpec,
        *,
        fingerprint: str,
        share: bool,
        pack: bool,
        batch_tokens: int,
    ) -> None:
        self._engine = engine
        self._spec = spec
        self._maker = None if head is None else TargetMaker(head, spec)
        self._fingerprint = fingerprint
        self._share = share
        self._pack = pack
        self.batch_tokens = batch_tokens
        self._sound: PreparedSample | None = None  # the last one on which the engine did not fail
        self._host = ThreadPoolExecutor(1, thread_name_prefix="records")
        self._flying: deque[Future[list[Captured]]] = deque()

    def launch(self, samples: Sequence[PreparedSample], claimed: set[str]) -> Iterator[list[Launched]]:
        """Runs samples batch by batch; a batch is yielded as soon as it is launched.

        claimed: prefix keys whose records other samples have; those of `samples` are added. The first one
        with a key has the records, the others refer to them.
        """
        singles = [Pack(samples=(sample,), wanted=(self._wanted(sample, claimed),)) for sample in samples]
        keys = [pack.wanted[0].keys[-1] if self._pack and pack.first.images else None for pack in singles]
        left = pack_samples(singles, keys, self.batch_tokens)
        while left:  # remaining batches are formed again when the budget has shrunk
            budget = self.batch_tokens
            done: set[int] = set()
            for batch in batches(left, budget):
                while len(self._flying) >= _FLYING:
                    wait([self._flying.popleft()])
                yield self._run([left[place] for place in batch])
                done.update(batch)
                if self.batch_tokens != budget:
                    break
            left = [pack for place, pack in enumerate(left) if place not in done]

    def _wanted(self, sample: PreparedSample, claimed: set[str]) -> Wanted:
        keys: list[str | None] = [None] * len(sample.images)
        if self._share:
            keys = list(prefix_keys(sample, self._fingerprint))
        owned = []
        for key in keys:
            owned.append(key is None or key not in claimed)
            if key is not None:
                claimed.add(key)
        positions = sample.positions
        return Wanted(
            keys=tuple(keys),
            owned=tuple(owned),
            response=positions["response"] if "response" in self._spec.targets else None,
            prompt=positions["prompt"] if "prompt" in self._spec.targets else None,
        )

    def _run(self, packs: list[Pack]) -> list[Launched]:
        """One batch of packs. When memory runs out, it is split in halves and the budget shrinks; a sample
        alone is tried once more when nothing else is in memory. It is also split when the engine refuses a
        sample or fails on it, until that sample is alone."""
        try:
            return [self._launch(packs)]
        except RowRejected as error:
            return self._apart(packs, error)
        except (KdcacheError, OSError):
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                if not self._is_of_the_samples(packs, error):
                    raise KdcacheError(
                        f"the teacher fails on every sample now: {first_line(error)}; finished shards are "
                        "kept: correct this and run the same command again"
                    ) from error
                detail = f"the teacher fails on the sample: {first_line(error)}"
                return self._apart(packs, RowRejected("forward", detail))
        flying = list(self._flying)
        self._flying.clear()
        wait(flying)  # what is in transfer takes memory too
        release_memory()
        longest = max(map(len, packs))
        if len(packs) == 1 and flying:
            return self._run(packs)
        if len(packs) > 1:
            self.batch_tokens = max(longest, min(self.batch_tokens, longest * len(packs)) // 2)
        detail = f"{longest} tokens do not fit into memory, even alone"
        return self._apart(packs, RowRejected("out_of_memory", detail))

    def _is_of_the_samples(self, packs: list[Pack], error: Exception) -> bool:
        """Whether a failure can be that of a sample: the device is sound, and so is the teacher on the sample
        that it captured last."""
        if any(word in str(error) for word in _DEVICE_FAULTS):
            return False
        alone = len(packs) == 1 and len(packs[0].samples) == 1
        if alone and self._sound is not None and not isinstance(self._engine, RecordEngine):
            try:
                self._engine.hidden_states([self._sound])
            except Exception:  # noqa: BLE001 - the first one is told
                return False
        return True

    def _apart(self, packs: list[Pack], error: RowRejected) -> list[Launched]:
        """A batch in halves, a pack sample by sample; one sample alone goes to quarantine for `error`."""
        if len(packs) > 1:
            half = len(packs) // 2
            return self._run(packs[:half]) + self._run(packs[half:])
        (pack,) = packs
        if len(pack.samples) > 1:
            return [launched for single in pack.apart() for launched in self._run([single])]
        row = QuarantinedRow(
            row=pack.first.row,
            sample_id=pack.first.sample_id,
            reason=error.reason,
            detail=writable(error.detail),
        )
        return [(packs, self._host.submit(lambda: [row]))]

    def _launch(self, packs: list[Pack]) -> Launched:
        """Queues a batch on the device, then the transfer of its records to the host."""
        samples = [sample for pack in packs for sample in pack.samples]
        if isinstance(self._engine, RecordEngine):
            wanted = [want for pack in packs for want in pack.wanted]
            parts = [w.positions(s, self._spec) for s, w in zip(samples, wanted, strict=True)]
            given = self._engine.records(samples, parts)
            return packs, self._host.submit(captured_by_engine, packs, given, self._spec)
        assert self._maker is not None
        hidden = self._hidden_states(self._engine, packs)
        self._sound = samples[-1]
        asked = asked_of(packs, [len(states) for states in hidden], self._spec)
        pending = self._maker.batch(torch.cat(hidden), asked)
        future = self._host.submit(self._fetch, packs, pending, Download(pending.tensors))
        self._flying.append(future)
        return packs, future

    @staticmethod
    def _hidden_states(engine: Engine, packs: Sequence[Pack]) -> list[Tensor]:
        """One (T, D) per sample, in order."""
        if all(len(pack.samples) == 1 for pack in packs):
            return engine.hidden_states([pack.first for pack in packs])
        assert isinstance(engine, PackingEngine)
        return [hidden for pack in engine.packed_hidden_states(packs) for hidden in pack]

    def _fetch(self, packs: list[Pack], pending: PendingRecords, download: Download) -> list[Captured]:
        """In the host's thread: the captured samples of a batch, once the device has finished it."""
        return captured_of(packs, pending.records(download.arrays()), self._spec)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on an accelerator or on the CPU."""
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "can't allocate memory" in text
        or "out of memory" in text
    )
