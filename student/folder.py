"""A student's folder: loading it, naming its parts, its digest, and writing it so that others accept it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from cache_schema.errors import KdcacheError
from student.stages import Part

logging.disable_progress_bar()  # progress is told through Progress

_VISION = ("vision_tower", "vision_model", "visual", "vision_encoder")
_PROJECTOR = (
    "multi_modal_projector",
    "connector",
    "merger",
    "image_newline",
    "aligner",
    "modality_projection",
)


def load_model(folder: Path | str, dtype: torch.dtype | str = "auto") -> Any:
    """The vision-language model in `folder`, on the CPU. KdcacheError when it is none or is incomplete."""
    path = _folder(folder)
    try:
        model, notes = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise KdcacheError(f"{path} is not a model that transformers can load: {_line(error)}") from error
    missing = sorted(notes["missing_keys"])
    if missing:
        raise KdcacheError(
            f"{path} lacks {len(missing)} weights (first: {missing[0]}); write the folder again, or convert "
            "it with `kdcache convert` where it comes from TinyLLaVA"
        )
    return model


def load_processor(folder: Path | str) -> Any:
    """The processor (tokenizer, image processor, chat template) in `folder`."""
    path = _folder(folder)
    try:
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise KdcacheError(f"{path} holds no processor that transformers can load: {_line(error)}") from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise KdcacheError(f"{path} holds a {type(processor).__name__}, not a processor for images and text")
    return processor


def special_tokens(tokenizer: Any) -> dict[str, str | None]:
    """The names under which the tokenizer's digest takes its special tokens."""
    roles = {"eos": "eos_token", "bos": "bos_token", "pad": "pad_token", "unk": "unk_token"}
    return {role: getattr(tokenizer, name, None) for role, name in roles.items()}


def part_of(name: str) -> Part:
    """The part that a parameter belongs to, by its name: vision tower, projector or language model."""
    words = name.split(".")
    if any(word in _PROJECTOR for word in words):
        return "projector"
    if any(word in _VISION for word in words):
        return "vision_tower"
    return "language_model"


def freeze(model: nn.Module, trainable: tuple[Part, ...]) -> list[str]:
    """Lets the parameters of `trainable` require gradients and no others; their names.

    Of a language model with adapters only these do. KdcacheError when a part has no parameter: the model is
    of a family whose parts are not known.
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
    path = _folder(folder)
    files = sorted([path / "config.json", *path.glob("*.safetensors")])
    if len(files) < 2:
        raise KdcacheError(f"{path} holds no safetensors weights")
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        whole.update(f"{file.name} {content}\n".encode())
    return whole.hexdigest()


def save_folder(model: Any, processor: Any, out: Path) -> None:
    """Writes model and processor to `out`, whole or not at all, replacing what is there.

    SigLIP and CLIP towers keep `vision_tower.vision_model.` in their keys, which transformers reads as well
    as without and vLLM requires (transformers 5 alone drops it).
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    _restore_vision_keys(temporary)
    for file in temporary.iterdir():
        sync(file)
    replace_folder(temporary, out)


def replace_folder(temporary: Path, out: Path) -> None:
    """Renames `temporary` to `out`; an `out` that exists is set aside first and removed afterwards."""
    sync(temporary)
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _restore_vision_keys(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tower = config.get("vision_config", {}).get("model_type", "")
    if tower not in ("siglip_vision_model", "clip_vision_model"):
        return

    def renamed(key: str) -> str:
        return re.sub(r"^((?:model\.)?vision_tower)\.(?!vision_model\.)", r"\1.vision_model.", key)

    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors = {renamed(key): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        save_file(tensors, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        document = json.loads(index.read_text(encoding="utf-8"))
        document["weight_map"] = {renamed(key): name for key, name in document["weight_map"].items()}
        index.write_text(json.dumps(document, indent=2), encoding="utf-8")


def _folder(folder: Path | str) -> Path:
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise KdcacheError(f"{path} is not a model folder: it has no config.json")
    return path


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
