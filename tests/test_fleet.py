"""A fleet that dies: many workers, one cache at a slow and failing object store, kills without end."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from datetime import datetime
from pathlib import Path

import pytest

from cache_schema.format.cache import open_cache
from cache_schema.operations import verify as verify_module
from cache_schema.operations.verify import verify
from tests.cache_teacher import KILL_SPEC, assert_same_cache, build_cache
from tests.fleet_worker import Fleet, work
from tests.rough_server import BUCKET, Faults, rough_server

WORKERS, KILLS, ROWS = 16, 100, 640
VERSIONS = ("0.1.9", "0.2.0")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_fleet_that_dies_leaves_the_cache_of_one_worker(tmp_path: Path, monkeypatch) -> None:
    build_cache(tmp_path / "undisturbed", KILL_SPEC, rows=ROWS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fleet_worker", "s3fs"])
    faults, chance = Faults(seed=1), random.Random(0)
    with rough_server(faults) as options:
        faults.delay, faults.errors = (0.05, 0.5), 0.05
        fleet = Fleet(
            url=f"s3://{BUCKET}/fleet", options=options, rows=ROWS, workers=WORKERS, log=tmp_path / "log"
        )

        def start(rank: int) -> multiprocessing.process.BaseProcess:
            skew = chance.uniform(-7200, 7200)
            process = context.Process(target=work, args=(fleet, rank, skew, VERSIONS[rank % 2]))
            process.start()
            return process

        began, killed = time.monotonic(), 0
        workers = {rank: start(rank) for rank in range(WORKERS)}
        while killed < KILLS:
            time.sleep(chance.expovariate(4.0))
            alive = [rank for rank, process in workers.items() if process.is_alive()]
            assert alive, f"all is built after {killed} kills"
            rank = chance.choice(alive)
            pid = workers[rank].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            workers[rank].join()
            killed += workers[rank].exitcode == -signal.SIGKILL
            workers[rank] = start(rank)
        for process in workers.values():
            process.join(timeout=300)
        assert [process.exitcode for process in workers.values()] == [0] * WORKERS
        seconds = time.monotonic() - began

        faults.delay, faults.errors = (0.0, 0.0), 0.0
        assert_same_cache(fleet.url, tmp_path / "undisturbed", storage_options=options)
        records = open_cache(fleet.url, storage_options=options).commits.values()
        assert {record.kdcache_version for record in records} == set(VERSIONS)
        made = [datetime.fromisoformat(record.created).timestamp() for record in records]
        assert max(made) - min(made) > seconds  # only wrong clocks can say so
        report = verify(fleet.url, quick=True, storage_options=options)
        monkeypatch.setattr(verify_module, "GRACE_SECONDS", -1.0)
        repaired = verify(fleet.url, quick=True, repair=True, storage_options=options)
        assert set(repaired.leftovers) == set(report.leftovers)
        after = verify(fleet.url, quick=True, storage_options=options)
        assert after.intact
        assert after.leftovers == []

    begun, shards = len(fleet.log.read_text().split()), len(records)
    lost = begun / shards - 1
    print(
        f"{killed} kills of {WORKERS} workers in {seconds:.0f} s, {shards} shards; {begun} shards begun: "
        f"{100 * lost:.0f}% of the work done twice; {len(report.leftovers)} files left over; "
        f"{faults.seen['requests']} requests, {faults.seen['failed']} failed"
    )
    # A kill costs at most the shard under way; two workers may begin the same one at the end.
    assert begun <= shards + killed + WORKERS * 4
    assert faults.seen["answers lost"] > 0
