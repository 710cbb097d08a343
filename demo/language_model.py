"""The parts of the demo's student: a language model trained on text only, and a vision tower."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cache_schema.errors import KdcacheError
from cache_schema.progress import Progress, Silent, task
from demo.vision_tower import one_cycle

IGNORE = -100
BATCH = 32
LEARNING_RATE = 3e-3


class LanguageSize(NamedTuple):
    """Of a Qwen2 model."""

    hidden_size: int
    layers: int
    heads: int


def conversation_texts(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """LLaVA rows as the chat template writes them, without their images."""
    texts = []
    for row in rows:
        messages = [
            {
                "role": "user" if turn["from"] == "human" else "assistant",
                "content": turn["value"].replace("<image>\n", ""),
            }
            for turn in row["conversations"]
        ]
        texts.append(str(tokenizer.apply_chat_template(messages, tokenize=False)))
    return texts


def padded(sequences: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Right-padded (B, T) int64."""
    width = max(len(sequence) for sequence in sequences)
    return torch.tensor([[*sequence, *[fill] * (width - len(sequence))] for sequence in sequences])


def train_language_model(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    size: LanguageSize,
    *,
    steps: int,
    seed: int = 0,
    tied: bool = True,
    progress: Progress | None = None,
) -> Qwen2ForCausalLM:
    """Trains a Qwen2 model on next tokens of `texts` and saves it with its tokenizer in `out`.

    Deterministic on one machine for one seed and thread count. The model has seen no image: the image token's
    row is as initialised. Embedding rows are padded to a multiple of 64.

    Args:
        texts: complete texts, shorter than the tokenizer's maximum length.
        steps: optimizer steps of 32 texts each.

    Returns:
        The model in eval mode, float32.
    """
    progress = progress or Silent()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=size.hidden_size,
        intermediate_size=3 * size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    sequences = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, steps))
    with task(progress, "language model on text", steps):
        for step in range(1, steps + 1):
            chosen = torch.randint(0, len(sequences), (BATCH,), generator=generator).tolist()
            labels = padded([sequences[row] for row in chosen], IGNORE)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=labels.clamp(min=0)[:, :-1]).logits
            loss = nn.functional.cross_entropy(
                logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(step, loss=f"{loss.item():.3f}")
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model


def extract_vision_tower(teacher: Path, out: Path) -> None:
    """Saves the vision tower of a LLaVA model with its image processor, loadable on its own with AutoModel.

    Raises:
        KdcacheError: `teacher` holds no model with a vision tower.
    """
    model = AutoModelForImageTextToText.from_pretrained(teacher)
    tower = getattr(model.model, "vision_tower", None)
    if tower is None:
        raise KdcacheError(f"{teacher} holds a {type(model).__name__}, which has no vision tower to extract")
    tower.save_pretrained(out)
    AutoProcessor.from_pretrained(teacher).image_processor.save_pretrained(out)
