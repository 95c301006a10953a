"""`veneer chat`: a conversation on the terminal with a base and its adapters, at any strengths."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from veneer.adapt.switch import using
from veneer.data.chat.templates import rendered
from veneer.errors import ConfigError, suggest
from veneer.foreign import visible
from veneer.models import adapted, machine
from veneer.tasks.text.samples import continuation

HELP = """/use NAME[@STRENGTH] ..  answer by these adapters, summed
/base                    answer by the base alone
/strength NUMBER         the strength of all adapters in use
/adapters                what is loaded, and what is in use
/system TEXT             the system message; begins anew
/again                   answer the last message once more
/clear                   forget the conversation
/quit                    leave, as Ctrl-D does"""


class Chat:
    """A conversation. messages: so far; strengths: of the adapters that answer, by name."""

    def __init__(self, opened: adapted.Opened, strengths: Mapping[str, float], **options: Any) -> None:
        self.model, self.tokenizer = opened.model, opened.tokenizer
        self.known = tuple(strengths)
        self.strengths, self.options = dict(strengths), options
        self.messages: list[dict[str, str]] = []
        self.transcript: list[dict[str, Any]] = []

    def command(self, line: str) -> str:
        """Carries out a line that begins with "/"; returns what to print. Raises ConfigError."""
        word, _, rest = line[1:].partition(" ")
        acts = {
            "use": self._use,
            "base": lambda _: self._set({}),
            "strength": self._strength,
            "adapters": lambda _: f"loaded: {', '.join(self.known) or 'none'}; in use: {self.in_use()}",
            "system": self._system,
            "again": self._again,
            "clear": lambda _: self._clear(),
            "help": lambda _: HELP,
        }
        if word not in acts:
            raise ConfigError(f"unknown command /{word}{suggest(word, acts)}")
        return acts[word](rest.strip())

    def answer(self, message: str) -> str:
        """Returns the model's answer, and keeps both."""
        asked = [*self.messages, {"role": "user", "content": message}]
        text = rendered(asked, self.tokenizer)
        with using(self.model, self.strengths):
            said = continuation(self.model, self.tokenizer, text, chat=True, **self.options).strip()
        self.messages = [*asked, {"role": "assistant", "content": said}]
        self.transcript.append({"adapters": dict(self.strengths), "message": message, "answer": said})
        return said

    def in_use(self) -> str:
        """Returns the adapters that answer, with their strengths."""
        return ", ".join(f"{n}@{s:g}" for n, s in self.strengths.items()) or "the base alone"

    def _use(self, words: str) -> str:
        found = {}
        for word in words.split():
            name, _, strength = word.partition("@")
            if name not in self.known:
                raise ConfigError(f"unknown adapter {name!r}{suggest(name, self.known)}")
            found[name] = _number(strength or "1")
        if not found:
            raise ConfigError("write /use NAME or /use NAME@STRENGTH")
        return self._set(found)

    def _strength(self, word: str) -> str:
        return self._set(dict.fromkeys(self.strengths, _number(word)))

    def _set(self, strengths: dict[str, float]) -> str:
        self.strengths = strengths
        return f"answers by {self.in_use()}"

    def _system(self, text: str) -> str:
        self.messages = [{"role": "system", "content": text}] if text else []
        return "begins anew"

    def _clear(self) -> str:
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
        return "forgotten"

    def _again(self, _: str) -> str:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ConfigError("no message to answer again")
        *self.messages, asked, _last = self.messages
        return self.answer(asked["content"])


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ConfigError(f"a strength must be a number, got {word!r}") from None


def chat(
    *,
    adapter: Sequence[str] = (),
    model: str | None = None,
    system: str | None = None,
    tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    allow: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Talks with the model on the terminal, and returns the conversation; /help lists commands.

    adapter: FOLDER, NAME=FOLDER or FOLDER@STRENGTH; may be given several times
    model: base model [that of the adapters, else the built-in one]
    system: system message
    tokens: longest answer
    temperature: 0 takes the likeliest token each time; higher is more surprising
    top_p: draw from the likeliest tokens that together have this probability
    seed: decides the draws
    dtype: number format of the weights: fp32, bf16, fp16, or auto for the fastest one here
    device: where to compute: cpu, cuda, ..; auto: cuda if available
    allow: what to let through when loading, see veneer.load
    """
    where = machine.device(device)
    base = model or (None if adapter else "builtin")
    number_format = machine.dtype(dtype, where)
    opened, wanted = adapted.open_all(
        adapter, model=base, dtype=number_format, device=str(where), allow=allow
    )
    options = {"max_new_tokens": tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    talk = Chat(opened, adapted.summed(wanted), **options)
    talk.messages = [{"role": "system", "content": system}] if system else []
    _say(f"{opened.base} on {where}; answers by {talk.in_use()}; /help lists commands")
    return _talked(talk)


def _talked(talk: Chat) -> list[dict[str, Any]]:
    """Answers what is typed, to the end; returns the conversation."""
    for line in _lines():
        try:
            answer = talk.command(line) if line.startswith("/") else talk.answer(line)
            print(visible(answer), flush=True)
        except ConfigError as e:
            _say(str(e))
    return talk.transcript


def _lines() -> Iterator[str]:
    """Yields what is typed, until /quit, Ctrl-D or Ctrl-C."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            return
        if not line or line.strip() in ("/quit", "/exit"):
            return
        if line.strip():
            yield line.strip()


def _say(sentence: str) -> None:
    print(visible(sentence), file=sys.stderr, flush=True)


def text(found: Sequence[Mapping[str, Any]]) -> str:
    """Returns the end of a conversation, for people."""
    return f"{len(found)} answers"
