"""The chat template of an export takes content as text and as parts, or nothing is written."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoProcessor

from cache_schema import KdcacheError
from cache_schema.progress import Silent
from models.folder import load_processor
from student.chat_template import settle_template
from student.export import export
from tests.chat_templates import FAMILIES
from tests.tiny_models import IMAGE, tiny_llava

SHIPPED = Path(__file__).resolve().parent.parent / "pipeline/templates"
LOOP = "{%- for message in messages -%}"
PARTS = "{%- for part in message.content -%}{{- part.text or '<image>' -}}{%- endfor -%}"
END = "{%- endfor -%}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("student"))


@pytest.fixture
def processor(folder):
    return load_processor(folder)


def chat(*, parts, image=True):
    question, answer = "What is it?", "A dog."
    mark = [{"type": "image"}] if image else []
    if not parts:
        first = f"{IMAGE}\n{question}" if image else question
        contents = (first, answer, "Which one?")
    else:
        text = [[{"type": "text", "text": each}] for each in (question, answer, "Which one?")]
        contents = ([*mark, *text[0]], text[1], text[2])
    return [
        {"role": role, "content": content}
        for role, content in zip(("user", "assistant", "user"), contents, strict=True)
    ]


def test_an_export_renders_text_and_parts_alike(folder, tmp_path):
    export(folder, tmp_path / "out", Silent())
    exported = AutoProcessor.from_pretrained(tmp_path / "out")
    expected = "USER: <image>\nWhat is it? ASSISTANT: A dog.<|endoftext|>USER: Which one? ASSISTANT:"
    own = load_processor(folder)
    assert own.apply_chat_template(chat(parts=True), tokenize=False) == expected
    assert "What" not in own.tokenizer.apply_chat_template(chat(parts=False), tokenize=False)
    for renders in (exported, exported.tokenizer):  # clients ask the one or the other
        for parts in (True, False):
            made = renders.apply_chat_template(chat(parts=parts), add_generation_prompt=True, tokenize=False)
            assert made == expected
    bare = exported.tokenizer.apply_chat_template(chat(parts=False, image=False), tokenize=False)
    assert bare == expected.replace("<image>\n", "")
    two = [{"role": "user", "content": f"{IMAGE}\n{IMAGE}\nSame?"}]
    assert (
        exported.tokenizer.apply_chat_template(two, tokenize=False)
        == "USER: <image>\n<image>\nSame? ASSISTANT:"
    )
    # of the export, an export is made without another change
    export(tmp_path / "out", tmp_path / "again", Silent())
    texts = [(tmp_path / name / "chat_template.jinja").read_text() for name in ("out", "again")]
    assert texts[0] == texts[1]


def test_templates_that_take_both_stay_as_they_are(processor):
    processor.chat_template = (SHIPPED / "llava_v1.jinja").read_text()
    settle_template(processor)
    assert processor.chat_template == (SHIPPED / "llava_v1.jinja").read_text()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            (SHIPPED / "plain.jinja").read_text(),
            "loses a question and the last question where .* a list of parts",
        ),
        (LOOP + "{{ message.content }}" + END, "prints the list itself"),
        (LOOP + "{{ message.role + message.content }}" + END, "fails .*list of parts"),
        (LOOP + PARTS.replace("'<image>'", "''") + END, "loses the image where"),
        ("{%- for message in messages if message.role == 'user' -%}" + PARTS + END, "loses an answer where"),
        ("{% if true %}", "fails"),
    ],
)
def test_templates_that_lose_something_are_refused(folder, tmp_path, template, message):
    broken = tmp_path / "student"
    shutil.copytree(folder, broken)
    (broken / "chat_template.jinja").write_text(template)
    with pytest.raises(KdcacheError, match=f"the chat template .*{message}"):
        export(broken, tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


TEXT_ALONE = {
    *("deepseek-vl2", "llama2", "minicpm-v", "molmo", "phi3.5-vision", "qwen3-thinking"),
    *("thinking-marked", "vicuna"),
}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_families_render_both_or_are_refused(name, processor):
    template = FAMILIES[name].text
    if name in TEXT_ALONE:
        processor.chat_template = template
        with pytest.raises(KdcacheError, match=r"where a message's content is a list of parts; correct"):
            settle_template(processor)
        template = (SHIPPED / "parts_to_text.jinja").read_text() + template  # as `build` stores it
    processor.chat_template = template
    settle_template(processor)
    for parts in (True, False):
        text = processor.tokenizer.apply_chat_template(
            chat(parts=parts), tokenize=False, add_generation_prompt=True
        )
        assert all(word in text for word in ("What is it?", "A dog.", "Which one?")), text
        assert "'type'" not in text
