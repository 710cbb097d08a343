"""A shard in memory, from which samples are decoded one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache_schema.errors import decoding
from cache_schema.format.codecs.hidden import hidden_of
from cache_schema.format.codecs.relation import RelationBlock
from cache_schema.format.codecs.topk import Arrays, Places, decode_topk, prepare_topk
from cache_schema.format.manifest import Manifest
from cache_schema.format.records import (
    HiddenStates,
    ImageRecord,
    Sample,
    StoredRelation,
    TopK,
    labels_of,
    positions_by_kind,
)
from cache_schema.format.shard import check_samples, positions_of
from cache_schema.format.spec import KINDS, Kind


class ShardBlock:
    """The stored arrays of a shard, uncompressed but still encoded: a sample is decoded on access.

    contents: the bytes of its images by SHA-256, where they are embedded and asked for. where: the shard in
    errors. ValueError when the arrays are not those of a shard.
    """

    def __init__(
        self,
        table: pa.Table,
        groups: Mapping[str, Arrays],
        manifest: Manifest,
        parts: frozenset[str],
        contents: Mapping[str, bytes] | None = None,
        where: str = "a shard",
    ) -> None:
        check_samples(table)
        spec, self._where = manifest.spec, where
        self._contents = contents or {}
        self.parts = parts
        self._groups = {kind: prepare_topk(arrays) for kind, arrays in groups.items()}
        self._hidden_kinds = spec.hidden if "hidden" in parts else ()
        self._temperatures = np.array(spec.temperatures, np.float32)
        self._relations = RelationBlock(groups["relation"]) if "relation" in groups else None
        self._rows = table.drop_columns(["images", "input_ids", "label_spans"]).to_pylist()
        self._input_ids = _Lists(table["input_ids"])
        _check_ids(self._input_ids.values.to_numpy(), manifest.vocab_size)
        self._label_spans = _Lists(table["label_spans"])
        self._images = _Lists(table["images"])
        images = self._images.values
        self._image_rows = images.to_pylist()
        self.nbytes = table.nbytes + sum(
            a.nbytes for arrays in self._groups.values() for a in arrays.values()
        )

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, position: int) -> Sample:
        """The sample at a position of the shard, its targets decoded. IndexError outside 0..len-1,
        CacheDamaged for a sample that points outside of what is stored."""
        row = self._rows[position]
        with decoding(f"{self._where}, sample {position}"), np.errstate(all="ignore"):
            return self._sample(row, position)

    def _sample(self, row: Mapping[str, Any], position: int) -> Sample:
        input_ids = self._input_ids.numbers(position)
        spans = self._label_spans.numbers(position).reshape(-1, 2)
        _check_runs(spans, len(input_ids), "label spans")
        labels = labels_of(input_ids, spans)
        images = self._image_rows[self._images.slice(position)]
        records = tuple(_image_record(image, len(input_ids), self._contents) for image in images)
        positions = positions_by_kind(labels, (record.positions for record in records))
        if row["responses"] != len(positions["response"]):
            raise ValueError(f"{len(positions['response'])} response positions, not {row['responses']}")
        places: dict[Kind, Places | None] = {
            "response": _span(row["response_start"], len(positions["response"])),
            "visual": _image_places(images, records),
            "prompt": _span(row["prompt_start"], len(positions["prompt"])),
        }
        return Sample(
            row=row["row"],
            sample_id=row["sample_id"],
            input_ids=input_ids,
            labels=labels,
            positions=positions,
            images=records,
            records={kind: self._record(kind, places[kind]) for kind in KINDS},
            relation_records=self._relations_of(images),
            model_inputs={entry["name"]: _array_of(entry) for entry in row["model_inputs"]},
            hidden_states=self._hidden_states(places),
        )

    def _record(self, kind: Kind, places: Places | None) -> TopK | None:
        return None if places is None or kind not in self.parts else self._decode(kind, places)

    def _hidden_states(self, places: Mapping[Kind, Places | None]) -> dict[Kind, HiddenStates]:
        found: dict[Kind, HiddenStates] = {}
        for kind in self._hidden_kinds:
            at = places[kind]
            if at is not None:
                states = found[kind] = hidden_of(self._groups[f"hidden_{kind}"], at)
                _check_lengths(_count(at), states.values, states.scales, states.channel_of)
                if not 0 <= states.channel_of.max(initial=0) < max(len(states.channels), 1):
                    raise ValueError("hidden states of channels that are not there")
        return found

    def _relations_of(self, images: list[dict[str, Any]]) -> tuple[StoredRelation, ...]:
        if self._relations is None:
            return ()
        found = []
        for image in images:
            number, tokens = image["relation"], sum(end - start for start, end in image["spans"])
            if not 0 <= number < len(self._relations) or self._relations.tokens_of(number) != tokens:
                raise ValueError(f"relation {number} is not that of an image of {tokens} tokens")
            found.append(self._relations.stored(number))
        return tuple(found)

    def _decode(self, kind: str, places: Places) -> TopK:
        record = decode_topk(self._groups[kind], places, self._temperatures)
        fields = (getattr(record, name) for name in TopK.__dataclass_fields__ if name != "temperatures")
        _check_lengths(_count(places), *fields)
        return record


def check_targets(groups: Mapping[str, Arrays], vocab_size: int) -> None:
    """ValueError for a token id among the targets that is outside of the vocabulary."""
    for arrays in groups.values():
        named = ("vocabulary",) if "vocabulary" in arrays else ("token_ids", "sampled_ids")
        for name in named:
            if name in arrays:
                _check_ids(arrays[name], vocab_size)


def _span(start: int | None, count: int) -> Places | None:
    if start is not None and start < 0:
        raise ValueError(f"targets from {start} on")
    return None if start is None else slice(start, start + count)


def _count(places: Places) -> int:
    return places.stop - places.start if isinstance(places, slice) else len(places)


def _check_ids(ids: NDArray[np.int32], vocab_size: int) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"token ids of {ids.min()} to {ids.max()}, not below {vocab_size}")


def _check_lengths(count: int, *fields: NDArray[Any] | None) -> None:
    for values in fields:
        if values is not None and len(values) != count:
            raise ValueError(f"targets of {len(values)} positions, not of {count}")


def _check_runs(spans: NDArray[np.integer[Any]], tokens: int, what: str) -> None:
    """ValueError unless half-open spans (S, 2) ascend among the tokens."""
    ends = spans.ravel()
    if len(ends) and (ends[0] < 0 or ends[-1] > tokens or (np.diff(ends) < 0).any()):
        raise ValueError(f"{what} are not ascending runs among {tokens} tokens")


def _image_places(images: list[dict[str, Any]], records: tuple[ImageRecord, ...]) -> Places | None:
    """The rows of the visual tokens of all images."""
    if not images or images[0]["visual_start"] is None:
        return None
    starts = [image["visual_start"] for image in images]
    if min(starts) < 0:
        raise ValueError(f"targets from {min(starts)} on")
    ends = [start + len(r.positions) for start, r in zip(starts, records, strict=True)]
    if starts[1:] == ends[:-1]:
        return slice(starts[0], ends[-1])
    return np.concatenate([np.arange(*span) for span in zip(starts, ends, strict=True)])


class _Lists:
    """An Arrow list column as flat values and offsets."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        joined = column.combine_chunks()
        self.values = joined.values
        self.offsets = joined.offsets.to_numpy()
        flat = self.values
        while pa.types.is_fixed_size_list(flat.type):
            flat = flat.values
        self._flat = None if pa.types.is_struct(flat.type) else flat.to_numpy()

    def slice(self, position: int) -> slice:
        return slice(int(self.offsets[position]), int(self.offsets[position + 1]))

    def numbers(self, position: int) -> NDArray[np.int32]:
        assert self._flat is not None
        place, width = self.slice(position), len(self._flat) // max(len(self.values), 1)
        numbers: NDArray[np.int32] = self._flat[place.start * width : place.stop * width]
        return numbers


def _image_record(image: dict[str, Any], tokens: int, contents: Mapping[str, bytes]) -> ImageRecord:
    _check_runs(np.array(image["spans"], np.int64).reshape(-1, 2), tokens, f"the tokens of {image['path']}")
    return ImageRecord(
        path=image["path"],
        sha256=image["sha256"],
        width=image["width"],
        height=image["height"],
        positions=positions_of(image["spans"]),
        content=contents.get(image["sha256"]),
    )


def _array_of(entry: dict[str, Any]) -> NDArray[Any]:
    return np.frombuffer(entry["data"], dtype=np.dtype(entry["dtype"])).reshape(entry["shape"])
