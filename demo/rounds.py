"""On-policy distillation in rounds: answers of the student, their cache, training.

Each step is the command that a user would run, in a process of its own; finished steps are not redone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cache_schema.errors import KdcacheError, WrongUsage
from cache_schema.output import write_text
from demo.settings import RoundsConfig
from demo.story import Story

_NEEDED = ("rounds", "student", "teacher", "data", "image_root")
_COMMANDS = ("answers", "build", "train")


def run_rounds(config: RoundsConfig) -> dict[str, Any]:
    """Runs the rounds that a recipe describes in `config.out`; returns each round's results and the model.

    The file holds rounds, student, teacher, data (rows with the questions), image_root; optionally `stage`,
    settings of a recipe's stage (default: base dft), whose `caches` are mixed in with those of the rounds;
    `weight`, that of each round's cache against theirs; and `answers`, `build`, `train`: further options of
    these commands by name. Round i trains the model of round i - 1 on its caches and on those of rounds
    1 .. i. WrongUsage for another file; KdcacheError or StoppedEarly when a step ends so.
    """
    recipe = _read(config.recipe)
    out = config.out
    story = Story(out, recipe)
    student, caches, rounds = str(recipe["student"]), list(recipe["stage"].get("caches", [])), []
    teacher, data, root = (str(recipe[name]) for name in ("teacher", "data", "image_root"))
    for number in range(1, recipe["rounds"] + 1):
        folder, name = out / f"round-{number}", f"round {number}: "
        rows, cache, stages = folder / "answers.jsonl", folder / "cache", folder / "recipe.yaml"
        if f"{name}answers" not in story.seconds:
            rows.unlink(missing_ok=True)  # of a step that did not end; the command overwrites nothing
        where = ("--image-root", root, "--out")
        ask = _options({"seed": number, **recipe["answers"]})
        asked = story.command(
            f"{name}answers", "answers", "--model", student, "--data", data, *where, rows, *ask
        )
        capture = _options(recipe["build"])
        built = story.command(
            f"{name}cache", "build", "--teacher", teacher, "--data", rows, *where, cache, *capture
        )
        caches.append({"cache": str(cache), "image_root": root, **recipe["weight"]})
        stage = {"base": "dft", **recipe["stage"], "caches": caches}
        write_text(stages, yaml.safe_dump({"name": f"round-{number}", "stages": [stage]}, sort_keys=False))
        learn = ("--student", student, "--out", str(folder / "run"), "--resume", *_options(recipe["train"]))
        trained = story.command(f"{name}training", "train", "--recipe", stages, *learn)
        student = trained["model"]
        rounds.append({"answers": asked, "cache": built, "training": trained["stages"][0]})
    return {"rounds": rounds, "model": student, "seconds": story.seconds}


def _read(file: Path) -> dict[str, Any]:
    """The recipe, with every key."""
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise KdcacheError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    known = (*_NEEDED, "stage", "weight", *_COMMANDS)
    if not isinstance(recipe, Mapping) or any(key not in recipe for key in _NEEDED):
        raise WrongUsage(f"{file} must hold {', '.join(_NEEDED)}")
    if unknown := sorted(set(recipe) - set(known)):
        raise WrongUsage(f"{file}: unknown keys {unknown}; known are {', '.join(known)}")
    if not isinstance(recipe["rounds"], int) or recipe["rounds"] < 1:
        raise WrongUsage(f"{file}: rounds must be a whole number from 1, not {recipe['rounds']!r}")
    made = {"stage": {}, **{key: {} for key in _COMMANDS}, **recipe}
    if bad := [key for key in ("stage", *_COMMANDS) if not isinstance(made[key], Mapping)]:
        raise WrongUsage(f"{file}: {bad[0]} must be a mapping")
    mixed = made["stage"].get("caches", [])
    weighted = any(isinstance(each, Mapping) and "weight" in each for each in mixed)
    if mixed and ("weight" in recipe) != weighted:
        raise WrongUsage(f"{file}: weight goes with weights of the stage's caches, and the other way round")
    made["weight"] = {"weight": recipe["weight"]} if "weight" in recipe else {}
    return made


def _options(values: Mapping[str, Any]) -> list[str]:
    """Options of a command; true is a flag, false leaves it out."""
    given = []
    for name, value in values.items():
        if value is not False:
            given += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return given
