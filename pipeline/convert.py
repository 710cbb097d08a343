"""`convert`: converts a TinyLLaVA or LLaVA-KD checkpoint to a Llava folder of transformers.

The names of the tensors are those of TinyLLaVA Factory (`vision_tower._vision_tower`,
`connector._connector.0/.2`, `language_model`), in one state dict or split over three folders. Values are not
changed, except that a head without a free row gains one for the image token.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
)
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from cache_schema.datasets.conversations import IMAGE_MARK
from cache_schema.errors import KdcacheError
from cache_schema.output import require_folder, writing_folder
from cache_schema.progress import Progress, task

_SPLIT = ("language_model", "vision_tower", "connector")
_RENAMED = (
    ("vision_tower._vision_tower.", "vision_tower."),
    ("connector._connector.0.", "multi_modal_projector.linear_1."),
    ("connector._connector.2.", "multi_modal_projector.linear_2."),
)
_STRATEGIES = {"patch": "default", "cls_patch": "full"}


def convert(checkpoint: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Writes `out` (new or empty) and loads it once to verify that every tensor has its place.

    Returns parameters, tensors, dtype, image_token_id and image_tokens. KdcacheError where the checkpoint is
    of another kind, is incomplete, or has parts that Llava does not have (other connectors or towers).
    """
    settings = _read_settings(checkpoint)
    require_folder(out, new=True)
    with task(progress, "converting", 3):
        state = _load_state(checkpoint)
        progress.update(1)
        config = _llava_config(checkpoint, settings, state)
        tokenizer = _tokenizer_with_image(checkpoint, config)
        _make_room(state, config, len(tokenizer))
        processor = _processor(checkpoint, settings, config, tokenizer)
        with writing_folder(out) as folder:
            config.save_pretrained(folder)
            processor.save_pretrained(folder)
            save_torch_state_dict(state, folder, max_shard_size="4GB")
            progress.update(2)
            _check(folder)
        progress.update(3)
    return {
        "out": str(out),
        "tensors": len(state),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "dtype": str(config.dtype).removeprefix("torch."),
        "image_token_id": config.image_token_id,
        "image_tokens": config.image_seq_length,
    }


def _read_settings(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's config.json."""
    path = checkpoint / "config.json"
    if not path.is_file():
        raise KdcacheError(f"{checkpoint} holds no config.json; give the folder of a TinyLLaVA checkpoint")
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KdcacheError(f"{path} is not valid JSON: {error}; fetch it again") from error
    if (checkpoint / "adapter_config.json").is_file():
        raise KdcacheError(f"{checkpoint} is an adapter (LoRA); merge it into its base model first")
    if settings.get("connector_type") != "mlp2x_gelu":
        raise KdcacheError(
            f"{path} has connector_type {settings.get('connector_type')!r}; only mlp2x_gelu is Llava's"
        )
    return settings


def _load_state(checkpoint: Path) -> dict[str, Tensor]:
    """The state dict under Llava's names, from one file or shards, or from the three folders."""
    whole = _load_tensors(checkpoint)
    if whole is None:
        whole = {}
        for part in _SPLIT:
            tensors = _load_tensors(checkpoint / part)
            if tensors is None:
                raise KdcacheError(f"{checkpoint} has neither whole weights nor {part}/; it is incomplete")
            for name, tensor in tensors.items():
                whole[_whole_name(part, name)] = tensor
    state: dict[str, Tensor] = {}
    for name, tensor in whole.items():
        for old, new in _RENAMED:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        # transformers writes a tower without this part of the name, but it and vLLM read it with it
        if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
            name = "vision_tower.vision_model." + name.removeprefix("vision_tower.")
        state[name] = tensor.contiguous()
    return state


def _whole_name(part: str, name: str) -> str:
    """The name that a tensor of a split checkpoint has in a whole one."""
    if part == "connector":
        return "connector." + name.removeprefix("connector.")
    if part == "vision_tower":
        return "vision_tower._vision_tower." + name.removeprefix("vision_tower.").removeprefix(
            "_vision_tower."
        )
    return "language_model." + name.removeprefix("language_model.")


def _load_tensors(folder: Path) -> dict[str, Tensor] | None:
    """All tensors of the .safetensors, or else .bin files of a folder; None where there are none."""
    safe, pickled = sorted(folder.glob("*.safetensors")), sorted(folder.glob("pytorch_model*.bin"))
    tensors: dict[str, Tensor] = {}
    for path in safe or pickled:
        try:
            if safe:
                tensors |= load_file(path)
            else:
                tensors |= torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise KdcacheError(
                f"{path} cannot be read: {str(error).splitlines()[0][:200]}; fetch it again"
            ) from error
    return tensors or None


def _llava_config(checkpoint: Path, settings: dict[str, Any], state: dict[str, Tensor]) -> LlavaConfig:
    """LlavaConfig with the checkpoint's text and vision configs."""
    text = _part_config(checkpoint / "language_model", settings.get("text_config"))
    vision = _part_config(checkpoint / "vision_tower", settings.get("vision_config"))
    if vision.model_type not in ("siglip_vision_model", "clip_vision_model"):
        raise KdcacheError(
            f"{checkpoint} has a {vision.model_type} tower; only SigLIP and CLIP towers are supported"
        )
    if vision.model_type == "siglip_vision_model":
        vision.vision_use_head = any(name.startswith("vision_tower.vision_model.head.") for name in state)
    strategy = settings.get("vision_feature_select_strategy", "patch")
    dtypes = Counter(tensor.dtype for tensor in state.values())
    patches = (vision.image_size // vision.patch_size) ** 2 + (vision.model_type == "clip_vision_model")
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        projector_hidden_act="gelu",
        vision_feature_layer=settings.get("vision_feature_layer", -2),
        vision_feature_select_strategy=_STRATEGIES[strategy],
        image_seq_length=patches - (strategy == "patch"),
        tie_word_embeddings="language_model.lm_head.weight" not in state,
        dtype=dtypes.most_common(1)[0][0],
    )


def _part_config(folder: Path, settings: dict[str, Any] | None) -> Any:
    """The config of the language model or the tower: its own file's, or else as nested in the whole."""
    path = folder / "config.json"
    if path.is_file():
        own = json.loads(path.read_text(encoding="utf-8"))
        if "connector_type" not in own:  # some split checkpoints repeat the whole config there
            settings = own
    if not settings or settings.get("model_type") not in CONFIG_MAPPING:
        raise KdcacheError(f"the checkpoint's config does not describe its {folder.name}")
    noise = ("model_name_or_path", "model_name_or_path2", "_name_or_path", "transformers_version")
    return CONFIG_MAPPING[settings["model_type"]](**{k: v for k, v in settings.items() if k not in noise})


def _tokenizer_with_image(checkpoint: Path, config: LlavaConfig) -> Any:
    """The checkpoint's tokenizer with `<image>` in it; sets the config's image token."""
    folder = next(
        (folder for folder in (checkpoint, checkpoint / "language_model") if _has_tokenizer(folder)), None
    )
    if folder is None:
        raise KdcacheError(f"{checkpoint} holds no tokenizer; save the language model's tokenizer into it")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True)
    if IMAGE_MARK not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_MARK]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def _make_room(state: dict[str, Tensor], config: LlavaConfig, tokens: int) -> None:
    """Gives the embedding and the head a row for the image token where the vocabulary has no free one.

    The row is the mean of the others: its embedding is never read, and its logit is an ordinary one.
    """
    missing = tokens - config.text_config.vocab_size
    if missing <= 0:
        return
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in state:
            rows = state[name].float().mean(dim=0, keepdim=True).expand(missing, -1)
            state[name] = torch.cat([state[name], rows.to(state[name].dtype)])
    config.text_config.vocab_size = tokens


