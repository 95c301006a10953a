"""The places of a model where a layer is held, so that it can be replaced by another kind of layer."""

from __future__ import annotations

from torch import nn


class Places:
    """Where in a model every module is held, which may be in several places."""

    def __init__(self, model: nn.Module) -> None:
        self._found: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for key, child in parent._modules.items():
                self._found.setdefault(id(child), []).append((parent, key))

    def put(self, old: nn.Module, new: nn.Module) -> None:
        """The new module in all places of the old one."""
        for parent, key in self._found[id(old)]:
            parent._modules[key] = new
