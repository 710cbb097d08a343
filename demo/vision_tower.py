"""The demo teacher's first phase: a small SigLIP tower learns shape and color from the training images.

The tower is trained once and then frozen, as in LLaVA-KD. The classification heads are discarded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from cache_schema.progress import Progress, task
from demo.easy_vqa import COLORS, SHAPES, Attributes, Picture

IMAGE_SIZE = 64
PATCH_SIZE = 8
VISUAL_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
FEATURE_LAYER = -2
UNKNOWN = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerTraining:
    """How the tower is built and trained."""

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    steps: int = 1600
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05


def load_images(pictures: Sequence[Picture]) -> Tensor:
    """Pixels of all pictures: uint8 (B, 3, 64, 64)."""
    arrays = [np.asarray(Image.open(picture.path).convert("RGB")) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def normalized(images: Tensor) -> Tensor:
    """Pixels as the image processor gives them: uint8 (B, 3, H, W) to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def shifted(images: Tensor, generator: torch.Generator, *, reach: int = 12) -> Tensor:
    """Mirrors half of the images and moves each by up to `reach` pixels, filling with the image's background.

    No rotation and no brightness: triangles point upwards and colors are labels.
    """
    batch, _, height, width = images.shape
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], dim=-1)
    background = border.median(dim=-1).values[:, :, None, None]
    canvas = background.expand(-1, -1, height + 2 * reach, width + 2 * reach).clone()
    canvas[:, :, reach : reach + height, reach : reach + width] = images
    offsets = torch.randint(0, 2 * reach + 1, (2, batch, 1), generator=generator)
    rows, columns = offsets[0] + torch.arange(height), offsets[1] + torch.arange(width)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    moved = canvas.permute(0, 2, 3, 1)[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None]]
    return moved.permute(0, 3, 1, 2)


def label_ids(attributes: Sequence[Attributes]) -> Tensor:
    """Class ids (B, 2) of shape and color, UNKNOWN where the questions do not determine them."""

    def class_id(values: Sequence[str], value: str | None) -> int:
        return UNKNOWN if value is None else values.index(value)

    return torch.tensor([[class_id(SHAPES, item.shape), class_id(COLORS, item.color)] for item in attributes])


class AttributeHeads(nn.Module):
    """Shape and color from the mean over the visual tokens, at the projector's layer and at the last one."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(hidden_size, len(SHAPES) + len(COLORS)) for _ in range(2))

    def forward(self, hidden_states: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(shape logits (B, 3), color logits (B, 8)) for each of the two layers; the projector's is first."""
        outputs = []
        for layer, norm, head in zip((FEATURE_LAYER, -1), self.norms, self.heads, strict=True):
            logits: Tensor = head(norm(hidden_states[layer]).mean(dim=1))
            outputs.append((logits[:, : len(SHAPES)], logits[:, len(SHAPES) :]))
        return outputs


def one_cycle(step: int, steps: int) -> float:
    """Learning rate factor: linear warm-up over the first 5% of the steps, cosine to zero after."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_tower(
    images: Tensor,
    attributes: Sequence[Attributes],
    held_out: int,
    settings: TowerTraining,
    *,
    seed: int,
    progress: Progress,
) -> tuple[SiglipVisionModel, dict[str, float]]:
    """Trains on all but the last `held_out` images and measures on those.

    Returns:
        The tower in eval mode, and the held-out accuracy of the heads on the projector's layer, by attribute.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=settings.hidden_size,
        intermediate_size=4 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    tower = SiglipVisionModel(config)
    heads = AttributeHeads(settings.hidden_size)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, settings.steps))
    labels = label_ids(attributes)
    trained = len(images) - held_out
    with task(progress, "vision tower", settings.steps):
        for step in range(1, settings.steps + 1):
            rows = torch.randint(0, trained, (settings.batch,), generator=generator)
            pixels = normalized(shifted(images[rows], generator))
            hidden_states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
            loss = torch.zeros(())
            for shape_logits, color_logits in heads(hidden_states):
                loss = loss + nn.functional.cross_entropy(shape_logits, labels[rows, 0], ignore_index=UNKNOWN)
                loss = loss + nn.functional.cross_entropy(color_logits, labels[rows, 1], ignore_index=UNKNOWN)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            progress.update(step, loss=f"{loss.item():.3f}")
            if step % 200 == 0 or step == settings.steps:
                accuracy = _accuracy(tower, heads, images[trained:], labels[trained:])
                found = ", ".join(f"{name} {share:.4f}" for name, share in accuracy.items())
                progress.message(f"vision tower, step {step}: held-out {found}")
    tower.eval()
    return tower, accuracy


@torch.no_grad()
def _accuracy(
    tower: SiglipVisionModel, heads: AttributeHeads, images: Tensor, labels: Tensor
) -> dict[str, float]:
    tower.eval()
    hidden_states = tower(pixel_values=normalized(images), output_hidden_states=True).hidden_states
    shape_logits, color_logits = heads(hidden_states)[0]
    tower.train()
    result = {}
    for name, logits, wanted in (
        ("shape", shape_logits, labels[:, 0]),
        ("color", color_logits, labels[:, 1]),
    ):
        known = wanted != UNKNOWN
        result[name] = (logits.argmax(-1)[known] == wanted[known]).float().mean().item()
    return result
