"""Equal visual prefixes of a shard are stored once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache_schema import CacheWriter, TargetSpec, open_cache
from cache_schema.operations.verify import verify
from tests.cache_teacher import make_manifest, make_sample

SPEC = TargetSpec(top_k=6)


def write(path: Path, *, share: bool, strip: bool = False) -> dict[str, int]:
    manifest = make_manifest(SPEC, rows=17, shard_size=17)
    writer = CacheWriter.open(path, manifest)
    samples = [make_sample(row, SPEC, share=share) for row in range(17)]
    if strip:
        seen: set[str] = set()
        for number, sample in enumerate(samples):
            images = [
                replace(image, visual=None, relation=None) if image.prefix_key in seen else image
                for image in sample.images
            ]
            seen |= {image.prefix_key for image in images if image.prefix_key is not None}
            samples[number] = replace(sample, images=tuple(images))
    record = writer.write_shard(0, samples, [], engine={}, seconds=0.0)
    assert record is not None
    return record.counts | record.statistics["bytes"]


@pytest.mark.parametrize("strip", [False, True])
def test_shared_prefixes_are_stored_once_and_read_by_all(tmp_path: Path, strip: bool) -> None:
    plain = write(tmp_path / "plain", share=False)
    shared = write(tmp_path / "shared", share=True, strip=strip)
    images = [image for row in range(17) for image in make_sample(row, SPEC, share=True).images]
    keys = {image.prefix_key for image in images if image.prefix_key is not None}
    alone = sum(image.prefix_key is None for image in images)
    assert plain["shared_images"] == 0
    assert shared["shared_images"] == len(images) - len(keys) - alone >= 6
    assert shared["visual_positions"] == 9 * (len(keys) + alone)
    assert shared["relations"] == len(keys) + alone
    assert shared["visual"] + shared["relation"] < plain["visual"] + plain["relation"]
    cache = open_cache(tmp_path / "shared")
    for sample in cache:
        given = make_sample(sample.row, SPEC, share=True)
        assert len(sample.relations) == len(given.images)
        if given.images:
            expected = np.concatenate([image.visual.token_ids for image in given.images])
            np.testing.assert_array_equal(sample.visual.token_ids, expected)
    assert verify(tmp_path / "shared").ok


def test_a_first_image_without_targets_is_refused(tmp_path: Path) -> None:
    writer = CacheWriter.open(tmp_path, make_manifest(SPEC, rows=1, shard_size=1))
    sample = make_sample(0, SPEC, share=True)
    bare = replace(sample, images=tuple(replace(image, visual=None) for image in sample.images))
    with pytest.raises(ValueError, match="visual 0 targets are missing"):
        writer.write_shard(0, [bare], [], engine={}, seconds=0.0)
    bare = replace(sample, images=tuple(replace(image, relation=None) for image in sample.images))
    with pytest.raises(ValueError, match="image 0: no relation"):
        writer.write_shard(0, [bare], [], engine={}, seconds=0.0)
