"""Hangs deltas on layers and takes them off: a child module and plain forward hooks, no change of class or
weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.acting.bare import put_changes, take_changes
from veneer.adapt.acting.forward import Deltas, act, changed_input, forget, is_private
from veneer.adapt.acting.recomputation import note, refuse_other_state
from veneer.adapt.acting.whole import put_weights, take_weights
from veneer.adapt.attached import Changes, adapters, changes, deltas_of, layers
from veneer.adapt.base_notes import forget_base, note_base
from veneer.errors import ConfigError, SiteError, first_few
from veneer.methods import Delta
from veneer.methods.base.protocols import GainsInput, OpensModel, TurnsInput
from veneer.sites import Site
from veneer.sites.bare.site import Holder, ParameterSite, shelf_of, unmount

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
BASE = "base"
# Attributes of the module that holds a layer's deltas: an adapter of such a name would hide one.
RESERVED = {
    BASE,
    "site",
    "active",
    "called",
    "group",
    "place",
    "swapped",
    "by_default",
    "misfit",
    "stepped",
    "passes",
    *dir(Deltas),
    *vars(nn.Module()),
}
CLASH = (
    "another adapter holds {names} as a site of another kind (matrix, whole module or bias); detach it first"
)


def hang(model: nn.Module, name: str, found: Changes, by_default: bool = False) -> None:
    """Adds ready-made deltas as adapter `name`, acting at strength 1.

    by_default: the layers were not named, so that those that turn out unfit are dropped in the first step.
    """
    for method in {type(delta) for _, delta in found}:
        if issubclass(method, OpensModel):
            method.open(model)
    for site, delta in found:
        if isinstance(site, ParameterSite):
            site.mount()
        deltas = deltas_of(site.module)
        if deltas is None:
            deltas = site.module.deltas = Deltas(site).train(site.module.training)
            _register(site)
        if _acts_on_input(site, delta) and _scale_input not in site.module._forward_pre_hooks.values():
            site.module.register_forward_pre_hook(_scale_input)
        deltas.add_module(name, delta.to(site.device).train(site.module.training))
        deltas.active = {**deltas.active, name: 1.0}
        if by_default:
            deltas.by_default.add(name)
    note_base(model, name)


def _register(site: Site) -> None:
    if isinstance(site, ParameterSite):
        if put_changes not in site.host._forward_pre_hooks.values():
            site.host.register_forward_pre_hook(put_changes)
            site.host.register_forward_hook(take_changes, always_call=True)
    elif site.swaps_weights:
        site.module.register_forward_pre_hook(put_weights)
        site.module.register_forward_hook(take_weights, always_call=True)
    elif site.acts_by_hook:
        site.module.register_forward_hook(_change_output)


def take_off(model: nn.Module, names: Iterable[str]) -> None:
    """Removes the named adapters from every layer; a layer without any loses its child and its hooks."""
    names, before = list(names), _methods(model)
    for module in [m for m in model.modules() if deltas_of(m)]:
        drop(module, names)
    forget_base(model, names)
    for method in before - _methods(model):
        if issubclass(method, OpensModel):
            method.close(model)
    if not layers(model):
        forget(model)


def drop(module: Any, names: Iterable[str]) -> None:
    """Removes the named adapters from one layer, which loses its child and its hooks with the last one."""
    deltas: Deltas = module.deltas
    for name in [n for n in names if n in deltas]:
        del deltas._modules[name]
        deltas.by_default.discard(name)
    deltas.active = {n: s for n, s in deltas.active.items() if n in deltas}
    if not deltas.names():
        del module.deltas
        remove(module, _change_output, _scale_input, put_weights, take_weights)
        if isinstance(module, Holder) and unmount(module):
            remove(module.owner, put_changes, take_changes)


def remove(module: nn.Module, *functions: Any) -> None:
    """Removes functions from a module's forward hooks and pre-hooks."""
    kinds = (module._forward_pre_hooks, module._forward_hooks)
    gone = [key for hooks in kinds for key, hook in hooks.items() if any(hook is f for f in functions)]
    notes = (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
    for key in gone:
        for hooks in (*kinds, *notes):
            hooks.pop(key, None)


def check_name(model: nn.Module, name: str) -> None:
    """Raises ConfigError for a name that is malformed, reserved or taken."""
    if not NAME.fullmatch(name) or name in RESERVED:
        raise ConfigError(
            f"adapter name {name!r}: must be 1 to 64 letters, digits, '-' and '_', and not a reserved "
            "word; choose another"
        )
    if name in adapters(model):
        raise ConfigError(f"an adapter called {name!r} is already attached; detach it or choose another name")


def refuse_compiled(model: nn.Module) -> None:
    """Raises ConfigError for torch.compile's wrapper, which prefixes every layer's name with `_orig_mod`."""
    if "_orig_mod" in model._modules:
        raise ConfigError(
            "model: must not be torch.compile's wrapper; pass the model itself (model._orig_mod) and "
            "compile it afterwards"
        )


def clashing(sites: Iterable[Site]) -> list[str]:
    """Returns the names of sites whose modules another adapter holds as a site of another kind."""
    return [s.name for s in sites if _clashes(s)]


def _clashes(site: Site) -> bool:
    if isinstance(site, ParameterSite):
        return deltas_of(site.host) is not None
    deltas = deltas_of(site.module)
    return shelf_of(site.module) is not None or (deltas is not None and type(deltas.site) is not type(site))


def refuse_clash(sites: Iterable[Site]) -> None:
    """Raises SiteError naming such sites: a module takes one kind of delta at a time."""
    names = clashing(sites)
    if names:
        raise SiteError(CLASH.format(names=first_few(names)))


def taken_off(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names to detach, all adapters for (). Raises ConfigError for an unknown one."""
    for name in names:
        changes(model, name)
    return names or tuple(adapters(model))


# Hooks are plain functions so that they survive deepcopy and pickle.
def _change_output(module: Any, args: tuple[Any, ...], y: Any) -> Any:
    deltas: Deltas = module.deltas
    if (
        not deltas.stepped and not torch.compiler.is_compiling()
    ):  # once: a module's attributes are slow to set
        deltas.called = True
        deltas.stepped = module.training
    refuse_other_state(deltas)
    if not deltas.active:
        note(deltas, y)
        return y
    if not args or not isinstance(y, Tensor):
        _refuse(
            deltas,
            "was called with keywords only; call it as layer(x)" if isinstance(y, Tensor) else _returns(y),
        )
        return y
    out = act(deltas, args[0], y, writable=is_private(module, _change_output))
    note(deltas, out)
    return out


def _refuse(deltas: Deltas, why: str) -> None:
    """Raises SiteError, or notes why if the layer was found by default: the first step then drops it."""
    if not deltas.active.keys() <= deltas.by_default:
        raise SiteError(f"layer {deltas.site.name!r} {why}")
    deltas.misfit = why


def _returns(y: Any) -> str:
    return f"returns a {type(y).__name__}; only layers returning a tensor can be adapted; exclude it"


def _scale_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    x = changed_input(module.deltas, args[0]) if args else None
    return None if x is None else (x, *args[1:])


@torch.no_grad()
def _acts_on_input(site: Site, delta: Delta) -> bool:
    return site.acts_by_hook and (
        isinstance(delta, TurnsInput) or (isinstance(delta, GainsInput) and delta.gains_input(site))
    )


def _methods(model: nn.Module) -> set[type[Delta]]:
    return {type(d[name]) for d in layers(model) for name in d.names()}
