"""Tells what adapters put into a model from what the model holds itself, by one name: the child `CHILD` of a
layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

CHILD = "deltas"
DRAWN = "_drawn_weights"  # attribute of a model: names of its parameters that its files lack, drawn at random


def is_own(name: str) -> bool:
    """Returns True if a dotted name of a module, parameter or buffer is an adapter's."""
    return CHILD in name.split(".")


def without_own(names: Iterable[str]) -> Iterator[str]:
    """Yields the dotted names that are the model's own."""
    return (n for n in names if not is_own(n))


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the model's own modules by name, without the model itself and without adapters."""
    return {n: m for n, m in model.named_modules() if n and not is_own(n)}


def child_of(layer: nn.Module) -> nn.Module | None:
    """Returns the module that holds the layer's adapters, or None."""
    return layer._modules.get(CHILD)


def split(name: str) -> tuple[str, str] | None:
    """Returns the adapted layer's name and the name below its child, or None for a name of the model's own.

    "model.q_proj.deltas.default.A" -> ("model.q_proj", "default.A").
    """
    owner, found, rest = f".{name}.".partition(f".{CHILD}.")
    return (owner.removeprefix("."), rest.removesuffix(".")) if found else None
