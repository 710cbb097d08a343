"""Templates and samples: which tokens are supervised, and where images stand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoProcessor

from cache_schema.datasets.conversations import conversation_of
from cache_schema.errors import KdcacheError, RowRejected
from pipeline.samples import PreparedSample, SamplePreparer
from pipeline.templates import load_template
from tests.tiny_models import END, chat_template, tiny_llava, write_png

IMAGE_ID = 2
PATCHES = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llava(folder)
    root = tmp_path_factory.mktemp("images")
    for number in range(3):
        write_png(root / f"{number}.png", seed=number, size=(30 + 10 * number, 20))
    return AutoProcessor.from_pretrained(folder), root


def row(*turns: str, images: int = 0) -> dict[str, Any]:
    sides = ("human", "gpt")
    made = {"conversations": [{"from": sides[i % 2], "value": text} for i, text in enumerate(turns)]}
    return made | ({"images": [f"{n}.png" for n in range(images)]} if images else {})


def prepare(
    world: tuple[Any, Path], raw: dict[str, Any], template: str | None = None, **rest: Any
) -> PreparedSample:
    processor, root = world
    options = {"max_length": 2048, "image_token_id": IMAGE_ID, "image_root": root} | rest
    return SamplePreparer(processor, load_template(processor, template), **options).prepare(
        conversation_of(raw, 7)
    )


def texts(world: tuple[Any, Path], sample: PreparedSample) -> list[str]:
    return [world[0].tokenizer.decode(sample.input_ids[a:b]) for a, b in sample.label_spans]


ASKED = row("<image>\nWhat is the colour?", "The shape is red.", "Café, naïve?", "Oui — 漢字 😀!", images=1)

EXPECTED = {
    None: (
        f"USER: {'<image>' * PATCHES}\nWhat is the colour? ASSISTANT: The shape is red.{END}"
        f"USER: Café, naïve? ASSISTANT: Oui — 漢字 😀!{END}",
        [f" The shape is red.{END}", f" Oui — 漢字 😀!{END}"],
    ),
    "plain": (
        f"{'<image>' * PATCHES}The shape is red.\nOui — 漢字 😀!\n",
        ["The shape is red.\n", "Oui — 漢字 😀!\n"],
    ),
    "llava_v1": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. "
        f"USER: {'<image>' * PATCHES}\nWhat is the colour? ASSISTANT: The shape is red.{END}"
        f"USER: Café, naïve? ASSISTANT: Oui — 漢字 😀!{END}",
        [f" The shape is red.{END}", f" Oui — 漢字 😀!{END}"],
    ),
}


@pytest.mark.parametrize("template", EXPECTED)
def test_text_and_supervised_spans(world: tuple[Any, Path], template: str | None) -> None:
    sample = prepare(world, ASKED, template)
    whole, answers = EXPECTED[template]
    assert world[0].tokenizer.decode(sample.input_ids) == whole
    assert texts(world, sample) == answers
    assert sample.answers_kept == 2
    assert sample.row == 7
    (image,) = sample.images
    np.testing.assert_array_equal(np.flatnonzero(sample.input_ids == IMAGE_ID), image.positions)
    assert sample.input_ids.dtype == np.int32


def test_prefix_differences_find_the_same_spans(world: tuple[Any, Path], tmp_path: Path) -> None:
    unmarked = tmp_path / "unmarked.jinja"
    unmarked.write_text(chat_template(generation_marks=False))
    marked, found = prepare(world, ASKED), prepare(world, ASKED, str(unmarked))
    np.testing.assert_array_equal(marked.input_ids, found.input_ids)
    np.testing.assert_array_equal(marked.label_spans, found.label_spans)


@pytest.mark.parametrize("form", ["refuses lists", "prints lists", "marked"])
def test_templates_of_language_models_take_parts_too(
    world: tuple[Any, Path], tmp_path: Path, form: str
) -> None:
    """Text where ours have parts: as most tokenizers' own templates want it."""
    said = {
        "refuses lists": "{{ 'ASSISTANT: ' + message['content'] + '<|endoftext|>' }}",
        "prints lists": "ASSISTANT: {{ message.content }}<|endoftext|>",
        "marked": "ASSISTANT: {% generation %}{{ message.content }}<|endoftext|>{% endgeneration %}",
    }[form]
    template = tmp_path / "text.jinja"
    template.write_text(
        "{% for message in messages %}{% if message.role == 'user' %}USER: {{ message.content }} "
        f"{{% else %}}{said}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    sample = prepare(world, ASKED, str(template))
    assert world[0].tokenizer.decode(sample.input_ids) == (
        f"USER: {'<image>' * PATCHES}\nWhat is the colour? ASSISTANT: The shape is red.{END}"
        f"USER: Café, naïve? ASSISTANT: Oui — 漢字 😀!{END}"
    )
    assert texts(world, sample) == [f"The shape is red.{END}", f"Oui — 漢字 😀!{END}"]
    text = load_template(world[0], str(template)).text  # what the cache keeps and a student adopts
    chat = conversation_of(ASKED, 0).messages
    assert world[0].apply_chat_template(chat, chat_template=text).count("<image>\nWhat is the colour?") == 1


def test_breaks_after_an_end_of_turn_are_not_supervised(world: tuple[Any, Path], tmp_path: Path) -> None:
    template = tmp_path / "broken_lines.jinja"
    template.write_text(chat_template(generation_marks=False).replace("<|endoftext|>'", "<|endoftext|>\n'"))
    assert texts(world, prepare(world, ASKED, str(template))) == EXPECTED[None][1]
    template.write_text(chat_template(generation_marks=False).replace("<|endoftext|>'", "\n'"))
    assert texts(world, prepare(world, ASKED, str(template)))[0] == " The shape is red.\n"


def test_the_input_is_what_the_processor_makes_of_the_chat(world: tuple[Any, Path]) -> None:
    processor, root = world
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "path": str(root / "0.png")}, {"type": "text", "text": "Hm?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
    ]
    theirs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    ours = prepare(world, row("<image>\nHm?", "A.", images=1))
    np.testing.assert_array_equal(ours.input_ids, theirs["input_ids"][0])
    np.testing.assert_array_equal(ours.pixel_inputs["pixel_values"], theirs["pixel_values"])
    ((start, end),) = ours.label_spans
    np.testing.assert_array_equal(np.flatnonzero(theirs["assistant_masks"][0]), np.arange(start, end))


