"""Is the cache about this student? Refusals show both values and the remedy."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from cache_schema import IdentityMismatch, KdcacheError, TargetSpec, open_cache
from cache_schema.datasets.image_roots import open_root
from cache_schema.progress import Silent
from models.folder import load_model, load_processor
from student.checks import check_student
from student.collate import Collator, respan
from student.pixels import PixelInputs
from student.stages import DFT, SFT
from student.train import train
from tests.student_caches import fake_capture, make_world
from tests.test_student_train import losses_of, settings
from tests.tiny_models import tiny_llava


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), sizes=((40, 36), (20, 50)))


def check(world, *, student=None, cache=None, stage=DFT, **options):
    folder = student or world.student
    return check_student(
        open_cache(cache or world.cache),
        load_model(folder),
        load_processor(folder),
        open_root(world.image_root),
        stage,
        **options,
    )


def small_cache(world, tmp_path, **changes):
    return fake_capture(tmp_path / "cache", world.student, world.image_root, rows=6, **changes)


def test_a_student_that_fits_passes(world):
    assert check(world) is None


def test_another_tokenizer_is_refused(world, tmp_path):
    other = tiny_llava(tmp_path / "student", words=330)
    with pytest.raises(
        IdentityMismatch, match=r"tokenizer \w{12} \(330 tokens\) here, \w{12} \(340 tokens\).*--like"
    ):
        check(world, student=other)


def test_another_special_token_is_refused(world, tmp_path):
    shutil.copytree(world.student, tmp_path / "student")
    path = tmp_path / "student/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|endoftext|>"}))
    with pytest.raises(IdentityMismatch, match="tokenizer"):
        check(world, student=tmp_path / "student")


def test_another_image_token_is_refused(world, tmp_path):
    cache = small_cache(world, tmp_path, training={"image_token_id": 5})
    with pytest.raises(IdentityMismatch, match="image token id 2 here, 5 in the cache; set it"):
        check(world, cache=cache)


def test_too_few_embedding_rows_are_refused(world, tmp_path):
    cache = small_cache(world, tmp_path, training={"vocab_size": 400})
    with pytest.raises(IdentityMismatch, match="352 embedding rows here, 400 tokens in the cache"):
        check(world, cache=cache)


def test_another_template_is_refused_unless_adopted_or_plain(world, tmp_path):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'][-1]['text'] }}\n{% endfor %}"
    cache = small_cache(world, tmp_path, training={"chat_template": template})
    with pytest.raises(
        IdentityMismatch, match=r"chat template 'USER: <image>.*assistant: A dog.*--adopt-template"
    ):
        check(world, cache=cache)
    assert check(world, cache=cache, adopt_template=True) is None
    config = settings(world, tmp_path / "run", cache=cache, max_steps=1, adopt_template=True)
    train(config, Silent())
    assert AutoProcessor.from_pretrained(tmp_path / "run/model").chat_template == template
    plain = fake_capture(
        tmp_path / "plain",
        world.student,
        world.image_root,
        rows=6,
        training={"chat_template": template, "template_name": "plain"},
    )
    assert check(world, cache=plain) is None


def test_a_template_of_the_same_effect_passes(world, tmp_path):
    template = "{# another comment #}" + load_processor(world.student).chat_template
    assert check(world, cache=small_cache(world, tmp_path, training={"chat_template": template})) is None


def test_missing_targets_and_temperatures_are_refused(world, tmp_path):
    cache = small_cache(world, tmp_path, spec=TargetSpec(targets=("response",), top_k=4, precision="full"))
    with pytest.raises(
        IdentityMismatch, match=r"the cache holds response; use `--targets response` or build"
    ):
        check(world, cache=cache)
    hot = replace(DFT.only(("response",)), losses=replace(DFT.only(("response",)).losses, temperature=2.0))
    with pytest.raises(
        IdentityMismatch, match=r"temperature 2.0 is requested, the cache holds tails at \[1.0\]"
    ):
        check(world, cache=cache, stage=hot)
    drawn = replace(hot, losses=replace(hot.losses, temperature=1.0, tail="sampled"))
    with pytest.raises(IdentityMismatch, match="needs draws, the cache holds 0"):
        check(world, cache=cache, stage=drawn)
    assert check(world, cache=cache, stage=DFT.only(("response",))) is None
    assert check(world, cache=cache, stage=SFT) is None


def test_all_differences_come_in_one_line(world, tmp_path):
    other = tiny_llava(tmp_path / "student", words=330)
    cache = small_cache(world, tmp_path, spec=TargetSpec(targets=("response",), top_k=4, precision="full"))
    with pytest.raises(IdentityMismatch) as caught:
        check(world, student=other, cache=cache)
    text = str(caught.value)
    assert "tokenizer" in text
    assert "--targets response" in text
    assert "\n" not in text


def test_other_visual_tokens_are_refused_or_replaced(world, tmp_path):
    cache = small_cache(world, tmp_path, image_tokens=9)
    with pytest.raises(
        IdentityMismatch,
        match=r"image \S+ \(40x36\) is 16 visual tokens here, 9 in the cache.*--targets response",
    ):
        check(world, cache=cache)
    stage = DFT.only(("response",))
    assert check(world, cache=cache, stage=stage) == 16
    train(settings(world, tmp_path / "run", stage, cache=cache, max_steps=12, learning_rate=3e-3), Silent())
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < losses[0]


def test_respan_keeps_every_supervised_token(world, tmp_path):
    cache = open_cache(small_cache(world, tmp_path, image_tokens=9))
    for index in range(len(cache)):
        old = cache[index]
        new = respan(old, 16, 2)
        assert len(new.input_ids) == len(old.input_ids) + 7 * len(old.images)
        assert (new.input_ids[new.input_ids != 2] == old.input_ids[old.input_ids != 2]).all()
        assert (new.labels[new.labels != -100] == old.labels[old.labels != -100]).all()
        assert (new.labels[new.response_positions + 1] == old.labels[old.response_positions + 1]).all()
        for image in new.images:
            assert (np.flatnonzero(new.input_ids == 2) == image.positions).all()
    narrower = respan(next(cache[i] for i in range(len(cache)) if cache[i].images), 1, 2)
    assert (narrower.input_ids == 2).sum() == 1


def collator_of(world):
    return Collator(
        pixels=PixelInputs(load_processor(world.student)),
        image_root=open_root(world.image_root),
        pad_token_id=1,
        image_token_id=2,
        targets=("response", "visual", "relation"),
    )


def test_relations_stay_in_16_bits_until_they_are_on_a_device(world, tmp_path):
    """One tensor of 16-bit columns for all images; what it makes is what the cache's samples hold."""
    spec = TargetSpec(top_k=16, temperatures=(1.0, 2.0))
    cache = open_cache(small_cache(world, tmp_path, spec=spec))
    samples = [cache[index] for index in range(len(cache))]
    batch = collator_of(world)(samples)
    (group,) = batch.targets.plan.groups
    assert group.factor is None
    assert group.steps.columns.dtype == torch.int16
    moved = batch.to(torch.device("cpu")).targets.plan.groups[0].decoded()
    factors = [relation.factor for sample in samples for relation in sample.relations]
    places = [place for place, sample in enumerate(samples) for _ in sample.images]
    assert len(moved.factor) == len(factors) > 2
    for place, made in zip(moved.samples, moved.factor, strict=True):
        factor = factors[places.index(place)]
        assert made[: len(factor), : factor.shape[1]].numpy().tobytes() == factor.tobytes()
        assert not made[:, factor.shape[1] :].any()