def _processor(
    checkpoint: Path, settings: dict[str, Any], config: LlavaConfig, tokenizer: Any
) -> LlavaProcessor:
    """A LlavaProcessor that makes the pixels TinyLLaVA makes, with LLaVA's chat as its template."""
    vision = config.vision_config
    if settings.get("image_aspect_ratio", "square") not in ("square", "pad"):
        raise KdcacheError(
            f"{checkpoint} crops images ({settings['image_aspect_ratio']}); only square and pad are supported"
        )
    siglip = vision.model_type == "siglip_vision_model"
    options: dict[str, Any] = {"do_pad": settings.get("image_aspect_ratio") == "pad"}
    folders = (checkpoint, checkpoint / "vision_tower")
    saved = [folder for folder in folders if (folder / "preprocessor_config.json").is_file()]
    if saved:
        image_processor = LlavaImageProcessorPil.from_pretrained(saved[0], local_files_only=True, **options)
    elif siglip:
        image_processor = LlavaImageProcessorPil(
            size={"height": vision.image_size, "width": vision.image_size},
            do_center_crop=False,
            image_mean=IMAGENET_STANDARD_MEAN,
            image_std=IMAGENET_STANDARD_STD,
            **options,
        )
    else:
        image_processor = LlavaImageProcessorPil(
            size={"shortest_edge": vision.image_size},
            crop_size={"height": vision.image_size, "width": vision.image_size},
            **options,
        )
    template = files("pipeline").joinpath("templates", "llava_v1.jinja").read_text(encoding="utf-8")
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=0 if siglip else 1,
        chat_template=template,
        image_token=IMAGE_MARK,
    )


def _check(out: Path) -> None:
    """KdcacheError unless the new folder loads with every tensor in place."""
    _, report = AutoModelForImageTextToText.from_pretrained(
        out, output_loading_info=True, local_files_only=True, dtype="auto"
    )
    problems = {
        kind: sorted(map(str, report[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")
    }
    found = [f"{len(keys)} {kind} ({keys[0]}, ...)" for kind, keys in problems.items() if keys]
    if found:
        raise KdcacheError(f"the checkpoint's tensors are not those of a Llava model: {'; '.join(found)}")
