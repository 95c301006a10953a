"""Renders conversations by a chat template, in the form of messages that the template can take."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import product
from typing import Any

from veneer import foreign
from veneer.data.chat.limits import limited
from veneer.data.forms.flags import FLAGS
from veneer.data.row_files import Row
from veneer.data.tokenizer import Tokenizer
from veneer.errors import DataError

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]

MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
TAGS = re.compile(r"</?think>")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates have for a turn's reasoning
# A template written for other messages fails with jinja2's exceptions or with these.
ORDINARY = (TypeError, ValueError, KeyError, AttributeError, IndexError)


class Conversation:
    """One row's messages and the texts that the tokenizer's template makes of their beginnings."""

    def __init__(self, row: Row, tokenizer: Tokenizer) -> None:
        """Raises DataError if the template takes the conversation in no form."""
        self.row, self.tokenizer = row, tokenizer
        self.tools = row.columns.get("tools")
        self.template: str = tokenizer.get_chat_template(None, self.tools)
        self.is_marked = MARKER.search(self.template) is not None
        self.specials = specials(tokenizer)
        self._texts: dict[tuple[int, bool], str] = {}
        self.messages = self._suitable()

    def _suitable(self) -> Messages:
        """Returns the messages in the first form that renders; templates differ in the form of tool calls."""
        given = [{k: v for k, v in m.items() if k not in FLAGS} for m in self.row.columns["messages"]]
        refusal: Exception | None = None
        found: list[tuple[Messages, str]] = []
        for messages in forms(given, self.template):
            try:
                found.append((messages, self._render(messages, False)))
            except failures() as e:
                refusal = e if refusal is None or (_is_own(e) and not _is_own(refusal)) else refusal
                continue
            if _is_suitable(*found[-1]):
                found = found[-1:]
                break
        if not found:
            raise DataError(f"{self.row.where}: the chat template refuses this conversation: {refusal}")
        messages, self._texts[len(given), False] = found[0]
        return messages

    def text(self, n: int, ask: bool = False) -> str:
        """Returns the first n messages as text; `ask` adds the request for an answer. Raises DataError."""
        if (n, ask) not in self._texts:
            try:
                self._texts[n, ask] = self._render(self.messages[:n], ask)
            except failures() as e:
                raise DataError(
                    f"{self.row.where}: the chat template refuses the first {n} messages: {e}"
                ) from None
        return self._texts[n, ask]

    def begins(self, n: int) -> bool:
        """Tells if the template takes the first n messages alone."""
        try:
            return bool(self.text(n))
        except DataError:
            return False

    def asked(self, n: int) -> tuple[str, str]:
        """Returns the first n messages without and with the request for an answer; "" if refused."""
        try:
            return self.text(n), self.text(n, ask=True)
        except DataError:
            return "", ""

    @cached_property
    def header(self) -> str:
        """Returns the template's request for an answer, as it follows a user's message."""
        user = [{"role": "user", "content": "x"}]
        try:
            before, prompt = self._render(user, False), self._render(user, True)
        except failures():
            return ""
        return prompt[common(before, prompt, self.specials) :]

    def marked(self, n: int) -> tuple[str, list[Span]]:
        """Returns the first n messages as text, and the characters (from, to) marked as generated."""
        return self._rendered(self.messages[:n], return_assistant_tokens_mask=True)

    def _render(self, messages: Messages, ask: bool) -> str:
        return self._rendered(messages, add_generation_prompt=ask)[0]

    def _rendered(self, messages: Messages, **options: bool) -> tuple[str, list[Span]]:
        """Renders as apply_chat_template does, which however removes every null from messages."""
        from transformers.utils.chat_template_utils import render_jinja_template

        given = {**self.tokenizer.special_tokens_map, "chat_template": self.template, "tools": self.tools}
        with limited(self.template):
            texts, spans = render_jinja_template([messages], **given, **options)
        return texts[0], spans[0] if spans else []


def failures() -> tuple[type[Exception], ...]:
    """Returns the exceptions of a template that cannot take some messages."""
    from jinja2.exceptions import TemplateError

    return (TemplateError, *ORDINARY)


def _is_own(e: Exception) -> bool:
    """Tells if a template raised the error in its own words, by raise_exception."""
    from jinja2.exceptions import TemplateError

    return type(e) is TemplateError


def forms(messages: Messages, template: str) -> Iterator[Messages]:
    """Yields the messages in the forms that templates expect, the usual one first.

    Content may be text or a list of parts, and absent content absent, null or empty. Arguments of tool calls
    may be an object or JSON text. A turn's reasoning is given under each name that the template mentions.
    """
    named = [_with_reasoning(m, template) for m in messages]
    seen = []
    contents: tuple[dict[str, Any], ...] = ({}, {"content": None}, {"content": ""})
    for listed, as_text, absent in product((False, True), (False, True), contents):
        form = [_form(m, listed, as_text, absent) for m in named]
        if form not in seen:
            seen.append(form)
            yield form


def _form(
    message: Mapping[str, Any], listed: bool, as_text: bool, absent: Mapping[str, Any]
) -> dict[str, Any]:
    form = {**absent, **message}
    if listed and isinstance(form.get("content"), str):
        form["content"] = [{"type": "text", "text": form["content"]}] if form["content"] else []
    if as_text and form.get("tool_calls"):
        form["tool_calls"] = [
            {**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}}
            for c in form["tool_calls"]
        ]
    return form


def _with_reasoning(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    reasoning = reasoning_of(message)
    names = [name for name in REASONING if re.search(rf"\b{name}\b", template)] if reasoning else []
    return {**message, **dict.fromkeys(names, reasoning)}


def reasoning_of(message: Mapping[str, Any]) -> str:
    """Returns the reasoning that a message has beside its content, or an empty string."""
    return next((str(message[name]) for name in REASONING if message.get(name)), "")


def split_reasoning(message: Mapping[str, Any]) -> tuple[str, str]:
    """Returns a message's reasoning and answer; the content may hold both, parted by </think>."""
    thought, content = reasoning_of(message), message.get("content") or ""
    content = content if isinstance(content, str) else "".join(p["text"] for p in content)
    if not thought and "</think>" in content:
        thought, _, content = content.rpartition("</think>")
        thought = thought.replace("<think>", "")
    return thought, content