def test_answers_of_weight_0_are_context_alone(world: tuple[Any, Path]) -> None:
    raw = row("First?", "One.", "Second?", "Two.", "Third?", "Three.")
    whole = prepare(world, raw)
    raw["conversations"][1]["weight"] = raw["conversations"][5]["weight"] = 0
    sample = prepare(world, raw)
    np.testing.assert_array_equal(sample.input_ids, whole.input_ids)
    assert texts(world, sample) == [f" Two.{END}"]
    raw["conversations"][3]["weight"] = 0
    assert rejection(world, raw).reason == "no_supervised_tokens"


def test_several_images_are_told_apart_although_they_touch(world: tuple[Any, Path]) -> None:
    raw = row("<image><image>", "Two.", "Now\n<image>", "Three.", images=3)
    sample = prepare(world, raw, "plain")
    first, second, third = (image.positions for image in sample.images)
    assert [len(first), len(second), len(third)] == [PATCHES] * 3
    assert second[0] == first[-1] + 1
    assert third[0] > second[-1] + 1
    assert [image.path for image in sample.images] == ["0.png", "1.png", "2.png"]
    assert sample.images[1].width == 40
    assert sample.pixel_inputs["pixel_values"].shape[0] == 3


def test_text_only_rows_have_no_pixels(world: tuple[Any, Path]) -> None:
    sample = prepare(world, row("Hello?", "Hello."))
    assert not sample.images
    assert not sample.pixel_inputs
    assert sample.pixel_bytes == 0


def rejection(
    world: tuple[Any, Path], raw: dict[str, Any], template: str | None = None, **rest: Any
) -> RowRejected:
    with pytest.raises(RowRejected) as caught:
        prepare(world, raw, template, **rest)
    return caught.value


