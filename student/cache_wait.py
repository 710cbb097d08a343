"""Waiting for a cache that `kdcache build` is still writing, until its last shard is committed."""

from __future__ import annotations

import time

from cache_schema.errors import KdcacheError, first_line
from cache_schema.format.cache import open_cache
from cache_schema.format.store import open_store
from cache_schema.format.writer import MANIFEST, committed_shards
from cache_schema.progress import Progress, task
from student.settings import TrainConfig

POLL_SECONDS = 5.0


def wait_for_caches(config: TrainConfig, progress: Progress) -> None:
    """Returns when every shard of the caches of a run is committed, at once if they all are.

    KdcacheError when nothing was committed for `wait_minutes`. Nothing is held or written meanwhile, so an
    interrupt may end the wait at any moment.
    """
    learnt = [source.cache for source in config.sources]
    for url in filter(None, (*learnt, config.eval_cache)):
        try:
            _wait(url, config.wait_minutes, progress)
        except OSError as error:
            raise KdcacheError(
                f"{url}: cannot be read ({first_line(error)}); check the connection or disk, then run again"
            ) from error


def _wait(url: str, minutes: float, progress: Progress) -> None:
    store, newest = open_store(url), time.monotonic()
    if not store.exists(MANIFEST):
        progress.message(f"{url} holds no cache yet: waiting for `kdcache build` to begin it")
        while not store.exists(MANIFEST):
            _pause(url, newest, minutes, "no cache is there")
    shards, done = open_cache(url).plan.shards, -1
    if len(committed_shards(store)) >= shards:
        return
    with task(progress, f"waiting for the shards of {url}", shards):
        while (now := len(committed_shards(store))) < shards:
            if now != done:
                done, newest = now, time.monotonic()
            progress.update(done)
            _pause(url, newest, minutes, f"{shards - done} of {shards} shards are missing")


def _pause(url: str, newest: float, minutes: float, state: str) -> None:
    if time.monotonic() - newest > 60 * minutes:
        raise KdcacheError(
            f"{url}: {state}, and nothing was added for {minutes:g} minutes; start `kdcache build` again, or "
            "train without --wait on what is there"
        )
    time.sleep(POLL_SECONDS)
