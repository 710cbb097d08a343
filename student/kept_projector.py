"""A teacher's projector in a student: as it is, or carried to the width of the student's language model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cache_schema.errors import KdcacheError, first_line
from models.folder import require_model_folder

IMAGES = 64
"""Images that a narrower projector is fitted to, at most."""

_LAYERS = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")


def keep_projector(student: Any, teacher: Path, image_processor: Any, images: Path | None) -> dict[str, Any]:
    """Gives a new Llava student the projector of a Llava teacher with the same vision features; returns how.

    Widths of language models D_t and D_s; the tokens of both are the same.
    - D_s = D_t: the teacher's matrices.
    - else a linear adapter (D_s, D_t) follows: the least-squares map from the teacher's token embeddings to
      the student's. It is folded into the projector's last matrix.
    - D_s > D_t: the D_s - D_t further inner units are 0: the fold is exact.
    - D_s < D_t: transformers' class has only D_s inner units. Those with the most effect stay, and the last
      matrix is fitted to all of them on `images`; `residual` is its relative error there.
    KdcacheError for another kind of teacher or features, or without images where they are needed.
    """
    theirs = _projector_of(teacher)
    projector = student.model.multi_modal_projector
    wide, narrow = theirs["linear_2.weight"].shape[0], projector.linear_2.weight.shape[0]
    features = projector.linear_1.weight.shape[1]
    if theirs["linear_1.weight"].shape[1] != features:
        raise KdcacheError(
            f"the projector of {teacher} takes features of width {theirs['linear_1.weight'].shape[1]}, the "
            f"student's tower gives {features}; take the teacher's vision tower"
        )
    told: dict[str, Any] = {"from": str(teacher), "widths": [wide, narrow], "residual": 0.0}
    made = theirs
    if wide != narrow:
        adapter = _adapter(theirs["embeddings"], student.get_input_embeddings().weight.detach().double())
        folded = {**theirs, "linear_2.weight": adapter @ theirs["linear_2.weight"]}
        folded["linear_2.bias"] = adapter @ theirs["linear_2.bias"]
        if wide < narrow:
            made = _padded(folded, narrow)
        else:
            seen = _features(student, image_processor, images)
            made, told["residual"] = _reduced(folded, narrow, seen)
    with torch.no_grad():
        for name in _LAYERS:
            projector.get_parameter(name).copy_(made[name])
    return told


def _projector_of(teacher: Path) -> dict[str, Tensor]:
    """Its matrices and biases, and the language model's token embeddings, in float64."""
    folder = require_model_folder(teacher, "teacher")
    wanted = {f"multi_modal_projector.{name}": name for name in _LAYERS} | {
        "embed_tokens.weight": "embeddings"
    }
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    for end, name in wanted.items():
                        if key.endswith(end) and "vision" not in key:
                            found[name] = opened.get_tensor(key).double()
        except SafetensorError as error:
            raise KdcacheError(f"{file} cannot be read: {first_line(error)}; fetch it again") from error
    if missing := sorted(set(wanted.values()) - set(found)):
        raise KdcacheError(
            f"{teacher} has no {missing[0]} of a projector of two layers: give the folder of a Llava teacher"
        )
    return found


def _adapter(theirs: Tensor, ours: Tensor) -> Tensor:
    """(D_s, D_t): the least-squares map of token embeddings, over the tokens that both have."""
    rows = min(len(theirs), len(ours))
    found: Tensor = torch.linalg.lstsq(theirs[:rows], ours[:rows], driver="gelsd").solution
    return found.T


def _padded(layers: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """The same function with further inner units that are always 0: GELU of 0 is 0."""
    first, bias = layers["linear_1.weight"], layers["linear_1.bias"]
    more = width - len(bias)
    second = layers["linear_2.weight"]
    return {
        "linear_1.weight": torch.cat([first, first.new_zeros(more, first.shape[1])]),
        "linear_1.bias": torch.cat([bias, bias.new_zeros(more)]),
        "linear_2.weight": torch.cat([second, second.new_zeros(len(second), more)], dim=1),
        "linear_2.bias": layers["linear_2.bias"],
    }


def _reduced(layers: Mapping[str, Tensor], width: int, seen: Tensor) -> tuple[dict[str, Tensor], float]:
    """`width` of the inner units and a last matrix fitted to the output of all on features `seen` (N, D_v);
    the relative error of the fit."""
    inner = torch.nn.functional.gelu(seen @ layers["linear_1.weight"].T + layers["linear_1.bias"])
    output = inner @ layers["linear_2.weight"].T + layers["linear_2.bias"]
    effect = inner.std(dim=0) * layers["linear_2.weight"].norm(dim=0)
    kept = torch.sort(torch.topk(effect, width).indices).values
    design = torch.cat([inner[:, kept], inner.new_ones(len(inner), 1)], dim=1)
    fitted = torch.linalg.lstsq(design, output, driver="gelsd").solution  # (width + 1, D_s)
    residual = float((design @ fitted - output).norm() / output.norm())
    made = {
        "linear_1.weight": layers["linear_1.weight"][kept],
        "linear_1.bias": layers["linear_1.bias"][kept],
        "linear_2.weight": fitted[:-1].T,
        "linear_2.bias": fitted[-1],
    }
    return made, residual


@torch.inference_mode()
def _features(student: Any, image_processor: Any, images: Path | None) -> Tensor:
    """(N, D_v) features that the projector takes of some images, in float64."""
    if images is None:
        raise KdcacheError(
            "the student's language model is narrower than the teacher's: the projector is fitted to images; "
            "give a folder of some with --projector-images"
        )
    files = sorted(images.iterdir())[:IMAGES] if images.is_dir() else []
    if not files:
        raise KdcacheError(f"--projector-images {images} is no folder with images; give one")
    found: list[Tensor] = []
    handle = student.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0].reshape(-1, inputs[0].shape[-1]).double())
    )
    try:
        for file in files:
            with Image.open(file) as image:
                pixels = image_processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]
            student.get_image_features(pixels.to(student.dtype))
    except OSError as error:
        raise KdcacheError(
            f"image {file} cannot be read: {first_line(error)}; give a folder of images alone"
        ) from error
    finally:
        handle.remove()
    return torch.cat(found)
