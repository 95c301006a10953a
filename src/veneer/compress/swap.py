"""Puts other layers in place of a model's own while adapters stay attached, acting and training as before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import nn

from veneer.adapt.attach import detach
from veneer.adapt.attached import active, adapters, changes, layers
from veneer.adapt.hooks import hang
from veneer.adapt.switch import activate, train_only
from veneer.compress.places import Places
from veneer.sites import Site, site_for
from veneer.sites.finding.kinds import kind_of


def swap(model: nn.Module, names: Iterable[str], make: Callable[[Site], nn.Module]) -> nn.Module:
    """Returns the model with `make(site)` in place of each named layer; adapters act on the new layers."""
    state = {n: changes(model, n) for n in adapters(model)}
    acting, trained = active(model), {id(p) for p in model.parameters() if p.requires_grad}
    watched = {d.site.name: d.called for d in layers(model)}
    detach(model)
    places = Places(model)
    for site in one_by_one([site_for(n, model.get_submodule(n)) for n in names]):
        places.put(site.module, make(site).train(site.module.training))
    for name, found in state.items():
        hang(model, name, [(_again(model, site), delta) for site, delta in found])
    if state:
        train_only(model)
        activate(model, acting)
        for p in (p for p in model.parameters() if id(p) in trained):
            p.requires_grad_(True)
        for d in layers(model):
            d.called = watched[d.site.name]
    return model


def one_by_one(sites: list[Site]) -> Iterator[Site]:
    """Yields the sites and forgets each, with its layer, when the next one is asked for."""
    sites.reverse()
    while sites:
        yield sites.pop()


def _again(model: nn.Module, site: Site) -> Site:
    """The site of the module that stands there now."""
    module = model.get_submodule(site.name)
    if type(site) is kind_of(site.module):
        return site_for(site.name, module)
    return type(site)(site.name, module)
