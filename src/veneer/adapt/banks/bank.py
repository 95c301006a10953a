"""Many adapters, one batch: every row with its own (FLoRA's idea, for every method).

Wen & Chaudhuri 2023, https://arxiv.org/abs/2312.05677.

y_i = g_i * (W (c_i * x_i) + B_i A_i (c_i * x_i)) + bias for row i with the normal form of its adapter, of any
method and rank: one product with W for all rows, and small ones for each.

State: A (n, r, in), B (n, r, out) and, if an adapter has gains, g (n, out) and c (n, in), in the layer's
dtype, padded with zeros to the largest rank; adapter 0 is the base. `ids`, one tensor that all layers read,
numbers the adapter of each row. Nothing is copied or compiled again when ids change, or when an adapter is
written into a free slot. Cost: bench/bank.py. Use: serving many adapters of one base, and training several on
one base in one pass (trainable=True). Against: above a few hundred ranks in all, decoding is bound by reading
the factors of every row's adapter. FLoRA above rank 1 costs one product with W per rank for its rows. Bat,
bottlenecks, prefixes and scattered FourierFT cannot take part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from veneer.adapt import attached, probe
from veneer.adapt.banks.entries import Entry, Forms, Source, entries
from veneer.adapt.banks.members import Slots
from veneer.adapt.banks.rows import FREE, Router, Rows
from veneer.adapt.modes import evaluating
from veneer.adapt.probe_inputs import Record, unpacked
from veneer.adapt.store.effect import refuse_effect
from veneer.adapt.switch import using
from veneer.errors import ConfigError, ShapeError, SiteError, first_few, suggest


class Bank:
    """The bank of a model. `ids` (b,) numbers the adapter of each row and may be written in place; `use`
    takes names.
    """

    def __init__(self, model: nn.Module) -> None:
        """Finds the bank of the model, or of a copy of it. Raises ConfigError without one."""
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
        """The adapter of each row: (b,), of each token (b, t), or of all rows (); int64, 0 for the base."""
        return self.router.ids

    @property
    def names(self) -> dict[str, int]:
        """The numbers of the adapters, and of the base, by name."""
        return {name: i for i, name in enumerate(self.router.names) if name != FREE}

    def use(self, rows: str | int | Sequence[str | int | None] | None) -> Bank:
        """Gives row i the adapter rows[i], by name or number, None for the base; one name serves any number
        of rows.

        Raises ConfigError listing all unknown ones.

        >>> bank.use(["french", None, "legal"])
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

    def write(self, name: str, adapter: Source | None = None) -> int:
        """Copies an adapter into a free slot and returns the slot's number; nothing is compiled again.

        adapter: an attached adapter, a folder or what `veneer.read` returned; `name` itself unless given. An
        adapter from a folder is checked in the slot it will be served from, with the bank acting: call it
        between batches. Raises ConfigError, ShapeError or SiteError, and FormatError as `load` does; nothing
        is then changed.
        """
        layers = self._slots()
        if name in self.names:
            raise ConfigError(
                f"the bank has an adapter {name!r} already; evict it first, or choose another name"
            )
        if FREE not in self.router.names:
            some = first_few(list(self.names)[1:])
            taken = len(self.router.names) - 1
            raise ConfigError(
                f"all {taken} slots of the bank are taken; evict one of {some}, or make it with slots="
            )
        entry = entries(self.model, {name: adapter or name})[name]
        _check_fit(layers, name, entry.forms)
        slot = self.router.names.index(FREE)
        fill(layers, self.router, slot, entry.forms)
        try:
            prove(self.model, self.router, slot, entry)
        except BaseException:
            fill(layers, self.router, slot, {})
            raise
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
                f"rows of the bank have adapter {name!r} now; give them another one with use() before it "
                "is evicted"
            )
        fill(layers, self.router, slot, {})
        self.router.names[slot] = FREE

    def _slots(self) -> dict[str, Slots]:
        found = {n: layer for n, layer in self.layers.items() if isinstance(layer, Slots)}
        if not found:
            raise ConfigError(
                "the adapters of a bank that trains stay where they are; detach it, and make another with "
                "veneer.bank"
            )
        return found


def fill(layers: Mapping[str, Slots], router: Router, slot: int, forms: Forms) -> None:
    """Writes an adapter into a slot of every layer; layers that it does not change get the base."""
    finite = [layer.write(slot, forms[name][1] if name in forms else None) for name, layer in layers.items()]
    router.mark(slot, all(finite))


def prove(model: nn.Module, router: Router, slot: int, entry: Entry) -> None:
    """Raises FormatError if an adapter of a folder does not do in its slot what it did when it was saved."""
    if entry.loaded is not None:
        refuse_effect(model, entry.loaded, _through(model, router, slot))


def _through(model: nn.Module, router: Router, slot: int) -> probe.Run:
    """Returns a function that runs the model in eval mode with all rows on the slot, or on the base.

    The bank stays on; only the ids are other ones for the duration of the call.
    """
    name = next(n for d in attached.layers(model) for n in d.names() if isinstance(d[n], Rows))

    @torch.no_grad()
    def run(inputs: Record, adapted: bool) -> Tensor:
        before = router.ids
        router.ids = torch.tensor(slot if adapted else 0, device=before.device)
        try:
            alone = attached.active(model) == {name: 1.0}
            with evaluating(model), nullcontext() if alone else using(model, name):
                return probe.output_of(model(**unpacked(model, inputs)))
        finally:
            router.ids = before

    return run


def _check_fit(layers: Mapping[str, Slots], name: str, forms: Forms) -> None:
    """Raises SiteError or ShapeError for what a written adapter has and the bank has no room for."""
    strange = [n for n in forms if n not in layers]
    if strange:
        raise SiteError(
            f"{name!r} changes layers that the bank does not serve: {first_few(strange)}; make the bank "
            "with to="
        )
    narrow = [
        f"{n} ({', '.join(wrong)})" for n, (_, form) in forms.items() if (wrong := layers[n].misfits(form))
    ]
    if narrow:
        raise ShapeError(
            f"the bank has no room for what {name!r} has at {first_few(narrow)}; make it with rank=, "
            "gains= or products="
        )
