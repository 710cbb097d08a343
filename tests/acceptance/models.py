"""The models of the acceptance run: a Llava of the real SmolLM2 and a real tower, and a third of SmolLM2."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModel
from transformers.utils import logging

from benchmarks._smollm2 import load_smollm2, save_llava
from tests.acceptance.tower import image_processor, save_tower

logging.disable_progress_bar()
CHATML = Path(__file__).with_name("chatml.jinja")
STUDENT_LAYERS = 10


def save_models(out: Path) -> dict[str, Any]:
    """Writes out/tower, out/blind-teacher (its projector is random) and out/small-language-model.

    Returns the sizes that are printed.
    """
    tokenizer, language = load_smollm2()
    tower = AutoModel.from_pretrained(save_tower(out / "tower")).eval()
    small = every_third_layer(language, STUDENT_LAYERS)
    small.save_pretrained(out / "small-language-model")
    tokenizer.save_pretrained(out / "small-language-model")
    save_llava(
        out / "blind-teacher",
        tokenizer=tokenizer,
        language=language,
        vision=tower.config,
        tower=tower,
        feature_layer=-1,
        image_processor=image_processor(tower.config.image_size),
        chat_template=CHATML,
    )
    return {
        "tower": tower.num_parameters(),
        "teacher's language model": language.num_parameters(),
        "student's language model": small.num_parameters(),
        "layers": [language.config.num_hidden_layers, small.config.num_hidden_layers],
    }


def every_third_layer(language: Any, layers: int) -> Any:
    """The model with `layers` of its layers, evenly spread, the first and the last among them."""
    last = language.config.num_hidden_layers - 1
    kept = [round(place * last / (layers - 1)) for place in range(layers)]
    small = copy.deepcopy(language)
    small.model.layers = nn.ModuleList(small.model.layers[place] for place in kept)
    for place, layer in enumerate(small.model.layers):
        layer.self_attn.layer_idx = place
    small.config.num_hidden_layers = layers
    if getattr(small.config, "layer_types", None):
        small.config.layer_types = [small.config.layer_types[place] for place in kept]
    return small
