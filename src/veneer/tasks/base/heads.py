"""Finds a model's head: the modules that a task trains whole beside the adapter."""

from __future__ import annotations

from torch import nn

from veneer.sites.own import DRAWN, is_own
from veneer.sites.roles import output_head


def heads(model: nn.Module) -> list[str]:
    """Returns the modules with parameters outside the base model, and those whose weights were drawn."""
    drawn = {name.rpartition(".")[0] for name in model.__dict__.get(DRAWN, ())}
    outside = output_head(model) | drawn
    return [
        name
        for name, module in model.named_modules()
        if name in outside and not is_own(name) and any(True for _ in module.parameters(recurse=False))
    ]
