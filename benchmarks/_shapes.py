"""Models and batches of LLaVA-KD's shapes, with random weights and targets, for the benchmarks of devices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig
from transformers.initialization import no_init_weights

from benchmarks._random_cache import IMAGE_ID as IMAGE_ID

VOCAB = 151_936
"""Rows of Qwen1.5's head."""
TEXT, ANSWER = 56, 105
"""Tokens of a question, and supervised tokens of a sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llava model: a SigLIP tower of `vision_*` and a Qwen2 language model. visual: tokens of an image."""

    name: str
    width: int
    layers: int
    heads: int
    inner: int
    tied: bool
    vision_width: int = 1152
    vision_layers: int = 27
    vision_heads: int = 16
    vision_inner: int = 4304
    image_size: int = 384
    vocab: int = VOCAB
    patch_size: int = 14

    @property
    def visual(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def config(self) -> LlavaConfig:
        """Its configuration, with attention that torch fuses."""
        vision = SiglipVisionConfig(
            hidden_size=self.vision_width,
            intermediate_size=self.vision_inner,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.vision_heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
            vision_use_head=False,
        )
        text = Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=4096,
            tie_word_embeddings=self.tied,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE_ID,
            vision_feature_select_strategy="full",
            tie_word_embeddings=self.tied,
        )
        config._attn_implementation = "sdpa"
        return config

    def build(self) -> Any:
        """The model with random weights, on the default device, in the default dtype."""
        with no_init_weights():
            model = LlavaForConditionalGeneration(self.config())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                else:
                    parameter.normal_(std=0.02)
        return model


TEACHER = Shape(name="teacher 4B", width=2560, layers=40, heads=20, inner=6912, tied=False)
STUDENT = Shape(name="student 0.5B", width=1024, layers=24, heads=16, inner=2816, tied=True)
TINY = {
    "width": 32,
    "layers": 2,
    "heads": 2,
    "inner": 48,
    "vision_width": 32,
    "vision_layers": 2,
    "vision_heads": 2,
    "vision_inner": 48,
    "image_size": 42,
    "vocab": 512,
}
TINY_TEACHER = Shape(name="tiny teacher", tied=False, **TINY)
TINY_STUDENT = Shape(name="tiny student", tied=True, **TINY)
"""To try the scripts on a CPU."""
SMALL = {
    "tower": {"vision_width": 384, "vision_layers": 6, "vision_heads": 6, "vision_inner": 1536},
}
SMALL_TEACHER = Shape(
    name="small teacher", width=768, layers=12, heads=12, inner=2048, tied=False, **SMALL["tower"]
)
SMALL_STUDENT = Shape(
    name="small student", width=384, layers=6, heads=6, inner=1024, tied=True, **SMALL["tower"]
)


def batch_of(folder: Path, shape: Shape, *, samples: int, rank: int, top_k: int = 32) -> Any:
    """A micro-batch as the loader makes it from a cache of random targets, on the host."""
    from benchmarks._random_cache import write_cache
    from benchmarks.training import collator_for
    from cache_schema import open_cache

    url = write_cache(
        folder,
        rows=samples,
        shard=samples,
        visual=shape.visual,
        text=TEXT,
        answer=ANSWER,
        vocab=shape.vocab,
        top_k=top_k,
        size=shape.image_size,
        rank=rank,
    )
    cache = open_cache(url)
    collator = collator_for(folder, cache, image_size=shape.image_size, patch_size=14)
    return collator([cache[row] for row in range(samples)])
