"""Lets changes of bare parameters act: their module runs with W' in place of W, whatever it does with it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.acting import groups
from veneer.adapt.acting.changed import Changed, Low
from veneer.adapt.acting.forward import Acting, Deltas, acting
from veneer.adapt.acting.recomputation import note, refuse_other_state
from veneer.methods import Delta
from veneer.methods.base.protocols import Dialled
from veneer.sites import Site
from veneer.sites.bare.site import Holder, Holders, shelf_of
from veneer.sites.leaf import put_parameters

Forms = Mapping[int | None, Acting]
NOTHING = Acting(None, None, ())


def changed(
    owner: nn.Module, parameter: str, holders: Sequence[Holder], given: Forms | None = None
) -> Tensor:
    """Returns W' for a parameter of `owner`: the sum kept apart, or dense where a change has no factors.

    holders: of the matrices with acting changes; given: the changes, in place of those that act.
    """
    W: Tensor = getattr(owner, parameter)
    forms = {h.index: acting(_deltas(h)) for h in holders} if given is None else given
    note = _Note(owner, holders)
    if isinstance(owner, nn.RNNBase | nn.MultiheadAttention) or any(f.others for f in forms.values()):
        note(None)
        return _dense(W, holders)
    first = holders[0]
    if first.index is None:

        def low(_: int | Tensor | None) -> Low:
            note(None)
            return _low(forms[None], first)

        return Changed.of(W, low, flipped=first.transposed)
    return Changed.of(W, _Stack(W, forms, first, note), flipped=first.transposed)


class _Note:
    """Notes which matrices were used in a call of their module."""

    def __init__(self, owner: nn.Module, holders: Sequence[Holder]) -> None:
        self.training, self.by_index = owner.training, {h.index: _deltas(h) for h in holders}

    def __call__(self, index: int | None) -> None:
        every = self.by_index.values() if index is None else [d] if (d := self.by_index.get(index)) else []
        for deltas in every:
            _noted(deltas, self.training)


class _Stack:
    """Makes the changes of a stack's matrices: of one alone, or of several side by side."""

    def __init__(self, W: Tensor, forms: Forms, holder: Holder, note: _Note) -> None:
        self.W, self.forms, self.holder, self.note = W, forms, holder, note
        self.all: Low | None = None

    def __call__(self, index: int | Tensor | None) -> Low:
        if isinstance(index, int):
            self.note(index)
            return _low(self.forms.get(index, NOTHING), self.holder)
        self.note(None)
        if self.all is None:
            self.all = self._stacked()
        if index is None:
            return self.all
        excess = self.all.excess
        return Low(self.all.A[index], self.all.B[index], None if excess is None else excess[index])

    def _stacked(self) -> Low:
        every = [_low(self.forms.get(i, NOTHING), self.holder) for i in range(len(self.W))]
        rank = max(low.A.shape[0] for low in every)
        gains = [low.excess for low in every]
        some = next((g for g in gains if g is not None), None)
        excess = None
        if some is not None:
            excess = torch.stack([torch.zeros_like(some) if g is None else g for g in gains])
        return Low(
            torch.stack([_filled(low.A, 0, rank) for low in every]),
            torch.stack([_filled(low.B, 1, rank) for low in every]),
            excess,
        )


def _low(form: Acting, holder: Holder) -> Low:
    """Returns the change of one matrix, of rank 0 for none."""
    if form.factors is not None:
        return Low(*form.factors, form.excess)
    W = getattr(holder.owner, holder.parameter)
    out, in_ = (W.mT if holder.transposed else W).shape[-2:]
    A, B = torch.zeros(0, in_, device=W.device), torch.zeros(out, 0, device=W.device)
    return Low(A, B, form.excess)


def _filled(t: Tensor, dim: int, size: int) -> Tensor:
    """Returns t with zeros up to `size` along a dimension."""
    short = size - t.shape[dim]
    if not short:
        return t
    shape = list(t.shape)
    shape[dim] = short
    return torch.cat([t, t.new_zeros(shape)], dim)


