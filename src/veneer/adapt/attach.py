"""Attaches and detaches adapters; the model's class, modules and weight names do not change."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from veneer import methods
from veneer.adapt import calls, hooks, switch
from veneer.adapt.attached import Changes, layers, n_base_parameters
from veneer.adapt.per_layer import build_all, check_patterns, options_at
from veneer.adapt.store import store
from veneer.adapt.store.loaded import Loaded
from veneer.errors import ConfigError, first_few
from veneer.methods import Delta, Stats
from veneer.sites import Site
from veneer.sites.bare.site import ParameterSite
from veneer.sites.find import ALL
from veneer.sites.finding.all_linear import bare_weights
from veneer.sites.finding.names import Target

DEFAULT = "default"


def attach(
    model: nn.Module,
    method: str | type[Delta] | Loaded = "lora",
    *,
    to: Target | None = None,
    exclude: Target = (),
    name: str = DEFAULT,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    untie: bool = False,
    stats: Mapping[str, Stats] | None = None,
    **options: Any,
) -> nn.Module:
    """Attaches a new adapter `name`, which acts and alone takes gradients, and returns the model.

    method: a method's name or class, or an adapter from `veneer.read`, which takes no options. to, exclude:
    None (the method's choice, mostly "all-linear"), "all-linear", a regular expression for whole layer names,
    or a list of names and endings of names. rank_pattern, alpha_pattern: other ranks and alphas for layers
    whose name ends with a match of the key (PEFT's rule). untie: adapt a layer that shares its weight with
    another. stats: from calibrate(), for starts that depend on data. Raises SiteError, ConfigError or
    ShapeError before anything is changed.

    >>> model = veneer.attach(model, "dora", to=r".*\\.(q|v)_proj", rank=16)
    """
    if isinstance(method, Loaded):
        _refuse_options(to, exclude, rank_pattern, alpha_pattern, untie, stats, options)
        return store.load(model, method, name, trainable=True)
    hooks.refuse_compiled(model)
    kind = methods.get(method) if isinstance(method, str) else method
    methods.check_options(kind, options)
    sites = kind.find(model, to, exclude, untie, options=options)
    hooks.refuse_clash(sites)
    check_patterns(sites, {**(rank_pattern or {}), **(alpha_pattern or {})})
    per_site = [options_at(s.name, kind, options, rank_pattern, alpha_pattern) for s in sites]
    hooks.check_name(model, name)
    _key_draws(sites, name)
    by_default = to is None or to == ALL
    built = build_all(kind, sites, per_site, stats, by_default=by_default)
    _refuse_dropout(built)
    hooks.hang(model, name, built, by_default)
    switch.train_only(model, name)
    calls.watch(model)
    if by_default:
        _warn_of_experts(model)
    return model


def _warn_of_experts(model: nn.Module) -> None:
    """Warns of stacks of matrices that no layer holds, which all-linear cannot reach."""
    left = bare_weights(model)
    if left:
        share = sum(p.numel() for p in left.values()) / n_base_parameters(model)
        warnings.warn(
            f"{len(left)} stacks of matrices, such as fused experts, hold {share:.0%} of the model and stay"
            f" frozen: {first_few(left, 2)}",
            stacklevel=3,
        )


def _refuse_dropout(built: Changes) -> None:
    """Raises ConfigError for dropout at bare parameters, whose inputs no hook sees."""
    dropping = [site.name for site, delta in built if isinstance(site, ParameterSite) and delta.dropout]
    if dropping:
        raise ConfigError(
            f"attach: dropout must be 0 at parameters such as {first_few(dropping, 1)}, got"
            f" {max(delta.dropout for _, delta in built):g}; leave out dropout, or these with exclude="
        )


def _key_draws(sites: list[Site], adapter: str) -> None:
    """Keys the layers' draws by their name and the adapter's, so that several adapters start apart.

    "default" draws by the layer's name alone, as files of earlier versions did.
    """
    for site in sites:
        site.key = site.name if adapter == DEFAULT else f"{site.name}\0{adapter}"


def _refuse_options(*given: Any) -> None:
    if any(given):
        raise ConfigError("attach: a loaded adapter has its layers and options already; pass only its name=")


def detach(model: nn.Module, *names: str) -> nn.Module:
    """Removes the named adapters, or all, and returns the model; removing the last one restores the original
    model.
    """
    hooks.take_off(model, hooks.taken_off(model, names))
    if not layers(model):
        calls.unwatch(model)
        switch.restore_training(model)
    return model
