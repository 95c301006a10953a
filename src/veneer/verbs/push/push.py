"""Loads an adapter into a running vLLM, and proves by log-probabilities of its probe that it acts there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.adapt.probe_inputs import packed_default
from veneer.adapt.switch import using
from veneer.errors import ConfigError, FormatError, option, suggest
from veneer.models import adapted
from veneer.verbs.convert import convert
from veneer.verbs.push.remote import Remote

SERVERS = ("vllm",)
KEY = "VENEER_PUSH_KEY"


@dataclass(frozen=True)
class Pushed:
    """An adapter on a server.

    change: the norm of the change of log-probabilities that the adapter makes here; off: the norm of the
    difference to the change there, over `change`; limit: the largest `off` that passes; base_off: the largest
    difference of the base's log-probabilities; notes: roundings, paddings and cuts of the conversion.
    """

    name: str
    url: str
    folder: str
    tokens: int
    change: float
    off: float
    limit: float
    base_off: float
    notes: list[str]

    @property
    def good(self) -> bool:
        """True if the adapter changes the server's answers as it does here."""
        return self.off <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "good": self.good}


def push(
    adapter: str,
    url: str,
    *,
    out: str,
    to: str = "vllm",
    name: str | None = None,
    path: str | None = None,
    replace: bool = False,
    model: str | None = None,
    rank: int | None = None,
    limit: float = 0.25,
    allow: Sequence[str] = (),
) -> Pushed:
    """Writes the adapter in the server's format, has it loaded there, and compares its effect.

    Compares log-probabilities of the probe's tokens, computed here and there. An adapter without the same
    effect is unloaded again. VENEER_PUSH_KEY holds the API key.

    adapter: folder of the adapter, or of its run
    url: address of the server, such as http://localhost:8000
    out: folder that the server can read, which must not exist
    to: kind of server: vllm
    name: name for requests [the adapter's]
    path: where the server finds `out` [the same path]
    replace: take the place of an adapter of the same name
    model: base model [the one the adapter was made for]
    rank: rank to cut to; needed to make plain LoRA of another kind of change
    limit: largest difference of the effect that passes, as a share of the effect
    allow: problems to let through when loading, see veneer.load
    """
    if to not in SERVERS:
        raise ConfigError(f"{option('to')}: unknown server {to!r}{suggest(to, SERVERS)}")
    asked = Asked(adapter, out, name, path or str(Path(out).resolve()), replace, model, rank, limit, allow)
    return _pushed(Remote(url, os.environ.get(KEY, "")), asked, to)


class Asked(NamedTuple):
    """Arguments of `push`."""

    adapter: str
    out: str
    name: str | None
    path: str
    replace: bool
    model: str | None
    rank: int | None
    limit: float
    allow: Sequence[str]


def _pushed(server: Remote, asked: Asked, to: str) -> Pushed:
    base = server.base()  # before anything is written
    opened, wanted = adapted.open_all(
        [asked.adapter], model=asked.model, dtype=torch.float32, allow=asked.allow
    )
    tokens, own = _tokens(opened.model), wanted[0]
    here, model = _here(opened.model, tokens, own.name), asked.model or opened.base
    done = convert(str(own.folder), out=asked.out, to=to, model=model, rank=asked.rank, allow=asked.allow)
    name = asked.name or own.name
    server.load(name, asked.path, replace=asked.replace)
    there = _there(server, base, name, tokens)
    change, found = (float(v.norm()) for v in (here.change, there.change - here.change))
    base_off = float((there.off - here.off).abs().max())
    off = found / change
    pushed = Pushed(name, server.url, done.out, len(tokens), change, off, asked.limit, base_off, done.notes)
    if not pushed.good:
        server.unload(name)
    return pushed


class Effect(NamedTuple):
    """Log-probabilities of the probe's tokens without the adapter and with it."""

    off: Tensor
    on: Tensor

    @property
    def change(self) -> Tensor:
        """The difference that the adapter makes."""
        return self.on - self.off


def _here(model: Any, tokens: list[int], adapter: str) -> Effect:
    """Returns the adapter's effect in this process. Raises FormatError for an adapter without one."""
    found = Effect(_logprobs(model, tokens, ()), _logprobs(model, tokens, (adapter,)))
    if not found.change.any():
        raise FormatError(f"adapter {adapter!r} must change the probe's outputs to be proven; it does not")
    return found


def _there(server: Remote, base: str, name: str, tokens: list[int]) -> Effect:
    """Returns the adapter's effect on the server; unloads it if that cannot be asked."""
    try:
        return Effect(*(torch.tensor(server.logprobs(n, tokens)) for n in (base, name)))
    except BaseException:
        server.unload(name)
        raise


def _tokens(model: Any) -> list[int]:
    found = packed_default(model)
    if isinstance(found, str) or set(found) != {"input_ids"}:
        raise ConfigError("push needs a language model that takes token ids alone")
    return [int(t) for t in found["input_ids"]["values"][0]]


@torch.no_grad()
def _logprobs(model: Any, tokens: list[int], adapters: Sequence[str]) -> Tensor:
    """Returns the log-probability of each token but the first."""
    ids = torch.tensor([tokens], device=next(model.parameters()).device)
    with using(model, *adapters):
        logits = model(input_ids=ids).logits[0, :-1].float()
    return torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0].cpu()


def text(pushed: Pushed) -> str:
    """Returns the outcome for people."""
    effect = f"its effect on {pushed.tokens} tokens differs by {pushed.off:.1%} ({pushed.limit:.0%} allowed)"
    if pushed.good:
        return "\n".join([f"{pushed.name} acts on {pushed.url}: {effect}", *pushed.notes])
    return (
        f"{pushed.name} was unloaded from {pushed.url}: {effect}; the base there differs by"
        f" {pushed.base_off:.2g} at most, check that it is the adapter's"
    )


def exit_code(pushed: Pushed) -> int:
    """Returns 0, or 3 if the adapter does not act as it should."""
    return 0 if pushed.good else 3
