"""`build --cluster`: workers of one build as tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache_schema.errors import KdcacheError, StoppedEarly, WrongUsage, first_line
from cache_schema.format.cache import open_cache
from cache_schema.format.store import open_store
from cache_schema.format.writer import committed_shards
from cache_schema.interrupt import Interrupt
from cache_schema.progress import Progress, Silent, task
from pipeline.capture import build, present_manifest, spec_for_engine, summary_of
from pipeline.settings import BuildConfig, BuildSummary, ClusterConfig

_RETRIES = 20
"""Starts of a worker after its process or its node was lost."""

_WAIT, _LOOK = 0.2, 2.0
"""Seconds until a request to stop is noticed, and between two listings of the commit records."""

_STOPPING = 600.0
"""Seconds that workers have to stop."""


def build_on_cluster(config: BuildConfig, cluster: ClusterConfig, progress: Progress) -> BuildSummary:
    """`build` by tasks of Ray: each begins with the shards of its rank and then takes any that is open.

    A task whose process or node is lost is started again, elsewhere where need be; it loses at most its
    shard. Teacher, data and cache must be under the same paths on every node. KdcacheError: as `build`, or
    no cluster, or shards that are missing when all tasks have ended. StoppedEarly after Ctrl-C or SIGTERM.
    """
    ray = _ray()
    started = time.monotonic()
    spec_for_engine(config)
    if config.rank is not None or config.world_size is not None:
        raise WrongUsage("--rank and --world-size are set by --cluster; omit them")
    config = _everywhere(config)
    before = len(committed_shards(open_store(config.out)))
    local = cluster.cluster == "local"
    try:
        # A local cluster has as many workers as are asked for, whatever the number of cores.
        place = {"num_cpus": cluster.workers or None} if local else {"address": cluster.cluster}
        ray.init(**place, include_dashboard=False, log_to_driver=False, configure_logging=False)
    except Exception as error:
        raise KdcacheError(
            f"no Ray cluster at {cluster.cluster} ({first_line(error)}); start one with `ray start --head`, "
            "or take --cluster local"
        ) from error
    try:
        tasks = _start(ray, config, cluster, progress)
        with Interrupt() as interrupt:
            _follow(ray, tasks, config, interrupt, progress)
    finally:
        ray.shutdown()
    cache = open_cache(config.out)
    if missing := cache.plan.shards - len(cache.shards):
        raise KdcacheError(
            f"{config.out}: {missing} of {cache.plan.shards} shards are missing after all workers have "
            "ended; run the same command again"
        )
    finished = before == cache.plan.shards and not config.retry_quarantine
    return summary_of(config.out, started, already_done=finished)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise WrongUsage("--cluster needs Ray: pip install 'kdcache[ray]'") from error
    return ray


def _everywhere(config: BuildConfig) -> BuildConfig:
    """The same with absolute paths: workers run in folders of their own."""
    root, out = (
        place if "://" in place else str(Path(place).absolute()) for place in (config.image_root, config.out)
    )
    teacher, data, template = config.teacher.absolute(), config.data.absolute(), config.template
    if template is not None and Path(template).is_file():
        template = str(Path(template).absolute())
    files = config.files
    if files.file_cache is not None:
        files = replace(files, file_cache=files.file_cache.absolute())
    return replace(
        config, teacher=teacher, data=data, template=template, image_root=root, out=out, files=files
    )


def _start(ray: Any, config: BuildConfig, cluster: ClusterConfig, progress: Progress) -> list[Any]:
    """One task per worker, in the order of their ranks."""
    resources = ray.cluster_resources()
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if resources.get("GPU") else 0.0
    most = int(resources.get("GPU", 0.0) / gpus if gpus else resources.get("CPU", 0.0))
    workers = cluster.workers or most
    if workers < 1:
        raise WrongUsage(
            f"no worker with {gpus:g} GPUs fits a cluster of {resources.get('GPU', 0.0):g}; give another "
            "--gpus-per-worker, or --workers for a cluster that grows"
        )
    if workers > most:
        progress.message(
            f"{workers} workers, of which {most} fit the cluster as it is: the others wait until it grows"
        )
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=_RETRIES)(_capture)
    return [
        remote.options(name=f"kdcache-{rank}").remote(replace(config, rank=rank, world_size=workers))
        for rank in range(workers)
    ]


def _capture(config: BuildConfig) -> str:
    """A worker's part of the build; what stopped it early, or nothing."""
    try:
        build(config, Silent())
    except StoppedEarly as stop:
        return str(stop)
    return ""


def _follow(
    ray: Any, tasks: list[Any], config: BuildConfig, interrupt: Interrupt, progress: Progress
) -> None:
    """Waits for the tasks and shows the commit records until all have ended."""
    open_tasks, stopped, deadline, looked = list(tasks), "", float("inf"), 0.0
    store, shards, lost = open_store(config.out), None, []
    with task(progress, f"capturing with {len(tasks)} workers"):
        while open_tasks:
            done, open_tasks = ray.wait(open_tasks, timeout=_WAIT)
            for one in done:
                try:
                    stopped = ray.get(one) or stopped
                except (ray.exceptions.TaskCancelledError, KeyboardInterrupt):
                    stopped = "stopped"
                except ray.exceptions.RayTaskError as error:
                    for other in open_tasks:
                        ray.cancel(other)
                    cause = error.cause
                    raise cause if isinstance(cause, KdcacheError) else error from None
                except ray.exceptions.RayError as error:  # others take over its shards
                    lost.append(error)
                    progress.message(f"a worker was lost for good ({first_line(error)})")
            if interrupt.asked and deadline == float("inf"):
                deadline = time.monotonic() + _STOPPING
                progress.message("stopping: every worker finishes its batch")
                for one in open_tasks:
                    ray.cancel(one)
            if time.monotonic() > deadline:
                break
            if time.monotonic() - looked < _LOOK:
                continue
            looked = time.monotonic()
            with contextlib.suppress(OSError, KdcacheError):
                if shards is None and (manifest := present_manifest(config.out)) is not None:
                    shards = manifest.plan.shards
                committed = len(committed_shards(store))
                progress.update(committed, shards=f"{committed}/{shards or '?'}")
    if interrupt.asked or stopped:
        raise StoppedEarly(f"stopped; finished shards are in {config.out}: run the same command again")
    if len(lost) == len(tasks):
        raise KdcacheError(f"every worker was lost ({first_line(lost[0])}); see Ray's logs")
