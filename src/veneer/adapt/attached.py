"""What hangs on a model: the changes of every adapted layer, by adapter, and what is the model's own."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.adapt.forward import Deltas
from veneer.errors import ConfigError, suggest
from veneer.methods import Delta
from veneer.sites import Site
from veneer.sites.own import child_of, is_own
from veneer.sites.quantised import packed_kind


def deltas_of(module: nn.Module) -> Deltas | None:
    """The changes of one layer, or None if it has none."""
    child = child_of(module)
    return child if isinstance(child, Deltas) else None


def layers(model: nn.Module) -> list[Deltas]:
    """The changes of every adapted layer, in the model's order."""
    return [m for m in model.modules() if isinstance(m, Deltas)]


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters by name, without those of adapters."""
    return {n: p for n, p in model.named_parameters() if not is_own(n)}


def n_base_parameters(model: nn.Module) -> int:
    """Numbers in the base; those of a packed weight count as they would unpacked."""
    packed: list[Any] = [m for m in model.modules() if packed_kind(m)]
    parts = {id(p) for m in packed for n, p in m.named_parameters(recurse=False) if n != "bias"}
    whole = sum(p.numel() for p in base_parameters(model).values() if id(p) not in parts)
    return whole + sum(int(m.out_features * m.in_features) for m in packed)


def adapters(model: nn.Module) -> list[str]:
    """Names of the attached adapters, in the order of their attaching."""
    return list(dict.fromkeys(name for d in layers(model) for name in d.names()))


def active(model: nn.Module) -> dict[str, float]:
    """The acting adapters and their strengths."""
    return {name: strength for d in layers(model) for name, strength in d.active.items()}


def changes(model: nn.Module, name: str) -> list[tuple[Site, Delta]]:
    """One adapter's changes by site. Raises ConfigError for an unknown name."""
    known = adapters(model)
    if name not in known:
        raise ConfigError(f"no adapter called {name!r} is attached{suggest(name, known)}")
    return [(d.site, d[name]) for d in layers(model) if name in d]


Changes = list[tuple[Site, Delta]]
