"""Noise while training: NEFTune's on embeddings, and dropout of attention weights.

Jain et al. 2023, https://arxiv.org/abs/2310.05914. Biderman et al. 2024, https://arxiv.org/abs/2405.09673,
compare dropout of attention with LoRA (section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.errors import ConfigError, option

SHARE = "attention_dropout"  # transformers' name in every attention layer, read in training mode alone


def noisy(model: nn.Module, alpha: float) -> RemovableHandle:
    """Adds noise within +-alpha / sqrt(t h) to the embeddings (b, t, h) of every pass in training mode.

    Returns the handle whose remove() ends that. Raises ConfigError for a model without token embeddings.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Module):
        kind = type(model).__name__
        raise ConfigError(
            f"{option('neftune')} needs a model with token embeddings, got {kind}; leave it out"
        )

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not model.training:
            return output
        most = alpha / math.sqrt(output.shape[-2] * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-most, most)

    return embedding.register_forward_hook(add)


def dropping(model: nn.Module, share: float) -> Callable[[], None]:
    """Makes every attention layer drop this share of its weights in training mode; returns the undoing.

    Raises ConfigError for a model whose attention layers have no dropout.
    """
    found = [
        (m, m.__dict__[SHARE]) for m in model.modules() if isinstance(m.__dict__.get(SHARE), float | int)
    ]
    if not found:
        raise ConfigError(
            f"{option(SHARE)} needs attention layers with dropout, got {type(model).__name__}; leave it out"
        )
    for module, _ in found:
        module.__dict__[SHARE] = share

    def undo() -> None:
        for module, before in found:
            module.__dict__[SHARE] = before

    return undo
