"""Holds the adapters of a bank at one layer: copies in slots, or the adapters themselves as they learn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.adapt.banks.rows import Form, Router, Rows, Stacks, form_of, products_of
from veneer.methods import Delta, Factors
from veneer.methods.base.protocols import GainsInput
from veneer.ops import spans
from veneer.sites import Site


class Slots(Rows):
    """Copies in the layer's dtype, with room for adapters to come."""

    A: Tensor
    B: Tensor
    excess: Tensor | None
    c: Tensor | None
    a: Tensor | None
    b: Tensor | None

    def __init__(
        self, site: Site, router: Router, *, rank: int, gains: tuple[bool, bool], products: int
    ) -> None:
        """rank, products: the most that a slot takes. gains: room for gains of outputs, and of inputs."""
        super().__init__()
        self.router, n, W = router, len(router.names), site.weight().detach()
        self.options: dict[str, Any] = {}
        self.register_buffer("A", W.new_zeros(n, rank, site.in_))
        self.register_buffer("B", W.new_zeros(n, rank, site.out))
        self.register_buffer("excess", W.new_zeros(n, site.out) if gains[0] else None)
        self.register_buffer("c", W.new_ones(n, site.in_) if gains[1] else None)
        self.register_buffer("a", W.new_zeros(n, products, site.in_) if products else None)
        self.register_buffer("b", W.new_zeros(n, products, site.out) if products else None)
        self.multiplied: set[int] = set()  # slots with products

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slots:
        super()._apply(
            lambda t: fn(t).to(t.dtype), recurse
        )  # moved, never made wider: products run in the slot's dtype
        return self

    def stacks(self, dtype: torch.dtype) -> Stacks:
        excess, a, b = (None if t is None else t.to(dtype) for t in (self.excess, self.a, self.b))
        return Stacks(self.A.to(dtype), self.B.to(dtype), excess, a, b)

    def input_gains(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.c is None else self.c.to(dtype)

    def gains_input(self, site: Site) -> bool:
        return self.c is not None

    def multiplying(self) -> list[int]:
        return sorted(self.multiplied)

    def is_finite(self) -> bool:
        return self.router.finite

    def misfits(self, given: Form) -> list[str]:
        """Returns, in words, the parts of a change that this slot has no room for."""
        form, room = given.factors, 0 if self.a is None else self.a.shape[1]
        r, s = form.A.shape[0], 0 if given.products is None else given.products.a.shape[0]
        return [
            *([f"rank {r} > {self.A.shape[1]}"] if r > self.A.shape[1] else []),
            *([f"{s} products with W > {room}"] if s > room else []),
            *(["gains of outputs"] if form.g is not None and self.excess is None else []),
            *(["gains of inputs"] if form.c is not None and self.c is None else []),
        ]

    @torch.no_grad()
    def write(self, slot: int, given: Form | None) -> bool:
        """Writes a change, or nothing, into a slot in place. Returns True if all numbers are finite there."""
        parts = [t[slot].zero_() for t in (self.A, self.B, self.excess, self.a, self.b) if t is not None]
        parts += [] if self.c is None else [self.c[slot].fill_(1)]
        self.multiplied.discard(slot)
        if given is None:
            return True
        form, r = given.factors, given.factors.A.shape[0]
        parts[0][:r].copy_(form.A)
        parts[1][:r].copy_(_folded(form).mT)
        if form.g is not None and self.excess is not None:
            self.excess[slot].copy_(form.g - 1)
        if form.c is not None and self.c is not None:
            self.c[slot].copy_(form.c)
        if given.products is not None and self.a is not None and self.b is not None:
            self.multiplied.add(slot)
            for into, own in ((self.a, given.products.a), (self.b, given.products.b)):
                into[slot, : len(own)].copy_(own)
        return all(bool(p.isfinite().all()) for p in parts)


class Live(Rows):
    """The adapters themselves: their factors are stacked in every call, so that each learns from its rows."""

    def __init__(self, site: Site, router: Router, changes: Sequence[Delta | None]) -> None:
        super().__init__()
        self.router, self.site, self.changes = (
            router,
            site,
            list(changes),
        )  # in a list: they belong to their own adapters
        self.options: dict[str, Any] = {}
        self.plain: bool | None = None

    def _forms(self) -> list[Form | None]:
        return [None if d is None else form_of(self.site, d) for d in self.changes]

    def multiplying(self) -> list[int]:
        return [i for i, d in enumerate(self.changes) if products_of(self.site, d) is not None]

    def stacks(self, dtype: torch.dtype) -> Stacks:
        given = self._forms()
        forms = [None if f is None else f.factors for f in given]
        rank = max(f.A.shape[0] for f in forms if f is not None)
        like = self._zeros(dtype)
        A = [like.new_zeros(0, self.site.in_) if f is None else f.A.to(dtype) for f in forms]
        B = [like.new_zeros(0, self.site.out) if f is None else _folded(f).mT.to(dtype) for f in forms]
        excess = _gains(
            [None if f is None or f.g is None else f.g - 1 for f in forms], like.new_zeros(self.site.out)
        )
        some = [None if f is None else f.products for f in given]
        most = max(0 if p is None else len(p.a) for p in some)
        if not most:
            return Stacks(_padded(A, rank), _padded(B, rank), excess)
        a = [like.new_zeros(0, self.site.in_) if p is None else p.a.to(dtype) for p in some]
        b = [like.new_zeros(0, self.site.out) if p is None else p.b.to(dtype) for p in some]
        return Stacks(_padded(A, rank), _padded(B, rank), excess, _padded(a, most), _padded(b, most))

    @torch.no_grad()
    def is_plain(self) -> bool:
        """Returns True if all changes are low-rank products alone; looked at once, as forms can be dear."""
        if self.plain is None:
            self.plain = all(f is None or _is_plain(f) for f in self._forms())
        return self.plain

    def onto(self, x: Tensor, y: Tensor, site: Site, *, writable: bool) -> Tensor:
        """Adds the change of each stretch of rows by its own products where all changes are plain ones."""
        if not spans.suits(x) or not self.is_plain():
            return super().onto(x, y, site, writable=writable)
        self.router.of(x, site)  # refuses ids of another shape
        found = self.router.stretches()
        factors = [None if f is None else f.factors for f in self._forms()]
        pairs = [None if f is None else (f.A.to(y.dtype), f.B.to(y.dtype)) for f in factors]
        return spans.add(x.to(y.dtype), y, found, [pairs[s.own] for s in found], writable=writable)

    def input_gains(self, dtype: torch.dtype) -> Tensor | None:
        return _gains(
            [None if f is None else f.factors.c for f in self._forms()],
            self._zeros(dtype).new_ones(self.site.in_),
        )

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        """Returns an empty tensor on the deltas' device; asking the layer for its weight may unpack it."""
        like = next(p for d in self.changes if d is not None for p in d.parameters())
        return like.new_zeros(0, dtype=dtype)

    def gains_input(self, site: Site) -> bool:
        return any(isinstance(d, GainsInput) and d.gains_input(site) for d in self.changes if d is not None)


def _is_plain(form: Form) -> bool:
    """Returns True for a change that is only a low-rank product."""
    f = form.factors
    return f.g is None and f.c is None and form.products is None and f.A.shape[0] > 0


def _folded(form: Factors) -> Tensor:
    """Returns B (out, r) with the gain of outputs folded in."""
    return form.B if form.g is None else form.g[:, None] * form.B


def _padded(factors: Iterable[Tensor], rank: int) -> Tensor:
    return torch.stack([F.pad(f, (0, 0, 0, rank - f.shape[0])) for f in factors])


def _gains(given: Sequence[Tensor | None], default: Tensor) -> Tensor | None:
    if all(g is None for g in given):
        return None
    return torch.stack([default if g is None else g.to(default.dtype) for g in given])
