"""Counts the bytes that a forward pass keeps for its backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of all tensors kept, parameters and buffers not counted, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x.requires_grad_())
    del y
    return sum(kept.values())
