"""Refuses adapters on an output head that a training loop reads directly."""

from __future__ import annotations

from torch import nn

from veneer.adapt.attached import deltas_of
from veneer.errors import ConfigError


def check_head(model: nn.Module) -> None:
    """Raises ConfigError if the output head is adapted: TRL reads its weight, so a hook never acts."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    if head is not None and deltas_of(head) is not None:
        raise ConfigError(
            "lm_head: TRL reads the head's weight directly, so an adapter there is bypassed; exclude it"
        )
