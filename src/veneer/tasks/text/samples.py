"""Continues prompts with a language model, and takes prompts from held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from veneer.data.pack import IGNORED, Segment, Window
from veneer.data.spread import spread
from veneer.data.tokenizer import Tokenizer
from veneer.errors import ConfigError

SAMPLES = 2  # prompts
PROMPT, LONGEST = 24, 200  # tokens of a prompt from plain text, and of the longest one
WRITTEN = 48  # tokens


def continuation(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    chat: bool = False,
    seed: int = 0,
    temperature: float = 0.7,
    **options: Any,
) -> str:
    """Returns the text that the model writes after the prompt; see `continuations`."""
    own: dict[str, Any] = {"chat": chat, "seed": seed, "temperature": temperature, **options}
    return continuations(model, tokenizer, prompt, n=1, **own)[0]


@torch.no_grad()
def continuations(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    n: int,
    chat: bool = False,
    seed: int = 0,
    temperature: float = 0.7,
    **options: Any,
) -> list[str]:
    """Returns n texts that the model writes after the prompt.

    chat: the prompt is a chat template's, which writes the beginning token itself. options: of transformers'
    generate. Raises ConfigError if prompt and continuation together are longer than the model's context.
    """
    ids = torch.tensor([[tokenizer.eos_token_id]])
    if prompt:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    ids = ids.to(next(model.parameters()).device)
    longest = room(model)
    if ids.shape[1] + options["max_new_tokens"] > longest:
        raise ConfigError(
            f"prompt and continuation must be at most {longest} tokens, the model's context,"
            f" got {ids.shape[1]} + {options['max_new_tokens']}; shorten one"
        )
    if not temperature:
        options.pop("top_p", None)
    drawing: dict[str, Any] = {"do_sample": False}
    if temperature:
        drawing = {"do_sample": True, "temperature": temperature, "top_k": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        written = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **({"num_return_sequences": n} if n > 1 else {}),
            **drawing,
            **options,
        )
    return [str(tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)) for row in written]


def room(model: nn.Module) -> int:
    """Returns the positions that the model has, or a large number if it names none."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return getattr(config if text is None else text(), "max_position_embeddings", None) or 1 << 20


def written(model: nn.Module) -> int:
    """Returns the length of a sample in tokens: it must leave room for a prompt."""
    return min(WRITTEN, room(model) // 2)


def prompts(
    model: nn.Module, windows: Sequence[Window], tokenizer: Tokenizer, n: int = SAMPLES
) -> list[dict[str, str]]:
    """Returns beginnings of n texts and their real continuations, evenly spaced.

    A beginning ends before the first learned token, or after a few tokens of plain text.
    """
    length = written(model)
    longest = max(1, min(LONGEST, room(model) - length - 8))
    found = []
    for s in spread([s for w in windows for s in w], n):
        ids, learned = learned_tokens(s)
        first = learned.index(True)
        start = first if first > 1 else min(PROMPT, len(ids) // 2)
        prompt = tokenizer.decode(ids[max(0, start - longest) : start], clean_up_tokenization_spaces=False)
        truth = tokenizer.decode(ids[start : start + length], clean_up_tokenization_spaces=False)
        found.append(
            {
                "prompt": prompt.removeprefix(tokenizer.bos_token or ""),
                "truth": truth.removesuffix(tokenizer.eos_token or ""),
            }
        )
    return found


def learned_tokens(s: Segment) -> tuple[list[int], list[bool]]:
    """Returns the tokens of a segment, and for each if it is learned; the first never is."""
    end = [int(s.labels[-1])] if s.labels[-1] != IGNORED else []
    return [*s.inputs.tolist(), *end], [False, *(s.labels != IGNORED).tolist()]
