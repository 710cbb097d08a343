"""The whole study: which runs there are and in which order, each once, in parallel processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ablations.arms import (
    SEARCHED_AS,
    STAGES,
    STRATEGIES,
    TARGETS,
    Arm,
    Budget,
    sized,
    with_images,
)
from cache_schema.errors import KdcacheError
from cache_schema.output import write_text
from cache_schema.progress import Progress, task

SEARCH_SEED = 1000
"""Of the search of learning rates; no seed of the tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySettings:
    """What is run. An arm takes the factor of its budget whose student is best on the validation images; its
    seed is not reported."""

    budgets: dict[str, Budget]
    seeds: int = 5
    text_steps: int = 60
    live: str | None = "easy-vqa"
    sizes: bool = True
    validation: int = 100
    test: int = 250
    teacher: dict[str, Any] = field(default_factory=dict)
    """Settings of `MosaicTeacher` other than its defaults."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the runs of an arm on a set are kept."""

    out: Path
    set_name: str
    arm: Arm

    def file(self, seed: int, factor: float) -> Path:
        name = re.sub(r"[^a-z0-9]+", "-", self.arm.name.lower())
        return self.out / self.set_name / "runs" / name / f"seed-{seed}-rate-{factor:g}.json"

    def result(self, seed: int, factor: float) -> dict[str, Any] | None:
        path = self.file(seed, factor)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class Study:
    """The runs in a folder, as far as they are made."""

    def __init__(self, out: Path, settings: StudySettings, only: str | None = None) -> None:
        """only: the one set that is worked on."""
        self.out, self.settings = out, settings
        self.sets = tuple(settings.budgets) if only is None else (only,)

    def arms(self, set_name: str) -> list[tuple[Arm, ...]]:
        """The arms of a set in groups, in the order in which they are run; none stands in two."""
        settings = self.settings
        groups: list[tuple[Arm, ...]] = []
        sources = tuple(SEARCHED_AS) if set_name == settings.live else ()
        for table in (STAGES, sources, STRATEGIES, TARGETS):
            groups.append(tuple(arm for arm in table if not any(arm in group for group in groups)))
        if settings.sizes:
            others = [*sized("small"), *sized("large")]
            for images in settings.budgets[set_name].fewer:
                others += with_images(images)
            groups.append(tuple(others))
        return groups

    def factor(self, set_name: str, arm: Arm) -> float | None:
        """The factor that the search chose; None before all of its runs are there. Arms that differ from
        another in their source alone take its factor."""
        arm = SEARCHED_AS.get(arm, arm)
        tried = {
            factor: self.place(set_name, arm).result(SEARCH_SEED, factor)
            for factor in self.settings.budgets[set_name].factors
        }
        if any(result is None for result in tried.values()):
            return None
        return max(tried, key=lambda factor: (tried[factor] or {})["validation"])

    def place(self, set_name: str, arm: Arm) -> Place:
        return Place(out=self.out, set_name=set_name, arm=arm)

    def results(self, set_name: str, arm: Arm) -> dict[int, dict[str, Any]]:
        """The finished runs of an arm by seed, at the chosen factor."""
        factor = self.factor(set_name, arm)
        if factor is None:
            return {}
        found = {seed: self.place(set_name, arm).result(seed, factor) for seed in range(self.settings.seeds)}
        return {seed: result for seed, result in found.items() if result is not None}

    def missing(self) -> Iterator[list[tuple[Place, int, float]]]:
        """What is still to be run, in lists whose runs do not wait for each other."""
        kinds = max(len(self.arms(set_name)) for set_name in self.sets)
        for kind in range(kinds):
            here = [
                (set_name, arm)
                for set_name in self.sets
                for group in self.arms(set_name)[kind : kind + 1]
                for arm in group
            ]
            yield self._without_result(
                (set_name, arm, SEARCH_SEED, factor)
                for set_name, arm in here
                if arm not in SEARCHED_AS
                for factor in self.settings.budgets[set_name].factors
            )
            yield self._without_result(
                (set_name, arm, seed, factor)
                for seed in range(self.settings.seeds)
                for set_name, arm in here
                if (factor := self.factor(set_name, arm)) is not None
            )

    def _without_result(
        self, wanted: Iterator[tuple[str, Arm, int, float]]
    ) -> list[tuple[Place, int, float]]:
        places = ((self.place(set_name, arm), seed, factor) for set_name, arm, seed, factor in wanted)
        return [
            (place, seed, factor) for place, seed, factor in places if not place.file(seed, factor).exists()
        ]


