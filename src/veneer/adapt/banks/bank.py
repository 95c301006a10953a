"""Many adapters, one batch: every row with its own.  Wen & Chaudhuri 2023, https://arxiv.org/abs/2312.05677, for every method.

y_i = g_i * (W (c_i * x_i) + B_i A_i (c_i * x_i)) + bias for row i with the normal form of its adapter, of any method and rank:
one product with W for all rows, and small ones for each.

State: A (n, r, in), B (n, r, out) and, where some adapter has gains, g and c (n, out), (n, in), in the layer's dtype, padded with
zeros to the largest rank; adapter 0 is the base. Which row has which is data: `ids`, one tensor that all layers read.
Cost: bench/bank.py. Nothing is copied or compiled again when ids change, or when an adapter is written into a free slot.
Use: serving many adapters of one base, and training several on one base in one pass (trainable=True).
Against: above a few hundred numbers of rank in all, decoding is bound by reading the factors of every row's adapter, as large
as a small model. FLoRA above rank 1 has no normal form: it costs a product with W a rank of the rows that have it. Bat, bottlenecks,
prefixes and scattered FourierFT cannot take part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapt import attach, attached
from veneer.adapt.attached import Changes
from veneer.adapt.banks.entries import Forms, read, to_train
from veneer.adapt.banks.members import Live, Slots
from veneer.adapt.banks.rows import FREE, Form, Router, Rows
from veneer.errors import ConfigError, ShapeError, SiteError, first_few, suggest
from veneer.methods import Delta
from veneer.sites import Site, find
from veneer.sites.find import Target


class Bank:
    """The bank of a model. `ids` (b,) numbers the adapter of each row, and may be written in place; `use` does it by names."""

    def __init__(self, model: nn.Module) -> None:
        """The bank that the model, or a copy of it, has. Raises ConfigError if it has none."""
        self.model = model
        self.layers = {
            d.site.name: delta
            for d in attached.layers(model)
            for n in d.names()
            if isinstance(delta := d[n], Rows)
        }
        if not self.layers:
            raise ConfigError("this model has no bank; make one with veneer.bank(model, {name: adapter, ..})")
        self.router: Router = next(iter(self.layers.values())).router

    @property
    def ids(self) -> Tensor:
        """Which adapter each row has: (b,), (b, t) for tokens apart, or () for all rows alike; int64, 0 for the base."""
        return self.router.ids

    @property
    def names(self) -> dict[str, int]:
        """Adapters and their numbers, the base's among them."""
        return {name: i for i, name in enumerate(self.router.names) if name != FREE}

    def use(self, rows: str | int | Sequence[str | int | None] | None) -> Bank:
        """From now on row i has adapter rows[i], by name or number, None for the base; one name is for any number of rows.

        Raises ConfigError, listing all of them, for unknown ones.
        """
        alone = rows is None or isinstance(rows, (str, int))
        given: list[str | int | None] = [rows] if rows is None or isinstance(rows, (str, int)) else list(rows)
        numbers = [self._number(r) for r in given]
        wrong = dict.fromkeys(
            f"the bank has no adapter {r!r}{self._advice(r)}"
            for r, i in zip(given, numbers, strict=True)
            if i is None
        )
        if wrong:
            raise ConfigError("\n".join(wrong))
        with torch.inference_mode(False):  # ids are written outside of it too
            ids = torch.tensor(numbers[0] if alone else numbers, dtype=torch.long, device=self.ids.device)
            if ids.shape == self.ids.shape:
                self.ids.copy_(ids)
            else:
                self.router.ids = ids
        return self

    def _number(self, row: str | int | None) -> int | None:
        if row is None:
            return 0
        if isinstance(row, str):
            return self.names.get(row)
        return row if row in self.names.values() else None

    def _advice(self, row: str | int | None) -> str:
        known = ", ".join(f"{i} {name}" for name, i in self.names.items())
        return suggest(row, self.names) if isinstance(row, str) else f"; known: {known}"

    def write(self, name: str, adapter: str | Path | None = None) -> int:
        """Copies an adapter into a free slot, and returns the slot's number; nothing is compiled again.

        adapter: an attached adapter or a folder, `name` itself unless given. A folder's is on the model for a moment, and is
        checked on it: write between batches. Raises ConfigError, ShapeError or SiteError, before anything is changed, for
        what does not fit.
        """
        layers = self._slots()
        if name in self.names:
            raise ConfigError(
                f"the bank has an adapter {name!r} already; evict it first, or choose another name"
            )
        if FREE not in self.router.names:
            n = len(self.router.names) - 1
            raise ConfigError(
                f"all {n} slots of the bank are taken; evict one of {first_few(list(self.names)[1:])}, or make it with slots="
            )
        forms = read(self.model, {name: adapter or name})[name]
        _check_fit(layers, name, forms)
        slot = self.router.names.index(FREE)
        _fill(layers, self.router, slot, forms)
        self.router.names[slot] = name
        return slot

    def evict(self, name: str) -> None:
        """Empties an adapter's slot. Raises ConfigError if it is not there, or rows have it."""
        layers = self._slots()
        if self._number(name) in (None, 0):
            raise ConfigError(
                f"the bank has no adapter {name!r} to evict{suggest(name, list(self.names)[1:])}"
            )
        slot = self.names[name]
        if bool((self.ids == slot).any()):
            raise ConfigError(
                f"rows of the bank have adapter {name!r} now; give them another one with use() before it is evicted"
            )
        _fill(layers, self.router, slot, {})
        self.router.names[slot] = FREE

    def _slots(self) -> dict[str, Slots]:
        found = {n: layer for n, layer in self.layers.items() if isinstance(layer, Slots)}
        if not found:
            raise ConfigError(
                "the adapters of a bank that trains stay where they are; detach it, and make another with veneer.bank"
            )
        return found


