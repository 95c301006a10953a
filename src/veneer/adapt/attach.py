"""Put changes on a model and take them off; the model's class, modules and weight names stay as they were."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer import methods
from veneer.adapt.attached import adapters, base_parameters, changes, deltas_of, layers
from veneer.adapt.forward import Deltas, act, forget, input_gain, is_private
from veneer.adapt.per_layer import build_all, check_patterns, options_at
from veneer.errors import ConfigError, SiteError, first_few
from veneer.methods import Delta, Stats
from veneer.methods.base.protocols import GainsInput, OpensModel
from veneer.sites import Site
from veneer.sites.find import Target

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
BASE = "base"
TRAINED_BEFORE = "_trained_before_adapters"  # names of the base's parameters that took gradients when the first was attached


RESERVED = {
    BASE,
    "site",
    "active",
    "called",
    "group",
    "place",
    *dir(Deltas),
    *vars(nn.Module()),
}  # attributes beside the adapters


def _apply(module: Any, args: tuple[Any, ...], y: Tensor) -> Tensor:
    """The forward hook of an adapted layer; a plain function, so that it survives deepcopy and pickle."""
    deltas: Deltas = module.deltas
    if not deltas.called and not torch.compiler.is_compiling():  # once: a module's attributes are slow to set
        deltas.called = True
    if not deltas.active:
        return y
    if not isinstance(y, Tensor):
        raise SiteError(
            f"{deltas.site.name!r} returns a {type(y).__name__}, not a tensor, which no change can be added to; leave it out"
        )
    if not args:
        raise SiteError(
            f"{deltas.site.name!r} was called with keywords only; call it as layer(x), so that its change can see x"
        )
    return act(deltas, args[0], y, writable=is_private(module, _apply))


def _scale_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The forward pre-hook of a layer of which some change has an input gain; a plain function, as _apply."""
    c = input_gain(module.deltas, args[0]) if args else None
    return None if c is None else (torch.addcmul(args[0], args[0], (c - 1).to(args[0].dtype)), *args[1:])


