"""Tiny random models, processors, tokenizers and data sets for the tests, made in a temporary folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

END = "<|endoftext|>"
PAD = "<|pad|>"
IMAGE = "<image>"

TEXTS = (
    "USER: What is the colour of the shape? ASSISTANT: The shape is red.",
    "USER: Is there a circle in the image? ASSISTANT: Yes, there is a blue circle.",
    "Describe the picture. A small green rectangle on a white background.",
    "a photo of a large yellow triangle, no, two of them, café, naïve, 3.14",
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'][0]['text'] ~ '\n' }}"
    "{%- elif message['role'] == 'user' -%}{{ 'USER: ' }}"
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<image>\n' }}{%- else -%}{{ item['text'] }}{%- endif -%}"
    "{%- endfor -%}{{ ' ASSISTANT:' }}"
    "{%- else -%}OPEN{{ ' ' ~ message['content'][0]['text'] ~ '<|endoftext|>' }}CLOSE"
    "{%- endif -%}{%- endfor -%}"
)


def chat_template(generation_marks: bool = True) -> str:
    """The tiny models' template: `USER: {q} ASSISTANT: {a}<|endoftext|>`, marked or not."""
    opening, closing = ("{% generation %}", "{% endgeneration %}") if generation_marks else ("", "")
    return CHAT_TEMPLATE.replace("OPEN", opening).replace("CLOSE", closing)


def tiny_tokenizer(*, words: int = 340, specials: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `words` entries with END, PAD and IMAGE (and `specials`) among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        special_tokens=[END, PAD, IMAGE, *specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[IMAGE, *specials],
        padding_side="right",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def tiny_llava(
    folder: Path,
    *,
    seed: int = 0,
    words: int = 340,
    vocab: int = 352,
    hidden: int = 32,
    layers: int = 2,
    image_size: int = 32,
    patch_size: int = 8,
    vision_hidden: int = 24,
    select_strategy: str = "full",
    generation_marks: bool = True,
    tie_word_embeddings: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A Llava (SigLIP tower, GELU projector, Qwen2) with its LlavaProcessor, saved in `folder`.

    `words` is the tokenizer's length, `vocab` the rows of the embedding (the rest is padding). An image
    is (image_size / patch_size)^2 tokens (less one under select_strategy "default").
    """
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(words=words)
    assert vocab >= len(tokenizer), (vocab, len(tokenizer))
    vision = SiglipVisionConfig(
        hidden_size=vision_hidden,
        intermediate_size=2 * vision_hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_hidden_act="gelu",
        vision_feature_select_strategy=select_strategy,
        vision_feature_layer=-2,
        image_seq_length=(image_size // patch_size) ** 2 - (select_strategy == "default"),
        tie_word_embeddings=tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config).to(dtype).eval()
    with torch.no_grad():  # larger than the usual initialisation, so that distributions are not flat
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
        model.model.language_model.norm.weight.fill_(6.0)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": image_size, "width": image_size}),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=select_strategy,
        num_additional_image_tokens=0,
        chat_template=chat_template(generation_marks),
        image_token=IMAGE,
    )
    processor.save_pretrained(folder)
    return Path(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyDataset:
    """A LLaVA JSON file, the root of its images, and its rows as written."""

    data: Path
    image_root: Path
    rows: list[dict[str, Any]]


def write_png(path: Path, *, seed: int, size: tuple[int, int] = (40, 36)) -> Path:
    """A real PNG of random colours, `size` = (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def tiny_rows(rows: int, *, images: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """`rows` conversations of 1-3 turns about `images` images in turn; every fifth row is text only."""
    images = images or max(1, rows // 2)
    generator = np.random.default_rng(seed)
    colours, shapes = ("red", "blue", "green", "grey"), ("circle", "triangle", "rectangle")
    made: list[dict[str, Any]] = []
    for row in range(rows):
        turns: list[dict[str, str]] = []
        for _ in range(int(generator.integers(1, 4))):
            shape, colour = str(generator.choice(shapes)), str(generator.choice(colours))
            turns.append({"from": "human", "value": f"What is the colour of the {shape}?"})
            turns.append({"from": "gpt", "value": f"The {shape} is {colour}."})
        made.append({"id": f"row-{row}", "conversations": turns})
        if row % 5 != 4:
            made[-1]["image"] = f"pictures/{row % images}.png"
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return made


def tiny_dataset(folder: Path, *, rows: int = 10, images: int | None = None, seed: int = 0) -> TinyDataset:
    """`tiny_rows` written as `data.json` with its PNGs under `images/` in `folder`."""
    made = tiny_rows(rows, images=images, seed=seed)
    root = Path(folder) / "images"
    for name in sorted({row["image"] for row in made if "image" in row}):
        write_png(root / name, seed=int(Path(name).stem) + 1000 * seed)
    data = Path(folder) / "data.json"
    data.write_text(json.dumps(made, indent=1), encoding="utf-8")
    root.mkdir(parents=True, exist_ok=True)
    return TinyDataset(data=data, image_root=root, rows=made)
