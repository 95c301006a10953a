"""Applies many adapters at one layer at once, each row of the batch with its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError, NotMergeable, ShapeError
from veneer.methods import Delta, Factors, Products
from veneer.methods.base.protocols import AddsInPlace, GainsInput, Routed, Served, Switched
from veneer.ops import batched, spans
from veneer.sites import Site

FREE = ""  # the name of a slot that holds nothing


class Router(nn.Module):
    """The adapter of every row: `ids` (b,), (b, t), or () for all rows, numbers into `names`; 0 is the base.

    All layers of a bank hold one such object, so that ids are written once and move and copy with the model.
    """

    ids: Tensor

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        super().__init__()
        self.names = list(names)
        self.broken: set[int] = set()  # slots that hold a number that is not finite
        self.finite = True
        self.held: tuple[Tensor, batched.Layout] | None = None
        self.spread: tuple[Tensor, list[spans.Span]] | None = None
        self.register_buffer("ids", torch.zeros((), dtype=torch.long, device=device), persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": None, "spread": None}

    def mark(self, slot: int, finite: bool) -> None:
        """Notes whether the slot that was just written is finite throughout."""
        self.broken = self.broken - {slot} if finite else self.broken | {slot}
        self.finite = not self.broken

    def of(self, x: Tensor, site: Site) -> Tensor:
        """Returns the flat ids on x's device. Raises ShapeError unless their shape begins x's."""
        ids = self.ids
        if ids.shape != x.shape[: ids.ndim] or ids.ndim >= x.ndim:
            raise ShapeError(
                f"the bank has ids of shape {tuple(ids.shape)} and {site.name!r} was called with "
                f"{tuple(x.shape)}; name an adapter for"
                f" every row of this batch with use([..]), or one for all of them with use(name)"
            )
        return ids.reshape(-1).to(x.device)

    def stretches(self) -> list[spans.Span]:
        """Returns the stretches of rows with one adapter, made once for all layers."""
        flat = self.ids.reshape(-1)
        if self.spread is None or not self.spread[0].equal(flat):
            self.spread = flat.clone(), spans.of(flat.tolist())
        return self.spread[1]

    def layout(self) -> batched.Layout | None:
        """Returns the rows by adapter, made once for all layers; None if that would break a graph or wait."""
        ids = self.ids
        if torch.compiler.is_compiling() or ids.is_cuda:
            return None
        flat = ids.reshape(-1)
        if self.held is None or not self.held[0].equal(flat):
            self.held = flat.clone(), batched.lay_out(flat, len(self.names))
        return self.held[1]


class Form(NamedTuple):
    """A change as a bank serves it: its normal form, or gains of outputs and products with W."""

    factors: Factors
    products: Products | None = None


def form_of(site: Site, delta: Delta) -> Form | None:
    """Returns the change as a bank serves it, or None if it cannot."""
    if not isinstance(delta, Served):
        return None
    normal = delta.normal_form(site)
    if normal is not None:
        return Form(normal)
    own = delta.products(site)
    return None if own is None else Form(Factors(own.a[:0], own.b[:0].mT, g=own.g), own)


def products_of(site: Site, delta: Delta | None) -> Products | None:
    """Returns the change as products with W, or None for a change without."""
    return delta.products(site) if isinstance(delta, Served) else None


class Stacks(NamedTuple):
    """All adapters of a layer side by side.

    A (n, r, in); B (n, r, out) with scaling and output gains folded in; excess (n, out): g - 1, or None; a
    (n, s, in) and b (n, s, out) of products with W, or None.
    """

    A: Tensor
    B: Tensor
    excess: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None


class Rows(Delta, GainsInput, AddsInPlace, Switched, Routed):
    """Adds each row's own change to a layer's output, and scales each row's input by its own gain."""

    router: Router

    @abstractmethod
    def stacks(self, dtype: torch.dtype) -> Stacks:
        """Returns the normal forms of all adapters side by side, the base first."""

    @abstractmethod
    def input_gains(self, dtype: torch.dtype) -> Tensor | None:
        """Returns c (n, in), or None if no adapter has one."""

    @abstractmethod
    def multiplying(self) -> list[int]:
        """Returns the adapters that have products with W."""

    def normal_form(self, site: Site) -> Factors | None:
        return None  # each row has another one

    def state(self) -> tuple[int, ...]:
        ids = self.router.ids
        return id(ids), -1 if ids.is_inference() else ids._version

    def groups(self, tokens: int) -> list[tuple[Hashable, Tensor | None]]:
        ids = self.router.ids.reshape(-1)
        if len(ids) == 1 or bool((ids == ids[0]).all()):
            return [(int(ids[0]), None)]
        if tokens % len(ids):
            raise ShapeError(
                f"the bank has ids of {len(ids)} rows and fused experts were called with {tokens} tokens;"
                " name an adapter for every row of this batch with use([..])"
            )
        each = ids.repeat_interleave(tokens // len(ids))
        return [(int(k), (each == k).nonzero().flatten()) for k in ids.unique()]

    def of_group(self, key: Hashable, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None] | None:
        if key == 0:
            return None
        stacks, k = self.stacks(dtype), int(str(key))
        return stacks.A[k], stacks.B[k].mT, None if stacks.excess is None else stacks.excess[k]

    def is_finite(self) -> bool:
        """Returns True if all numbers in the stacks are known to be finite."""
        return False

    def input_gain(self, x: Tensor, site: Site) -> Tensor | None:
        c = self.input_gains(x.dtype)
        if c is None:
            return None
        ids = self.router.of(x, site)
        return c.index_select(0, ids).view(
            *self.router.ids.shape, *(1,) * (x.ndim - self.router.ids.ndim - 1), site.in_
        )

    def onto(self, x: Tensor, y: Tensor, site: Site, *, writable: bool) -> Tensor:
        ids, stacks = self.router.of(x, site), self.stacks(y.dtype)
        mine = writable and y.is_contiguous() and not torch.is_grad_enabled()
        total = y.contiguous().view(len(ids), -1, site.out)
        if stacks.excess is not None:
            total, mine = torch.addcmul(total, *self._gained(total, ids, stacks.excess, site)), True
        if stacks.a is not None and stacks.b is not None:  # there are gains then
            total = self._multiplied(x, total, ids, stacks.a, stacks.b, site)
        if not stacks.A.shape[1]:
            return total.view_as(y)
        return self._added(x, total if mine else total.clone(), ids, stacks).view_as(y)

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """Returns the sum to add to y if other changes act too, or this one at another strength than 1.

        Raises ConfigError for gains of inputs, which act alone.
        """
        if self.input_gains(y.dtype) is not None:
            raise ConfigError(
                f"the bank's adapters have gains of inputs at {site.name!r}, which it can only give alone "
                "and in full; use it without"
                f" other adapters, at strength 1"
            )
        ids, stacks = self.router.of(x, site), self.stacks(y.dtype)
        total = y.new_zeros(y.shape).view(len(ids), -1, site.out)
        if stacks.excess is not None:
            gain, own = self._gained(y.contiguous().view(total.shape), ids, stacks.excess, site)
            total = gain * own
        if stacks.a is not None and stacks.b is not None:
            total = self._multiplied(x, total, ids, stacks.a, stacks.b, site)
        return (self._added(x, total, ids, stacks) if stacks.A.shape[1] else total).view_as(y)

    def _gained(self, y: Tensor, ids: Tensor, excess: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        shift = site.shift()
        return excess.index_select(0, ids)[:, None], y if shift is None else y - shift

    def _multiplied(self, x: Tensor, total: Tensor, ids: Tensor, a: Tensor, b: Tensor, site: Site) -> Tensor:
        """Returns total (b, t, out) plus sum_k b_k * W (a_k * x) for the rows with such an adapter.

        All rows are multiplied where selecting them would wait for a GPU or break a graph.
        """
        each, rows = x.to(total.dtype).reshape(len(ids), -1, x.shape[-1]), None
        if not torch.compiler.is_compiling() and not ids.is_cuda:
            rows = torch.isin(ids, torch.tensor(self.multiplying())).nonzero()[:, 0]
            if not len(rows):
                return total
            each, ids = each.index_select(0, rows), ids.index_select(0, rows)
        scaled = each[:, None] * a.index_select(0, ids)[:, :, None]  # (b, s, t, in)
        made = site.apply(scaled, site.weight().to(total.dtype))  # (b, s, t, out)
        change = (made * b.index_select(0, ids)[:, :, None]).sum(1)
        return total + change if rows is None else total.index_add(0, rows, change)

    def _added(self, x: Tensor, total: Tensor, ids: Tensor, stacks: Stacks) -> Tensor:
        each = x.to(total.dtype).reshape(len(ids), -1, x.shape[-1])
        layout = self.router.layout()
        way = batched.choose(each, stacks.A, finite=self.is_finite(), layout=layout)
        return batched.add(each, total, stacks.A, stacks.B, ids, way=way, layout=layout)

    def delta(self, site: Site) -> Tensor:
        raise NotMergeable(
            f"a bank holds many adapters, of which {site.name!r} can take one at most; merge or save that "
            "one itself"
        )
