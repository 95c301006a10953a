"""A tiny served model: adapters of several methods in folders, and the answers that each sum gives alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from support import models, tiny
from support.models import randomise

import veneer

ADAPTERS = {
    "french": ("lora", {"rank": 4}),
    "formal": ("lora", {"rank": 2, "init": "pissa"}),
    "dora": ("dora", {"rank": 3, "to": ["q_proj", "up_proj"]}),
    "gains": ("ia3", {}),
    "wide": ("lora", {"rank": 8, "to": ["q_proj", "v_proj", "down_proj"]}),
    "flora": ("flora", {"to": ["q_proj", "o_proj"]}),
}
CONTEXT = 256


def model() -> Any:
    """The base in float32: the same for every call."""
    found = models.llama(vocab_size=len(tiny.tokenizer()), max_position_embeddings=CONTEXT, hidden_size=48)
    found.generation_config.eos_token_id = tiny.tokenizer().eos_token_id
    found.name_or_path = "tiny"
    return found.eval()


def save(
    folder: Path, name: str, *, method: str = "lora", seed: int = 0, size: float = 0.1, **options: Any
) -> Path:
    """Writes a random adapter of the base into a folder."""
    base = model()
    veneer.attach(base, method, name="own", **options)
    randomise(base, "own", seed=seed, size=size)
    return veneer.save(base, folder / name, "own")


def folder(path: Path) -> Path:
    """Writes all ADAPTERS under a root."""
    for seed, (name, (method, options)) in enumerate(ADAPTERS.items()):
        save(path, name, method=method, seed=seed, **options)
    return path


class Oracle:
    """The base with adapters attached, asked for one text at a time by transformers' own generation."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.model = model()
        self.model.generation_config.eos_token_id = (
            None  # the server's answers end earlier, and are compared as far
        )
        for name, where in folders.items():
            veneer.load(self.model, where, name)
        self.answer = functools.cache(self._answer)

    @torch.no_grad()
    def _answer(self, prompt: tuple[int, ...], terms: tuple[tuple[str, float], ...], n: int) -> list[int]:
        ids = torch.tensor([prompt])
        with veneer.using(self.model, dict(terms)):
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0
            )
        return [int(t) for t in out[0, len(prompt) :]]

    @torch.no_grad()
    def differs(
        self, prompt: tuple[int, ...], terms: tuple[tuple[str, float], ...], got: list[int]
    ) -> str | None:
        """Returns the first token that one-by-one greedy generation would not choose, or None.

        Every token is compared with the largest logit after those before it, in one pass without a cache. A
        token whose logit is within 1e-4 of the largest counts as right.
        """
        with veneer.using(self.model, dict(terms)):
            logits = self.model(torch.tensor([[*prompt, *got]]), use_cache=False).logits[
                0, len(prompt) - 1 : -1
            ]
        short = logits.amax(-1) - logits.gather(1, torch.tensor(got)[:, None])[:, 0]
        wrong = (short >= 1e-4).nonzero()
        if not len(wrong):
            return None
        at = int(wrong[0])
        return f"token {at} is {got[at]}, not {int(logits[at].argmax())}, by {float(short[at]):.2g}"


def prompt(seed: int, tokens: int) -> tuple[int, ...]:
    """Token ids of nonsense, without special tokens."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(int(t) for t in torch.randint(1, len(tiny.tokenizer()), (tokens,), generator=draw))
