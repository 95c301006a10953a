"""Looks methods up by name, reads their options from their signatures, and builds them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from veneer.errors import ConfigError, suggest
from veneer.methods.base.delta import Delta, master_dtype
from veneer.methods.base.stats import Stats
from veneer.ops.matrix.sketch import Svd
from veneer.registry import Registry
from veneer.sites import Site

METHODS = Registry("veneer.methods", "method", apart=("base", "inits"))


def available() -> list[str]:
    """Names of all methods: the files of this folder."""
    return METHODS.names()


def get(name: str) -> type[Delta]:
    """The method called `name`. Raises ConfigError with the nearest name for an unknown one."""
    return METHODS.own_class(name, Delta)  # type: ignore[type-abstract]


def options_of(method: type[Delta]) -> dict[str, inspect.Parameter]:
    """The method's options with their types and defaults."""
    parameters = list(inspect.signature(method.__init__, eval_str=True).parameters.values())
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def option(method: type[Delta], name: str, options: Mapping[str, Any] | None) -> Any:
    """The value of an option of the method: what is given, or its default."""
    return {**{n: p.default for n, p in options_of(method).items()}, **(options or {})}[name]


def check_options(method: type[Delta], options: dict[str, Any]) -> None:
    """Raises ConfigError for an option that the method does not have."""
    known = options_of(method)
    name = method.__module__.rsplit(".", 1)[-1]
    unknown = [f"method {name!r} has no option {o!r}{suggest(o, known)}" for o in options if o not in known]
    if unknown:
        raise ConfigError("\n".join(unknown))


def unseen(site: Site) -> Stats:
    """Statistics of the right shapes that say nothing: for a change whose start is put in place afterwards,
    or never used."""
    W = site.weight()
    one, q = torch.ones((), dtype=master_dtype(site), device=W.device), min(W.shape)
    return Stats(Svd(one.expand(site.out, q), one.expand(q), one.expand(q, site.in_)))


def takes_stats(method: type[Delta]) -> bool:
    """Whether the method can start from what calibration saw."""
    return "stats" in inspect.signature(method.__init__).parameters


def build(method: type[Delta], site: Site, options: dict[str, Any], stats: Stats | None = None) -> Delta:
    """A change of `site`, on its device, in float32 at least; `options` is kept with it for the manifest."""
    delta = method(site, **options) if stats is None else method(site, stats, **options)
    delta.options = {**{n: p.default for n, p in options_of(method).items()}, **options}
    return delta
