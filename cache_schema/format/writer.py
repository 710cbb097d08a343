"""Writing a cache: shard by shard; only the commit record makes a shard exist."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np

from cache_schema.errors import CacheDamaged, IdentityMismatch, KdcacheError
from cache_schema.format.archive import Place, pack
from cache_schema.format.checks import hidden_problems, relation_problems, topk_problems
from cache_schema.format.identity import compare
from cache_schema.format.manifest import (
    CommitRecord,
    Manifest,
    StoredFile,
    commit_path,
    targets_path,
)
from cache_schema.format.records import CapturedSample, HiddenStates, QuarantinedRow, TopK
from cache_schema.format.roll import write_roll
from cache_schema.format.shard import EncodedShard, encode_shard, response_count
from cache_schema.format.spec import HiddenKind, Kind
from cache_schema.format.store import LocalStore, Store, open_store
from cache_schema.format.stored_head import HEAD_FOLDER

MANIFEST = "manifest.json"
FOLDERS = ("commits", "samples", "targets", "quarantine", "images", "aside", HEAD_FOLDER)


class CacheWriter:
    """A cache open for writing; any number of processes may write to one cache at once."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self._vocab_size = manifest.vocab_size

    @classmethod
    def open(
        cls,
        url: str | os.PathLike[str],
        manifest: Manifest,
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> CacheWriter:
        """Create the cache at `url`, or join an existing one, which keeps its format version.

        IdentityMismatch when the existing cache has another fingerprint, spec or plan; KdcacheError when
        something else is there or it cannot be written.
        """
        return cls.join(open_store(url, storage_options), manifest)

    @classmethod
    def join(cls, store: Store, manifest: Manifest) -> CacheWriter:
        """As `open`, on a store."""
        try:
            if not store.exists(MANIFEST):
                manifest = replace(manifest, format_version=_version_of_the_rest(store, manifest))
                if store.create(MANIFEST, manifest.to_bytes()) and store.create(MANIFEST, b""):
                    raise KdcacheError(
                        f"{store.url}: this store cannot create files exclusively, so a cache is not safe "
                        "in it; build into a directory and copy it when it is complete"
                    )
            present = Manifest.from_bytes(store.read(MANIFEST), f"{store.url}/{MANIFEST}")
        except OSError as error:
            raise store_failure(error, store) from error
        _refuse_other_identity(store, manifest, present)
        return cls(store, present)

    @property
    def lacks_head(self) -> bool:
        """Whether the cache is to have the teacher's head and does not, in full."""
        head = self.manifest.head
        return head is not None and self.store.list(HEAD_FOLDER).get(head.path) != head.size

    def put_head(self, data: bytes) -> None:
        """Store the teacher's head, before the first shard. IdentityMismatch when it is not the cache's."""
        head = self.manifest.head
        if head is None or hashlib.sha256(data).hexdigest() != head.sha256:
            raise IdentityMismatch(
                f"{self.store.url}: the teacher's head is not the one of this cache; build with the same "
                "teacher on the same versions, or into another directory"
            )
        if not self.lacks_head:
            return
        try:
            self.store.create(head.path, data)
        except OSError as error:
            raise store_failure(error, self.store) from error
        if self.lacks_head:
            raise CacheDamaged(
                f"{self.store.url}/{head.path}: damaged; run `kdcache verify --repair`, then this again"
            )

    def committed(self) -> set[int]:
        """The shards that exist now."""
        return committed_shards(self.store)

    def finish(self) -> None:
        """Once all shards are committed, list them in one file for readers at object stores: see `roll`."""
        write_roll(self.store, self.manifest.plan.shards)

    def is_committed(self, shard: int) -> bool:
        """Whether the shard exists now."""
        return self.store.exists(commit_path(shard))

    def pending(self, rank: int = 0, world_size: int = 1) -> Iterator[int]:
        """See `pending_shards`."""
        return pending_shards(self.store, self.manifest.plan.shards, rank, world_size)

    def write_shard(
        self,
        index: int,
        samples: Sequence[CapturedSample],
        quarantined: Sequence[QuarantinedRow],
        *,
        engine: Mapping[str, str],
        seconds: float,
    ) -> CommitRecord | None:
        """Write and commit a shard; None when another attempt committed it first.

        ValueError when the rows are not exactly those of the plan, or a record is not as the spec says.
        """
        self._refuse_unsound(index, samples, quarantined)
        attempt = uuid.uuid4().hex[:12]
        shard = encode_shard(f"{index:05d}-{attempt}", samples, quarantined, self.manifest.spec)
        return self.commit(index, attempt, shard, engine=engine, seconds=seconds)

    def commit(
        self, index: int, attempt: str, shard: EncodedShard, *, engine: Mapping[str, str], seconds: float
    ) -> CommitRecord | None:
        """Write the files of an encoded shard, then its record; None when another attempt was first."""
        version = self.manifest.format_version
        targets, tables, parts = targets_path(shard.name, version), dict(shard.tables), {}
        if version == 1:
            files = tables | {f"{targets}/{path}": data for path, data in shard.arrays.items()}
        else:
            tables[targets], parts[targets] = pack(shard.arrays)
            files = tables
        stored = tuple(_stored(path, files[path], parts.get(path, {})) for path in sorted(files))
        record = CommitRecord(
            cache=self.manifest.identity,
            shard=index,
            attempt=attempt,
            counts=shard.counts,
            statistics=shard.statistics | {"bytes": _bytes_by_part(stored, parts.get(targets, {}))},
            files=stored,
            engine=dict(engine),
            seconds=seconds,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            format_version=version,
        )
        try:
            if version == 1:
                self.store.put_folder(targets, shard.arrays)
            for path, data in tables.items():
                self.store.put(path, data)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._discard(record)
            raise store_failure(error, self.store) from error
        return record if self.publish(record) else None

    def publish(self, record: CommitRecord) -> bool:
        """Create the commit record of a shard whose files are written. False when another attempt was first;
        then the files are removed.

        The record is read back instead of trusting `create`: an object store may execute a request whose
        reply is lost, and refuse its retry. KdcacheError when the store fails; the files stay unless the
        record cannot come into being any more, since an object store may still execute the request.
        """
        failure = None
        try:
            self.store.create(record.path, record.to_bytes())
        except OSError as error:
            failure = error
        try:
            winner = self._winner(record)
            never = winner is None and isinstance(self.store, LocalStore)
            if never or winner not in (None, record.attempt):
                self._discard(record)
        except OSError as error:
            raise store_failure(failure or error, self.store) from (failure or error)
        if winner in (None, record.attempt) and failure is not None:
            raise store_failure(failure, self.store) from failure
        return winner == record.attempt

    def _winner(self, record: CommitRecord) -> str | None:
        """The committed attempt of a record's shard; None when there is none."""
        try:
            return CommitRecord.from_bytes(self.store.read(record.path), record.path).attempt
        except FileNotFoundError:
            return None

    def _discard(self, record: CommitRecord) -> None:
        self.store.remove([file.path for file in record.files])

    def reopen(self, index: int) -> None:
        """Set a shard aside so that it is captured again (`--retry-quarantine`)."""
        set_aside(self.store, commit_path(index))

    def _refuse_unsound(
        self, index: int, samples: Sequence[CapturedSample], quarantined: Sequence[QuarantinedRow]
    ) -> None:
        planned = self.manifest.plan.rows_of(index).tolist()
        given = sorted([s.row for s in samples] + [q.row for q in quarantined])
        if given != sorted(planned):
            raise ValueError(
                f"shard {index}: the {len(given)} rows given are not the {len(planned)} rows of the plan"
            )
        spec, seen = self.manifest.spec, set()
        for sample in samples:
            where = f"shard {index}, row {sample.row}"
            parts = {
                "response": (sample.response, response_count(sample.label_spans)),
                "prompt": (sample.prompt, None),
            }
            self._refuse_hidden(where, "response", sample.hidden, sample.response)
            for number, image in enumerate(sample.images):
                first = image.prefix_key is None or image.prefix_key not in seen
                seen.add(image.prefix_key)
                tokens = len(image.record.positions)
                if first or image.visual is not None:
                    parts[f"visual {number}"] = (image.visual, tokens)
                    self._refuse_hidden(where, "visual", image.hidden, image.visual)
                if "relation" in spec.targets and first and image.relation is None:
                    raise ValueError(f"{where}, image {number}: no relation")
                if image.relation is not None and (found := relation_problems(image.relation, tokens)):
                    raise ValueError(f"{where}, image {number}, relation: {'; '.join(found)}")
            for name, (record, count) in parts.items():
                kind = cast(Kind, name.split()[0])
                asked = kind in spec.targets
                if asked != (record is not None):
                    raise ValueError(
                        f"{where}: {name} targets are {'missing' if asked else 'present, against the spec'}"
                    )
                if record is None:
                    continue
                if count is not None and len(record) != count:
                    raise ValueError(f"{where}: {name} has {len(record)} positions, not {count}")
                if found := topk_problems(record, kind, spec, self._vocab_size):
                    raise ValueError(f"{where}, {name}: {'; '.join(found)}")
            ends = np.append(sample.label_spans.ravel(), len(sample.input_ids))
            if (np.diff(ends) < 0).any() or (ends < 0).any():
                raise ValueError(
                    f"{where}: label spans {sample.label_spans.tolist()} are not ascending within the sample"
                )

    def _refuse_hidden(
        self, where: str, kind: HiddenKind, states: HiddenStates | None, record: TopK | None
    ) -> None:
        """ValueError unless the hidden states of a record are as the spec says."""
        if (kind in self.manifest.spec.hidden) != (states is not None):
            raise ValueError(f"{where}: {kind} hidden states are not as the spec says")
        if states is not None and (found := hidden_problems(states, 0 if record is None else len(record))):
            raise ValueError(f"{where}, {kind} hidden states: {'; '.join(found)}")


def committed_shards(store: Store) -> set[int]:
    """The shards of a cache that exist now, by one listing."""
    return {int(path[8:-5]) for path in store.list("commits") if not path.startswith("commits/.")}


def look_every(shards: int) -> int:
    """After how many shards of its own a worker looks what others have finished, to show it: a listing is as
    long as the cache, so that one after every shard would take time with the square of their number."""
    return max(1, shards // 128)


def pending_shards(store: Store, shards: int, rank: int, world_size: int) -> Iterator[int]:
    """Of the plan's `shards` those to build: with i mod world_size = rank, then any that are not committed.

    Listed once for its own and once for the others, and each that is not there is looked for again when its
    turn comes. Shards of other workers come in an order that depends on the rank, so that idle workers rarely
    take the same one.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} workers")
    own = [i for i in range(shards) if i % world_size == rank]
    others = np.array([i for i in range(shards) if i % world_size != rank], dtype=np.int64)
    others = np.random.default_rng(rank).permutation(others)
    for part in (own, others.tolist()):
        listed = committed_shards(store)
        for shard in part:
            if shard not in listed and not store.exists(commit_path(shard)):
                yield shard


def set_aside(store: Store, commit: str) -> None:
    """Move a commit record to `aside/`: its shard no longer exists and can be built again.

    Its files stay as leftovers; moving the record back restores the shard until `verify --repair` removes
    them.
    """
    try:
        store.move(commit, f"aside/{uuid.uuid4().hex[:8]}/{commit}")
    except OSError as error:
        raise store_failure(error, store) from error


def store_failure(error: OSError, store: Store) -> KdcacheError:
    """The error line for a failure of the cache's storage."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "the disk is full: free space there and run the same command again"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        remedy = "it cannot be written: make it writable or give another location"
    elif isinstance(error, NotADirectoryError | FileExistsError):
        remedy = "it is not a directory: give another location"
    else:
        remedy = f"{error.strerror or error}: correct this and run the same command again"
    return KdcacheError(f"{store.url}: {remedy}; every committed shard is intact")


def _stored(path: str, data: bytes, parts: Mapping[str, Place]) -> StoredFile:
    def digest(start: int, end: int) -> str:
        return hashlib.sha256(memoryview(data)[start:end]).hexdigest()

    return StoredFile(
        path=path,
        bytes=len(data),
        sha256=digest(0, len(data)),
        parts={name: (at.start, at.end, digest(at.start, at.end)) for name, at in parts.items()},
    )


def _bytes_by_part(files: Sequence[StoredFile], zipped: Mapping[str, Place]) -> dict[str, int]:
    """Bytes of a shard's files: samples, quarantine, the groups of the targets, other."""
    sizes: Counter[str] = Counter()
    for file in files:
        pieces = file.path.split("/")
        sizes[pieces[0] if pieces[0] != "targets" else pieces[2] if len(pieces) > 3 else "other"] += (
            file.bytes
        )
    for group, (start, end, listed) in zipped.items():
        sizes[group] += end - start + listed
        sizes["other"] -= end - start + listed
    return dict(sorted(sizes.items()))


def _version_of_the_rest(store: Store, manifest: Manifest) -> int:
    """The format version for a manifest that is not there: that of the committed shards, else its own.

    Refused unless the location is empty, or this very cache with its manifest set aside. One that another
    worker has written since is compared afterwards.
    """
    version = manifest.format_version
    for path in store.list():
        if path == MANIFEST:
            continue
        if path.split("/")[0] not in FOLDERS and not path.startswith(".manifest"):
            raise KdcacheError(
                f"{store.url}: not a cache and not empty ({path}); give an empty or a new directory"
            )
        if path.startswith("commits/") and not path.startswith("commits/."):
            record = CommitRecord.from_bytes(store.read(path), f"{store.url}/{path}")
            version = record.format_version
            if record.cache != manifest.identity:
                raise IdentityMismatch(
                    f"{store.url}: it has no manifest, and {path} belongs to a cache of another identity; "
                    "build with the same teacher, data and settings, or into another directory"
                )
    return version


def _refuse_other_identity(store: Store, ours: Manifest, present: Manifest) -> None:
    if ours.identity == present.identity:
        return
    differences = [str(d) for d in compare(ours.fingerprint, present.fingerprint) if d.blocks != "nothing"]
    for key, (mine, theirs) in ours.spec.differences(present.spec).items():
        if not any(key in text for text in differences):
            differences.append(f"spec.{key}: here {mine}, in the cache {theirs}")
    if ours.plan_digest != present.plan_digest:
        a, b = ours.plan, present.plan
        differences.append(
            f"plan: here {a.rows} rows in shards of {a.shard_size}, in the cache {b.rows} in shards of "
            f"{b.shard_size}"
            + ("" if (a.rows, a.shard_size) != (b.rows, b.shard_size) else ", in another order")
        )
    if not differences:  # a cache of an older version, the same in all that it holds
        return
    raise IdentityMismatch(
        f"{store.url}: a cache of another identity exists here: {'; '.join(differences)}; build with the "
        "same "
        "teacher, data and settings, or into another directory"
    )
