"""Tiny random teachers of every family that a cache can be captured from, with their processors.

Those of TORCHVISION need torchvision for their processors; see tests/torchvision_folder.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import CHAT_TEMPLATE, END, PAD, tiny_llava, tiny_tokenizer

IMAGE_SIZE, PATCH = 28, 7
HIDDEN, VOCAB = 32, 424

SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
}


def tokenizer_with(**specials: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with named special tokens that a processor asks it for."""
    names = [token for token in dict.fromkeys(specials.values()) if token not in (END, PAD, "<image>")]
    backend = tiny_tokenizer(words=400, specials=names).backend_tokenizer
    roles = {role: specials.pop(role) for role in ("bos_token", "unk_token") if role in specials}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=specials,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **roles,
    )


def text_config(kind: str, tokenizer: Any, **rest: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | rest


def template(image: str) -> str:
    text = CHAT_TEMPLATE.replace("OPEN", "{% generation %}").replace("CLOSE", "{% endgeneration %}")
    return text.replace("<image>\\n", image).replace("<image>\n", image)


def save(folder: Path, model: Any, processor: Any) -> Path:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
            elif name.endswith(("language_model.norm.weight", "text_model.norm.weight")):
                parameter.fill_(5.0 if "gemma" not in model.config.model_type else 4.0)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llava_next(folder: Path) -> Path:
    tokenizer = tokenizer_with(image_token="<image>")
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = transformers.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **SIGLIP},
        text_config=text_config("llama", tokenizer),
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=pinpoints,
        image_seq_length=16,
    )
    processor = transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\\n"),
    )
    return save(folder, transformers.LlavaNextForConditionalGeneration(config), processor)


def llava_onevision(folder: Path) -> Path:
    tokenizer = tokenizer_with(image_token="<image>", video_token="<video>")
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = transformers.LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **SIGLIP},
        text_config=text_config("qwen2", tokenizer),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=pinpoints,
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template("<image>\\n"),
    )
    return save(folder, transformers.LlavaOnevisionForConditionalGeneration(config), processor)


