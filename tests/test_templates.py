"""Chat templates: what they write is what transformers writes, and only the answers are supervised."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from cache_schema.datasets.conversations import Conversation, conversation_of
from cache_schema.errors import KdcacheError, RowRejected
from pipeline import rendering
from pipeline.templates import ChatTemplate, load_template
from tests.chat_templates import CHATML, FAMILIES, THINK_FIRST, Family


def loaded(family: Family, folder: Path) -> ChatTemplate:
    """The family's template as a build loads it from a file."""
    path = folder / "t.jinja"
    path.write_text(family.text, encoding="utf-8")
    return load_template(processor_of(family), str(path))


def processor_of(family: Family) -> Any:
    tokenizer = SimpleNamespace(
        special_tokens_map={"bos_token": family.bos, "eos_token": family.eos},
        all_special_tokens=list(family.specials),
        chat_template=None,
    )
    return SimpleNamespace(tokenizer=tokenizer, image_token="<image>", chat_template=None)


def chat(*turns: str, image: bool = True, system: str | None = None) -> Conversation:
    said = [] if system is None else [{"from": "system", "value": system}]
    said += [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return conversation_of({"conversations": said} | ({"image": "0.png"} if image else {}), 0)


def answers(template: ChatTemplate, conversation: Conversation) -> list[str]:
    rendered = template.render(conversation.messages, conversation.supervised)
    return [rendered.text[start:end] for start, end in rendered.spans]


CASES: dict[str, tuple[str, ...]] = {
    "one": ("What is it?", "A red fox."),
    "several": ("What is it?", "A red fox.", "Is it big?", "No: it is\n\nsmall.", "Sure?", "Sure?"),
    "header words": ("assistant", "assistant", "user", "user", "Assistant:", "Assistant:"),
    "short": ("1+1?", "2", "2+2?", "4"),
    "with an empty answer": ("What is it?", "", "Is it big?", "Yes."),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_spans_are_the_answers(tmp_path: Path, name: str, case: str) -> None:
    family = FAMILIES[name]
    template = loaded(family, tmp_path)
    turns = CASES[case]
    expected = [f"{family.lead}{turn}{family.end}" for turn in turns[1::2] if turn]
    for image in (True, False):
        assert answers(template, chat(*turns, image=image)) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_an_empty_answer_alone_supervises_nothing(tmp_path: Path, name: str) -> None:
    template = loaded(FAMILIES[name], tmp_path)
    for nothing in ("", " ", "\n"):
        assert answers(template, chat("What is it?", nothing)) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_prompt_is_written_or_the_row_refused(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    conversation = chat("What is it?", "A fox.", "Big?", "Yes.", system="Answer in one word.")
    template = loaded(family, tmp_path)
    if family.system != "kept":
        with pytest.raises(RowRejected) as caught:
            template.render(conversation.messages)
        assert caught.value.reason == family.system
        return
    assert "Answer in one word." in template.render(conversation.messages).text
    assert answers(template, conversation) == [f"{family.lead}{a}{family.end}" for a in ("A fox.", "Yes.")]


@pytest.mark.parametrize("name", FAMILIES)
def test_blanks_around_an_answer(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    (first, second) = answers(loaded(family, tmp_path), chat("q?", " A fox.\n", "q?", "\nYes."))
    if family.trims:
        assert (first, second) == tuple(f"{family.lead}{a}{family.end}" for a in ("A fox.", "Yes."))
    else:
        assert first.removesuffix(family.end).strip() == "A fox."
        assert second.removesuffix(family.end).strip() == "Yes."


@pytest.mark.parametrize("name", FAMILIES)
def test_turns_of_weight_0_are_left_out(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    conversation = chat("q?", "One.", "q?", "Two.", "q?", "Three.")
    rendered = loaded(family, tmp_path).render(conversation.messages, (False, True, False))
    ((start, end),) = rendered.spans
    assert rendered.text[start:end] == f"{family.lead}Two.{family.end}"


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_is_what_transformers_writes(tmp_path: Path, name: str) -> None:
    template = loaded(FAMILIES[name], tmp_path)
    for turns in CASES.values():
        messages = chat(*turns).messages
        for count in range(1, len(messages) + 1):
            for prompt in (False, True):
                ours, spans = template._run(messages[:count], add_generation_prompt=prompt)
                theirs, marks = render_jinja_template(
                    conversations=[messages[:count]],
                    chat_template=template.text,
                    return_assistant_tokens_mask=template.marked,
                    add_generation_prompt=prompt,
                    **template.variables,
                )
                assert ours == theirs[0]
                assert spans == ([tuple(span) for span in marks[0]] if template.marked else [])


def test_a_prompt_that_opens_a_thought_is_the_reason_told(tmp_path: Path) -> None:
    family = Family(text=THINK_FIRST, specials=("<|user|>", "<|assistant|>", "</s>"))
    with pytest.raises(RowRejected) as caught:
        loaded(family, tmp_path).render(chat("q?", "Red.").messages)
    assert caught.value.reason == "template"
    assert r"asks for an answer with '<think>\n' but writes" in caught.value.detail


def family_of(text: str, **rest: Any) -> Family:
    return Family(text=text, specials=CHATML, eos="<|im_end|>", **rest)


HEADERS = (
    "{% for m in messages %}[{{ m.role }}] "
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}"
)


def test_a_header_without_a_generation_prompt_is_not_supervised(tmp_path: Path) -> None:
    template = loaded(family_of(HEADERS + "<|im_end|>\n{% endfor %}"), tmp_path)
    assert answers(template, chat("q?", "Red.", "q?", "Yes.")) == ["Red.<|im_end|>", "Yes.<|im_end|>"]


def test_a_lost_system_prompt_is_noticed(tmp_path: Path) -> None:
    without = HEADERS.replace("in messages %}", "in messages if m.role != 'system' %}")
    template = loaded(family_of(without + "<|im_end|>\n{% endfor %}"), tmp_path)
    with pytest.raises(RowRejected, match="system_dropped"):
        template.render(chat("q?", "Rouge.", system="Answer in French.").messages)
    captions = load_template(processor_of(family_of("")), "plain")  # which drops questions too
    assert answers(captions, chat("q?", "Rouge.", system="Answer in French.")) == ["Rouge.\n"]


@pytest.mark.parametrize("text", ["written twice", "left out", "by its length"])
def test_answers_that_cannot_be_found(tmp_path: Path, text: str) -> None:
    said = {
        "written twice": "{{ m.content[0].text }}{{ m.content[0].text }}",
        "left out": "nothing",
        "by its length": "{{ m.content[0].text }}{{ m.content[0].text | length }}",
    }[text]
    template = loaded(family_of("{% for m in messages %}[{{ m.role }}]" + said + "{% endfor %}"), tmp_path)
    with pytest.raises(RowRejected, match=r"template: .*mark the answers with"):
        template.render(chat("q?", "Red.", image=False).messages)


def test_the_clock_is_stopped(tmp_path: Path) -> None:
    family = family_of("{{ strftime_now('%H:%M:%S.%f %A %d. %B %Y') }}" + HEADERS + "<|im_end|>{% endfor %}")
    template = loaded(family, tmp_path)
    messages = chat("q?", "Red.").messages
    text = template.render(messages).text
    assert text.startswith("00:00:00.000000 Friday 26. July 2024[user] q?<|im_end|>")
    theirs, _ = render_jinja_template(conversations=[messages], chat_template=template.text)
    assert theirs == [text], "a student that adopts the template writes the same day"


@pytest.mark.parametrize("text", ["{{ ['a', 'b'] | random }}", "{{ lipsum(1) }}"])
def test_templates_that_draw_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(KdcacheError, match="draws at random"):
        loaded(family_of(text), tmp_path)


def test_template_files_by_their_encoding(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_bytes(b"\xef\xbb\xbf" + HEADERS.encode() + b"<|im_end|>{% endfor %}")
    processor = processor_of(family_of(""))
    assert load_template(processor, str(path)).render(chat("q?", "Red.").messages).text.startswith("[user]")
    path.write_bytes(HEADERS.encode("utf-16"))
    with pytest.raises(KdcacheError, match=r"t\.jinja is not UTF-8 text"):
        load_template(processor, str(path))
    processor.chat_template = "\ufeff" + HEADERS + "{% endfor %}"
    assert load_template(processor, None).render(chat("q?", "Red.").messages).text.startswith("[user]")


GROWING = (
    "{{% set n = namespace(s={}) %}}{{% for i in range(99) %}}{{% set n.s = n.s {} n.s %}}{{% endfor %}}"
)
MANY = "'a' * 1000000"
RUNAWAYS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(999) %}{% for b in range(9999) if false %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
    "recursive loops": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "output": "{% for a in range(99999) %}{{ messages[0].content[0].text * 999 }}{% endfor %}",
    "doubled by ~": GROWING.format("'ab'", "~"),
    "doubled by +": GROWING.format("'ab'", "+"),
    "squared": GROWING.format("99", "*"),
    "product": "{{ 'a' * 10000000000 }}",
    "list": "{{ ([1] * 10000000000) | length }}",
    "power": "{{ 10 ** 1000000000 }}",
    "width": "{{ '%9999999999d' % 1 }}",
    "width of a filter": "{{ '%9999999999d' | format(1) }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "method": "{{ 'a'.ljust(10000000000) }}",
    "replace": f"{{{{ ({MANY}) | replace('a', {MANY}) }}}}",
    "method replace": f"{{{{ ({MANY}).replace('a', {MANY}) }}}}",
    "join": f"{{{{ (['b'] * 200000) | join({MANY}) }}}}",
    "method join": f"{{{{ ({MANY}).join(['b'] * 200000) }}}}",
    "join of a map": f"{{{{ (['a'] * 200000) | map('replace', 'a', {MANY}) | join }}}}",
    "indent": "{{ ('\\n' * 1000000) | indent(1000000) }}",
    "indent of JSON": "{{ [1] | tojson(indent=1000000) }}",
    "word wrap": f"{{{{ ({MANY}) | wordwrap(1, true, {MANY}) }}}}",
    "tabs": "{{ ('\\t' * 1000000).expandtabs(1000000) }}",
    "translate": f"{{{{ ({MANY}).translate({{97: {MANY}}}) }}}}",
    "many widths": "{{ ('%9999d' * 100000) % 1 }}",
    "given width": "{{ '%*d' % (1000000000, 1) }}",
    "width in braces": "{{ ('{0:4000000}' * 1000).format(1) }}",
    "named fields": f"{{{{ ('%(a)s' * 100000) % {{'a': {MANY}}} }}}}",
    "numbered fields": f"{{{{ ('{{0}}' * 100000).format({MANY}) }}}}",
    "one text many times": f"{{% set x = [{MANY}] * 200000 %}}{{{{ x }}}}",
    "lists of themselves": "{% set ns = namespace(a=['x']) %}{% for i in range(60) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a == ns.a | list }}",
    "mappings of themselves": "{% set ns = namespace(a=['x']) %}{% for i in range(60) %}"
    "{% set ns.a = {'a': ns.a, 'b': ns.a} %}{% endfor %}{{ ns.a | tojson }}",
    "tuples of themselves": "{% set ns = namespace(a=('x',)) %}{% for i in range(60) %}"
    "{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ ns.a | string }}",
    "sum of lists": "{{ ([[1, 2]] * 80000) | sum(start=[]) | length }}",
    "a macro's output": f"{{% macro m() %}}{{% for i in range(90000) %}}{{{{ {MANY} }}}}{{% endfor %}}"
    "{% endmacro %}{{ m() | length }}",
    "a block's text": "{% set x %}{% for i in range(90000) %}" + "y" * 99999 + "{% endfor %}{% endset %}",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", RUNAWAYS)
def test_a_template_that_does_not_end_is_the_rows_fault(tmp_path: Path, kind: str) -> None:
    """Told when it is loaded where two short turns are too much, else of the row."""
    long_only = "{% if messages[0].content[0].text | length > 99 %}" + RUNAWAYS[kind] + "{% endif %}"
    with pytest.raises(KdcacheError, match=r"t\.jinja refuses the row: .*; give another template") as caught:
        loaded(family_of(RUNAWAYS[kind] + HEADERS + "{% endfor %}"), tmp_path)
    assert len(str(caught.value)) < 500
    template = loaded(family_of(long_only + HEADERS + "<|im_end|>{% endfor %}"), tmp_path)
    assert answers(template, chat("q?", "Red.")) == ["Red.<|im_end|>"]
    with pytest.raises(RowRejected) as rejected:
        template.render(chat("q?" * 99, "Red.", image=False).messages)
    assert rejected.value.reason == "template"


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ namespace(__class__=1) }}",
        "{% include 'other' %}",
        "{{ messages[99].role }}{{ undefined.attribute }}",
        "{{ 1 // 0 }}",
    ],
)
def test_what_a_template_may_not_do(tmp_path: Path, text: str) -> None:
    template = loaded(family_of(text + HEADERS + "{% endfor %}"), tmp_path)
    with pytest.raises(RowRejected, match="template"):
        template.render(chat("q?", "Red.").messages)


def test_the_characters_that_hold_the_places_are_refused_in_text(tmp_path: Path) -> None:
    template = loaded(FAMILIES["qwen2.5-vl"], tmp_path)
    with pytest.raises(RowRejected, match="noncharacters"):
        template.render(chat("q?", "\ufdd0Red.\ufdd1").messages)


def test_an_ordinary_rendering_is_far_from_the_bounds(tmp_path: Path) -> None:
    turns = [word for i in range(200) for word in (f"q{i}?", f"Answer {i}. " * 200)]
    for family in FAMILIES.values():
        assert len(answers(loaded(family, tmp_path), chat(*turns))) == 200
    assert rendering._ENVIRONMENT._work.steps < rendering.MOST_STEPS / 100
