"""Continues prompts with a model, for samples in reports and for `veneer generate`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer.errors import ConfigError


@torch.no_grad()
def continuation(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    chat: bool = False,
    seed: int = 0,
    temperature: float = 0.7,
    **options: Any,
) -> str:
    """Returns what the model writes after the prompt.

    chat: the prompt is a chat template's, which writes the beginning token itself. Raises ConfigError if prompt
    and continuation together are longer than the model's context.
    """
    given = (
        tokenizer(prompt, add_special_tokens=not chat)["input_ids"] if prompt else [tokenizer.eos_token_id]
    )
    ids = torch.tensor([given], device=next(model.parameters()).device)
    _check_room(model, len(given), options["max_new_tokens"])
    drawing = (
        {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    )
    if not temperature:
        options.pop("top_p", None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        written = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **drawing,
            **options,
        )
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def _check_room(model: nn.Module, n: int, more: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and n + more > longest:
        raise ConfigError(
            f"the prompt has {n} tokens; with {more} more it exceeds the model's context of {longest}; shorten one"
        )
