"""Storage of a bank in segment layout: factors of several adapters side by side, layer by layer, written once
and then read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.adapt.banks.rows import Form
from veneer.methods import Products
from veneer.sites import Site

PLACES = 16  # adapters in a stack: neighbours share one batched product


class Placed(NamedTuple):
    """Where an adapter lies, and whether it has gains of outputs, gains of inputs, or products with W
    anywhere.
    """

    stack: int
    place: int
    gains: bool
    scales: bool
    multiplies: bool


class Layer:
    """One layer's part of a stack, in the layer's dtype.

    A (n, r, in); B (n, r, out) with output gains folded in; ranks: the rank in use at each place; excess (n,
    out): g - 1; c (n, in); products by place. Places in use are never written again before they are freed.
    """

    def __init__(self, site: Site, rank: int) -> None:
        W = site.weight()
        self.A, self.B = (W.new_zeros(PLACES, rank, n) for n in (site.in_, site.out))
        self.ranks = [0] * PLACES
        self.excess: Tensor | None = None
        self.c: Tensor | None = None
        self.products: dict[int, Products] = {}

    @torch.no_grad()
    def write(self, place: int, given: Form) -> bool:
        """Writes a change into a free place. Returns True if all numbers are finite in its dtype."""
        form, r = given.factors, given.factors.A.shape[0]
        self.A[place, :r].copy_(form.A)
        self.B[place, :r].copy_((form.B if form.g is None else form.g[:, None] * form.B).mT)
        self.ranks[place] = r
        written = [self.A[place], self.B[place]]
        if form.g is not None:
            if self.excess is None:
                self.excess = self.A.new_zeros(PLACES, self.B.shape[2])
            written.append(self.excess[place].copy_(form.g - 1))
        if form.c is not None:
            if self.c is None:
                self.c = self.A.new_ones(PLACES, self.A.shape[2])
            written.append(self.c[place].copy_(form.c))
        if given.products is not None:
            own = Products(*(t.detach().to(self.A) for t in given.products))
            self.products[place] = own
            written += own
        return all(bool(t.isfinite().all()) for t in written)

    def clear(self, place: int) -> None:
        """Empties a place."""
        self.A[place].zero_()
        self.B[place].zero_()
        self.ranks[place] = 0
        if self.excess is not None:
            self.excess[place].zero_()
        if self.c is not None:
            self.c[place].fill_(1)
        self.products.pop(place, None)

    def factors(self, first: int, places: int) -> tuple[Tensor, Tensor] | None:
        """A (n, r, in) and B (n, r, out) with r the largest rank there; None if all places are empty."""
        r = max(self.ranks[first : first + places])
        return (self.A[:, :r], self.B[:, :r]) if r else None


class Stack:
    """PLACES adapters of at most `rank`; layers are made when an adapter first changes them."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.free = set(range(PLACES))
        self.layers: dict[str, Layer] = {}

    def write(self, place: int, forms: Mapping[str, tuple[Site, Form]]) -> bool:
        """Puts an adapter into a free place. Returns True if all its numbers are finite."""
        self.free.remove(place)
        finite = True
        for name, (site, form) in forms.items():
            if name not in self.layers:
                self.layers[name] = Layer(site, self.rank)
            finite &= self.layers[name].write(place, form)
        return finite

    def clear(self, place: int) -> None:
        """Empties a place and frees it."""
        for layer in self.layers.values():
            layer.clear(place)
        self.free.add(place)


def rank_class(rank: int) -> int:
    """The rank of the stacks that hold an adapter of this rank: the next power of two."""
    return 1 << (rank - 1).bit_length() if rank else 0
