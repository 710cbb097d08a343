"""The demo's data, tokenizer and language model: what the LLaVA rows promise and what the template marks."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaProcessor,
    Qwen2ForCausalLM,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from cache_schema.errors import KdcacheError
from demo.easy_vqa import KINDS, Attributes, attributes_of, load_pictures, question_kind, write_dataset
from demo.language_model import (
    LanguageSize,
    conversation_texts,
    extract_vision_tower,
    train_language_model,
)
from demo.measure_teacher import answer_accuracy
from demo.teacher_texts import Texts, attention_of
from demo.tokenizer import CHAT_TEMPLATE, END, IMAGE, train_tokenizer, training_texts
from demo.vision_tower import FEATURE_LAYER, VISUAL_TOKENS

TEACHER = Path(__file__).parent.parent / "demo" / "teacher"


@pytest.fixture(scope="module")
def pictures():
    return load_pictures("train")


@pytest.fixture(scope="module")
def tokenizer(pictures):
    return train_tokenizer(training_texts(pictures))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), train_images=300, test_images=40, seed=3)


@pytest.fixture(scope="module")
def processor(tokenizer):
    image_processor = SiglipImageProcessorPil(size={"height": 64, "width": 64})
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def read(path):
    return json.loads(path.read_text())


def turns_of(row):
    values = [turn["value"] for turn in row["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


@pytest.mark.parametrize(
    ("answer", "kind"), [("circle", "shape"), ("teal", "color"), ("no", "yesno"), ("yes", "yesno")]
)
def test_question_kind(answer, kind):
    assert question_kind(answer) == kind


def test_an_unknown_answer_is_refused():
    with pytest.raises(ValueError, match="'maybe' is not an easy-VQA answer"):
        question_kind("maybe")


@pytest.mark.parametrize(
    ("questions", "shape", "color"),
    [
        ([("what color is the circle?", "red")], "circle", "red"),
        ([("what is the blue shape?", "triangle")], "triangle", "blue"),
        ([("is there a red shape?", "yes")], None, "red"),
        ([("is there not a red shape?", "no")], None, "red"),
        ([("is there a red shape?", "no")], None, None),
        ([("is no circle present?", "yes"), ("is a triangle present?", "no")], "rectangle", None),
        ([("does the image not contain a circle?", "no")], "circle", None),
    ],
)
def test_attributes_follow_from_the_answers(questions, shape, color):
    assert attributes_of(questions) == Attributes(shape=shape, color=color)


@pytest.mark.parametrize(
    ("shape", "color", "captions"),
    [
        ("circle", "red", ("red circle", "circle in red")),
        ("circle", None, ("circle",)),
        (None, "red", ("red shape",)),
        (None, None, ("plain shape",)),
    ],
)
def test_captions_say_what_is_known(shape, color, captions):
    assert Attributes(shape=shape, color=color).captions == captions


def test_no_answer_of_the_published_set_contradicts_the_derived_attributes(pictures):
    for picture in pictures:
        for question, answer in picture.questions:
            kind = question_kind(answer)
            if kind != "yesno":
                assert getattr(picture.attributes, kind) == answer, (picture.image_id, question)


def test_training_rows_hold_every_question_once_and_train_images_only(data, pictures):
    by_id = {picture.image_id: picture for picture in pictures}
    captions, conversations = read(data.captions), read(data.conversations)
    assert len(captions) == len(conversations) == 300
    moved = 0
    for caption, conversation in zip(captions, conversations, strict=True):
        assert caption["image"] == conversation["image"]
        split, name = conversation["image"].split("/")
        picture = by_id[int(name.removesuffix(".png"))]
        assert split == "train"
        assert (data.image_root / conversation["image"]).read_bytes() == picture.path.read_bytes()
        turns = turns_of(conversation)
        assert turns[0][0].startswith("<image>\n")
        assert all("<image>" not in question for question, _ in turns[1:])
        plain = [(question.removeprefix("<image>\n"), answer) for question, answer in turns]
        assert sorted(plain) == sorted(picture.questions)
        moved += plain not in (list(picture.questions), sorted(plain))
        [(request, said)] = turns_of(caption)
        assert request == "<image>\nDescribe the image."
        assert said in picture.attributes.captions
    assert moved > 250


def test_test_rows_are_single_questions_about_test_images(data):
    rows = read(data.test)
    expected = {picture.image_id: picture for picture in load_pictures("test")}
    images = {row["image"] for row in rows}
    assert len(images) == 40
    assert all(image.startswith("test/") for image in images)
    assert len({row["id"] for row in rows}) == len(rows)
    chosen = [expected[int(image.removeprefix("test/").removesuffix(".png"))] for image in images]
    assert len(rows) == sum(len(picture.questions) for picture in chosen)
    for row in rows:
        [(question, answer)] = turns_of(row)
        assert question.startswith("<image>\n")
        assert row["kind"] == question_kind(answer)


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(tmp_path):
    def digest(name, seed):
        written = write_dataset(
            tmp_path / name, train_images=40, test_images=20, max_yesno_per_image=2, seed=seed
        )
        files = (written.captions, written.conversations, written.test)
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]

    first, again, other = digest("a", 1), digest("b", 1), digest("c", 2)
    assert first == again
    assert all(x != y for x, y in zip(first, other, strict=True))


def test_yesno_questions_can_be_thinned(tmp_path):
    full = write_dataset(tmp_path / "full", train_images=1, test_images=30)
    thin = write_dataset(tmp_path / "thin", train_images=1, test_images=30, max_yesno_per_image=2)
    kept, every = read(thin.test), read(full.test)
    assert [row for row in kept if row["kind"] != "yesno"] == [row for row in every if row["kind"] != "yesno"]
    assert {row["id"] for row in kept} < {row["id"] for row in every}
    for image in {row["image"] for row in every}:
        thinned = sum(row["image"] == image and row["kind"] == "yesno" for row in kept)
        assert thinned == min(2, sum(row["image"] == image and row["kind"] == "yesno" for row in every))


def test_more_images_than_there_are_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot take 4001 images: the split has 4000"):
        write_dataset(tmp_path, train_images=4001)


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(KdcacheError, match=r"kdcache\[demo\]"):
        write_dataset(tmp_path)


@pytest.mark.parametrize(
    "text", ["is there not a teal circle?", "Grüße, 世界! 🙂", " two  blanks\n\n", "a\tb"]
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_is_small_deterministic_and_keeps_answers_whole(tokenizer, pictures, tmp_path):
    assert len(tokenizer) <= 512
    assert train_tokenizer(training_texts(pictures)).get_vocab() == tokenizer.get_vocab()
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.image_token_id}) == 3
    for answer in ("yes", "no", "rectangle", "teal"):
        assert len(tokenizer(f" {answer}")["input_ids"]) == 1
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == CHAT_TEMPLATE


CHAT = [
    {"role": "user", "content": "<image>\nwhat color is it?"},
    {"role": "assistant", "content": "teal"},
    {"role": "user", "content": "is there a circle?"},
    {"role": "assistant", "content": "no"},
]
PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "teal"}]},
    {"role": "user", "content": [{"type": "text", "text": "is there a circle?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
]


def test_the_template_writes_llava_turns(tokenizer, processor):
    text = (
        "USER: <image>\nwhat color is it? ASSISTANT: teal<|endoftext|>"
        "USER: is there a circle? ASSISTANT: no<|endoftext|>"
    )
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == text
    assert processor.apply_chat_template(PARTS) == text
    prompt = processor.apply_chat_template(PARTS[:3], add_generation_prompt=True)
    assert prompt == text.removesuffix(" no<|endoftext|>")


def test_the_generation_mask_covers_answers_and_their_ends(tokenizer):
    encoded = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    marked = [tokenizer.decode([token]) for token, inside in zip(ids, mask, strict=True) if inside]
    assert marked == [" teal", END, " no", END]
    prompt = tokenizer.apply_chat_template(CHAT[:3], add_generation_prompt=True)["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert len(ids) == len(prompt) + 2


def test_a_system_turn_is_refused_by_the_template(tokenizer):
    with pytest.raises(Exception, match="roles are user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "be brief"}], tokenize=False)


def test_the_teacher_reads_what_the_processor_makes(tokenizer, processor, pictures):
    texts = Texts(tokenizer)
    turns = pictures[0].questions[:3]
    row = texts.conversation(turns)
    ids, labels = row.ids, row.labels
    messages = []
    for number, (question, answer) in enumerate(turns):
        image = f"{IMAGE}\n" if number == 0 else ""
        messages += [
            {"role": "user", "content": image + question},
            {"role": "assistant", "content": answer},
        ]
    whole = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    start = whole["input_ids"].index(tokenizer.image_token_id)
    expand = [tokenizer.image_token_id] * VISUAL_TOKENS
    assert ids == whole["input_ids"][:start] + expand + whole["input_ids"][start + 1 :]
    mask = whole["assistant_masks"][:start] + [0] * VISUAL_TOKENS + whole["assistant_masks"][start + 1 :]
    assert labels == [token if inside else -100 for token, inside in zip(ids, mask, strict=True)]

    row = texts.caption("red circle")
    ids, labels = row.ids, row.labels
    caption = tokenizer("<image>red circle\n")["input_ids"]
    assert ids == expand + caption[1:]
    assert labels == [-100] * VISUAL_TOKENS + caption[1:]


def test_packed_questions_are_single_conversations_that_share_their_image(tokenizer, pictures):
    texts = Texts(tokenizer)
    turns = pictures[0].questions[:3]
    row = texts.questions(turns)
    mask, positions = attention_of([row, texts.caption("red circle")])
    parts = np.array(row.parts)
    for number, turn in enumerate(turns, start=1):
        alone = texts.conversation([turn])
        inside = np.flatnonzero((parts == 0) | (parts == number))
        assert [row.ids[position] for position in inside] == alone.ids
        assert [row.labels[position] for position in inside] == alone.labels
        assert positions[0, inside].tolist() == list(range(len(alone.ids)))
        last = mask[0, 0, inside[-1]].numpy()
        assert np.flatnonzero(last).tolist() == inside.tolist()
    assert mask.any(-1).all()  # padding too: a row without any would be NaN


def test_a_language_model_learns_the_text_and_loads_again(data, tokenizer, tmp_path):
    texts = conversation_texts(read(data.conversations), tokenizer)
    assert all(IMAGE not in text and text.endswith(END) for text in texts)
    size = LanguageSize(hidden_size=32, layers=1, heads=2)
    model = train_language_model(texts, tokenizer, tmp_path, size, steps=60, seed=1)
    ids = tokenizer(texts[0], return_tensors="pt")["input_ids"]
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 3.0  # uniform over the vocabulary: 5.9
    loaded = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert loaded(input_ids=ids, labels=ids).loss.item() == pytest.approx(loss, rel=1e-5)
    assert loaded.config.vocab_size >= len(tokenizer) > tokenizer.image_token_id
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATE


def test_conversations_are_cut_at_the_turns_asked_for(tmp_path):
    whole = write_dataset(tmp_path / "whole", train_images=30, test_images=5)
    cut = write_dataset(tmp_path / "cut", train_images=30, test_images=5, max_turns=4)
    for long, short in zip(read(whole.conversations), read(cut.conversations), strict=True):
        assert turns_of(short) == turns_of(long)[:4]
    assert max(len(turns_of(row)) for row in read(whole.conversations)) > 8
    assert read(cut.test) == read(whole.test)


def test_held_out_conversations_are_about_test_images(tmp_path):
    data = write_dataset(tmp_path, train_images=2, test_images=3, held_out_images=2)
    rows = json.loads(data.held_out.read_text(encoding="utf-8"))
    assert len(rows) == 2
    assert all(row["image"].startswith("test/") for row in rows)


def test_the_shipped_teacher_is_the_measured_one():
    record = json.loads((TEACHER / "TRAINING.json").read_text())
    weights = (TEACHER / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == record["sha256"]
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) < 8_000_000
    assert all(record["test"][kind]["accuracy"] >= 0.95 for kind in KINDS)
    model = AutoModelForImageTextToText.from_pretrained(TEACHER, dtype=torch.float32)
    assert model.config.vision_feature_layer == FEATURE_LAYER
    found = answer_accuracy(model, AutoProcessor.from_pretrained(TEACHER), load_pictures("test")[:12])
    assert all(found[kind]["accuracy"] >= 0.8 for kind in KINDS), found


def test_the_extracted_tower_sees_what_the_teacher_sees(tmp_path, pictures):
    extract_vision_tower(TEACHER, tmp_path)
    tower = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    image = Image.open(pictures[0].path)
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"]
    teacher = AutoModelForImageTextToText.from_pretrained(TEACHER, dtype=torch.float32).eval()
    with torch.no_grad():
        features = tower(pixels, output_hidden_states=True).hidden_states[-2]
        expected = teacher.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert features.shape == (1, VISUAL_TOKENS, 128)
    assert torch.equal(features, expected)
    assert (tmp_path / "preprocessor_config.json").exists()
    assert "tmp" not in (TEACHER / "config.json").read_text()
