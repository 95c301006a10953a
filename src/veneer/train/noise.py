"""NEFTune: uniform noise on embeddings while training. Jain et al. 2023, https://arxiv.org/abs/2310.05914"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.errors import ConfigError, option


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
