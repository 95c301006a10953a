"""One layer's changes by many adapters at once, each row of the batch with its own: copied into slots, or as they learn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import ConfigError, NotMergeable, ShapeError
from veneer.methods.base import Delta, Factors
from veneer.ops import batched
from veneer.sites import Site

FREE = ""  # the name of a slot that holds nothing


class Router(nn.Module):
    """Which adapter every row has: `ids` (b,), (b, t), or () for all rows alike, numbers into `names`; 0 is the base.

    One object, which all layers of a bank hold: its ids are data, written in place, and move and are copied with the model.
    """

    ids: Tensor

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        super().__init__()
        self.names = list(names)
        self.broken: set[int] = set()  # slots that hold a number that is not finite
        self.finite = True
        self.held: tuple[Tensor, batched.Layout] | None = None
        self.register_buffer("ids", torch.zeros((), dtype=torch.long, device=device), persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": None}

    def mark(self, slot: int, finite: bool) -> None:
        """Notes whether a slot that was just written is finite throughout."""
        self.broken = self.broken - {slot} if finite else self.broken | {slot}
        self.finite = not self.broken

    def of(self, x: Tensor, site: Site) -> Tensor:
        """The ids, flat, where x is. Raises ShapeError unless their shape is the beginning of x's."""
        ids = self.ids
        if ids.shape != x.shape[: ids.ndim] or ids.ndim >= x.ndim:
            raise ShapeError(
                f"the bank has ids of shape {tuple(ids.shape)} and {site.name!r} was called with {tuple(x.shape)}; name an adapter for"
                f" every row of this batch with use([..]), or one for all of them with use(name)"
            )
        return ids.reshape(-1).to(x.device)

    def layout(self) -> batched.Layout | None:
        """The rows by adapter, made once for all layers; None where that would stop a graph or wait for a GPU."""
        if torch.compiler.is_compiling() or self.ids.is_cuda:
            return None
        flat = self.ids.reshape(-1)
        if self.held is None or not torch.equal(self.held[0], flat):
            self.held = flat.clone(), batched.lay_out(flat, len(self.names))
        return self.held[1]


class Stacks(NamedTuple):
    """A (n, r, in); B (n, r, out) with scaling and output gains folded in; excess (n, out): g - 1, or None."""

    A: Tensor
    B: Tensor
    excess: Tensor | None