def bank(
    model: nn.Module,
    adapters: Mapping[str, str | Path] | Iterable[str] | None = None,
    *,
    slots: int | None = None,
    rank: int = 0,
    gains: bool = False,
    products: int = 0,
    to: Target = (),
    trainable: bool = False,
    name: str = "bank",
) -> Bank:
    """Makes the adapters into one bank, which acts alone from now on: every row of a batch has its own.

    adapters: {name in the bank: attached adapter or folder}, or names of attached ones; None: the bank that the model has.
    slots, rank, gains, products, to: room for adapters to come: for how many in all, of which rank, whether with gains, with how
    many products with W (the rank of FLoRA, above 1), and on which layers beside those of `adapters`. trainable: the
    attached adapters are not copied; each learns, and nothing else does, from its own rows, as if they were trained apart.
    name: of the bank among the model's adapters.
    Raises ConfigError, with all of them, for adapters that are not there or have no normal form; nothing is then changed.
    """
    if adapters is None:
        return Bank(model)
    attach.refuse_compiled(model)
    attach.check_name(model, name)
    if any(isinstance(d[n], Rows) for d in attached.layers(model) for n in d.names()):
        raise ConfigError("this model has a bank already; write into it, or detach it first")
    chosen: dict[str, str | Path] = (
        dict(adapters) if isinstance(adapters, Mapping) else {n: n for n in adapters}
    )
    if attach.BASE in chosen or FREE in chosen:
        raise ConfigError("'base' and '' are no names for adapters in a bank: a row without one has the base")
    if trainable and (slots is not None or rank or gains or products or to):
        raise ConfigError(
            "a bank that trains holds the attached adapters as they are; leave slots, rank, gains, products and to out"
        )
    members = (
        _live(model, chosen)
        if trainable
        else _stacked(model, chosen, slots, _Room(rank, gains or products > 0, products, to))
    )
    attach.hang(model, name, members)
    attach.activate(model, name)
    if trainable:
        attach.train_only(model, *map(str, chosen.values()))
        attach.watch(model)
    return Bank(model)


class _Room(NamedTuple):
    """What adapters to come may have."""

    rank: int
    gains: bool
    products: int
    to: Target


def _stacked(
    model: nn.Module, chosen: Mapping[str, str | Path], slots: int | None, room: _Room
) -> list[tuple[Site, Delta]]:
    n = len(chosen) if slots is None else slots
    if n < len(chosen):
        raise ConfigError(f"slots={n} for {len(chosen)} adapters; leave it out, or give that many at least")
    forms = read(model, chosen)
    sites = {name: site for own in forms.values() for name, (site, _) in own.items()}
    sites |= {site.name: site for site in (find(model, room.to) if room.to else ()) if site.name not in sites}
    attach.refuse_clash(sites.values())
    if not n or not sites:
        raise ConfigError(
            "this bank would be empty; name adapters, or slots=, rank= and to= for those to come"
        )
    router = Router(
        [attach.BASE, *chosen, *[FREE] * (n - len(chosen))], next(iter(sites.values())).weight().device
    )
    layers = {
        name: _slots_for(site, router, [own[name][1] for own in forms.values() if name in own], room)
        for name, site in sites.items()
    }
    for slot, own in enumerate(forms.values(), 1):
        _fill(layers, router, slot, own)
    return [(sites[name], layer) for name, layer in layers.items()]


def _slots_for(site: Site, router: Router, forms: Sequence[Form], room: _Room) -> Slots:
    normal = [f.factors for f in forms]
    rank = max([room.rank, *(f.A.shape[0] for f in normal)])
    products = max([room.products, *(len(f.products.a) for f in forms if f.products)])
    gains = (
        room.gains or any(f.g is not None for f in normal),
        room.gains or any(f.c is not None for f in normal),
    )
    return Slots(site, router, rank=rank, gains=gains, products=products)


def _fill(layers: Mapping[str, Slots], router: Router, slot: int, forms: Forms) -> None:
    """Writes an adapter into a slot of every layer: the base where it changes nothing."""
    finite = [layer.write(slot, forms[name][1] if name in forms else None) for name, layer in layers.items()]
    router.mark(slot, all(finite))


def _live(model: nn.Module, chosen: Mapping[str, str | Path]) -> list[tuple[Site, Delta]]:
    found = to_train(model, chosen)
    if not found:
        raise ConfigError("this bank would be empty; name the attached adapters that are to be trained")
    return living(found, {site.name: site for changes in found.values() for site, _ in changes})


def living(adapters: Mapping[str, Changes], sites: Mapping[str, Site]) -> list[tuple[Site, Delta]]:
    """The changes of a bank in which adapters learn: theirs side by side at every one of the sites, by name."""
    router = Router([attach.BASE, *adapters], next(iter(sites.values())).weight().device)
    found = [{site.name: delta for site, delta in changes} for changes in adapters.values()]
    return [(site, Live(site, router, [None, *(own.get(n) for own in found)])) for n, site in sites.items()]


def _check_fit(layers: Mapping[str, Slots], name: str, forms: Forms) -> None:
    """Raises SiteError or ShapeError for what a written adapter has and the bank has no room for."""
    strange = [n for n in forms if n not in layers]
    if strange:
        raise SiteError(
            f"{name!r} changes layers that the bank does not serve: {first_few(strange)}; make the bank with to="
        )
    narrow = [
        f"{n} ({', '.join(wrong)})" for n, (_, form) in forms.items() if (wrong := layers[n].misfits(form))
    ]
    if narrow:
        raise ShapeError(
            f"the bank has no room for what {name!r} has at {first_few(narrow)}; make it with rank=, gains= or products="
        )
