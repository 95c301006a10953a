"""Chat templates by name: the package's own, a file's, or a tokenizer's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from veneer.data.chat.limits import limited
from veneer.data.tokenizer import Tokenizer
from veneer.errors import ConfigError, option, suggest

PLAIN = "plain"
ENDING = ".jinja"
FOLDER = files("veneer.data.chat") / "named"
# Names that templates write and that a tokenizer should have as one token each.
NAMES = re.compile(r"<\|[A-Za-z_]+\|>|<(?:start|end)_of_turn>|\[/?[A-Z_]+\]")


def names() -> list[str]:
    """Returns the names of the package's own templates."""
    return sorted(p.name.removesuffix(ENDING) for p in FOLDER.iterdir() if p.name.endswith(ENDING))


def chosen(wanted: str, tokenizer: Tokenizer) -> str:
    """Returns the template of this name: a file, one of the tokenizer's own by name, or one of `names()`.

    Raises ConfigError for an unknown name and an unreadable file.
    """
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if Path(wanted).is_file():
        try:
            return Path(wanted).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"{option('chat_template')}: the file {wanted} must be UTF-8 text") from None
    if wanted in own:
        return str(own[wanted])
    if wanted not in names():
        raise ConfigError(
            f"{option('chat_template')} must be a file or a name, got"
            f" {wanted!r}{suggest(wanted, [*own, *names()])}"
        )
    return packaged(wanted, tokenizer)


def packaged(name: str, tokenizer: Tokenizer) -> str:
    """Returns a template of `names()`; the plain one writes the tokenizer's beginning token, if any."""
    from veneer.data.tokens import beginning

    text = (FOLDER / f"{name}{ENDING}").read_text(encoding="utf-8")
    return "{{- bos_token }}" + text if name == PLAIN and beginning(tokenizer) else text


def choose(tokenizer: Tokenizer, wanted: str | None) -> list[str]:
    """Gives the tokenizer the wanted template, where one is named. Returns notes on it."""
    if wanted is None:
        return []
    tokenizer.chat_template = chosen(wanted, tokenizer)
    known = set(tokenizer.get_vocab())
    odd = sorted({name for name in NAMES.findall(tokenizer.chat_template) if name not in known})
    if not odd or wanted == PLAIN:
        return []
    return [
        f"chat_template {wanted!r} uses {', '.join(odd)}, which this tokenizer spells out in several tokens"
    ]


def described(tokenizer: Tokenizer, wanted: str | None) -> str:
    """Returns words for the template that conversations get."""
    if wanted is not None:
        return f"the chat template {Path(wanted).name!r}"
    if tokenizer.chat_template:
        return "the chat template of the base's tokenizer"
    return f"the chat template {PLAIN!r}, since the base's tokenizer lacks one"


def complete(tokenizer: Tokenizer) -> Any:
    """Returns the tokenizer with a template: the plain one, unless it has its own."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = packaged(PLAIN, tokenizer)
    return tokenizer


def asked(message: str, tokenizer: Tokenizer, template: str | None = None) -> str:
    """Returns a user's message with the request for an answer, by this template or the tokenizer's own."""
    return rendered([{"role": "user", "content": message}], tokenizer, template)


def rendered(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, template: str | None = None) -> str:
    """Returns messages with the request for an answer, by this template or the tokenizer's own."""
    template = template or tokenizer.chat_template or packaged(PLAIN, tokenizer)
    with limited(template):
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                chat_template=None if isinstance(template, dict) else template,
                tokenize=False,
                add_generation_prompt=True,
            )
        )
