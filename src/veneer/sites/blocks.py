"""Finds the blocks of a model, and the hidden states that enter one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def blocks(body: nn.Module) -> list[nn.Module]:
    """Returns the layers of `stack`; compiled one by one they share one graph, which compiles faster."""
    found = stack(body)
    return [] if found is None else list(found)


def stack(body: nn.Module) -> nn.ModuleList | None:
    """Returns the list of layers of one class that has most parameters, or None without such a list."""
    stacks = [m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    alike = [
        s for s in stacks if len({type(layer) for layer in s}) == 1 and any(True for _ in s[0].children())
    ]
    size = {id(s): sum(p.numel() for layer in s for p in layer.parameters()) for s in alike}
    return max(alike, key=lambda s: size[id(s)], default=None)


class _Reached(Exception):
    """Carries what enters the first adapted block out of the model."""

    def __init__(self, hidden: Any) -> None:
        super().__init__()
        self.hidden = hidden


def reach(model: nn.Module, block: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Returns the first positional input of the block, or None if there is only keyword input.

    Stops the forward pass there.
    """

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Reached(args[0] if args else None)

    handle = block.register_forward_pre_hook(stop)
    try:
        model(**inputs)
    except _Reached as found:
        return found.hidden
    finally:
        handle.remove()
    return None