def idefics3(folder: Path, *, smolvlm: bool = False) -> Path:
    family = "SmolVLM" if smolvlm else "Idefics3"
    grid = {f"r{row}{col}_token": f"<row_{row}_col_{col}>" for row in (1, 2, 3) for col in (1, 2, 3)}
    tokenizer = tokenizer_with(
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        end_of_utterance_token="<end_of_utterance>",
        global_image_token="<global-img>",
        **grid,
    )
    config = getattr(transformers, f"{family}Config")(
        vision_config=dict(SIGLIP),
        text_config=text_config("llama", tokenizer),
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    image_processor = getattr(transformers, f"{family}ImageProcessor{'' if smolvlm else 'Pil'}")(
        size={"longest_edge": 2 * IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}
    )
    rest: dict[str, Any] = {}
    if smolvlm:
        rest["video_processor"] = transformers.SmolVLMVideoProcessor(
            size={"longest_edge": IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}
        )
    processor = getattr(transformers, f"{family}Processor")(
        image_processor=image_processor,
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=template("<image>"),
        **rest,
    )
    return save(folder, getattr(transformers, f"{family}ForConditionalGeneration")(config), processor)


def smolvlm(folder: Path) -> Path:
    return idefics3(folder, smolvlm=True)


def internvl(folder: Path) -> Path:
    tokenizer = tokenizer_with(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    vision = {k: v for k, v in SIGLIP.items() if not k.endswith("_size")}
    config = transformers.InternVLConfig(
        vision_config=vision
        | {
            "hidden_size": 16,
            "intermediate_size": 32,
            "image_size": [IMAGE_SIZE, IMAGE_SIZE],
            "patch_size": [PATCH, PATCH],
        },
        text_config=text_config("qwen2", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=size, max_patches=4),
        tokenizer=tokenizer,
        video_processor=transformers.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>\\n"),
    )
    return save(folder, transformers.InternVLForConditionalGeneration(config), processor)


def gemma3(folder: Path, *, softcap: float | None = None) -> Path:
    tokenizer = tokenizer_with(
        bos_token="<bos>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    config = transformers.Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **SIGLIP},
        text_config=text_config(
            "gemma3_text",
            tokenizer,
            sliding_window=16,
            final_logit_softcapping=softcap,
            query_pre_attn_scalar=16,
        ),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessorPil(
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template="<bos>" + template("<start_of_image>"),
    )
    return save(folder, transformers.Gemma3ForConditionalGeneration(config), processor)


def gemma3_capped(folder: Path) -> Path:
    return gemma3(folder, softcap=3.0)


def paligemma(folder: Path) -> Path:
    backend = tiny_tokenizer(words=400, specials=["<bos>"]).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    image_processor = transformers.SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    image_processor.image_seq_length = 16
    # 1,024 location and 128 segmentation tokens come with the processor
    processor = transformers.PaliGemmaProcessor(image_processor=image_processor, tokenizer=tokenizer)
    config = transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **SIGLIP},
        text_config=text_config("gemma", tokenizer, vocab_size=len(tokenizer) + 8),
        image_token_index=processor.image_token_id,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
    )
    return save(folder, transformers.PaliGemmaForConditionalGeneration(config), processor)


def qwen(folder: Path, kind: str, *, hidden: int = HIDDEN) -> Path:
    """Qwen2VL, Qwen2_5_VL or Qwen3VL."""
    tokenizer = tokenizer_with(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
        for name in ("image", "video", "vision_start", "vision_end")
    }
    shared = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision = {
        "Qwen2VL": {"embed_dim": 16, "hidden_size": hidden, "mlp_ratio": 2},
        "Qwen2_5_VL": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [1],
            "window_size": 16,
        },
        "Qwen3VL": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": hidden,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
    }[kind]
    rope = {
        "rope_type": "default",
        "mrope_section": [part * hidden // HIDDEN for part in (2, 3, 3)],
        "rope_theta": 10000.0,
    }
    text = text_config(
        "",
        tokenizer,
        hidden_size=hidden,
        head_dim=hidden // 2,
        rope_parameters=rope | ({"mrope_interleaved": True} if kind == "Qwen3VL" else {}),
    )
    del text["model_type"]
    config = getattr(transformers, f"{kind}Config")(vision_config=shared | vision, text_config=text, **ids)
    pixels = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    limits = {"size": {"shortest_edge": 8 * 8 * 2, "longest_edge": 8 * 8 * 24}}
    videos = "Qwen3VLVideoProcessor" if kind == "Qwen3VL" else "Qwen2VLVideoProcessor"
    name = "Qwen2_5_VLProcessor" if kind == "Qwen2_5_VL" else f"{kind}Processor"
    processor = getattr(transformers, name)(
        image_processor=transformers.Qwen2VLImageProcessor(**pixels, **limits),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, videos)(**pixels),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return save(folder, getattr(transformers, f"{kind}ForConditionalGeneration")(config), processor)


PLAIN: dict[str, Callable[[Path], Path]] = {
    "llava": tiny_llava,
    "llava_next": llava_next,
    "idefics3": idefics3,
    "gemma3": gemma3,
    "gemma3_capped": gemma3_capped,
    "paligemma": paligemma,
}
TORCHVISION: dict[str, Callable[[Path], Path]] = {
    "llava_onevision": llava_onevision,
    "smolvlm": smolvlm,
    "internvl": internvl,
    "qwen2_vl": lambda folder: qwen(folder, "Qwen2VL"),
    "qwen2_5_vl": lambda folder: qwen(folder, "Qwen2_5_VL"),
    "qwen3_vl": lambda folder: qwen(folder, "Qwen3VL"),
}


def make(name: str, folder: Path, *, seed: int = 0) -> Path:
    """The family `name`, saved in `folder`."""
    torch.manual_seed(seed)
    return (PLAIN | TORCHVISION)[name](folder)


def names(*, torchvision: bool) -> Sequence[str]:
    return list(TORCHVISION if torchvision else PLAIN)
