"""Defines an adapter that was read from its folder, checked against a model, and not attached yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from veneer.adapt.attached import Changes, layers
from veneer.errors import ConfigError, first_few
from veneer.sites import Site


class Loaded(NamedTuple):
    """An adapter of `folder` as deltas for the layers of the model that it was read for.

    probe: the inputs and outputs that veneer.json keeps, or None. foreign: another program wrote the folder,
    so that only "has it any effect" can be asked. allowed: the words of ALLOW passed to read(); let_through:
    those that let a problem through.
    """

    folder: Path
    changes: Changes
    probe: dict[str, Any] | None
    foreign: bool
    allowed: frozenset[str]
    let_through: frozenset[str]


def check_fresh(model: nn.Module, loaded: Loaded) -> None:
    """Raises ConfigError if the adapter was read for another model, or hangs on this one already."""
    modules = {id(m) for m in model.modules()}
    strange = [site.name for site, _ in loaded.changes if id(site.host) not in modules]
    if strange:
        raise ConfigError(
            f"{loaded.folder}: was read for another model ({first_few(strange)}); read it for this one "
            "with veneer.read"
        )
    own = {id(delta) for _, delta in loaded.changes}
    if any(id(delta) in own for site, _ in loaded.changes for delta in _hung(model, site)):
        raise ConfigError(
            f"{loaded.folder}: this copy is attached already; read the folder again for a second one"
        )


def _hung(model: nn.Module, site: Site) -> list[nn.Module]:
    """Returns the deltas at the site; a bare parameter's holder may be another one than when it was read."""
    deltas = next((d for d in layers(model) if d.site.name == site.name), None)
    return [] if deltas is None else [deltas[n] for n in deltas.names()]
