"""Gives preference training its reference: the same model with its adapters off, without a second copy."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from veneer.adapt.switch import using
from veneer.errors import ConfigError


class _Off(nn.Module):
    """Runs a backbone with every adapter of `model` off."""

    def __init__(self, model: nn.Module, backbone: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)  # no submodule: its parameters are the backbone's own
        self.backbone = backbone

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the backbone; adapters act again afterwards, after an error too."""
        with using(self.model):
            return self.backbone(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("backbone"), name)


def reference(model: nn.Module) -> nn.Module:
    """Returns a view of a transformers model that computes as the base and shares every parameter.

    Give it as `ref_model` to TRL's DPO or KTO trainer. The adapters are switched off inside the backbone,
    because TRL replaces the forward of the whole model. Raises ConfigError for a model without a backbone.
    """
    name = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, name, None) if name else None
    if not isinstance(backbone, nn.Module):
        raise ConfigError(
            f"model: {type(model).__name__} has no backbone in base_model_prefix; use a transformers model"
        )
    view = copy.copy(model)
    view._modules = dict(model._modules)
    view._modules[name] = _Off(model, backbone)
    view.__dict__.pop("forward", None)
    return view