def _check_called(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A hook on the whole model: after its first eager training step every adapted layer must have been called."""
    if torch.compiler.is_compiling() or not model.training or not torch.is_grad_enabled():
        return
    _remove(model._forward_hooks, _check_called)
    check_called(model)


def check_called(model: nn.Module) -> None:
    """Raises SiteError, naming them, if changed layers have not been called since they were attached."""
    silent = [d.site.name for d in layers(model) if d.active and not d.called]
    if silent:
        raise SiteError(
            f"{len(silent)} adapted layers were never called in the first training step: {first_few(silent)}. Their owner may read"
            f" the weight itself, or not use them for this input; leave them out with exclude="
        )


def attach(
    model: nn.Module,
    method: str | type[Delta] = "lora",
    *,
    to: Target | None = None,
    exclude: Target = (),
    name: str = "default",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    untie: bool = False,
    stats: Mapping[str, Stats] | None = None,
    **options: Any,
) -> nn.Module:
    """The same model with a new adapter `name`: acting at strength 1, and the only thing that trains.

    to, exclude: None (what the method chooses, "all-linear" for most), "all-linear", a regular expression for whole
    layer names, or a list of names and endings of names.
    rank_pattern, alpha_pattern: other ranks and alphas for layers whose name ends with a match of the key (PEFT's
    rule). untie: adapt a layer that shares its weight with another. stats: of calibrate(), for a start that looks at the
    loss. The other options are the method's own.
    Raises SiteError, ConfigError or ShapeError before anything is changed.
    """
    refuse_compiled(model)
    kind = methods.get(method) if isinstance(method, str) else method
    methods.check_options(kind, options)
    sites = kind.find(model, to, exclude, untie, options=options)
    refuse_clash(sites)
    check_patterns(sites, {**(rank_pattern or {}), **(alpha_pattern or {})})
    per_site = [options_at(s.name, kind, options, rank_pattern, alpha_pattern) for s in sites]
    check_name(model, name)
    hang(model, name, build_all(kind, sites, per_site, stats))
    train_only(model, name)
    watch(model)
    return model


def watch(model: nn.Module) -> None:
    """Has the first training step raise SiteError if an adapted layer is not called in it."""
    if not any(h is _check_called for h in model._forward_hooks.values()):
        model.register_forward_hook(_check_called)


def refuse_compiled(model: nn.Module) -> None:
    """Raises ConfigError for torch.compile's wrapper, under which every layer's name begins with `_orig_mod`."""
    if "_orig_mod" in model._modules:
        raise ConfigError(
            "this is torch.compile's wrapper of a model; give the model itself (model._orig_mod) and compile it afterwards"
        )


def clashing(sites: Iterable[Site]) -> list[str]:
    """Names of the sites whose modules another adapter changes as a site of another kind."""
    there = [(site, deltas_of(site.module)) for site in sites]
    return [s.name for s, d in there if d is not None and type(d.site) is not type(s)]


CLASH = "another adapter changes {names} in another way (as a matrix, or whole); detach that one first"


def refuse_clash(sites: Iterable[Site]) -> None:
    """Raises SiteError for such sites: a module has one kind of change at a time."""
    names = clashing(sites)
    if names:
        raise SiteError(CLASH.format(names=first_few(names)))


def check_name(model: nn.Module, name: str) -> None:
    """Raises ConfigError for a name that cannot be used, or already is."""
    if not NAME.fullmatch(name) or name in RESERVED:
        raise ConfigError(
            f"adapter name {name!r}: use up to 64 letters, digits, '-' and '_', and none of Veneer's own words"
        )
    if name in adapters(model):
        raise ConfigError(f"an adapter called {name!r} is already attached; detach it or choose another name")


def hang(model: nn.Module, name: str, changes: list[tuple[Site, Delta]]) -> None:
    """Adds ready-made changes as adapter `name`, acting at strength 1."""
    for kind in {type(delta) for _, delta in changes}:
        if issubclass(kind, OpensModel):
            kind.open(model)
    for site, delta in changes:
        deltas = deltas_of(site.module)
        if deltas is None:
            deltas = site.module.deltas = Deltas(site)
            if site.acts_by_hook:
                site.module.register_forward_hook(_apply)
        if _gains_input(site, delta) and _scale_input not in site.module._forward_pre_hooks.values():
            site.module.register_forward_pre_hook(_scale_input)
        deltas.add_module(name, delta.to(site.device).train(site.module.training))
        deltas.active[name] = 1.0


@torch.no_grad()
def _gains_input(site: Site, delta: Delta) -> bool:
    return isinstance(delta, GainsInput) and delta.gains_input(site)


def strengths(names: tuple[str | Mapping[str, float], ...]) -> dict[str, float]:
    """("a", {"b": 0.5}) as {"a": 1.0, "b": 0.5}."""
    found: dict[str, float] = {}
    for entry in names:
        found.update({entry: 1.0} if isinstance(entry, str) else {k: float(v) for k, v in entry.items()})
    wild = {n: s for n, s in found.items() if not math.isfinite(s)}
    if wild:
        raise ConfigError(f"strengths must be finite numbers, not {wild}")
    return found


def activate(model: nn.Module, *names: str | Mapping[str, float]) -> None:
    """From now on the named adapters act, each at strength 1 or as a mapping says, and no others."""
    wanted = strengths(names)
    for name in wanted:
        changes(model, name)
    for d in layers(model):
        d.active = {name: strength for name, strength in wanted.items() if name in d}


@contextmanager
def using(model: nn.Module, *names: str | Mapping[str, float]) -> Iterator[nn.Module]:
    """Within the block only the named adapters act: using(model, "a", {"b": 0.5}); using(model) is the base bit for bit."""
    before = [(d, d.active) for d in layers(model)]
    activate(model, *names)
    try:
        yield model
    finally:
        for d, active in before:
            d.active = active


def train_only(model: nn.Module, *names: str) -> None:
    """Only the parameters of the named adapters take gradients; "base" stands for the model's own."""
    chosen = [delta for name in names if name != BASE for _, delta in changes(model, name)]
    packed = (
        [n for n, p in base_parameters(model).items() if not p.is_floating_point()] if BASE in names else []
    )
    if packed:
        raise ConfigError(
            f"a quantised base cannot be trained: {first_few(packed, 3)} are codes; train an adapter, or dequantise it"
        )
    if layers(model) and TRAINED_BEFORE not in model.__dict__:
        model.__dict__[TRAINED_BEFORE] = frozenset(
            n for n, p in base_parameters(model).items() if p.requires_grad
        )
    of_adapters = {id(p) for d in layers(model) for p in d.parameters()}
    for p in model.parameters():
        p.requires_grad_(id(p) not in of_adapters and BASE in names)
    for delta in chosen:
        delta.requires_grad_(True)


def detach(model: nn.Module, *names: str) -> nn.Module:
    """The same model without the named adapters, or without any; what is left of none is no trace at all."""
    gone = names or tuple(adapters(model))
    for name in names:
        changes(model, name)
    before = _kinds(model)
    for module, deltas in [(m, d) for m in model.modules() if (d := deltas_of(m))]:
        for name in [n for n in gone if n in deltas]:
            del deltas._modules[name]
        deltas.active = {n: s for n, s in deltas.active.items() if n in deltas}
        if not deltas.names():
            del module.deltas
            _remove(module._forward_hooks, _apply)
            _remove(module._forward_pre_hooks, _scale_input)
    for kind in before - _kinds(model):
        if issubclass(kind, OpensModel):
            kind.close(model)
    if not layers(model):
        _remove(model._forward_hooks, _check_called)
        trained = model.__dict__.pop(TRAINED_BEFORE, None)
        for n, p in base_parameters(model).items() if trained is not None else ():
            p.requires_grad_(n in trained)
        forget(model)
    return model


def _kinds(model: nn.Module) -> set[type[Delta]]:
    return {type(d[name]) for d in layers(model) for name in d.names()}


def _remove(hooks: dict[int, Any], function: Any) -> None:
    for key in [k for k, h in hooks.items() if h is function]:
        del hooks[key]
