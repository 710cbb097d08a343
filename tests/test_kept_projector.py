"""A student that keeps its teacher's projector, at equal, larger and smaller width."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

from cache_schema import KdcacheError
from cache_schema.errors import WrongUsage
from models.folder import load_model, load_processor
from student.assemble import new_student
from student.kept_projector import keep_projector
from student.settings import NewStudentConfig
from tests.test_student_evaluate import tiny_language_model
from tests.tiny_models import tiny_llava, tiny_tokenizer, write_png


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("teacher"), seed=1, hidden=32)


def student_of(folder, hidden):
    folder = tiny_llava(folder / "student", seed=2, hidden=hidden)
    return load_model(folder, torch.float32), load_processor(folder)


def adapted(teacher, student, features):
    """The teacher's projected features, by the least-squares map of its token embeddings to the student's."""
    model = load_model(teacher, torch.float32)
    theirs, ours = (each.get_input_embeddings().weight.detach().double() for each in (model, student))
    adapter = torch.linalg.pinv(theirs) @ ours
    return model.model.multi_modal_projector.double()(features) @ adapter


def test_at_equal_width_it_is_the_teachers(teacher, tmp_path):
    model, processor = student_of(tmp_path, 32)
    told = keep_projector(model, teacher, processor.image_processor, None)
    assert (told["widths"], told["residual"]) == ([32, 32], 0.0)
    theirs = load_model(teacher, torch.float32).model.multi_modal_projector.state_dict()
    assert all(torch.equal(theirs[k], v) for k, v in model.model.multi_modal_projector.state_dict().items())


def test_a_wider_student_folds_the_adapter_in_exactly(teacher, tmp_path):
    model, processor = student_of(tmp_path, 48)
    assert keep_projector(model, teacher, processor.image_processor, None)["residual"] == 0.0
    features = torch.randn(200, 24, dtype=torch.float64)
    with torch.no_grad():
        found = model.model.multi_modal_projector.double()(features)
        torch.testing.assert_close(found, adapted(teacher, model.float(), features), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")  # in the stock class
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert again.model.multi_modal_projector.linear_2.weight.shape == (48, 48)


def test_a_narrower_student_is_fitted_to_images_and_says_how_well(teacher, tmp_path):
    model, processor = student_of(tmp_path, 24)
    for seed in range(12):
        write_png(tmp_path / f"images/{seed}.png", seed=seed)
    drawn = model.model.multi_modal_projector.state_dict()
    drawn = {name: tensor.clone() for name, tensor in drawn.items()}
    told = keep_projector(model, teacher, processor.image_processor, tmp_path / "images")
    features = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, inputs: features.append(inputs[0].detach().reshape(-1, 24).double())
    )
    from PIL import Image

    for seed in range(12):
        image = Image.open(tmp_path / f"images/{seed}.png").convert("RGB")
        pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        model.get_image_features(pixels)
    hook.remove()
    seen = torch.cat(features)
    with torch.no_grad():
        found = model.model.multi_modal_projector.double()(seen)
        wanted = adapted(teacher, model.float(), seen)
        model.model.multi_modal_projector.load_state_dict(drawn)
        fresh = model.model.multi_modal_projector.double()(seen)
    residual = float((found - wanted).norm() / wanted.norm())
    assert residual == pytest.approx(told["residual"], rel=1e-3, abs=1e-6)
    assert 0 < residual < 0.2 < float((fresh - wanted).norm() / wanted.norm())


def test_what_cannot_be_kept_is_refused(teacher, tmp_path):
    model, processor = student_of(tmp_path, 24)
    with pytest.raises(KdcacheError, match="--projector-images"):
        keep_projector(model, teacher, processor.image_processor, None)
    with pytest.raises(KdcacheError, match=r"--projector-images .*none-here is no folder with images"):
        keep_projector(model, teacher, processor.image_processor, tmp_path / "none-here")
    (tmp_path / "mixed" / "folder").mkdir(parents=True)
    with pytest.raises(KdcacheError, match=r"image .*mixed/folder cannot be read: .*give a folder of images"):
        keep_projector(model, teacher, processor.image_processor, tmp_path / "mixed")
    other = tiny_llava(tmp_path / "other", seed=1, vision_hidden=16)
    with pytest.raises(KdcacheError, match="takes features of width 16, the student's tower gives 24"):
        keep_projector(model, other, processor.image_processor, None)
    with pytest.raises(WrongUsage, match="projector_images needs projector_from"):
        NewStudentConfig(
            vision_tower=teacher, language_model=teacher, out=tmp_path, projector_images=tmp_path
        )


def test_new_student_keeps_it_and_says_so(teacher, tmp_path):
    words = tiny_language_model(tmp_path / "words", tokenizer=tiny_tokenizer())
    write_png(tmp_path / "images/0.png", seed=0)
    made = new_student(
        NewStudentConfig(
            vision_tower=teacher,
            language_model=words,
            out=tmp_path / "new",
            projector_from=teacher,
            projector_images=tmp_path / "images",
        )
    )
    student = load_model(tmp_path / "new", torch.float32)
    width = student.config.text_config.hidden_size
    assert made["projector"]["widths"] == [32, width]
    assert made["projector"]["from"] == str(teacher)
