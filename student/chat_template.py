"""The chat template of an export: it takes a message's content as text and as a list of parts."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from cache_schema.errors import KdcacheError, first_line

_TEXT_TO_PARTS = """\
{#- Text as content becomes parts, its image tokens image parts. -#}
{%- set made = namespace(messages=[], parts=[]) -%}
{%- for message in messages -%}
{%- set made.parts = message['content'] -%}
{%- if message['content'] is string -%}
{%- set made.parts = [] -%}
{%- for piece in message['content'].split(IMAGE) -%}
{%- if not loop.first -%}{%- set made.parts = made.parts + [{'type': 'image'}] -%}{%- endif -%}
{%- set text = piece if loop.first else piece.lstrip('\\n') -%}
{%- if text or loop.length == 1 -%}
{%- set made.parts = made.parts + [{'type': 'text', 'text': text}] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set made.messages = made.messages + [dict(message, content=made.parts)] -%}
{%- endfor -%}
{%- set messages = made.messages -%}
"""

_REMEDY = "correct chat_template.jinja in the model's folder, or train with a chat template such as llava_v1"
_TEXTS = (("user", "kdcache-first"), ("assistant", "kdcache-answer"), ("user", "kdcache-last"))


def settle_template(processor: Any) -> None:
    """Makes the processor's template take content as text too, where it takes parts alone.

    Chat clients send parts, lmms-eval's simple models and many scripts send text; a template that takes only
    one of them renders the other as nothing, without an error. KdcacheError where one would still be lost.
    """
    template = processor.chat_template
    if template is None:
        return
    if not isinstance(template, str):
        raise KdcacheError(
            f"the model has several chat templates ({', '.join(template)}): an export has one; keep it as "
            "chat_template.jinja"
        )
    if fault := _lost(processor, template, parts=True):
        raise KdcacheError(
            f"the chat template {fault} where a message's content is a list of parts; {_REMEDY}"
        )
    if _lost(processor, template, parts=False):
        template = _TEXT_TO_PARTS.replace("IMAGE", repr(processor.image_token)) + template
    if fault := _lost(processor, template, parts=False):
        raise KdcacheError(f"the chat template {fault} where a message's content is text; {_REMEDY}")
    processor.chat_template = processor.tokenizer.chat_template = template


def _lost(processor: Any, template: str, *, parts: bool) -> str:
    """What a template loses of a chat with an image and two questions; empty for nothing."""
    try:
        text, bare = (_rendered(processor, template, parts, image) for image in (True, False))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        return f"fails ({first_line(error)})"
    words = {
        "kdcache-first": "a question",
        "kdcache-answer": "an answer",
        "kdcache-last": "the last question",
    }
    if parts and "'type'" in text:
        return "prints the list itself"
    lost = [name for word, name in words.items() if word not in text]
    return (
        f"loses {' and '.join([*lost, *(['the image'] if text == bare else [])])}"
        if lost or text == bare
        else ""
    )


def _rendered(processor: Any, template: str, parts: bool, image: bool) -> str:
    messages: list[dict[str, Any]] = []
    for role, text in _TEXTS:
        shown = image and not messages
        content: Any = f"{processor.image_token}\n{text}" if shown else text
        if parts:
            content = [*([{"type": "image"}] if shown else []), {"type": "text", "text": text}]
        messages.append({"role": role, "content": content})
    rendered: str = processor.tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    return rendered
