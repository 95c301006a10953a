"""A bank in segment layout, for serving: rows lie sorted by adapter, any number of adapters come and go, any
sum can act.

A row's adapters are a sum of W' - W with strengths: low-rank parts are concatenated by adding one after the
other, gains of outputs act on the layer's own output, and what needs another input (gains of inputs beside
others, products with W) costs a product of the base's size for those rows alone. Nothing is padded to the
largest rank, and no factor is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt import attach, hooks
from veneer.adapt.banks.program import Apart, Program, Terms
from veneer.adapt.banks.rows import Form
from veneer.adapt.banks.stacks import PLACES, Layer, Placed, Stack, rank_class
from veneer.errors import ConfigError, NotMergeable, ShapeError
from veneer.methods import Delta, Factors
from veneer.methods.base.protocols import AddsInPlace, GainsInput, Routed
from veneer.ops import segmented
from veneer.ops.segmented import Run
from veneer.sites import Site

NAME = "bank"


class SegmentBank:
    """The adapters that a served model has at hand. Not safe for threads: one thread writes, and runs the
    model.
    """

    def __init__(self, model: nn.Module, layer: Callable[[SegmentBank, Site], SegmentLayer] | None = None):
        """
        model: gets a hook at each layer that some adapter changes, when the first such adapter comes
        layer: makes the change of such a layer
        """
        hooks.refuse_compiled(model)
        hooks.check_name(model, NAME)
        self.model, self.layer = model, layer or SegmentLayer
        self.stacks: dict[int, Stack] = {}
        self.layers: dict[str, SegmentLayer] = {}
        self.programs: tuple[Program, ...] = ()
        self._made = 0

    def put(self, forms: Mapping[str, tuple[Site, Form]]) -> tuple[Placed, bool]:
        """Copies an adapter into a free place. Returns the place, and True if all numbers are finite."""
        rank = rank_class(max(f.factors.A.shape[0] for _, f in forms.values()))
        number = next((n for n, s in self.stacks.items() if s.rank == rank and s.free), None)
        if number is None:
            number, self._made = self._made, self._made + 1
            self.stacks[number] = Stack(rank)
        place = min(self.stacks[number].free)
        finite = self.stacks[number].write(place, forms)
        factors = [f.factors for _, f in forms.values()]
        placed = Placed(
            number,
            place,
            gains=any(f.g is not None for f in factors),
            scales=any(f.c is not None for f in factors),
            multiplies=any(f.products is not None for _, f in forms.values()),
        )
        self._hang(forms)
        return placed, finite

    def _hang(self, forms: Mapping[str, tuple[Site, Form]]) -> None:
        new = []
        for name, (site, form) in forms.items():
            layer = self.layers.get(name)
            if layer is None:
                layer = self.layers[name] = self.layer(self, site)
                new.append((site, layer))
            if form.factors.c is not None and not layer.scales:
                layer.scales = True
                new.append((layer.site, layer))
        if new:
            hooks.hang(self.model, NAME, list(new))

    def drop(self, placed: Placed) -> None:
        """Frees an adapter's place, and the stack's memory with the last one."""
        stack = self.stacks[placed.stack]
        stack.clear(placed.place)
        if len(stack.free) == PLACES:
            del self.stacks[placed.stack]

    def use(self, *batches: Sequence[tuple[Terms, int]]) -> None:
        """From now on rows have these adapters: (adapters, consecutive rows) in order; several for layers
        that see fewer rows.
        """
        like = next(self.model.parameters())
        programs = tuple(Program(rows, like) for rows in batches)
        self.programs = () if all(p.is_idle for p in programs) else programs

    def close(self) -> None:
        """Takes the bank off the model."""
        if self.layers:
            attach.detach(self.model, NAME)
        self.layers, self.stacks, self.programs = {}, {}, ()


class SegmentLayer(Delta, GainsInput, AddsInPlace, Routed):
    """Adds each row's own adapters to one layer's output."""

    def __init__(self, bank: SegmentBank, site: Site) -> None:
        super().__init__()
        self.bank, self.site, self.scales = bank, site, False
        self.options: dict[str, Any] = {}

    def _program(self, x: Tensor) -> Program | None:
        """The program for the rows of x, or None where no row has an adapter. Raises ShapeError for other
        rows.
        """
        return self._of_rows(x.numel() // x.shape[-1])

    def _of_rows(self, rows: int) -> Program | None:
        if not self.bank.programs:
            return None
        for program in self.bank.programs:
            if program.rows == rows:
                return program
        known = " or ".join(str(p.rows) for p in self.bank.programs)
        raise ShapeError(
            f"{self.site.name!r} was called with {rows} rows, the batch has {known};"
            " call use() with the adapters of every row"
        )

    def _layer(self, stack: int) -> Layer | None:
        return self.bank.stacks[stack].layers.get(self.site.name)

    def groups(self, tokens: int) -> list[tuple[Hashable, Tensor | None]]:
        program = self._of_rows(tokens)
        return [((), None)] if program is None else [*program.groups(self.site.device)]

    @torch.no_grad()
    def of_group(self, key: Hashable, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None] | None:
        assert isinstance(key, tuple)
        found = [(placed.place, layer, s) for placed, s in key if (layer := self._layer(placed.stack))]
        if not found:
            return None
        pairs = [(f[0][i], s * f[1][i].mT) for i, own, s in found if (f := own.factors(i, 1))]
        gains = [s * own.excess[i] for i, own, s in found if own.excess is not None]
        W = self.site.weight()
        A = torch.cat([a for a, _ in pairs]) if pairs else W.new_zeros(0, self.site.in_)
        B = torch.cat([b for _, b in pairs], 1) if pairs else W.new_zeros(self.site.out, 0)
        return A, B, torch.stack(gains).sum(0) if gains else None

    def normal_form(self, site: Site) -> Factors | None:
        return None  # each row has another one

    def gains_input(self, site: Site) -> bool:
        return self.scales

    def input_gain(self, x: Tensor, site: Site) -> Tensor | None:
        program = self._program(x) if self.scales else None
        if program is None:
            return None
        c: Tensor | None = None
        for run in program.scales:
            layer = self._layer(run.stack)
            if layer is not None and layer.c is not None:
                c = x.new_ones(program.rows, site.in_) if c is None else c
                segmented.fill(c, layer.c, run)
        return None if c is None else c.view_as(x)

    @torch.no_grad()
    def onto(self, x: Tensor, y: Tensor, site: Site, *, writable: bool) -> Tensor:
        program = self._program(x)
        if program is None or program.is_idle:
            return y
        out = y if writable and y.is_contiguous() else y.clone(memory_format=torch.contiguous_format)
        rows, flat = x.reshape(program.rows, -1).to(y.dtype), out.view(program.rows, -1)
        apart = [(a, self._apart(rows, flat, a)) for a in program.apart]
        for run in program.gains:
            layer = self._layer(run.stack)
            if layer is not None and layer.excess is not None:
                segmented.gain(flat, layer.excess, run, site.shift())
        for run in program.pairs:
            self._pair(rows, flat, run)
        for index, more in program.more:
            chosen, change = rows.index_select(0, index), flat.new_zeros(len(index), site.out)
            for run in more:
                self._pair(chosen, change, run)
            flat.index_add_(0, index, change)
        for a, own in apart:
            if own is not None:
                flat[a.start : a.start + a.rows] += own
        return out

    def _pair(self, x: Tensor, y: Tensor, run: Run) -> None:
        layer = self._layer(run.stack)
        factors = None if layer is None else layer.factors(run.first, run.places)
        if factors is not None:
            segmented.add(x, y, *factors, run)

    def _apart(self, x: Tensor, y: Tensor, a: Apart) -> Tensor | None:
        """strength * (W' - W) x for the rows of one term, its low-rank part only if it is `whole`."""
        layer = self._layer(a.placed.stack)
        if layer is None:
            return None
        place, own = a.placed.place, slice(a.start, a.start + a.rows)
        x, y, shift = x[own], y[own], self.site.shift()
        linear = y if shift is None else y - shift  # W x
        change: Tensor = torch.zeros_like(y)
        scaled, factors = x, layer.factors(place, 1)
        if a.whole and layer.c is not None:
            scaled = x * layer.c[place]
            change = self.site.apply(scaled, self.site.weight().to(x.dtype)) - linear
        if a.gain and layer.excess is not None:
            change = change + layer.excess[place] * (linear + change)
        if a.whole and factors is not None:
            change = change + (scaled @ factors[0][place].mT) @ factors[1][place]
        if place in layer.products:
            own_products = layer.products[place]
            made = self.site.apply(
                x * own_products.a[:, None], self.site.weight().to(x.dtype)
            )  # (s, rows, out)
            change = change + (made * own_products.b[:, None]).sum(0)
        return change if a.strength == 1 else a.strength * change

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        raise ConfigError(
            f"a bank of segments acts alone, and other adapters act at {site.name!r} too;"
            f" activate only {NAME!r}"
        )

    def delta(self, site: Site) -> Tensor:
        raise NotMergeable(
            f"a bank holds many adapters, of which {site.name!r} can take one at most;"
            " merge or save that one itself"
        )
