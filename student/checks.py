"""Checks before training: student and cache must agree in tokens, images and template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cache_schema.datasets.image_roots import ImageRoot
from cache_schema.errors import IdentityMismatch
from cache_schema.format.cache import Cache
from cache_schema.format.records import ImageRecord
from cache_schema.format.spec import KINDS
from cache_schema.progress import Progress
from models.tokens import digest_of_tokenizer, tokenizer_parts
from student.collate import Collator
from student.pixels import PixelInputs
from student.stages import Stage

_SIZES = 4
_PROBE = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "text", "text": "And there?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
]


def warn_of_cache(cache: Cache, progress: Progress) -> None:
    """Says what of a cache is not there to use: shards that are still being built, and what an older version
    did not record of its tokenizer."""
    missing = sorted(set(range(cache.plan.shards)) - set(cache.shards))
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        progress.message(
            f"cache {cache.url} is not complete: {len(missing)} of {cache.plan.shards} shards are missing "
            f"({', '.join(map(str, missing[:8]))}{more}); only the {len(cache)} samples in it now are used; "
            "let `kdcache build` finish first, or use --wait"
        )
    if "tokenizer_parts" not in cache.manifest.fingerprint.training:
        progress.message(
            f"{cache.url} is of an older version, which kept of a tokenizer the vocabulary and the special "
            "tokens alone: its merges and other parts could not be compared with the student's"
        )


def check_student(
    cache: Cache,
    model: Any,
    processor: Any,
    image_root: ImageRoot,
    stage: Stage | None,
    *,
    adopt_template: bool = False,
) -> int | None:
    """None when the student's tokenizer, image token, template and visual tokens are the cache's.

    stage: what is to be learnt from the cache; None: the student is only measured on it. Where only the
    number of visual tokens differs and the stage reads no target that depends on it, the student's number is
    returned: each image's placeholders are then replaced by that many (`Collator.placeholders`). Any
    other difference: IdentityMismatch, all of them in one line, each with both values and the remedy.
    """
    training = cache.manifest.fingerprint.training
    problems = _token_problems(training, model, processor)
    problems += _measure_problems(cache) if stage is None else _target_problems(cache, stage)
    if not adopt_template:
        problems += _template_problems(training, processor)
    placeholders = None
    if not problems:
        counts = _visual_tokens(cache, model, processor, image_root)
        different = [(record, seen) for record, seen in counts if seen != len(record.positions)]
        if different:
            bound = [] if stage is None else [name for name in stage.targets if name != "response"]
            constant = len({seen for _, seen in counts}) == 1
            if bound or not constant:
                problems.append(_spans_problem(different[0], bound))
            else:
                placeholders = counts[0][1]
    if problems:
        raise IdentityMismatch(f"the student does not fit the cache {cache.url}: {'; '.join(problems)}")
    return placeholders


def _token_problems(training: dict[str, Any], model: Any, processor: Any) -> list[str]:
    tokenizer = processor.tokenizer
    problems = []
    ours = digest_of_tokenizer(tokenizer)
    if ours != training["tokenizer"]:
        problems.append(
            f"tokenizer {ours[:12]} ({len(tokenizer)} tokens) here, {training['tokenizer'][:12]} "
            f"({training['vocab_size']} tokens) in the cache: token ids would have other meanings; "
            "make the student with `kdcache new-student --like CACHE`"
        )
    theirs = training.get("tokenizer_parts")  # caches of older versions have none
    mine = tokenizer_parts(tokenizer)
    different = [name for name, digest in (theirs or {}).items() if mine.get(name) != digest]
    if different and not problems:
        problems.append(
            f"the tokenizer's {', '.join(different)} are not those of the cache: texts would become other "
            "token ids; make the student with `kdcache new-student --like CACHE`"
        )
    image_token = getattr(model.config, "image_token_id", None)
    if image_token != training["image_token_id"]:
        problems.append(
            f"image token id {image_token} here, {training['image_token_id']} in the cache; "
            "set it in the student's config.json or make the student with `--like CACHE`"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < training["vocab_size"]:
        problems.append(
            f"{rows} embedding rows here, {training['vocab_size']} tokens in the cache; "
            "resize the student's embeddings"
        )
    return problems


def _target_problems(cache: Cache, stage: Stage) -> list[str]:
    spec, losses = cache.spec, stage.losses
    problems = []
    absent = [name for name in stage.targets if name not in spec.targets]
    if absent:
        left = [name for name in stage.targets if name in spec.targets]
        problems.append(
            f"stage {stage.name} learns from {', '.join(stage.targets)}, the cache holds "
            f"{', '.join(spec.targets)}; use `--targets {','.join(left) or 'none'}` or build the cache with "
            f"{', '.join(absent)}"
        )
    if not stage.targets:
        return problems
    if losses.tail == "dense":
        problems += _dense_problems(cache, stage)
    elif losses.tail == "sampled":
        if not spec.tail_samples or spec.sample_temperature != losses.temperature:
            problems.append(
                f"tail `sampled` at temperature {losses.temperature} needs draws, the cache holds "
                f"{spec.tail_samples} at {spec.sample_temperature}; use tail `bucket`"
            )
    elif losses.temperature not in spec.temperatures:
        problems.append(
            f"temperature {losses.temperature} is requested, the cache holds tails at "
            f"{list(spec.temperatures)}; "
            "use one of those or build the cache with it"
        )
    return problems


def _dense_problems(cache: Cache, stage: Stage) -> list[str]:
    """Kinds of positions whose hidden states tail `dense` needs and the cache does not have."""
    wanted = [kind for kind in KINDS if kind in stage.targets]
    absent = [kind for kind in wanted if kind not in cache.spec.hidden]
    if not absent:
        return []
    return [
        f"tail `dense` needs hidden states of {', '.join(wanted)} positions, the cache holds "
        f"{', '.join(cache.spec.hidden) or 'none'}; use tail `bucket`, or build the cache with `hidden` "
        "among its --targets"
    ]


def _measure_problems(cache: Cache) -> list[str]:
    temperatures = list(cache.spec.temperatures)
    if 1.0 in temperatures:
        return []
    return [f"measuring needs the tail mass at temperature 1, the cache holds tails at {temperatures}"]


def _template_problems(training: dict[str, Any], processor: Any) -> list[str]:
    """Differences between the student's chat template and the cache's."""
    theirs = training["chat_template"]
    if training["template_name"] == "plain" or processor.chat_template == theirs:
        return []  # captions of pre-training are not chats
    here = "no chat template"
    if processor.chat_template is not None:
        here = processor.apply_chat_template(_PROBE, tokenize=False)
    there = processor.apply_chat_template(_PROBE, chat_template=theirs, tokenize=False)
    if here == there:
        return []
    return [
        f"chat template {here!r} here, {there!r} in the cache: chats would not look like the training text; "
        "use `--adopt-template` to give the student the cache's template"
    ]


def _visual_tokens(
    cache: Cache, model: Any, processor: Any, image_root: ImageRoot
) -> list[tuple[ImageRecord, int]]:
    """(image, tokens the student makes of it) for one image of each of the first few image sizes."""
    collator = Collator(
        pixels=PixelInputs(processor),
        image_root=image_root,
        pad_token_id=0,
        image_token_id=cache.manifest.fingerprint.training["image_token_id"],
    )
    found: dict[tuple[int, int], tuple[Sequence[ImageRecord], int]] = {}
    block = cache.read_shard(cache.shards[0], parts=(), images=True)
    for place in range(len(block)):
        images = block.sample(place).images
        for number, image in enumerate(images):
            found.setdefault((image.width, image.height), (images, number))
        if len(found) >= _SIZES:
            break

    def tokens(images: Sequence[ImageRecord]) -> list[int]:
        pixels = {
            name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in collator.images([images]).items()
        }
        return [feature.shape[-2] for feature in model.get_image_features(**pixels).pooler_output]

    counts = []
    with torch.inference_mode():
        for beside, number in found.values():
            together = tokens(beside)  # LLaVA-OneVision tiles an image only when it is alone
            whole = len(together) == len(beside)  # others return features per tile, alone or not
            counts.append((beside[number], together[number] if whole else sum(tokens([beside[number]]))))
    return counts


def _spans_problem(different: tuple[ImageRecord, int], bound: list[str]) -> str:
    image, seen = different
    remedy = (
        "train with `--targets response`"
        if bound
        else "the number varies with the image's size, so the cache must be built with this processor"
    )
    return (
        f"image {image.path} ({image.width}x{image.height}) is {seen} visual tokens here, "
        f"{len(image.positions)} in the cache; {remedy}"
    )
