"""Puts a model into evaluation or training mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Within the block every module is in this mode; each gets its own mode back."""
    modes = [(m, m.training) for m in model.modules() if m.training is not training]
    model.train(training)
    try:
        yield
    finally:
        for m, own in modes:
            m.training = own


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Within the block every module is in eval mode; each gets its own mode back."""
    return in_mode(model, training=False)
