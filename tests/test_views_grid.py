"""Tokens are laid where the teacher's own code took them from: processor's pixels, model's packing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    Qwen2VLImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from views.grid import ImageSettings, Layout, Shape, framed, layout_of

SIDE, PATCH = 56, 7
PATCHES = SIDE // PATCH
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
SIZES = [(300, 120), (120, 300), (256, 256), (90, 333), (333, 90), (400, 399), (57, 91), (611, 200)]
NEWLINE = -1.0


def gradient(width: int, height: int) -> Image.Image:
    """A picture whose red tells how far to the right a pixel is, whose green tells how far down."""
    across = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    down = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    channels = np.stack([across, down, np.ones((height, width))], axis=-1)
    return Image.fromarray((channels * 255).round().astype(np.uint8))


def settings_of(image_processor: Any, model_type: str, **processor: Any) -> ImageSettings:
    document = json.loads(image_processor.to_json_string())
    named = document["image_processor_type"].replace("Pil", "")
    document |= {"image_processor_type": named}
    return ImageSettings(
        {
            "processor_config.json": json.dumps(processor | {"image_processor": document}).encode(),
            "config.json": json.dumps({"model_type": model_type}).encode(),
        }
    )


def patch_means(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """(N, 3, H, W) pixels in 0..1 as the mean colour of every patch, (N, patches, 2), in reading order."""
    means = torch.nn.functional.avg_pool2d(pixels[:, :2].double(), patch)
    return means.flatten(2).transpose(1, 2)


def expected(layout: Layout, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(count, 2) where the layout says each token looks, as (right, down), NEWLINE where nowhere; and
    (count,) whether a cell half as large again lies wholly on the picture."""
    found, inside = np.full((count, 2), NEWLINE), np.zeros(count, dtype=bool)
    for layer in layout.layers:
        assert layer.box is not None
        rows, columns = layer.tokens.shape
        start, end = np.array(layer.box[:2]), np.array(layer.box[2:])
        cell = (end - start) / (columns, rows)
        for (i, j), token in np.ndenumerate(layer.tokens):
            found[token] = start + cell * (j + 0.5, i + 0.5)
            far = np.abs(found[token] - 0.5) + 0.75 * cell
            inside[token] = bool((far <= 0.5).all())
    return found, inside


def assert_laid(layout: Layout, seen: np.ndarray) -> None:
    """Every token looks where the layout has it. At the picture's edge, a patch mixes in the padding."""
    assert layout.note is None
    told, inside = expected(layout, len(seen))
    np.testing.assert_array_equal(told == NEWLINE, seen == NEWLINE)
    assert inside.sum() > len(seen) // 6
    np.testing.assert_allclose(seen[inside], told[inside], atol=0.02)


def any_resolution_processor(size: dict[str, int]) -> LlavaNextImageProcessorPil:
    return LlavaNextImageProcessorPil(
        size=size,
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
        do_normalize=False,
    )


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("model", [LlavaNextModel, LlavaOnevisionModel])
def test_any_resolution(model: Any, width: int, height: int) -> None:
    """The processor's pixels of a gradient, each patch's mean packed by the model as if it were a feature."""
    onevision = model is LlavaOnevisionModel
    processor = any_resolution_processor(
        {"height": SIDE, "width": SIDE} if onevision else {"shortest_edge": SIDE}
    )
    made = processor(gradient(width, height), return_tensors="pt")
    features = patch_means(made["pixel_values"][0], PATCH)
    config = SimpleNamespace(
        image_grid_pinpoints=PINPOINTS, vision_config=SimpleNamespace(image_size=SIDE, patch_size=PATCH)
    )
    rest = (
        {"vision_aspect_ratio": "anyres_max_1"} if onevision else {"vision_feature_select_strategy": "full"}
    )
    packed, lengths = model.pack_image_features(
        SimpleNamespace(config=config),
        [features],
        made["image_sizes"],
        image_newline=torch.full((2,), NEWLINE, dtype=torch.float64),
        **rest,
    )
    settings = (
        settings_of(
            processor, "llava_onevision", num_image_tokens=PATCHES**2, vision_aspect_ratio="anyres_max_1"
        )
        if onevision
        else settings_of(processor, "llava_next", patch_size=PATCH, num_additional_image_tokens=1)
    )
    if onevision:
        settings.pixels["image_processor_type"] = "LlavaOnevisionImageProcessor"
    layout = layout_of(Shape(width=width, height=height, count=int(lengths[0])), settings)
    assert_laid(layout, packed[0].numpy())
    assert len(layout.layers[1].row_ends) == len(layout.layers[1].tokens)


