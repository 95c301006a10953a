"""Makes a bank of adapters: copies in slots for serving, or the adapters themselves for training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from veneer.adapt import attach, attached, calls, hooks, switch
from veneer.adapt.attached import Changes
from veneer.adapt.banks.bank import Bank, fill, prove
from veneer.adapt.banks.entries import Entry, Source, entries, to_train
from veneer.adapt.banks.members import Live, Slots
from veneer.adapt.banks.rows import FREE, Form, Router, Rows
from veneer.errors import ConfigError
from veneer.methods import Delta
from veneer.sites import Site, find
from veneer.sites.finding.names import Target


class Room(NamedTuple):
    """Room for adapters to come."""

    rank: int
    gains: bool
    products: int
    to: Target


def bank(
    model: nn.Module,
    adapters: Mapping[str, Source] | Iterable[str] | None = None,
    *,
    slots: int | None = None,
    rank: int = 0,
    gains: bool = False,
    products: int = 0,
    to: Target = (),
    trainable: bool = False,
    name: str = "bank",
) -> Bank:
    """Makes the adapters into one bank, which then acts alone: every row of a batch has its own adapter.

    adapters: {name in the bank: attached adapter, folder or what `read` returned}, or names of attached ones;
    None returns the bank that the model has. slots, rank, gains, products, to: room for adapters to come: how
    many in all, their rank, gains, products with W (the rank of FLoRA, above 1) and layers beside those of
    `adapters`. trainable: the attached adapters are not copied; each learns, and nothing else does, from its
    own rows. name: of the bank among the model's adapters. Raises ConfigError listing all adapters that are
    missing or have no normal form, and FormatError as `load` does; nothing is then changed.

    >>> rows = veneer.bank(model, {"french": "out/french", "legal": "out/legal"})
    >>> rows.use(["french", None, "legal"])
    """
    if adapters is None:
        return Bank(model)
    chosen: dict[str, Source] = dict(adapters) if isinstance(adapters, Mapping) else {n: n for n in adapters}
    _check_names(model, name, chosen)
    if not trainable:
        room = Room(rank, gains or products > 0, products, to)
        _hang_slots(model, name, entries(model, chosen), slots, room)
    elif slots is not None or rank or gains or products or to:
        raise ConfigError(
            "slots, rank, gains, products, to: cannot be set with trainable=True; leave them out"
        )
    else:
        _hang_live(model, name, chosen)
    return Bank(model)


def _check_names(model: nn.Module, name: str, chosen: Mapping[str, Source]) -> None:
    hooks.refuse_compiled(model)
    hooks.check_name(model, name)
    if any(isinstance(d[n], Rows) for d in attached.layers(model) for n in d.names()):
        raise ConfigError("this model has a bank already; write into it, or detach it first")
    if hooks.BASE in chosen or FREE in chosen:
        raise ConfigError("'base' and '' cannot name adapters of a bank: they name the base and a free slot")


def living(adapters: Mapping[str, Changes], sites: Mapping[str, Site]) -> list[tuple[Site, Delta]]:
    """Returns a bank in which adapters learn: theirs side by side at every one of the sites, by name."""
    router = Router([hooks.BASE, *adapters], next(iter(sites.values())).weight().device)
    found = [{site.name: delta for site, delta in changes} for changes in adapters.values()]
    return [(site, Live(site, router, [None, *(own.get(n) for own in found)])) for n, site in sites.items()]


def _hang_live(model: nn.Module, name: str, chosen: Mapping[str, Source]) -> None:
    found = to_train(model, chosen)
    if not found:
        raise ConfigError("this bank would be empty; name the attached adapters to train")
    sites = {site.name: site for changes in found.values() for site, _ in changes}
    hooks.hang(model, name, living(found, sites))
    switch.activate(model, name)
    switch.train_only(model, *map(str, chosen.values()))
    calls.watch(model)


def _hang_slots(
    model: nn.Module, name: str, found: Mapping[str, Entry], slots: int | None, room: Room
) -> None:
    n = len(found) if slots is None else slots
    if n < len(found):
        raise ConfigError(
            f"slots: must be at least {len(found)}, the number of adapters, got {n}; leave it out"
        )
    sites = {name: site for entry in found.values() for name, (site, _) in entry.forms.items()}
    sites |= {site.name: site for site in (find(model, room.to) if room.to else ()) if site.name not in sites}
    hooks.refuse_clash(sites.values())
    if not n or not sites:
        raise ConfigError(
            "this bank would be empty; name adapters, or slots=, rank= and to= for those to come"
        )
    device = next(iter(sites.values())).weight().device
    router = Router([hooks.BASE, *found, *[FREE] * (n - len(found))], device)
    own = [entry.forms for entry in found.values()]
    layers = {
        s: _slots_for(site, router, [f[s][1] for f in own if s in f], room) for s, site in sites.items()
    }
    for slot, forms in enumerate(own, 1):
        fill(layers, router, slot, forms)
    before = attached.active(model)
    hooks.hang(model, name, [(sites[s], layer) for s, layer in layers.items()])
    switch.activate(model, name)
    try:
        for slot, entry in enumerate(found.values(), 1):
            prove(model, router, slot, entry)
    except BaseException:
        attach.detach(model, name)
        switch.activate(model, before)
        raise


def _slots_for(site: Site, router: Router, forms: Sequence[Form], room: Room) -> Slots:
    normal = [f.factors for f in forms]
    rank = max([room.rank, *(f.A.shape[0] for f in normal)])
    products = max([room.products, *(len(f.products.a) for f in forms if f.products)])
    gains = (
        room.gains or any(f.g is not None for f in normal),
        room.gains or any(f.c is not None for f in normal),
    )
    return Slots(site, router, rank=rank, gains=gains, products=products)
