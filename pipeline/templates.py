"""Chat templates: from messages to text, and which characters of it the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from cache_schema.errors import KdcacheError, RowRejected, WrongUsage

SHIPPED = ("plain", "llava_v1")
"""The templates of this package: LLaVA's pre-training prompt and its chat."""

_PYTHON_LIST = re.compile(r"""\[\{['"]type['"]""")
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A conversation as text. spans: half-open character ranges that the assistant wrote, ascending."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A Jinja chat template and the variables it is rendered with (special tokens, `image_token`).

    name: `processor`, a shipped name, or a file's path. specials: the tokenizer's special tokens.
    """

    name: str
    text: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    specials: frozenset[str] = frozenset()

    @property
    def marked(self) -> bool:
        """Whether the template says itself, by `{% generation %}`, what the assistant writes."""
        return _MARK.search(self.text) is not None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> Rendered:
        """The text of a conversation and the spans of its answers.

        Spans come from the `{% generation %}` marks, or else from prefix differences: what an answer
        adds to the text that asks for it. RowRejected (`template`) when the template refuses the
        messages or writes a turn differently once others follow.
        """
        if self.marked:
            text, spans = self._run(messages, marks=True)
            return Rendered(text=text, spans=tuple(span for span in spans if span[0] < span[1]))
        text, _ = self._run(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked, _ = self._run(messages[:index], add_generation_prompt=True)
            answered, _ = self._run(messages[: index + 1])
            if not (answered.startswith(asked) and text.startswith(answered.rstrip())):
                raise RowRejected(
                    "template",
                    f"template {self.name} has no generation marks and writes turn {index} differently when "
                    "others follow; mark the answers with {% generation %}",
                )
            spans.append((len(asked), len(asked) + len(self._without_trailing_break(answered[len(asked) :]))))
        return Rendered(text=text, spans=tuple(spans))

    def _without_trailing_break(self, answer: str) -> str:
        """Blanks after an end-of-turn token separate turns: no model has to write them."""
        stripped = answer.rstrip()
        return stripped if stripped.endswith(tuple(self.specials)) else answer

    def _run(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        marks: bool = False,
        add_generation_prompt: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self.text,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except jinja2.TemplateSyntaxError as error:
            raise KdcacheError(
                f"template {self.name} is not valid Jinja (line {error.lineno}): {error}"
            ) from error
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise RowRejected("template", f"template {self.name} refuses the row: {error}") from error
        return texts[0], spans[0] if marks else []


def load_template(processor: Any, name: str | None) -> ChatTemplate:
    """The processor's own template (None), a shipped one by name, or a Jinja file.

    One that takes the content of a message as text, as those of language models do, gets a beginning
    that makes text of parts; the whole of it is then the template, for the student too. KdcacheError when
    the processor has none; WrongUsage when `name` is neither shipped nor a file.
    """
    tokenizer = processor.tokenizer
    variables = {**tokenizer.special_tokens_map, "image_token": processor.image_token}
    if name is None:
        text = processor.chat_template
        if isinstance(text, Mapping):
            text = text.get("default")
        text = text or tokenizer.chat_template
        if not isinstance(text, str):
            raise KdcacheError(
                f"the teacher's processor has no chat template; choose one with --template "
                f"({', '.join(SHIPPED)}, or a Jinja file)"
            )
        name = "processor"
    elif name in SHIPPED:
        text = _shipped(name)
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise WrongUsage(f"template {name} is neither a file nor one of {', '.join(SHIPPED)}")
    specials = frozenset(token for token in tokenizer.all_special_tokens if token.strip())
    template = ChatTemplate(name=name, text=text, variables=variables, specials=specials)
    if not _takes_parts(template):
        flattened = replace(template, text=_shipped("parts_to_text") + text)
        if _takes_parts(flattened):
            return flattened
    return template


def _shipped(name: str) -> str:
    return files("pipeline").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")


def _takes_parts(template: ChatTemplate) -> bool:
    """Whether the text of a part comes out as it is: not refused, and not as the list's Python form."""
    chat = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "Asked?"), ("assistant", "Answered."))
    ]
    try:
        text = template.render(chat).text
    except RowRejected:
        return False
    return "Answered." in text and not _PYTHON_LIST.search(text)