@pytest.mark.parametrize("width", range(40, 700, 33))
@pytest.mark.parametrize("height", [61, 200, 336])
def test_counts_are_those_of_the_processor(width: int, height: int) -> None:
    image_processor = any_resolution_processor({"shortest_edge": SIDE})
    processor = SimpleNamespace(
        image_processor=image_processor,
        patch_size=PATCH,
        num_additional_image_tokens=0,
        _get_unpadded_features=lambda *a: LlavaNextProcessor._get_unpadded_features(None, *a),
    )
    count = LlavaNextProcessor._get_number_of_features(processor, height, width, SIDE, SIDE)
    settings = settings_of(image_processor, "llava_next", patch_size=PATCH)
    layout = layout_of(Shape(width=width, height=height, count=count), settings)
    assert layout.note is None
    assert sum(layer.tokens.size + layer.row_ends.size for layer in layout.layers) == count
    assert layout_of(Shape(width=width, height=height, count=count + 1), settings).note


def test_many_images_of_onevision_are_padded_to_squares() -> None:
    processor = any_resolution_processor({"height": SIDE, "width": SIDE})
    settings = settings_of(processor, "llava_onevision", num_image_tokens=PATCHES**2)
    settings.pixels["image_processor_type"] = "LlavaOnevisionImageProcessor"
    layout = layout_of(Shape(width=200, height=100, count=PATCHES**2 + 1, images=2), settings)
    assert layout.apart == (PATCHES**2,)
    assert layout.frame == (0.0, -0.5, 1.0, 1.5)
    assert framed(gradient(200, 100), layout.frame).size == (200, 200)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_qwen(width: int, height: int) -> None:
    patch, merge = 4, 2
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=merge,
        do_normalize=False,
        size={"shortest_edge": 32 * 32, "longest_edge": 96 * 96},
    )
    made = processor(gradient(width, height), return_tensors="pt")
    _, rows, columns = made["image_grid_thw"][0].tolist()
    # one row a patch, the patches of a token one after the other: (channel, time, y, x) in each
    patches = made["pixel_values"].reshape(rows * columns, 3, -1).double().mean(dim=2)
    tokens = patches.reshape(-1, merge * merge, 3).mean(dim=1)[:, :2].numpy()
    settings = settings_of(processor, "qwen2_vl")
    layout = layout_of(Shape(width=width, height=height, count=len(tokens)), settings)
    assert layout.layers[0].tokens.shape == (rows // merge, columns // merge)
    assert_laid(layout, tokens)
    old = settings.pixels | {"min_pixels": 32 * 32, "max_pixels": 96 * 96, "size": None}
    settings.pixels = old
    assert layout_of(Shape(width=width, height=height, count=len(tokens)), settings).note is None


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_tiles_that_the_text_names(width: int, height: int) -> None:
    """Idefics3 and SmolVLM: tiles in reading order, then the whole picture."""
    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 4 * SIDE}, max_image_size={"longest_edge": SIDE}, do_normalize=False
    )
    made = processor([[gradient(width, height)]], return_tensors="pt", return_row_col_info=True)
    rows, columns = made["rows"][0][0], made["cols"][0][0]
    features = patch_means(made["pixel_values"][0], 2 * PATCH)
    length = features.shape[1]
    names = [f"<row_{i + 1}_col_{j + 1}>" for i in range(int(rows)) for j in range(int(columns))]
    runs = [(length, f"\n<fake> {name}") for name in [*names, "<global-img>"]]
    settings = settings_of(processor, "idefics3", image_seq_len=length)
    shape = Shape(width=width, height=height, count=length * len(runs), runs=runs)
    layout = layout_of(shape, settings)
    assert_laid(layout, features.reshape(-1, 2).numpy())
    swapped = Shape(width=width, height=height, count=shape.count, runs=[*runs[1:], runs[0]])
    assert layout_of(swapped, settings).note


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_tiles_of_the_nearest_canvas(width: int, height: int) -> None:
    """InternVL: as many tiles as fit the picture's proportions, then the whole picture."""
    processor = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, max_patches=6, crop_to_patches=True, do_normalize=False
    )
    made = processor(gradient(width, height), return_tensors="pt")
    seen = patch_means(made["pixel_values"], 2 * PATCH)
    settings = settings_of(processor, "internvl", image_seq_length=seen.shape[1])
    layout = layout_of(Shape(width=width, height=height, count=seen[:, :, 0].numel()), settings)
    assert_laid(layout, seen.reshape(-1, 2).numpy())


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize(("width", "height"), [(200, 100), (90, 160)])
def test_one_grid_in_the_middle_or_around(pad: bool, width: int, height: int) -> None:
    processor = LlavaImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        do_pad=pad,
        do_normalize=False,
    )
    seen = patch_means(processor(gradient(width, height), return_tensors="pt")["pixel_values"], PATCH)[
        0
    ].numpy()
    settings = settings_of(processor, "llava", vision_feature_select_strategy="default")
    layout = layout_of(Shape(width=width, height=height, count=PATCHES**2), settings)
    assert_laid(layout, seen)
    shown = framed(gradient(width, height), layout.frame)
    assert shown.size == ((max(width, height),) * 2 if pad else (min(width, height),) * 2)


