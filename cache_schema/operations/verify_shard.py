"""Verifies one committed shard: its files as they were committed, and what they hold."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from cache_schema.errors import UNDECODABLE, CacheDamaged, shown
from cache_schema.format.archive import disagreement, unpack
from cache_schema.format.block import ShardBlock
from cache_schema.format.cache import hierarchy
from cache_schema.format.checks import hidden_problems, relation_problems, topk_problems
from cache_schema.format.groups import read_groups
from cache_schema.format.manifest import CommitRecord, Manifest
from cache_schema.format.shard import read_table
from cache_schema.format.store import Range, Store

REMAKE = "run `kdcache verify --repair`, then the same `kdcache build` again: it makes this shard again"

Report = Callable[[str, str], None]
"""Takes a file and what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that is not as it must be: the file, what, and what to do."""

    file: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}; {self.remedy}"


def check_shard(
    record: CommitRecord,
    store: Store,
    present: Mapping[str, int],
    manifest: Manifest | None,
    *,
    quick: bool = False,
) -> list[Problem]:
    """All that is wrong with a shard. present: bytes of the store's files by path. quick: sizes and digests
    of its files alone; nothing is decoded, as without a manifest."""
    problems: list[Problem] = []

    def problem(file: str, what: str) -> None:
        problems.append(Problem(file=file, what=shown(what, 600), remedy=REMAKE))

    files = _check_files(record, store, present, problem)
    if files is not None and manifest is not None and not quick:
        try:
            _check_content(record, files, manifest, problem)
        except (CacheDamaged, *UNDECODABLE) as error:
            problem(record.path, f"its files cannot be decoded ({error})")
    return problems


def _check_files(
    record: CommitRecord, store: Store, present: Mapping[str, int], problem: Report
) -> dict[str, bytes] | None:
    """The shard's files by path, None when one is missing or altered."""
    whole = {f.path: Range(f.path, 0, f.bytes) for f in record.files if present.get(f.path) == f.bytes}
    found = dict(zip(whole, store.read_many(list(whole.values())), strict=True))
    for file in record.files:
        if file.path not in present:
            problem(file.path, "missing")
        elif file.path not in whole:
            what = f"{present[file.path]} bytes, {file.bytes} were committed"
            problem(file.path, what)
        elif hashlib.sha256(found[file.path]).hexdigest() != file.sha256:
            problem(file.path, "altered: it does not match its digest")
            del whole[file.path]
    return found if len(whole) == len(record.files) else None


def _check_content(
    record: CommitRecord, files: Mapping[str, bytes], manifest: Manifest, problem: Report
) -> None:
    name, base = record.name, f"{record.targets}/"
    quarantine = read_table(files[f"quarantine/{name}.arrow"])
    if record.format_version > 1:
        for what in [disagreement(files[record.targets]), *_misplaced(record, files[record.targets])]:
            if what:
                problem(record.targets, what)
    groups = hierarchy(record, {Range(path, 0, len(data)): data for path, data in files.items()})
    block = ShardBlock(
        read_table(files[f"samples/{name}.arrow"]),
        read_groups(groups),
        manifest,
        frozenset(manifest.spec.targets),
    )
    if manifest.spec.embed_images:
        _check_images(
            files[f"images/{name}.arrow"], block, lambda what: problem(f"images/{name}.arrow", what)
        )
    spec, vocab_size = manifest.spec, manifest.vocab_size
    rows = quarantine["row"].to_pylist()
    counts = Counter(samples=len(block), quarantined=len(rows))
    for position in range(len(block)):
        sample = block.sample(position)
        rows.append(sample.row)
        counts.update(tokens=len(sample.input_ids), images=len(sample.images))
        where = f"sample {position} (row {sample.row})"
        for kind, topk in sample.records.items():
            if kind not in spec.targets or (kind == "visual" and not sample.images):
                continue
            if topk is None or len(topk) != len(sample.positions[kind]):
                problem(base + kind, f"{where}: its targets are missing")
                continue
            if kind != "visual":  # an image's rows may serve several samples
                counts[f"{kind}_positions"] += len(topk)
            for what in topk_problems(topk, kind, spec, vocab_size):
                problem(base + kind, f"{where}: {what}")
        for kind in spec.hidden:
            if kind == "visual" and not sample.images:
                continue
            states = sample.hidden_states.get(kind)
            count = len(sample.positions[kind])
            told = ["missing"] if states is None else hidden_problems(states, count)
            for what in told:
                problem(f"{base}hidden_{kind}", f"{where}: {what}")
            if (
                states is not None
                and manifest.head is not None
                and states.values.shape[1:] != (manifest.head.width,)
            ):
                problem(f"{base}hidden_{kind}", f"{where}: not as wide as the teacher's head")
        if "relation" in spec.targets and len(sample.relation_records) != len(sample.images):
            problem(base + "relation", f"{where}: not one relation per image")
        for relation, image in zip(sample.relations, sample.images, strict=False):
            for what in relation_problems(relation, len(image.positions)):
                problem(base + "relation", f"{where}: {what}")
    if sorted(rows) != np.sort(manifest.plan.rows_of(record.shard)).tolist():
        problem(record.path, "samples and quarantine do not match the rows of the plan")
    for name, count in counts.items():
        if record.counts[name] != count:
            problem(record.path, f"{name}: {record.counts[name]} counted, {count} there")


def _check_images(data: bytes, block: ShardBlock, problem: Callable[[str], None]) -> None:
    """Whether the embedded images are those of the samples, each with the bytes of its SHA-256."""
    table = read_table(data)
    digests = table["sha256"].to_pylist()
    for digest, content in zip(digests, table["data"], strict=True):
        if hashlib.sha256(content.as_buffer()).hexdigest() != digest:
            problem(f"image {digest}: its bytes do not match its digest")
    needed = {image.sha256 for place in range(len(block)) for image in block.sample(place).images}
    for digest in sorted(needed ^ set(digests)):
        problem(f"image {digest}: {'missing' if digest in needed else 'of no sample'}")


def _misplaced(record: CommitRecord, data: bytes) -> list[str]:
    """The groups that are not where the commit record says."""
    (file,) = (file for file in record.files if file.path == record.targets)
    there = {path for path in unpack(data) if "/" in path}
    return [
        f"{name}: not at the bytes that the commit record names"
        for name, (start, end, digest) in file.parts.items()
        if hashlib.sha256(data[start:end]).hexdigest() != digest
        or unpack(data[start:end]).keys() != {path for path in there if path.startswith(f"{name}/")}
    ] + [
        f"{path}: of no group of the commit record" for path in there if path.split("/")[0] not in file.parts
    ]
