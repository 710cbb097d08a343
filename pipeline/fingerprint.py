"""The identity of a build: teacher, tokenizer, template, image processor, data and spec."""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PretrainedConfig

from cache_schema.errors import KdcacheError
from cache_schema.file_cache import sha256_of
from cache_schema.format.identity import Fingerprint, digest_of
from cache_schema.format.spec import TargetSpec
from models.folder_files import weights_files
from models.tokens import digest_of_tokenizer, pad_token_id_of, tokenizer_parts
from pipeline.templates import ChatTemplate

ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)
"""The teacher's small files that a cache contains, so that students are made without the teacher."""

_HASH_THREADS = 4
_CONFIG_NOISE = frozenset({"_name_or_path", "transformers_version", "architectures"})


def weights_digest(folder: Path) -> Future[str]:
    """SHA-256 over names and SHA-256 of the weight files in `folder` (.safetensors, else .bin), computed in
    threads of its own: loading the weights meanwhile reads the same pages of the files, once for both.

    KdcacheError when there are none; the result raises it when one cannot be read.
    """
    files = weights_files(folder)
    digest: Future[str] = Future()

    def work() -> None:
        try:
            with ThreadPoolExecutor(min(_HASH_THREADS, len(files))) as pool:
                found = dict(zip((path.name for path in files), pool.map(sha256_of, files), strict=True))
            digest.set_result(digest_of(found))
        except OSError as error:
            digest.set_exception(KdcacheError(f"weights in {folder} cannot be read: {error}"))
        except BaseException as error:  # noqa: BLE001 - raised where the digest is asked for
            digest.set_exception(error)

    threading.Thread(target=work, name="weights-digest", daemon=True).start()
    return digest


def fingerprint_of(
    *,
    weights: str,
    config: PretrainedConfig,
    processor: Any,
    template: ChatTemplate,
    image_token_id: int,
    dtype: str,
    dataset: str,
    spec: TargetSpec,
    sharing: bool,
    rules: dict[str, Any],
    recorded: dict[str, Any],
) -> Fingerprint:
    """The fingerprint of a build.

    weights, dataset: digests. rules: what decides which rows are captured and how they are cut.
    """
    tokenizer = processor.tokenizer
    vocabulary, parts = digest_of_tokenizer(tokenizer), tokenizer_parts(tokenizer)
    settings = json.loads(json.dumps(config.to_dict(), default=str))
    return Fingerprint(
        capture={
            "teacher_weights": weights,
            "teacher_config": digest_of(_without_noise(settings)),
            "dtype": dtype,
            "tokenizer": vocabulary,
            "tokenizer_parts": parts,
            "chat_template": digest_of(template.text),
            "image_processor": digest_of(json.loads(processor.image_processor.to_json_string())),
            "dataset": dataset,
            "spec": spec.to_json(),
            "sharing": sharing,
            "rules": rules,
        },
        training={
            "tokenizer": vocabulary,
            "tokenizer_parts": parts,
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": pad_token_id_of(tokenizer),
            "image_token_id": image_token_id,
            "chat_template": template.text,
            "template_name": template.name,
            "vision_feature_layer": settings.get("vision_feature_layer"),
            "vision_feature_select_strategy": settings.get("vision_feature_select_strategy"),
            "model_type": config.model_type,
            "image_seq_tokens": image_tokens(processor, image_token_id),
        },
        recorded=recorded,
    )


def image_tokens(processor: Any, image_token_id: int) -> int | None:
    """Placeholder tokens per image if it is the same for all image shapes, else None."""
    counts = set()
    for size in ((96, 96), (160, 96), (96, 224)):
        images = [[Image.new("RGB", size)]]
        ids = processor(text=[processor.image_token], images=images, return_tensors="np")["input_ids"]
        counts.add(int((ids == image_token_id).sum()))
    return counts.pop() if len(counts) == 1 else None


def read_assets(folder: Path) -> dict[str, bytes]:
    """The files of ASSETS that `folder` has, name -> bytes."""
    return {name: (folder / name).read_bytes() for name in ASSETS if (folder / name).is_file()}


def _without_noise(settings: Any) -> Any:
    """Config values without those that do not affect the model."""
    if isinstance(settings, dict):
        return {key: _without_noise(value) for key, value in settings.items() if key not in _CONFIG_NOISE}
    return [_without_noise(item) for item in settings] if isinstance(settings, list) else settings
