"""Pixels of the short way are those of the whole processor, bit by bit."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPImageProcessorPil, LlavaProcessor, SiglipImageProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils import is_torchvision_available

from cache_schema import KdcacheError
from models.pixels import look_up, with_table
from student.pixels import PixelInputs
from tests.tiny_models import IMAGE, tiny_tokenizer

KINDS = {
    "square": SiglipImageProcessorPil(size={"height": 40, "width": 56}),
    "bilinear": SiglipImageProcessorPil(
        size={"height": 40, "width": 40}, resample=2, image_mean=[0.1, 0.5, 0.9]
    ),
    "crop": CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 36}),
    "crop that fills up": CLIPImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 32, "width": 32}
    ),
}
if is_torchvision_available():  # as test_pipeline_torchvision.py runs this file
    KINDS |= {
        "square, torchvision": SiglipImageProcessor(size={"height": 40, "width": 56}),
        "bilinear, torchvision": SiglipImageProcessor(
            size={"height": 40, "width": 40}, resample=2, image_mean=[0.1, 0.5, 0.9]
        ),
        "crop, torchvision": CLIPImageProcessor(
            size={"shortest_edge": 36}, crop_size={"height": 32, "width": 36}
        ),
    }


def processor_of(image_processor):
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tiny_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_gives_the_bits_of_the_processor(kind):
    processor = processor_of(KINDS[kind])
    pixels = PixelInputs(processor)
    assert pixels._table is not None
    random = np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in [(40, 56), (1, 1), (300, 7), (7, 300), (200, 200), (41, 55), (333, 217)]
    ]
    images.append(Image.new("RGB", (2100, 2100), (1, 20, 255)))  # in two pieces of pillow's memory
    found = pixels([images[:2], [], images[2:]])
    assert found.keys() == {"pixel_values"}
    for image, ours in zip(images, found["pixel_values"], strict=True):
        theirs = processor(text=[IMAGE], images=[[image]], return_tensors="pt")["pixel_values"]
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs[0])
    assert pixels([[], []]) == {}
    narrow = PixelInputs(processor, as_bytes=True)
    levels = narrow([images[:2], [], images[2:]])["pixel_values"]
    assert levels.dtype == torch.uint8
    looked_up = look_up(levels, narrow.table)
    assert levels.is_contiguous()
    assert looked_up.is_contiguous()
    with pytest.raises(KdcacheError, match=r"torch\.float32 where the bytes of images are expected"):
        look_up(torch.cat([levels, found["pixel_values"]]), narrow.table)
    assert torch.equal(looked_up, found["pixel_values"])


@pytest.mark.parametrize("change", [{"do_normalize": False}, {"do_rescale": False}, {"do_pad": True}])
def test_other_settings_go_through_the_processor(change):
    processor = processor_of(SiglipImageProcessorPil(size={"height": 40, "width": 40}, **change))
    pixels = PixelInputs(processor)
    assert pixels._table is None
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 30, 3), dtype=np.uint8))
    theirs = processor(text=[IMAGE], images=[[image]], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels([[image]])["pixel_values"], theirs)


def test_an_image_processor_of_its_own_is_asked():
    class Darker(SiglipImageProcessorPil):
        def normalize(self, image, mean, std, **options):
            return super().normalize(image, mean, std, **options) * 0.5

    class Other(SiglipImageProcessorPil):
        def resize(self, image, size, resample=None, **options):
            return 255 - super().resize(image, size, resample=resample, **options)

    for kind in (Darker, Other):
        assert PixelInputs(processor_of(kind(size={"height": 40, "width": 40})))._table is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_processor_with_the_table_makes_the_same_of_text_and_images(kind):
    processor = processor_of(KINDS[kind])
    faster = copy.deepcopy(with_table(processor))
    assert faster.image_processor is not processor.image_processor
    random = np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in [(40, 56), (9, 200)]
    ]
    asked = {"return_offsets_mapping": True, "return_text_replacement_offsets": True, "return_tensors": "pt"}
    found, expected = (
        one(text=[f"a {IMAGE} b {IMAGE} c"], images=[images], **asked) for one in (faster, processor)
    )
    assert found.pop("text_replacement_offsets") == expected.pop("text_replacement_offsets")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    grey = images[0].convert("L")  # not what the table is for
    for picture in (grey, np.array(images[0])):
        ours, theirs = (
            one(text=[IMAGE], images=[[picture]], return_tensors="pt")["pixel_values"]
            for one in (faster, processor)
        )
        assert torch.equal(ours, theirs)
