"""`veneer generate`: one prompt continued by the base and by several adapters, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from veneer.data.chat.templates import asked
from veneer.errors import ConfigError
from veneer.models import adapted, machine
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
    dtype: str = "auto",
    device: str = "auto",
    stream_base: bool = False,
    allow: Sequence[str] = (),
) -> dict[str, str]:
    """The continuation of the prompt by name: "base", then every adapter at its strength.

    prompt: text to go on from
    adapter: FOLDER, NAME=FOLDER or FOLDER@STRENGTH; may be given several times
    model: base model [that of the adapters, else the built-in one]
    base: show the base model's continuation too
    tokens: longest continuation
    temperature: 0 takes the likeliest token each time; higher is more surprising
    top_p: draw from the likeliest tokens that together have this probability
    seed: decides the draws; each model gets the same ones
    chat: treat the prompt as a user's message, written by the chat template of training
    dtype: number format of the weights: fp32, bf16, fp16, or auto for the fastest one here
    device: where to compute: cpu, cuda, ..; auto: cuda if available
    stream_base: leave the base on disk, one block at a time in memory; each token reads the whole base
    allow: what to let through when loading, see veneer.load
    """
    if tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError("tokens must be 1 or more, temperature 0 or more, top_p above 0 and at most 1")
    opened, wanted = _opened(adapter, model, dtype, device, allow, stream_base)
    options = {"max_new_tokens": tokens, "temperature": temperature, "top_p": top_p}
    found: dict[str, str] = {}
    shown: dict[str, adapted.Wanted | None] = {"base": None} if base or not wanted else {}
    for title, acting in {**shown, **{adapted.title(w): w for w in wanted}}.items():
        with adapted.alone(opened.model, acting, allow):
            own = adapted.chat_template(acting.folder) if acting else None
            text = asked(prompt, opened.tokenizer, own) if chat else prompt
            found[title] = continuation(opened.model, opened.tokenizer, text, chat=chat, seed=seed, **options)
    return found


def _opened(
    specs: Sequence[str], model: str | None, dtype: str, device: str, allow: Sequence[str], stream: bool
) -> tuple[adapted.Opened, list[adapted.Wanted]]:
    """Returns the base alone, and the adapters, each of which can be loaded."""
    if not specs and model is None:
        model = "builtin"
    wanted, where = adapted.there(specs), machine.device(device)
    base = model or adapted.base_of(wanted)
    opened = adapted.open_base(base, wanted, machine.dtype(dtype, where), str(where), stream=stream)
    adapted.check(opened.model, wanted, allow)
    return opened, wanted


def text(found: Mapping[str, str]) -> str:
    """Returns the continuations below each other, for people."""
    return "\n\n".join(f"== {name}\n{continued}" for name, continued in found.items())
