"""Chooses which attached adapters act, at what strength, and which train."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from veneer.adapt.attached import base_parameters, changes, layers
from veneer.adapt.hooks import BASE
from veneer.errors import ConfigError, first_few

TRAINED_BEFORE = "_trained_before_adapters"  # base parameters that took gradients before the first adapter


def strengths(names: tuple[str | Mapping[str, float], ...]) -> dict[str, float]:
    """Returns ("a", {"b": 0.5}) as {"a": 1.0, "b": 0.5}. Raises ConfigError for a strength that is not
    finite.
    """
    found: dict[str, float] = {}
    for entry in names:
        found.update({entry: 1.0} if isinstance(entry, str) else {k: float(v) for k, v in entry.items()})
    wild = {n: s for n, s in found.items() if not math.isfinite(s)}
    if wild:
        raise ConfigError(f"strengths must be finite numbers, got {wild}")
    return found


def activate(model: nn.Module, *names: str | Mapping[str, float]) -> None:
    """Makes the named adapters act, each at strength 1 or as a mapping says, and no others."""
    wanted = strengths(names)
    for name in wanted:
        changes(model, name)
    for d in layers(model):
        d.active = {name: strength for name, strength in wanted.items() if name in d}


@contextmanager
def using(model: nn.Module, *names: str | Mapping[str, float]) -> Iterator[nn.Module]:
    """Within the block only the named adapters act; without names the model is the base bit for bit.

    >>> with using(model, "french", {"legal": 0.5}):
    ...     y = model(x)
    """
    before = [(d, d.active) for d in layers(model)]
    activate(model, *names)
    try:
        yield model
    finally:
        for d, active in before:
            d.active = active


def train_only(model: nn.Module, *names: str) -> None:
    """Gives gradients to the parameters of the named adapters alone; "base" stands for the model's own.

    Raises ConfigError for an unknown adapter, and for "base" if weights are quantised.
    """
    chosen = [delta for name in names if name != BASE for _, delta in changes(model, name)]
    own = base_parameters(model)
    packed = [n for n, p in own.items() if not p.is_floating_point()] if BASE in names else []
    if packed:
        raise ConfigError(
            f"a quantised base cannot be trained: {first_few(packed, 3)} are codes; train an adapter, or "
            "dequantise it"
        )
    if layers(model) and TRAINED_BEFORE not in model.__dict__:
        model.__dict__[TRAINED_BEFORE] = frozenset(n for n, p in own.items() if p.requires_grad)
    of_adapters = {id(p) for d in layers(model) for p in d.parameters()}
    for p in model.parameters():
        p.requires_grad_(id(p) not in of_adapters and BASE in names)
    for delta in chosen:
        delta.requires_grad_(True)


def restore_training(model: nn.Module) -> None:
    """Gives gradients to the base parameters that took them before the first adapter was attached."""
    trained = model.__dict__.pop(TRAINED_BEFORE, None)
    for n, p in base_parameters(model).items() if trained is not None else ():
        p.requires_grad_(n in trained)
