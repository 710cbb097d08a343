"""Export: a folder that transformers and vLLM load, with a model card that documents its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from cache_schema.errors import KdcacheError
from cache_schema.output import require_folder, write_text
from cache_schema.progress import Progress, task
from cache_schema.runs import read_result
from cache_schema.version import VERSION
from models.folder import load_model, load_processor
from models.parts import part_of
from student.chat_template import settle_template
from student.folder import folder_digest, save_folder
from student.generation import drop_padding, settle_generation
from student.run_folder import read_history, write_history


def export(model: Path, out: Path, progress: Progress, *, dtype: str = "auto") -> dict[str, Any]:
    """Writes `out`: safetensors, configuration, processor, chat template, generation config and README.md.
    Columns of the head that are no token are left out.

    model: a model folder, or the folder of a finished run, whose stages and metrics are then in the card.
    dtype: of the weights, a torch name or `auto` for as they are. Returns sizes and digest.
    """
    run = _run_of(model)
    folder = model if run is None else run / "model"
    require_folder(out, new=True)
    with task(progress, "exporting"):
        processor = load_processor(folder)
        settle_template(processor)
        loaded = load_model(folder, "auto" if dtype == "auto" else _dtype(dtype))
        drop_padding(loaded, processor)
        settle_generation(loaded, processor)
        history = read_history(folder) or ([] if run is None else _history(run))
        save_folder(loaded, processor, out)
        if history:
            write_history(out, history)
        sizes: dict[str, int] = {}
        for name, parameter in loaded.named_parameters():
            sizes[part_of(name)] = sizes.get(part_of(name), 0) + parameter.numel()
        write_text(out / "README.md", _card(loaded, sizes, history))
    return {
        "folder": str(out),
        "parameters": sizes,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "stages": [stage["stage"]["name"] for stage in history],
        "digest": folder_digest(out),
    }


def _run_of(model: Path) -> Path | None:
    """The run that made the model, if its folder shows it."""
    for folder in (model, model.parent):
        if (folder / "recipe.yaml").is_file() and (folder / "model" / "config.json").is_file():
            return folder
    return None


def _history(run: Path) -> list[dict[str, Any]]:
    """recipe.yaml and result.json of a run and of those that made its student, first stage first: of models
    that version 0.1 trained, which have no training.json."""
    found: list[dict[str, Any]] = []
    seen: set[Path] = set()
    place: Path | None = run
    while place is not None and place.resolve() not in seen:
        seen.add(place.resolve())
        recipe = yaml.safe_load((place / "recipe.yaml").read_text(encoding="utf-8"))
        found.insert(0, {**recipe, "result": read_result(place) or {}})
        # A relative path starts where the run was started: here, or above the run's folder.
        students = [base / recipe["student"] for base in (Path(), *place.resolve().parents)]
        place = next((made for made in map(_run_of, students) if made is not None), None)
    return found


def _card(model: Any, sizes: dict[str, int], history: list[dict[str, Any]]) -> str:
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags: [knowledge-distillation, llava]",
        "---",
        "",
        f"# {type(model).__name__} trained with kdcache",
        "",
        f"Exported by kdcache {VERSION}.",
        "",
        "| part | parameters |",
        "|---|---|",
        *(f"| {part.replace('_', ' ')} | {count:,} |" for part, count in sizes.items()),
        "",
        "```python",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        'model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")',
        'processor = AutoProcessor.from_pretrained("THIS_FOLDER")',
        "```",
    ]
    for number, stage in enumerate(history, start=1):
        lines += ["", f"## Stage {number}: {stage['stage']['name']}", "", *_stage_lines(stage)]
    if not history:
        lines += ["", "The training is unknown: the model was exported from a folder without its run."]
    return "\n".join(lines) + "\n"


def _stage_lines(stage: dict[str, Any]) -> list[str]:
    result = stage["result"]
    settings, identity = stage["stage"], stage["identity"]
    losses = ", ".join(f"{name} {value}" for name, value in settings["losses"].items())
    lines = [
        f"- trained parts: {', '.join(settings['trainable'])}; {result.get('steps', 0)} steps of "
        f"{settings['global_batch']} samples, {settings['schedule']} from {settings['learning_rate']}, seed "
        f"{stage['seed']}, {stage['precision']}",
        *(
            [f"- the weights are those of step {result['model_step']}, the best on the held-out cache"]
            if result.get("model_step") != result.get("steps")
            else []
        ),
        f"- losses: {losses}",
        *(
            f"- cache: fingerprint `{cache['identity']}`, {cache['samples']} samples"
            for cache in (identity["caches"].values() if "caches" in identity else [identity["cache"]])
        ),
        f"- started from weights `{identity['student']}`",
        "- versions: " + ", ".join(f"{name} {version}" for name, version in stage["versions"].items()),
        "",
        "| metric | value |",
        "|---|---|",
    ]
    groups = (("training, last steps", result.get("train")), ("held out", result.get("evaluation")))
    for title, values in groups:
        for name, value in (values or {}).items():
            if not name.startswith("time ") and isinstance(value, int | float):
                lines.append(f"| {title}: {name} | {value:.4g} |")
    lines += ["", "<details><summary>recipe</summary>", "", "```json", json.dumps(settings, indent=1), "```"]
    return [*lines, "", "</details>"]


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise KdcacheError(
            f"dtype {name} is not a floating-point type of torch; use float32, bfloat16 or float16"
        )
    return found
