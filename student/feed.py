"""The batches of a run, step after step: of one cache, or of a mixture with shares measured on the way."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch

from cache_schema.format.cache import Cache
from student.collate import Batch, Collator
from student.domains import Reweighing, domains_of
from student.loader import load_ahead
from student.mixture import MixedStream
from student.model import DistilledStudent
from student.order import Catalogue, StreamConfig
from student.pairs import PairStream
from student.ranks import Ranks
from student.run_state import RunState
from student.settings import TrainConfig
from student.stream import OrderedStream, Stream


class Feed:
    """Where a run's batches come from. `state` is the run's own, whose step moves on between batches. note:
    what of the caches is not read, to be told."""

    def __init__(
        self,
        config: TrainConfig,
        caches: Sequence[Cache],
        collator: Collator,
        ranks: Ranks,
        device: torch.device,
        state: RunState,
    ) -> None:
        self._config, self._collator, self._ranks = config, collator, ranks
        self._device, self._state = device, state
        self._loader: Generator[tuple[int, list[Batch]]] | None = None
        self._reweighing: Reweighing | None = None
        self.note = ""
        self._stream = self._open(caches)
        self.steps_per_epoch = self._stream.steps_per_epoch
        self._total = config.resolved_stage.total_steps(self.steps_per_epoch)

    def _open(self, caches: Sequence[Cache]) -> OrderedStream:
        stage, mixture = self._config.resolved_stage, self._config.mixture
        order = StreamConfig(
            seed=self._config.seed,
            global_batch=stage.global_batch,
            window=self._config.window,
            group_by_modality=stage.group_by_modality,
            mega_batch=stage.mega_batch,
        )
        reading: dict[str, Any] = {
            "micro_batch": self._config.micro_batch,
            "targets": stage.parts,
            "rank": self._ranks.rank,
            "world_size": self._ranks.count,
        }
        if stage.preference:
            pairs = PairStream(caches, order, **reading)
            if pairs.alone:
                kind = "chosen samples" if len(caches) > 1 else f"samples of {caches[0].url}"
                self.note = f"{pairs.alone} of {len(caches[0])} {kind} have no partner and are left out"
            return pairs
        if mixture is None:
            return Stream(caches[0], order, **reading)
        catalogue = Catalogue(caches)
        domains = domains_of(mixture, caches, catalogue, self._config.seed)
        stream = MixedStream(
            catalogue, order, [domain.samples for domain in domains], mixture.shares, **reading
        )
        if mixture.rule == "ddk":
            self._reweighing = Reweighing(mixture, domains, caches, catalogue, stream, self._state.mixture)
        return stream

    def reweigh(self, student: DistilledStudent) -> dict[str, float] | None:
        """Measures the domains of a mixture where that is due before this step; returns what is to be written
        of it. Every rank must ask before every step. KdcacheError when held-out samples cannot be read."""
        if self._reweighing is None or not self._reweighing.due(self._state.step):
            return None
        self.close()
        written = self._reweighing.measure(
            student,
            self._collator,
            self._ranks,
            self._device,
            step=self._state.step,
            micro_batch=self._config.micro_batch,
            workers=self._config.workers,
        )
        student.reshard()
        self._state.mixture = self._reweighing.state
        return written

    def next(self) -> list[Batch]:
        """The micro-batches of this step."""
        if self._loader is None:
            step = self._state.step
            stop = self._total if self._reweighing is None else self._reweighing.next_after(step)
            self._loader = load_ahead(
                self._stream.read(step, min(stop, self._total)),
                self._collator,
                workers=self._config.workers,
                pin=self._device.type == "cuda",
            )
        return next(self._loader)[1]

    def close(self) -> None:
        """Ends what reads ahead."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None