def is_in(part: str, text: str) -> bool:
    """Tells if a text contains a part, plainly or as JSON; white space and thinking tags do not count."""
    forms = (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
    bare = _bare(text)
    return any(_bare(form) in bare for form in forms)


def _bare(text: str) -> str:
    return "".join(TAGS.sub("", text).split())


def _is_suitable(messages: Messages, text: str) -> bool:
    """Tells if a rendering has the last answer and all calls, and writes no Python object as arguments."""
    _, answer = split_reasoning(messages[-1])
    calls = [call for m in messages for call in m.get("tool_calls") or ()]
    objects = (a for a in (c["function"]["arguments"] for c in calls) if isinstance(a, dict) and a)
    has_all = is_in(answer, text) and all(has_call(call, text) for call in calls)
    return has_all and not any(repr(a) in text for a in objects)


def has_call(call: Mapping[str, Any], text: str) -> bool:
    """Tells if a text contains the name of a call and those of its arguments that are text."""
    given = call["function"]["arguments"]
    given = foreign.loads(given) if isinstance(given, str) else given
    values = [v for v in given.values() if isinstance(v, str)] if isinstance(given, dict) else []
    return all(is_in(part, text) for part in (call["function"]["name"], *values))


@lru_cache(maxsize=8)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


def specials(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Returns a pattern that matches the names of the tokenizer's special tokens."""
    return _pattern(tuple(str(t) for t in tokenizer.all_special_tokens))


def common(a: str, b: str, names: re.Pattern[str] | None) -> int:
    """Returns the number of leading characters that two texts share; special tokens count as a whole."""
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    for text in (a, b) if names is not None else ():
        for match in names.finditer(text, max(0, n - 64)):  # type: ignore[union-attr]
            if match.start() >= n:
                break
            if match.end() > n:
                n = match.start()
    return n
