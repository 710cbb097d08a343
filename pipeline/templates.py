"""Chat templates: from messages to text, and which characters of it are the assistant's answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from cache_schema.datasets.conversations import text_of
from cache_schema.errors import KdcacheError, RowRejected, StoppedEarly, WrongUsage, first_line, shown
from pipeline.rendering import TooMuch, holds_marks, names_and_filters, render

SHIPPED = ("plain", "llava_v1")
"""The templates of this package: LLaVA's pre-training prompt and its chat."""

_PYTHON_LIST = re.compile(r"""\[\{['"]type['"]""")
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "\ufdd2{}\ufdd3"  # for an answer: no characters of any text

Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A conversation as text. spans: half-open character ranges of the supervised answers, ascending."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Habits:
    """What a template without marks writes around every answer.

    lead: blanks that an answer begins with, because the prompt that asks for it ends before them. end: what
    closes an answer whether or not others follow; several_ends: it depends. fault: why no answer of this
    template can be learned from.
    """

    lead: str = ""
    end: str = ""
    several_ends: bool = False
    fault: str | None = None


@dataclass(frozen=True, kw_only=True)
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
        """Whether the template marks the assistant's text by `{% generation %}`."""
        return _MARK.search(self.text) is not None

    def render(self, messages: Sequence[Mapping[str, Any]], supervised: Sequence[bool] = ()) -> Rendered:
        """The text of a conversation and the spans of its answers.

        supervised: for each answer whether it is to be learned; empty: all are. A span is an answer with
        the blanks before it that the prompt leaves to it and the end that the template gives it; nothing
        else that the template writes (headers, generation prompts, empty thoughts) is in it, and an empty
        answer has none. It is found inside the `{% generation %}` marks, or else by rendering the
        conversation once more with other answers. RowRejected `template` where it is not found,
        `turn_weight` where marks and answers do not match, `system_dropped` where the template leaves a
        system prompt out.
        """
        text, marked = self._run(messages)
        answers = [message for message in messages if message["role"] == "assistant"]
        if not self.marked:
            spans = self._unmarked(messages, text)
        elif len(marked) == len(answers):
            pairs = zip(marked, answers, strict=True)
            spans = [self._within(text, span, text_of(answer)) for span, answer in pairs]
        elif all(supervised):
            spans = [span for span in marked if self._says_something(text[slice(*span)])]
        else:
            raise RowRejected(
                "turn_weight",
                f"template {self._told} marks {len(marked)} spans for {len(answers)} answers, so none can "
                "be omitted by its weight",
            )
        self._refuse_a_lost_system_prompt(messages, text)
        learned = supervised or (True,) * len(spans)
        kept = [span for span, learn in zip(spans, learned, strict=True) if learn and span[0] < span[1]]
        return Rendered(text=text, spans=tuple(kept))

    @property
    def _told(self) -> str:
        return shown(Path(self.name).name or self.name, 60)

    def _within(self, text: str, span: Span, answer: str) -> Span:
        """A marked span without what the template writes in it before the answer, such as empty thoughts."""
        bare, written = answer.strip(), text[slice(*span)]
        if not bare:
            return span[0], span[0]
        if written.lstrip().startswith(bare) or bare not in written:
            return span
        return span[0] + written.rindex(bare), span[1]

    def _says_something(self, written: str) -> bool:
        for special in self.specials:
            written = written.replace(special, "")
        return bool(written.strip())

    def _unmarked(self, messages: Sequence[Mapping[str, Any]], text: str) -> list[Span]:
        """The span of every answer, empty for an empty one: where the text changes with the answers."""
        habits = self._habits
        if habits.fault is not None:
            raise RowRejected("template", f"template {self._told} {habits.fault}")
        answers = [text_of(message) for message in messages if message["role"] == "assistant"]
        fixed, _ = self._run(_with_answers(messages, [_STAND_IN.format(i) for i in range(len(answers))]))
        around: list[str] = []
        for number in range(len(answers)):
            before, found, fixed = fixed.partition(_STAND_IN.format(number))
            if not found or _STAND_IN.format(number) in fixed:
                raise self._not_found(number, "does not write it once and as it is")
            around.append(before)
        around.append(fixed)
        if not text.startswith(around[0]):
            raise self._not_found(0, "writes more than the answer otherwise when the answer changes")
        spans, at = [], len(around[0])
        for number, answer in enumerate(answers):
            following = around[number + 1]
            last = number == len(answers) - 1
            forms = (answer, answer.strip(), answer.lstrip(), answer.rstrip(), answer.strip("\n"))
            for form in forms:
                rest = text[at:]
                if rest == form + following if last else rest.startswith(form + following):
                    break
            else:
                raise self._not_found(number, "writes more than the answer otherwise when the answer changes")
            end = at + len(form)
            lead = habits.lead if text[:at].endswith(habits.lead) else ""
            closing = self._end_of(following, number, last=last)
            spans.append((at - len(lead), end + len(closing)) if form.strip() else (at, at))
            at = end + len(following)
        return spans

    def _not_found(self, number: int, why: str) -> RowRejected:
        return RowRejected(
            "template",
            f"template {self._told} has no generation marks and answer {number} is not found: it {why}; mark "
            "the answers with {% generation %}",
        )

    def _end_of(self, following: str, number: int, *, last: bool) -> str:
        """How much of what follows an answer is its end."""
        if self._habits.end and following.startswith(self._habits.end):
            return self._habits.end
        closing = self._to_first_special(following)
        if closing and (last or closing.strip() == self.variables.get("eos_token")):
            return closing
        if not last and self._habits.several_ends:
            raise self._not_found(number, "ends an answer differently when others follow")
        return ""

    def _to_first_special(self, following: str) -> str:
        """Whitespace and a special token after it; empty where other text follows."""
        begins = following.lstrip()
        for special in sorted(self.specials, key=len, reverse=True):
            if begins.startswith(special):
                return following[: len(following) - len(begins) + len(special)]
        return ""

    @cached_property
    def _habits(self) -> _Habits:
        first, second = _STAND_IN.format(0), _STAND_IN.format(1)
        chat = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (
                ("user", "Is it?"),
                ("assistant", first),
                ("user", "Now?"),
                ("assistant", second),
            )
        ]
        try:
            asked, _ = self._run(chat[:1], add_generation_prompt=True)
            alone, _ = self._run(chat[:2])
            whole, _ = self._run(chat)
        except RowRejected:
            return _Habits()  # one that wants a system prompt, an image, ...
        if first not in alone or first not in whole or second not in whole:
            return _Habits()
        before = alone[: alone.index(first)]
        if not alone.startswith(asked):
            common = len(_common(asked, before))
            written = shown(repr(before[common:]), 60) if before[common:] else "not so"
            return _Habits(
                fault=f"asks for an answer with {shown(repr(asked[common:]), 60)} but writes {written} "
                "before one: a student would be asked otherwise than taught; make both the same"
            )
        lead = before[len(asked) :]
        after = [whole.partition(answer)[2] for answer in (first, second)]
        end = _common(*after)
        places = [end.index(special) + len(special) for special in self.specials if special in end]
        return _Habits(
            lead=lead if lead.isspace() else "",
            end=end[: min(places)] if places else end,
            several_ends=not end and all(after),
        )

    def _refuse_a_lost_system_prompt(self, messages: Sequence[Mapping[str, Any]], text: str) -> None:
        """RowRejected where the system prompt is not in a text that has the questions."""
        if not messages or messages[0]["role"] != "system":
            return
        written = _bare(text)
        if _bare(text_of(messages[0])) in written:
            return
        asked = [_bare(text_of(message)) for message in messages if message["role"] == "user"]
        if any(question and question in written for question in asked):
            raise RowRejected(
                "system_dropped", f"template {self._told} does not write the row's system prompt"
            )

    def _run(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """(text, marked spans)"""
        if any(holds_marks(text_of(message)) for message in messages):
            raise RowRejected("template", "the row has the noncharacters U+FDD0 or U+FDD1 in its text")
        variables = {
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.variables,
        }
        try:
            return render(self.text, variables)
        except jinja2.TemplateSyntaxError as error:
            raise KdcacheError(
                f"template {self.name} is not valid Jinja (line {error.lineno}): {first_line(error)}"
            ) from error
        except StoppedEarly:  # a signal that arrived here is no fault of the row
            raise
        except Exception as error:  # templates call methods of strings and lists, which raise what they like
            raise RowRejected(
                "template", f"template {self._told} refuses the row: {first_line(error)}"
            ) from error


def _bare(text: str) -> str:
    return "".join(text.split())


def _common(one: str, other: str) -> str:
    """The longest beginning of both."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return min(one, other, key=len) if length is None else one[:length]


def _with_answers(messages: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[dict[str, Any]]:
    """The conversation with the text of its answers replaced."""
    left = iter(answers)
    changed = []
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant":
            others = [part for part in content if part["type"] != "text"]
            content = [*others, {"type": "text", "text": next(left)}]
        changed.append({**message, "content": content})
    return changed


def load_template(processor: Any, name: str | None) -> ChatTemplate:
    """The processor's own template (None), a shipped one by name, or a Jinja file.

    One that takes the content of a message as text, as those of language models do, gets a beginning
    that makes text of parts, and one that reads the clock a beginning that stops it; the whole of it is
    then the template, for the student too. KdcacheError when the processor has none, or it cannot be
    read or is not the same every time; WrongUsage when `name` is neither shipped nor a file.
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
        text = _read(Path(name))
    else:
        raise WrongUsage(f"template {name} is neither a file nor one of {', '.join(SHIPPED)}")
    specials = frozenset(token for token in tokenizer.all_special_tokens if token.strip())
    text = _of_one_moment(name, text.removeprefix("\ufeff"))
    template = ChatTemplate(name=name, text=text, variables=variables, specials=specials)
    if not _takes_parts(template):
        flattened = replace(template, text=_shipped("parts_to_text") + text)
        if _takes_parts(flattened):
            return flattened
    return template


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise KdcacheError(f"template {path} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise KdcacheError(f"template {path} cannot be read: {error.strerror or error}") from error


def _of_one_moment(name: str, text: str) -> str:
    """The template with a fixed clock. KdcacheError for a template with random numbers or invalid Jinja."""
    try:
        names, filters = names_and_filters(text)
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise KdcacheError(
            f"template {name} is not valid Jinja (line {line}): {first_line(error)}"
        ) from error
    if "random" in filters or "lipsum" in names:
        raise KdcacheError(f"template {name} draws at random, so no two renderings agree; write it without")
    return _shipped("pinned_date") + text if "strftime_now" in names else text


def _shipped(name: str) -> str:
    return files("pipeline").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")


def _takes_parts(template: ChatTemplate) -> bool:
    """Whether the text of a part is rendered as it is: not refused, and not as a Python list."""
    chat = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "Asked?"), ("assistant", "Answered."))
    ]
    try:
        text, _ = template._run(chat)
    except RowRejected as error:
        if isinstance(error.__cause__, TooMuch):  # on two short turns: on every row
            raise KdcacheError(f"{error.detail}; give another template") from error
        return False
    return "Answered." in text and not _PYTHON_LIST.search(text)
