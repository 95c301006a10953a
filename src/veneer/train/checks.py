"""Checks that a method and a model fit together, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from veneer.adapt import calls
from veneer.errors import SiteError, first_few


@torch.no_grad()
def check_leaves(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raises SiteError unless every module with parameters is called with one positional argument alone.

    A change W' - W of each module acts through such calls. inputs: arguments for one forward pass.
    """
    leaves = {n: m for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    calls: dict[str, bool] = {}

    def look(name: str) -> Any:
        return lambda module, args, kwargs: calls.update(
            {name: calls.get(name, True) and len(args) == 1 and not kwargs}
        )

    handles = [m.register_forward_pre_hook(look(n), with_kwargs=True) for n, m in leaves.items()]
    try:
        model(**inputs)
    finally:
        for h in handles:
            h.remove()
    odd = [n for n in leaves if not calls.get(n, False)]
    if odd:
        raise SiteError(
            f"method 'full' saves a change of each module, which must be called with one input alone; in this"
            f" model {len(odd)} modules are not: {first_few(odd)}; use an adapter, such as method 'lora'"
        )


@torch.no_grad()
def check_called(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raises SiteError, naming them, if a forward pass does not call all adapted layers."""
    model(**inputs)
    calls.check_called(model)