def layout_with(count: int, model_type: str = "llava", **pixels: Any) -> Layout:
    document = {"image_processor_type": "CLIPImageProcessor", "size": {"height": 336, "width": 336}} | pixels
    assets = {
        "preprocessor_config.json": json.dumps(document).encode(),
        "config.json": json.dumps({"model_type": model_type, "mm_tokens_per_image": 256}).encode(),
    }
    return layout_of(Shape(width=640, height=480, count=count), ImageSettings(assets))


def test_what_is_not_known_is_said_and_not_guessed() -> None:
    """64 queries of a resampler, four crops of Gemma 3 and twelve tokens would all pass for a grid."""
    assert layout_with(576).note is None
    assert layout_with(256, "gemma3", image_processor_type="Gemma3ImageProcessor").note is None
    for layout in (
        layout_with(64, "kosmos-2"),
        layout_with(1024, "gemma3", image_processor_type="Gemma3ImageProcessor"),
        layout_with(12),
        layout_with(577),
        layout_with(64, image_processor_type="SomeImageProcessor"),
        layout_of(Shape(width=9, height=9, count=5), ImageSettings({})),
        layout_of(Shape(width=9, height=9, count=0), ImageSettings({})),
    ):
        assert layout.note is not None
        assert layout.note.endswith("not over the image.")
        assert [layer.box for layer in layout.layers] == [None]


def test_a_class_token_stands_apart() -> None:
    assets = {
        "preprocessor_config.json": b'{"image_processor_type": "CLIPImageProcessorFast", "size": 336,'
        b'"do_center_crop": true, "crop_size": 336}',
        "processor_config.json": b'{"vision_feature_select_strategy": "full", '
        b'"num_additional_image_tokens": 1}',
        "config.json": b'{"model_type": "llava"}',
    }
    layout = layout_of(Shape(width=336, height=336, count=577), ImageSettings(assets))
    assert layout.apart == (0,)
    assert layout.layers[0].tokens[0, 0] == 1
    assert layout.layers[0].tokens.shape == (24, 24)


def test_a_frame_that_is_the_picture_changes_nothing(tmp_path: Path) -> None:
    picture = gradient(30, 20)
    assert framed(picture, (0.0, 0.0, 1.0, 1.0)) is picture
    assert framed(picture, (-0.5, 0.0, 1.5, 1.0)).getpixel((0, 0)) == (127, 127, 127)
    assert framed(picture, (0.25, 0.0, 0.75, 1.0)).size == (14, 20)
