"""Checks in the first training step that every adapted layer is called."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer.adapt.attached import layers
from veneer.adapt.hooks import remove
from veneer.errors import SiteError, first_few


def watch(model: nn.Module) -> None:
    """Makes the first training step raise SiteError if an adapted layer is not called in it."""
    if not any(h is _after_step for h in model._forward_hooks.values()):
        model.register_forward_hook(_after_step)


def unwatch(model: nn.Module) -> None:
    """Takes the check off the model."""
    remove(model, _after_step)


def check_called(model: nn.Module) -> None:
    """Raises SiteError naming the adapted layers that have not been called since they were attached."""
    silent = [d.site.name for d in layers(model) if d.active and not d.called]
    if silent:
        raise SiteError(
            f"{len(silent)} adapted layers were never called in the first training step: "
            f"{first_few(silent)}. Their"
            f" owner may read the weight itself, or not use them for this input; leave them out with exclude="
        )


def _after_step(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling() or not model.training or not torch.is_grad_enabled():
        return
    unwatch(model)
    check_called(model)
