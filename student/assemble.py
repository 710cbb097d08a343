"""A new student: a vision tower, a projector and a language model as one Llava folder."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from cache_schema.errors import KdcacheError, first_line
from cache_schema.format.cache import Cache, open_cache
from cache_schema.output import require_folder
from models.folder import LOAD_ERRORS
from models.parts import part_of
from student.experts import upcycle
from student.folder import save_folder
from student.generation import answer_ends, settle_generation
from student.kept_projector import keep_projector
from student.settings import NewStudentConfig

IMAGE_TOKEN = "<image>"
_TOWER_KEY = re.compile(r"^(?:model\.)?(?:vision_tower\.)?(?:vision_model\.)?")


def new_student(config: NewStudentConfig) -> dict[str, Any]:
    """Writes a LlavaForConditionalGeneration folder with its processor and returns its sizes.

    The projector is drawn from the seed as torch draws linear layers, or is a teacher's (`keep_projector`).
    With `like`, tokenizer, image token, feature layer, select strategy, chat template and (where the tower's
    folder has none) image processor are those of the cache's teacher. KdcacheError when a folder is of
    another kind or the language model does not cover the tokenizer.
    """
    out, like = config.out, config.like
    require_folder(out, new=True)
    tower = _load_tower(config.vision_tower)
    language = _load(AutoModelForCausalLM, config.language_model, "a causal language model")
    has_cls = "clip" in tower.config.model_type and "siglip" not in tower.config.model_type
    layer: int = -2
    strategy = "default" if has_cls else "full"
    with tempfile.TemporaryDirectory() as folder:
        cache = None if like is None else open_cache(like)
        tokenizer, template, assets = _words(cache, config.language_model, Path(folder))
        image_processor = _image_processor(config.vision_tower, assets)
    if cache is not None:
        training = cache.manifest.fingerprint.training
        layer = training.get("vision_feature_layer") or layer
        strategy = training.get("vision_feature_select_strategy") or strategy
        image_token_id = int(training["image_token_id"])
        _refuse_other_words(language, config.language_model, tokenizer, cache)
    else:
        image_token_id = _add_image_token(tokenizer, language)
    layer = layer if config.feature_layer is None else config.feature_layer
    strategy = config.select_strategy or strategy
    if config.experts is not None:
        language = upcycle(language, experts=config.experts, active=config.active or 2, seed=config.seed)
    model = _join(tower, language, image_token_id, layer, strategy, config.seed)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(has_cls),
        chat_template=template,
        image_token=tokenizer.convert_ids_to_tokens(image_token_id),
    )
    kept = {}
    if config.projector_from is not None:
        kept = keep_projector(model, config.projector_from, image_processor, config.projector_images)
    tokens = _visual_tokens(model, image_processor)
    model.config.image_seq_length = tokens
    settle_generation(model, processor, () if cache is None else answer_ends(cache, tokenizer))
    save_folder(model, processor, out)
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        sizes[part] = sizes.get(part, 0) + parameter.numel()
    return {
        "folder": str(out),
        "parameters": sizes,
        "image_token_id": image_token_id,
        "visual_tokens": tokens,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
        "tokenizer_length": len(tokenizer),
        "like": like,
        **({"projector": kept} if kept else {}),
    }


def _load_tower(folder: Path) -> Any:
    """The vision tower alone: of a vision-language folder no other weight is read."""
    config = _load(AutoConfig, folder, "a vision model")
    vision = getattr(config, "vision_config", None)
    if vision is None:
        tower = _load(AutoModel, folder, "a vision model")
        if not hasattr(tower.config, "patch_size"):
            raise KdcacheError(f"{folder} holds a {config.model_type} model, not a vision tower")
        return tower
    tower = AutoModel.from_config(vision)
    wanted = {_TOWER_KEY.sub("", name): name for name in tower.state_dict()}
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    bare = _TOWER_KEY.sub("", key)
                    if "vision_" in key and bare in wanted:
                        found[wanted[bare]] = opened.get_tensor(key)
        except SafetensorError as error:
            raise KdcacheError(f"{file} cannot be read: {first_line(error)}; fetch it again") from error
    missing = sorted(set(wanted.values()) - set(found))
    if missing:
        raise KdcacheError(
            f"{folder}: {len(missing)} weights of its vision tower were not found in its safetensors files "
            f"(first: {missing[0]}); save the tower alone with save_pretrained and give that folder"
        )
    tower.load_state_dict(found, assign=True)
    return tower


def _load(kind: Any, folder: Path, what: str) -> Any:
    if not (folder / "config.json").is_file():
        raise KdcacheError(f"{folder} is not {what}: it has no config.json")
    try:
        return kind.from_pretrained(folder)
    except LOAD_ERRORS as error:
        raise KdcacheError(f"{folder} is not {what}: {' '.join(str(error).split())[:200]}") from error


def _words(cache: Cache | None, language_model: Path, folder: Path) -> tuple[Any, str | None, Path | None]:
    """(tokenizer, chat template, folder of the cache's files) of the cache, or of the language model."""
    if cache is None:
        tokenizer = _load(AutoTokenizer, language_model, "a tokenizer")
        return tokenizer, tokenizer.chat_template, None
    cache.write_assets(folder)
    training = cache.manifest.fingerprint.training
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        text = " ".join(str(error).split())[:200]
        raise KdcacheError(f"the processor files in the cache {cache.url} do not load: {text}") from error
    # Captions of pre-training are captured without a chat; the teacher's own template is used then.
    template = processor.chat_template
    if training["template_name"] != "plain":
        template = training["chat_template"]
        if processor.image_token != IMAGE_TOKEN:  # a variable that only kdcache would give to the template
            template = f"{{%- set image_token = {processor.image_token!r} -%}}{template}"
    return processor.tokenizer, template, folder


def _image_processor(vision_tower: Path, assets: Path | None) -> Any:
    for folder in (vision_tower, assets):
        names = ("preprocessor_config.json", "processor_config.json")
        if folder is not None and any((folder / name).is_file() for name in names):
            return AutoImageProcessor.from_pretrained(folder)
    raise KdcacheError(
        f"{vision_tower} has no preprocessor_config.json; add the tower's, or give --like CACHE to take the "
        "teacher's image processor"
    )


def _refuse_other_words(language: Any, folder: Path, tokenizer: Any, cache: Cache) -> None:
    """The language model must know the tokens of the cache, at the same ids."""
    rows = language.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise KdcacheError(
            f"{folder} has {rows} embedding rows, the cache {cache.url} has {len(tokenizer)} tokens; choose "
            "a language model of the teacher's family"
        )
    if not (folder / "tokenizer.json").is_file():
        return
    own = _load(AutoTokenizer, folder, "a tokenizer").get_vocab()
    theirs = tokenizer.get_vocab()
    moved = [token for token, place in own.items() if theirs.get(token, place) != place]
    absent = [token for token in own if token not in theirs]
    if moved or len(absent) > len(own) // 100:
        example = (moved or absent)[0]
        raise KdcacheError(
            f"{folder} has another tokenizer than the cache {cache.url}: {len(moved)} tokens at other ids, "
            f"{len(absent)} unknown there (for example {example!r}: {own[example]} here, "
            f"{theirs.get(example)} in the cache); choose a language model of the teacher's family"
        )


def _add_image_token(tokenizer: Any, language: Any) -> int:
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if language.get_input_embeddings().weight.shape[0] < len(tokenizer):
        language.resize_token_embeddings(len(tokenizer))
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def _join(tower: Any, language: Any, image_token_id: int, layer: int, strategy: str, seed: int) -> Any:
    dtypes = {part.dtype for part in (tower, language)}
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=image_token_id,
        projector_hidden_act="gelu",
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=bool(language.config.tie_word_embeddings),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).to(dtypes.pop() if len(dtypes) == 1 else torch.float32)
        for layer_of_projector in model.model.multi_modal_projector.modules():
            if isinstance(layer_of_projector, nn.Linear):
                layer_of_projector.reset_parameters()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.base_model.state_dict())
    model.get_output_embeddings().load_state_dict(language.get_output_embeddings().state_dict())
    return model.eval()


def _visual_tokens(model: Any, image_processor: Any) -> int:
    pixels = image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    with torch.inference_mode():
        features = model.get_image_features(pixels["pixel_values"].to(model.dtype)).pooler_output
    return sum(feature.shape[-2] for feature in features)