def run_study(study: Study, jobs: int, progress: Progress) -> None:
    """Prepares the sets and makes every missing run, `jobs` at a time with one thread each. What is finished
    stays: an interrupted study is continued by the same call. KdcacheError when `study.out` holds another
    study."""
    _claim(study)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            waiting = [pool.submit(_prepare, study.out, study.settings, set_name) for set_name in study.sets]
            for done in as_completed(waiting):
                progress.message(f"prepared {done.result()}")
            for batch in study.missing():
                if batch:
                    _make(pool, study, batch, progress)
        except BaseException:
            processes = list(pool._processes.values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise


def _make(
    pool: ProcessPoolExecutor, study: Study, batch: list[tuple[Place, int, float]], progress: Progress
) -> None:
    """Makes the language models that runs start from, each once, and then the runs."""
    wanted = dict.fromkeys((place.set_name, place.arm.size, seed) for place, seed, _ in batch)
    for made in [pool.submit(_language_model, study.out, study.settings, *each) for each in wanted]:
        made.result()
    waiting = [pool.submit(_run, study.settings, place, seed, factor) for place, seed, factor in batch]
    with task(progress, "runs", len(waiting)):
        for number, done in enumerate(as_completed(waiting), start=1):
            progress.update(number, last=done.result())


def _claim(study: Study) -> None:
    file = study.out / "settings.json"
    settings = json.loads(json.dumps(asdict(study.settings)))
    if file.exists() and (found := json.loads(file.read_text(encoding="utf-8"))) != settings:
        differ = sorted(name for name in settings if found.get(name) != settings[name])
        raise KdcacheError(
            f"{study.out} holds a study with other settings ({', '.join(differ)}): choose another --out"
        )
    study.out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(settings, indent=1))


# What follows runs in the processes, which import torch.

_benches: dict[str, Any] = {}


def _opened(out: Path, settings: StudySettings, set_name: str) -> tuple[Any, Any]:
    import torch
    import transformers

    from ablations.mosaic_teacher import MosaicTeacher
    from ablations.question_sets import Sizes, open_set

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    sizes = Sizes(
        validation=settings.validation,
        test=settings.test,
        mosaic_teacher=MosaicTeacher(**settings.teacher),
    )
    return open_set(set_name, out / set_name, settings.budgets[set_name], sizes), sizes


def _prepare(out: Path, settings: StudySettings, set_name: str) -> str:
    from ablations.question_sets import prepare
    from cache_schema.progress import Silent

    found, sizes = _opened(out, settings, set_name)
    sources = ("compact", "full", "threshold") if set_name == settings.live else ("compact",)
    prepare(found, sizes, sources, Silent())
    measures = {
        "accuracy": (teacher := _bench(out, settings, set_name).of_teacher["test"]).accuracy(),
        "calibration": teacher.calibration_error(),
    }
    write_text(out / set_name / "teacher.json", json.dumps(measures))
    return set_name


def _bench(out: Path, settings: StudySettings, set_name: str) -> Any:
    from ablations.arm_run import Bench

    if set_name not in _benches:
        _benches[set_name] = Bench(_opened(out, settings, set_name)[0], settings.text_steps)
    return _benches[set_name]


def _language_model(out: Path, settings: StudySettings, set_name: str, size: Any, seed: int) -> None:
    _bench(out, settings, set_name).language_model(size, seed)


def _run(settings: StudySettings, place: Place, seed: int, factor: float) -> str:
    from ablations.arm_run import Job, run_arm

    bench = _bench(place.out, settings, place.set_name)
    result = run_arm(bench, Job(arm=place.arm, seed=seed, factor=factor))
    file = place.file(seed, factor)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(result))
    return f"{place.set_name}, {place.arm.name}, seed {seed}: {result['test']['mean']:.3f}"
