"""Looks methods up by name, reads their options from their signatures, and builds them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from veneer.errors import ConfigError, not_finite, suggest
from veneer.methods.base.delta import Delta, master_dtype
from veneer.methods.base.stats import Stats
from veneer.ops.matrix.sketch import Svd
from veneer.registry import Registry
from veneer.sites import Site

METHODS = Registry("veneer.methods", "method", apart=("base", "inits"))


def available() -> list[str]:
    """Returns the names of all methods: the files of this folder."""
    return METHODS.names()


def get(name: str) -> type[Delta]:
    """Returns the method called `name`. Raises ConfigError with the nearest name for an unknown one."""
    return METHODS.own_class(name, Delta)  # type: ignore[type-abstract]


def options_of(method: type[Delta]) -> dict[str, inspect.Parameter]:
    """Returns the method's options with their types and defaults."""
    parameters = list(inspect.signature(method.__init__, eval_str=True).parameters.values())
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def option(method: type[Delta], name: str, options: Mapping[str, Any] | None) -> Any:
    """Returns an option's value in `options`, or its default."""
    return {**{n: p.default for n, p in options_of(method).items()}, **(options or {})}[name]


def check_options(method: type[Delta], options: dict[str, Any]) -> None:
    """Raises ConfigError for all options unknown to the method, with the nearest names, and for infinite
    ones."""
    known = options_of(method)
    name = method.__module__.rsplit(".", 1)[-1]
    problems = [f"method {name!r} has no option {o!r}{suggest(o, known)}" for o in options if o not in known]
    problems += not_finite(options)
    if problems:
        raise ConfigError("\n".join(problems))


def unseen(site: Site) -> Stats:
    """Returns placeholder statistics of the right shapes, for a change whose start is replaced or never
    used."""
    W = site.weight()
    one, q = torch.ones((), dtype=master_dtype(site), device=W.device), min(W.shape)
    like = Svd(one.expand(site.out, q), one.expand(q), one.expand(q, site.in_))
    return Stats(like, inputs=(like,), oriented=(like, like))


def takes_stats(method: type[Delta]) -> bool:
    """True if the method can start from calibration's statistics."""
    return "stats" in inspect.signature(method.__init__).parameters


def build(method: type[Delta], site: Site, options: dict[str, Any], stats: Stats | None = None) -> Delta:
    """Returns a change of `site`, on its device, in float32 at least; its `options` go into the manifest."""
    delta = method(site, **options) if stats is None else method(site, stats, **options)
    delta.options = {**{n: p.default for n, p in options_of(method).items()}, **options}
    return delta
