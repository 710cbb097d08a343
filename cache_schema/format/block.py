"""A shard in memory, from which samples are decoded one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache_schema.format.codecs.relation import RelationBlock
from cache_schema.format.codecs.topk import Arrays, Places, decode_topk, prepare_topk
from cache_schema.format.records import (
    ImageRecord,
    Relation,
    Sample,
    TopK,
    labels_of,
    positions_by_kind,
)
from cache_schema.format.shard import positions_of
from cache_schema.format.spec import TargetSpec


class ShardBlock:
    """The stored arrays of a shard, uncompressed but still encoded: a sample is decoded on access."""

    def __init__(
        self, table: pa.Table, groups: Mapping[str, Arrays], spec: TargetSpec, parts: frozenset[str]
    ) -> None:
        self.parts = parts
        self._groups = {kind: prepare_topk(arrays) for kind, arrays in groups.items()}
        self._temperatures = np.array(spec.temperatures, np.float32)
        self._relations = RelationBlock(groups["relation"]) if "relation" in groups else None
        self._rows = table.drop_columns(["images", "input_ids", "label_spans"]).to_pylist()
        self._input_ids = _Lists(table["input_ids"])
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
        """The sample at a position of the shard, its targets decoded. IndexError outside 0..len-1."""
        row = self._rows[position]
        input_ids = self._input_ids.numbers(position)
        labels = labels_of(input_ids, self._label_spans.numbers(position).reshape(-1, 2))
        images = self._image_rows[self._images.slice(position)]
        records = tuple(_image_record(image) for image in images)
        positions = positions_by_kind(labels, (record.positions for record in records))
        return Sample(
            row=row["row"],
            sample_id=row["sample_id"],
            input_ids=input_ids,
            labels=labels,
            positions=positions,
            images=records,
            records={
                "response": self._span("response", row["response_start"], len(positions["response"])),
                "visual": self._visual(images, records),
                "prompt": self._span("prompt", row["prompt_start"], len(positions["prompt"])),
            },
            relations=self._relations_of(images),
            model_inputs={entry["name"]: _array_of(entry) for entry in row["model_inputs"]},
        )

    def _span(self, kind: str, start: int | None, count: int) -> TopK | None:
        if start is None or kind not in self.parts:
            return None
        return self._decode(kind, slice(start, start + count))

    def _visual(self, images: list[dict[str, Any]], records: tuple[ImageRecord, ...]) -> TopK | None:
        if "visual" not in self.parts or not images or images[0]["visual_start"] is None:
            return None
        starts = [image["visual_start"] for image in images]
        ends = [start + len(r.positions) for start, r in zip(starts, records, strict=True)]
        if starts[1:] == ends[:-1]:
            return self._decode("visual", slice(starts[0], ends[-1]))
        return self._decode(
            "visual", np.concatenate([np.arange(*span) for span in zip(starts, ends, strict=True)])
        )

    def _relations_of(self, images: list[dict[str, Any]]) -> list[Relation]:
        if self._relations is None:
            return []
        return [self._relations[image["relation"]] for image in images]

    def _decode(self, kind: str, places: Places) -> TopK:
        return decode_topk(self._groups[kind], places, self._temperatures)


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


def _image_record(image: dict[str, Any]) -> ImageRecord:
    return ImageRecord(
        path=image["path"],
        sha256=image["sha256"],
        width=image["width"],
        height=image["height"],
        positions=positions_of(image["spans"]),
    )


def _array_of(entry: dict[str, Any]) -> NDArray[Any]:
    return np.frombuffer(entry["data"], dtype=np.dtype(entry["dtype"])).reshape(entry["shape"])
