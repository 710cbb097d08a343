"""A model folder: its model and its processor, as transformers loads them."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from cache_schema.errors import KdcacheError, first_line
from models.folder_files import require_whole_files, weights_files

LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    AttributeError,
    ImportError,
    RuntimeError,
    TypeError,
    SafetensorError,
    UnpicklingError,
)
"""What transformers raises where a folder does not hold what is asked for."""

logging.disable_progress_bar()  # progress is reported through Progress


def require_model_folder(folder: Path | str, role: str = "model") -> Path:
    """The folder. KdcacheError unless it has whole files of a transformers model."""
    path = Path(folder)
    config = path / "config.json"
    if not path.is_dir():
        raise KdcacheError(f"{role} folder {path} does not exist; give a folder with config.json and weights")
    if not config.is_file():
        raise KdcacheError(f"{path} holds no config.json; give a folder that `save_pretrained` wrote")
    kind = require_whole_files(path).get("model_type")
    if isinstance(kind, str) and kind.startswith("tinyllava"):
        raise KdcacheError(
            f"{path} is a {kind} checkpoint; turn it into a transformers one with `kdcache convert`"
        )
    return path


def load_model(
    folder: Path | str, dtype: torch.dtype | str = "auto", *, role: str = "model", **options: Any
) -> Any:
    """The vision-language model in `folder`. KdcacheError when it is not one or is incomplete.

    dtype: `auto` is as saved. options: further arguments of from_pretrained. role: its name in the message.
    """
    path = require_model_folder(folder, role)
    weights_files(path)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # its report of missing tensors, told below in one line
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, output_loading_info=True, local_files_only=True, **options
        )
    except LOAD_ERRORS as error:
        hint = "; `kdcache convert` turns it into a transformers folder" if "tinyllava" in str(error) else ""
        raise KdcacheError(f"cannot load the {role} in {path}: {first_line(error)}{hint}") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if any("lm_head" in key for key in missing):
        raise KdcacheError(
            f"the weights in {path} have no output head ({missing[0]}): it was lost on the way; fetch "
            "the checkpoint again, or set tie_word_embeddings in config.json where the head is the embeddings"
        )
    if missing:
        raise KdcacheError(
            f"the weights in {path} lack {len(missing)} tensors of the {role} ({missing[0]}, ...): they "
            "would be random; fetch or save the whole folder again"
        )
    return model


def outline_of(folder: Path | str, role: str = "model") -> Any:
    """The model in `folder` without its weights, on the meta device; only the heads of its files are read.

    KdcacheError when tensors are missing, so that this is told before anything long runs.
    """
    return load_model(folder, role=role, device_map="meta")


def load_config(folder: Path | str, role: str = "model") -> Any:
    """The configuration in `folder`. KdcacheError when transformers knows no such model."""
    path = require_model_folder(folder, role)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except LOAD_ERRORS as error:
        raise KdcacheError(f"no usable config.json in {path}: {first_line(error)}") from error


def load_processor(folder: Path | str, role: str = "model") -> Any:
    """The processor (tokenizer, image processor, chat template) in `folder`. KdcacheError naming what is
    missing."""
    path = require_model_folder(folder, role)
    try:
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    except ImportError as error:
        needs = "torchvision" if "torchvision" in str(error).lower() else "a package that is not installed"
        raise KdcacheError(
            f"the processor in {path} needs {needs}; install it: {first_line(error)}"
        ) from error
    except Exception as error:
        raise KdcacheError(f"no usable processor in {path}: {first_line(error)}") from error
    parts = ("tokenizer", "image_processor", "image_token")
    if any(getattr(processor, part, None) is None for part in parts):
        raise KdcacheError(
            f"{path} holds a {type(processor).__name__}, not a processor for images and text; save the "
            f"{role}'s processor (processor_config.json, preprocessor_config.json) with it"
        )
    return processor
