"""Finds the deltas that hang on a model, by layer and by adapter, and the model's own parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.adapt.acting.forward import Deltas
from veneer.errors import ConfigError, suggest
from veneer.methods import Delta
from veneer.sites import Site
from veneer.sites.own import child_of, is_own
from veneer.sites.quantised import packed_kind


def deltas_of(module: nn.Module) -> Deltas | None:
    """Returns the deltas of one layer, or None for a layer without adapters."""
    child = child_of(module)
    return child if isinstance(child, Deltas) else None


def layers(model: nn.Module) -> list[Deltas]:
    """Returns the deltas of every adapted layer, in the model's order."""
    return [m for m in model.modules() if isinstance(m, Deltas)]


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the model's own parameters by name, without those of adapters."""
    return {n: p for n, p in model.named_parameters() if not is_own(n)}


def n_base_parameters(model: nn.Module) -> int:
    """Counts the numbers in the base; a packed weight counts as if unpacked."""
    packed: list[Any] = [m for m in model.modules() if packed_kind(m)]
    parts = {id(p) for m in packed for n, p in m._parameters.items() if n != "bias"}
    whole = sum(p.numel() for p in base_parameters(model).values() if id(p) not in parts)
    return whole + sum(int(m.out_features * m.in_features) for m in packed)


def adapters(model: nn.Module) -> list[str]:
    """Returns the names of the attached adapters, in the order in which they were attached."""
    return list(dict.fromkeys(name for d in layers(model) for name in d.names()))


def active(model: nn.Module) -> dict[str, float]:
    """Returns the strengths of the acting adapters by name."""
    return {name: strength for d in layers(model) for name, strength in d.active.items()}


def changes(model: nn.Module, name: str) -> list[tuple[Site, Delta]]:
    """Returns one adapter's deltas by site. Raises ConfigError for an unknown name."""
    known = adapters(model)
    if name not in known:
        raise ConfigError(f"no adapter called {name!r} is attached{suggest(name, known)}")
    return [(d.site, d[name]) for d in layers(model) if name in d]


Changes = list[tuple[Site, Delta]]
