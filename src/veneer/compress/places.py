"""Finds the parents of a layer in a model, so that the layer can be replaced."""

from __future__ import annotations

from torch import nn


class Places:
    """Parents and names of every module of a model; a shared module has several."""

    def __init__(self, model: nn.Module) -> None:
        self._found: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for key, child in parent._modules.items():
                self._found.setdefault(id(child), []).append((parent, key))

    def put(self, old: nn.Module, new: nn.Module) -> None:
        """Replaces the old module in all its places."""
        for parent, key in self._found[id(old)]:
            parent._modules[key] = new