def test_an_image_that_changed_or_vanished_is_refused(world, tmp_path):
    shutil.copytree(world.image_root, tmp_path / "images")
    moved = replace(world, image_root=tmp_path / "images")
    for path in (tmp_path / "images/pictures").iterdir():
        Image.new("RGB", (40, 36)).save(path)
    with pytest.raises(
        KdcacheError, match=r"is not the one the teacher saw: sha256 \w{12} here, \w{12} in the cache"
    ):
        train(settings(moved, tmp_path / "run"), Silent())
    shutil.rmtree(tmp_path / "images/pictures")
    with pytest.raises(KdcacheError, match=r"cannot be read under .*--image-root"):
        train(settings(moved, tmp_path / "run"), Silent())


def test_a_head_that_the_losses_do_not_know_is_refused(world, tmp_path, monkeypatch):
    from transformers import LlavaForConditionalGeneration

    forward = LlavaForConditionalGeneration.forward

    def scaled(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", scaled)
    with pytest.raises(KdcacheError, match="differ from its own logits"):
        train(settings(world, tmp_path / "run"), Silent())


def test_inputs_are_what_the_model_was_captured_with(world):
    """Padded ids, labels, masks and positions of a batch point at the right tokens."""
    cache = open_cache(world.cache)
    samples = [cache[index] for index in range(6)]
    batch = collator_of(world)(samples)
    length = batch.labels.shape[1]
    for place, sample in enumerate(samples):
        count = len(sample.input_ids)
        assert (batch.inputs["input_ids"][place, :count].numpy() == sample.input_ids).all()
        assert (batch.inputs["input_ids"][place, count:] == 1).all()
        assert batch.inputs["attention_mask"][place].sum() == count
        assert (batch.labels[place, count:] == -100).all()
        for kind in ("response", "visual"):
            record = batch.targets.positions[kind]
            mine = record.positions[record.samples == place] - place * length
            assert (mine.numpy() == sample.positions[kind]).all()
            if sample.records[kind] is not None and len(mine):
                own = sample.records[kind].token_ids
                assert (record.token_ids[record.samples == place].numpy() == own).all()
    relations = {relation.sample: relation for relation in batch.targets.relations}
    assert set(relations) == {place for place, sample in enumerate(samples) if sample.images}
    for place, relation in relations.items():
        assert (relation.positions.numpy() - place * length == samples[place].images[0].positions).all()
    assert len(batch.inputs["pixel_values"]) == len(relations)
    assert batch.inputs["pixel_values"].dtype == torch.float32
