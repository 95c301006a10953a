"""`veneer generate`: one prompt continued by the base and by several adapters, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from veneer.data.chat.templates import asked
from veneer.errors import ConfigError
from veneer.models import adapted
from veneer.tasks.text.samples import continuation


def generate(
    prompt: str,
    *,
    adapter: Sequence[str] = (),
    model: str | None = None,
    base: bool = True,
    tokens: int = 60,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    chat: bool = False,
    device: str = "cpu",
    allow: Sequence[str] = (),
) -> dict[str, str]:
    """The continuation of the prompt by name: "base", then every adapter at its strength.

    prompt: text to go on from
    adapter: FOLDER, NAME=FOLDER or FOLDER@STRENGTH; may be given several times
    model: the base; the one that the adapters were made for unless given, or the built-in one without
    adapters base: show the base model's continuation too tokens: longest continuation temperature: 0 takes
    the likeliest token each time; higher is more surprising top_p: draw from the likeliest tokens that
    together have this probability seed: decides the draws; each model gets the same ones chat: treat the
    prompt as a user's message, written by the chat template of training device: where to compute allow: what
    to let through when loading, see veneer.load
    """
    if tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError("tokens must be 1 or more, temperature 0 or more, top_p above 0 and at most 1")
    if not adapter and model is None:
        model = "builtin"
    wanted = adapted.there(adapter)
    opened = adapted.open_base(model or adapted.base_of(wanted), wanted, torch.float32, device)
    adapted.check(opened.model, wanted, allow)
    options = {"max_new_tokens": tokens, "temperature": temperature, "top_p": top_p}
    found: dict[str, str] = {}
    shown: dict[str, adapted.Wanted | None] = {"base": None} if base or not wanted else {}
    for title, acting in {**shown, **{adapted.title(w): w for w in wanted}}.items():
        with adapted.alone(opened.model, acting, allow):
            own = adapted.chat_template(acting.folder) if acting else None
            text = asked(prompt, opened.tokenizer, own) if chat else prompt
            found[title] = continuation(opened.model, opened.tokenizer, text, chat=chat, seed=seed, **options)
    return found


def text(found: Mapping[str, str]) -> str:
    """Returns the continuations below each other, for people."""
    return "\n\n".join(f"== {name}\n{continued}" for name, continued in found.items())