class Rows(Delta, ABC):
    """What adds each row's own change to a layer's output, and scales each row's input by its own gain."""

    router: Router

    @abstractmethod
    def stacks(self, dtype: torch.dtype) -> Stacks:
        """The normal forms of all adapters side by side, the base first."""

    @abstractmethod
    def input_gains(self, dtype: torch.dtype) -> Tensor | None:
        """c (n, in), or None where no adapter has one."""

    def is_finite(self) -> bool:
        """Whether all numbers in the stacks are known to be finite."""
        return False

    def input_gain(self, x: Tensor, site: Site) -> Tensor | None:
        c = self.input_gains(x.dtype)
        if c is None:
            return None
        ids = self.router.of(x, site)
        return c.index_select(0, ids).view(*self.router.ids.shape, *(1,) * (x.ndim - self.router.ids.ndim - 1), site.in_)

    def onto(self, x: Tensor, y: Tensor, site: Site, *, writable: bool) -> Tensor:
        ids, stacks = self.router.of(x, site), self.stacks(y.dtype)
        mine = writable and y.is_contiguous() and not torch.is_grad_enabled()
        total = y.reshape(len(ids), -1, site.out)
        if stacks.excess is not None:
            total, mine = torch.addcmul(total, *self._gained(total, ids, stacks.excess, site)), True
        if not stacks.A.shape[1]:
            return total.view_as(y)
        return self._added(x, total if mine else total.clone(), ids, stacks).view_as(y)

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """What to add to y, where other changes act too, or this one not in full. Raises ConfigError for input gains."""
        if self.input_gains(y.dtype) is not None:
            raise ConfigError(
                f"the bank's adapters have gains of inputs at {site.name!r}, which it can only give alone and in full; use it without"
                f" other adapters, at strength 1"
            )
        ids, stacks = self.router.of(x, site), self.stacks(y.dtype)
        total = torch.zeros_like(y).view(len(ids), -1, site.out)
        if stacks.excess is not None:
            gain, own = self._gained(y.reshape(total.shape), ids, stacks.excess, site)
            total = gain * own
        return (self._added(x, total, ids, stacks) if stacks.A.shape[1] else total).view_as(y)

    def _gained(self, y: Tensor, ids: Tensor, excess: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        shift = site.shift()
        return excess.index_select(0, ids)[:, None], y if shift is None else y - shift

    def _added(self, x: Tensor, total: Tensor, ids: Tensor, stacks: Stacks) -> Tensor:
        each = x.to(total.dtype).reshape(len(ids), -1, x.shape[-1])
        layout = self.router.layout()
        way = batched.choose(each, stacks.A, finite=self.is_finite(), layout=layout)
        return batched.add(each, total, stacks.A, stacks.B, ids, way=way, layout=layout)

    def delta(self, site: Site) -> Tensor:
        raise NotMergeable(f"a bank holds many adapters, of which {site.name!r} can take one at most; merge or save that one itself")


class Slots(Rows):
    """Copies in the layer's dtype, with room for adapters to come."""

    A: Tensor
    B: Tensor
    excess: Tensor | None
    c: Tensor | None

    def __init__(self, site: Site, router: Router, *, rank: int, gains: tuple[bool, bool]) -> None:
        """rank: the most that a slot takes; gains: whether it takes gains of outputs, and of inputs."""
        super().__init__()
        self.router, n, W = router, len(router.names), site.weight().detach()
        self.options: dict[str, Any] = {}
        self.register_buffer("A", W.new_zeros(n, rank, site.in_))
        self.register_buffer("B", W.new_zeros(n, rank, site.out))
        self.register_buffer("excess", W.new_zeros(n, site.out) if gains[0] else None)
        self.register_buffer("c", W.new_ones(n, site.in_) if gains[1] else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slots:
        super()._apply(lambda t: fn(t).to(t.dtype), recurse)  # moved, and never made wider: it is computed with as it is
        return self

    def stacks(self, dtype: torch.dtype) -> Stacks:
        return Stacks(self.A.to(dtype), self.B.to(dtype), None if self.excess is None else self.excess.to(dtype))

    def input_gains(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.c is None else self.c.to(dtype)

    def gains_input(self, site: Site) -> bool:
        return self.c is not None

    def is_finite(self) -> bool:
        return self.router.finite

    def misfits(self, form: Factors) -> list[str]:
        """What of a change this slot has no room for, in words."""
        r = form.A.shape[0]
        return [
            *([f"rank {r} > {self.A.shape[1]}"] if r > self.A.shape[1] else []),
            *(["gains of outputs"] if form.g is not None and self.excess is None else []),
            *(["gains of inputs"] if form.c is not None and self.c is None else []),
        ]

    @torch.no_grad()
    def write(self, slot: int, form: Factors | None) -> bool:
        """Puts a change, or nothing, into a slot, in place; whether all its numbers are finite in the layer's dtype."""
        parts = [self.A[slot].zero_(), self.B[slot].zero_()]
        parts += [] if self.excess is None else [self.excess[slot].zero_()]
        parts += [] if self.c is None else [self.c[slot].fill_(1)]
        if form is None:
            return True
        r = form.A.shape[0]
        parts[0][:r].copy_(form.A)
        parts[1][:r].copy_(_folded(form).mT)
        if form.g is not None and self.excess is not None:
            self.excess[slot].copy_(form.g - 1)
        if form.c is not None and self.c is not None:
            self.c[slot].copy_(form.c)
        return all(bool(p.isfinite().all()) for p in parts)


class Live(Rows):
    """The adapters themselves: their factors are stacked in every call, so that each learns from its own rows."""

    def __init__(self, site: Site, router: Router, changes: Sequence[Delta | None]) -> None:
        super().__init__()
        self.router, self.site, self.changes = router, site, list(changes)  # in a list: they belong to their own adapters
        self.options: dict[str, Any] = {}

    def _forms(self) -> list[Factors | None]:
        return [None if d is None else d.normal_form(self.site) for d in self.changes]

    def stacks(self, dtype: torch.dtype) -> Stacks:
        forms = self._forms()
        rank = max(f.A.shape[0] for f in forms if f is not None)
        like = self._zeros(dtype)
        A = [like.new_zeros(0, self.site.in_) if f is None else f.A.to(dtype) for f in forms]
        B = [like.new_zeros(0, self.site.out) if f is None else _folded(f).mT.to(dtype) for f in forms]
        excess = _gains([None if f is None or f.g is None else f.g - 1 for f in forms], like.new_zeros(self.site.out))
        return Stacks(_padded(A, rank), _padded(B, rank), excess)

    def input_gains(self, dtype: torch.dtype) -> Tensor | None:
        return _gains([None if f is None else f.c for f in self._forms()], self._zeros(dtype).new_ones(self.site.in_))

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        """An empty tensor where the changes are; asking the layer for its weight may unpack it."""
        like = next(p for d in self.changes if d is not None for p in d.parameters())
        return like.new_zeros(0, dtype=dtype)

    def gains_input(self, site: Site) -> bool:
        return any(d is not None and d.gains_input(site) for d in self.changes)


def _folded(form: Factors) -> Tensor:
    """B (out, r) with the gain of outputs in it."""
    return form.B if form.g is None else form.g[:, None] * form.B


def _padded(factors: Iterable[Tensor], rank: int) -> Tensor:
    return torch.stack([F.pad(f, (0, 0, 0, rank - f.shape[0])) for f in factors])


def _gains(given: Sequence[Tensor | None], default: Tensor) -> Tensor | None:
    if all(g is None for g in given):
        return None
    return torch.stack([default if g is None else g.to(default.dtype) for g in given])
