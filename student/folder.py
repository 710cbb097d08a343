"""A student's folder: which parts train, its digest, and writing it in a form that other libraries load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from cache_schema.errors import KdcacheError, first_line
from cache_schema.file_cache import sha256_of
from cache_schema.output import writing_folder
from models.folder import require_model_folder
from models.parts import NESTED_TOWERS, Part, nested_tower_name, part_of

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What torch, safetensors and the system raise when a disk is full or refuses."""

_PROCESSOR_FILES = (
    "*token*.json",
    "*processor_config.json",
    "vocab*",
    "merges.txt",
    "*.model",
)


def freeze(model: nn.Module, trainable: tuple[Part, ...]) -> list[str]:
    """Makes exactly the parameters of `trainable` require gradients; returns their names.

    Of a language model with adapters only the adapters do. KdcacheError when a part has no parameter: the
    model's family is unknown.
    """
    names = []
    adapted = any(".lora_" in name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        part = part_of(name)
        base = adapted and part == "language_model" and ".lora_" not in name
        parameter.requires_grad_(part in trainable and not base)
        if parameter.requires_grad:
            names.append(name)
    for part in trainable:
        if not any(part_of(name) == part for name in names):
            raise KdcacheError(f"the student has no {part}: no parameter of {type(model).__name__} is one")
    return names


def folder_digest(folder: Path | str) -> str:
    """SHA-256 over the configuration and every weights file of a model folder, by name."""
    path = require_model_folder(folder)
    files = sorted([path / "config.json", *path.glob("*.safetensors")])
    if len(files) < 2:
        raise KdcacheError(f"{path} holds no safetensors weights")
    return _digest(files)


def _digest(files: Sequence[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.name} {sha256_of(file)}\n".encode())
    return whole.hexdigest()


def processor_digest(folder: Path | str) -> str:
    """SHA-256 over the tokenizer's and the processor's files of a model folder, by name."""
    path = require_model_folder(folder)
    found = {file.name for pattern in _PROCESSOR_FILES for file in path.glob(pattern)}
    return _digest([path / name for name in sorted(found)])


def model_is_whole(folder: Path) -> bool:
    """Whether a model folder has its configuration, its processor and every byte of its weights."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    try:
        if index.exists():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for name in names:
            with safe_open(
                folder / name, framework="pt"
            ):  # refuses a file of another length than its header's
                pass
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    return any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))


def save_folder(model: Any, processor: Any, out: Path) -> None:
    """Writes model and processor to `out`, completely or not at all, replacing its content.

    KdcacheError when the disk refuses.
    SigLIP and CLIP towers keep `vision_tower.vision_model.` in their keys, which transformers reads as well
    as without and vLLM requires (transformers 5 alone drops it).
    """
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = head is embeddings  # as the weights are: others drop a head by it
    with writing_folder(out) as temporary:
        try:
            model.save_pretrained(temporary)
            processor.save_pretrained(temporary)
            _restore_vision_keys(temporary)
        except WRITE_ERRORS as error:
            raise KdcacheError(
                f"the model {out} cannot be written: {first_line(error)}; free space"
            ) from error


def _restore_vision_keys(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tower = config.get("vision_config", {}).get("model_type", "")
    if tower not in NESTED_TOWERS:
        return

    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors = {nested_tower_name(key): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        save_file(tensors, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        document = json.loads(index.read_text(encoding="utf-8"))
        document["weight_map"] = {
            nested_tower_name(key): name for key, name in document["weight_map"].items()
        }
        index.write_text(json.dumps(document, indent=2), encoding="utf-8")
