"""Puts a model into evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block every module is in eval mode; each gets its own mode back."""
    modes = [(m, m.training) for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
