"""On-policy distillation in rounds: answers of the student, their cache, training.

Each step is the command that a user would run, in a process of its own; finished steps are not redone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cache_schema.errors import KdcacheError, WrongUsage
from cache_schema.format.cache import open_cache
from cache_schema.output import write_text
from demo.settings import RoundsConfig
from demo.story import Story

_PATHS = ("student", "teacher", "data", "image_root")
_NEEDED = ("rounds", *_PATHS)
_COMMANDS = ("answers", "build", "train")
_OF_RECIPES = {"recipe", "stage", "cache", "targets"}
"""Options of `train` that the recipe of a round takes the place of."""


Check = Callable[[Mapping[str, list[str]], Mapping[str, Any]], None]


def run_rounds(config: RoundsConfig, check: Check) -> dict[str, Any]:
    """Runs the rounds that a recipe describes in `config.out`; returns each round's results and the model.

    The file holds rounds, student, teacher, data (rows with the questions), image_root; optionally `stage`,
    settings of a recipe's stage (default: base dft), whose `caches` are mixed in with those of the rounds;
    `weight`, that of each round's cache against theirs; and `answers`, `build`, `train`: further options of
    these commands by name. Round i trains the model of round i - 1 on its caches and on those of rounds
    1 .. i. check: raises WrongUsage where the commands of a round, their arguments by name, or the recipe
    of its training are wrong. WrongUsage for another file, before anything is done; KdcacheError or
    StoppedEarly when a step ends so.
    """
    recipe, out = _read(config.recipe), config.out
    _refuse_early(recipe, config, check)
    story = Story(out, recipe)
    student, rounds = recipe["student"], []
    for number in range(1, recipe["rounds"] + 1):
        folder, name = out / f"round-{number}", f"round {number}: "
        if f"{name}answers" not in story.seconds:
            # Of a step that did not end; the command overwrites nothing.
            (folder / "answers.jsonl").unlink(missing_ok=True)
        words = _words(recipe, folder, number, student)
        asked = story.command(f"{name}answers", "answers", *words["answers"])
        built = story.command(f"{name}cache", "build", *words["build"])
        stages = folder / "recipe.yaml"
        write_text(stages, yaml.safe_dump(_training(recipe, out, number), sort_keys=False))
        trained = story.command(f"{name}training", "train", "--recipe", stages, *words["train"])
        student = trained["model"]
        rounds.append({"answers": asked, "cache": built, "training": trained["stages"][0]})
    return {"rounds": rounds, "model": student, "seconds": story.seconds}


def _words(recipe: Mapping[str, Any], folder: Path, number: int, student: str) -> dict[str, list[str]]:
    """The arguments of each command of a round, but for the recipe of `train`. WrongUsage where the file sets
    an option that the round does."""
    root, rows = recipe["image_root"], folder / "answers.jsonl"
    fixed: dict[str, dict[str, Any]] = {
        "answers": {"model": student, "data": recipe["data"], "image_root": root, "out": rows},
        "build": {
            "teacher": recipe["teacher"],
            "data": rows,
            "image_root": root,
            "out": folder / "cache",
        },
        "train": {"student": student, "out": folder / "run", "resume": True},
    }
    made = {}
    for name, options in fixed.items():
        of_file = recipe[name]
        if taken := sorted({*options, *(_OF_RECIPES if name == "train" else ())} & {*of_file}):
            raise WrongUsage(f"{name}: the rounds set {', '.join(taken)} themselves")
        seed = {"seed": number} if name == "answers" else {}
        made[name] = _options({**options, **seed, **of_file})
    return made


def _training(recipe: Mapping[str, Any], out: Path, number: int) -> dict[str, Any]:
    """The recipe of a round's training: on the stage's caches and on those of all rounds so far."""
    of_rounds = [
        {"cache": str(out / f"round-{each}/cache"), "image_root": recipe["image_root"], **recipe["weight"]}
        for each in range(1, number + 1)
    ]
    caches = [*recipe["stage"].get("caches", []), *of_rounds]
    return {"name": f"round-{number}", "stages": [{"base": "dft", **recipe["stage"], "caches": caches}]}


def _refuse_early(recipe: Mapping[str, Any], config: RoundsConfig, check: Check) -> None:
    """WrongUsage or KdcacheError for what a step would refuse, perhaps after hours of those before it."""
    try:
        words = _words(recipe, config.out / "round-1", 1, recipe["student"])
        words["train"] += ["--stage=dft", "--cache=none"]  # those of the recipe count
        check(words, _training(recipe, config.out, 1))
    except WrongUsage as error:
        raise WrongUsage(f"{config.recipe}: {error}") from error
    for name in ("student", "teacher"):
        if not (Path(recipe[name]) / "config.json").is_file():
            raise KdcacheError(f"{config.recipe}: {name} {recipe[name]} is no model folder (no config.json)")
    for source in recipe["stage"].get("caches", []):
        open_cache(source if isinstance(source, str) else source["cache"])


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
    rounds = recipe["rounds"]
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise WrongUsage(f"{file}: rounds must be a whole number from 1, not {rounds!r}")
    if bad := [key for key in _PATHS if not isinstance(recipe[key], str) or not recipe[key]]:
        raise WrongUsage(f"{file}: {bad[0]} must be a path, not {recipe[bad[0]]!r}")
    made = {"stage": {}, **{key: {} for key in _COMMANDS}, **recipe}
    if bad := [key for key in ("stage", *_COMMANDS) if not isinstance(made[key], Mapping)]:
        raise WrongUsage(f"{file}: {bad[0]} must be a mapping")
    mixed = made["stage"].get("caches", [])
    if not isinstance(mixed, list):
        raise WrongUsage(f"{file}: caches must be a list of caches, not {mixed!r}")
    weighted = any(isinstance(each, Mapping) and "weight" in each for each in mixed)
    if mixed and ("weight" in recipe) != weighted:
        raise WrongUsage(f"{file}: weight goes with weights of the stage's caches, and the other way round")
    made["weight"] = {"weight": recipe["weight"]} if "weight" in recipe else {}
    for name in _COMMANDS:
        made[name] = {str(key).replace("-", "_"): value for key, value in made[name].items()}
    return made


def _options(values: Mapping[str, Any]) -> list[str]:
    """Options of a command; true is a flag, false leaves it out, a list has commas."""
    given = []
    for name, value in values.items():
        if value is not False:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            given += [f"--{name.replace('_', '-')}", *([] if value is True else [text])]
    return given
