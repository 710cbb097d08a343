"""Recipes: each stage starts from the model of the previous one; finished stages are skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cache_schema.errors import WrongUsage
from cache_schema.progress import Progress
from student.settings import TrainConfig
from student.sources import Source
from student.stages import Recipe, RecipeStage
from student.train import train


def train_recipe(
    recipe: Recipe,
    config: TrainConfig,
    progress: Progress,
    *,
    caches: Mapping[str, str] | None = None,
    image_roots: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Trains the stages of a recipe in `out/1-NAME`, `out/2-NAME`, ... and returns their results.

    config: settings of every stage; its `stage` is not used, and its `max_steps`, `epochs`,
    `learning_rate`, `global_batch` and `lora_rank` override every stage's where given. caches, image_roots:
    by stage name, before what the recipe says, which stands before `config.cache` and `config.image_root`.
    """
    caches, image_roots = caches or {}, image_roots or {}
    names = [entry.stage.name for entry in recipe.stages]
    unknown = sorted({*caches, *image_roots} - set(names))
    if unknown:
        raise WrongUsage(f"recipe {recipe.name} has no stage {', '.join(unknown)}; it has {', '.join(names)}")
    bare = [
        entry.stage.name
        for entry in recipe.stages
        if not (caches.get(entry.stage.name) or _sources(entry) or entry.cache or config.cache)
    ]
    if bare:
        raise WrongUsage(f"stage {', '.join(bare)} has no cache to learn from: give --cache")
    student = config.student
    results = []
    for number, entry in enumerate(recipe.stages, start=1):
        name = entry.stage.name
        mixture = entry.mixture
        if mixture is not None and name in caches:
            mixture = replace(mixture, sources=())
        root = image_roots.get(name) or entry.image_root or config.image_root
        result = train(
            replace(
                config,
                stage=entry.stage,
                student=student,
                cache=caches.get(name) or entry.cache or config.cache,
                mixture=mixture,
                rejected=entry.rejected or (config.rejected if entry.stage.preference else None),
                image_root=root,
                eval_cache=entry.eval_cache or config.eval_cache,
                out=config.out / f"{number}-{name}",
            ),
            progress,
        )
        results.append(result)
        student = config.out / f"{number}-{name}" / "model"
    return {"recipe": recipe.name, "stages": results, "model": str(student)}


def _sources(entry: RecipeStage) -> tuple[Source, ...]:
    return entry.mixture.sources if entry.mixture else ()