def test_rows_that_cannot_be_captured(world: tuple[Any, Path], tmp_path: Path) -> None:
    assert rejection(world, ASKED | {"images": ["none.png"]}).reason == "missing_image"
    assert rejection(world, row("q", "An <image> mark."), "plain").reason == "image_count"
    silent = tmp_path / "silent.jinja"
    silent.write_text("{% for m in messages %}{% generation %}{% endgeneration %}{{ m.role }}{% endfor %}")
    assert rejection(world, row("q", ""), str(silent)).reason == "no_supervised_tokens"
    assert rejection(world, row("q", "a"), str(silent)).reason == "span_mismatch"
    strict = tmp_path / "strict.jinja"
    strict.write_text("{{ raise_exception('no system, please') }}")
    refused = rejection(world, row("q", "a"), str(strict))
    assert refused.reason == "template"
    assert "no system, please" in refused.detail
    forgets = tmp_path / "forgets.jinja"  # writes the first answer differently once a second follows
    forgets.write_text(
        "{% for m in messages %}{{ m.content[0].text ~ ('.' if loop.last else ';') }}{% endfor %}"
    )
    assert rejection(world, row("a", "b", "c", "d"), str(forgets)).reason == "template"


def test_image_tokens_that_do_not_add_up_are_refused(world: tuple[Any, Path], tmp_path: Path) -> None:
    doubled = tmp_path / "doubled.jinja"
    doubled.write_text("<image><image>{% generation %}{{ messages[1].content[0].text }}{% endgeneration %}")
    assert rejection(world, ASKED, str(doubled)).reason == "processor"
    wrong_id = rejection(world, ASKED, image_token_id=5)
    assert wrong_id.reason == "image_tokens"
    assert "1 images" in wrong_id.detail


@pytest.mark.parametrize("over_long", ["quarantine", "cut"])
def test_over_long_samples(world: tuple[Any, Path], over_long: str) -> None:
    raw = row("<image>\nFirst?", "One.", "Second?", "Two.", "Third?\n<image>", "Three.", images=2)
    whole = prepare(world, raw)
    length = len(whole)
    assert len(prepare(world, raw, max_length=length, over_long=over_long)) == length
    if over_long == "quarantine":
        refused = rejection(world, raw, max_length=length - 1)
        assert refused.reason == "over_long"
        assert f"{length} tokens" in refused.detail
        return
    for limit in range(int(whole.label_spans[1, 1]), length):
        cut = prepare(world, raw, max_length=limit, over_long="cut")
        assert texts(world, cut) == [f" One.{END}", f" Two.{END}"]
        assert len(cut) == whole.label_spans[1, 1]
        assert cut.answers_kept == 2
        assert len(cut.images) == len(cut.pixel_inputs["pixel_values"]) == 1
        np.testing.assert_array_equal(cut.input_ids, whole.input_ids[: len(cut)])
    shortest = int(whole.label_spans[0, 1])
    assert len(prepare(world, raw, max_length=shortest, over_long="cut")) == shortest
    assert rejection(world, raw, max_length=shortest - 1, over_long="cut").reason == "over_long"


def test_a_cut_counts_what_the_template_writes_at_its_end(world: tuple[Any, Path], tmp_path: Path) -> None:
    talkative = tmp_path / "talkative.jinja"
    talkative.write_text(chat_template() + "That is all that was said about it.")
    raw = row("First?", "One.", "Second?", "Two.", "Third?", "Three.")
    whole = prepare(world, raw, str(talkative))
    cut = prepare(world, raw, str(talkative), max_length=len(whole) - 1, over_long="cut")
    assert cut.answers_kept == 2
    shorter = prepare(world, raw, str(talkative), max_length=len(cut) - 1, over_long="cut")
    assert shorter.answers_kept == 1


def test_templates_that_cannot_be_loaded(world: tuple[Any, Path], tmp_path: Path) -> None:
    processor, _ = world
    with pytest.raises(KdcacheError, match="plain, llava_v1"):
        load_template(processor, "no_such_template")
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for %}")
    with pytest.raises(KdcacheError, match="not valid Jinja"):
        prepare(world, ASKED, str(broken))
    processor_without = AutoProcessor.from_pretrained(processor.tokenizer.name_or_path)
    processor_without.chat_template = processor_without.tokenizer.chat_template = None
    with pytest.raises(KdcacheError, match="--template"):
        load_template(processor_without, None)