def _dense(W: Tensor, holders: Sequence[Holder]) -> Tensor:
    """Returns W' as a plain tensor."""
    made = {h.index: _change(h) for h in holders}
    if holders[0].index is None:
        return W + made[None].to(W.dtype)
    zero = torch.zeros_like(next(iter(made.values())))
    return W + torch.stack([made.get(i, zero) for i in range(len(W))]).to(W.dtype)


def _change(holder: Holder) -> Tensor:
    """Returns the sum of the acting changes of one matrix, as the parameter keeps it."""
    deltas = _deltas(holder)
    D = sum(_at(deltas[n], deltas.site, s) for n, s in deltas.active.items())
    assert isinstance(D, Tensor)
    return D.mT if holder.transposed else D


def _at(delta: Delta, site: Site, strength: float) -> Tensor:
    return delta.delta_at(site, strength) if isinstance(delta, Dialled) else strength * delta.delta(site)


def _deltas(holder: nn.Module) -> Deltas:
    deltas: Any = holder.deltas
    return deltas  # type: ignore[no-any-return]


# Hooks are plain functions so that they survive deepcopy and pickle. A compiler breaks its graph at them: a
# swap traced by half would let the base act.
@torch.compiler.disable
def put_changes(owner: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Puts W' into the module before it runs; of a bank with several adapters, that of the first group."""
    shelf = shelf_of(owner)
    if shelf is None:
        return None
    for holder in shelf.children():
        refuse_other_state(_deltas(holder))
    bank = groups.routed(shelf)
    if bank is None:
        found = {p: changed(owner, p, holders) for p, holders in groups.holders_of(shelf).items()}
        shelf.swapped = put_parameters(owner, found)
        return None
    every = groups.groups_of(bank, owner, args)
    first = every[0]
    _put_group(owner, shelf, first.key)
    if first.tokens is None:
        return None
    shelf.waiting = groups.Waiting(args, every)
    return groups.chosen(args, first.tokens)


@torch.compiler.disable
def take_changes(owner: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
    """Puts the module's own W back after it ran, or failed; runs the other groups of a bank."""
    shelf = shelf_of(owner)
    if shelf is None:
        return None
    _put_back(owner, shelf)
    waiting, shelf.waiting = shelf.waiting, None
    if waiting is not None and y is not None:

        def run(group: groups.Group, own: tuple[Any, ...]) -> Any:
            try:
                _put_group(owner, shelf, group.key)
                return owner.forward(*own)
            finally:
                _put_back(owner, shelf)

        y = groups.rest(waiting, y, run)
    for holder in shelf.children():  # each may have adapters of its own
        note(_deltas(holder), y)
    return None if waiting is None else y


def _put_group(owner: nn.Module, shelf: Holders, key: Hashable) -> None:
    """Puts in the W' of one adapter of a bank."""
    found = {}
    for parameter, holders in groups.holders_of(shelf).items():
        forms = {h.index: form for h in holders if (form := _of_group(_deltas(h), key)) is not None}
        if forms:
            own = [h for h in holders if h.index in forms]
            found[parameter] = changed(owner, parameter, own, forms)
        for h in holders:
            _noted(_deltas(h), owner.training)
    shelf.swapped = put_parameters(owner, found)


def _put_back(owner: nn.Module, shelf: Holders) -> None:
    put_parameters(owner, shelf.swapped)
    shelf.swapped = {}


def _of_group(deltas: Deltas, key: Hashable) -> Acting | None:
    """Returns the change of one matrix by an adapter of the bank, or None for the base's."""
    (name,) = deltas.active
    own: Any = deltas[name]
    found = own.of_group(key, deltas.site.dtype)
    if found is None:
        return None
    A, B, excess = found
    return Acting((A, B), excess, ())


def _noted(deltas: Deltas, training: bool) -> None:
    if not deltas.stepped:
        deltas.called = True
        deltas.stepped = training
